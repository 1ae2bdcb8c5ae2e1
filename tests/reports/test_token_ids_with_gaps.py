"""A tokenizer some of whose ids have no piece, and whose highest id lies beyond the number of its pieces.

Vocabularies are cut and extended, and models' tables padded to round sizes. Counting pieces is then no way to know the
ids: text whose ids lie behind a gap ended in a traceback, canaries drew from the gap, and never the last letters.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from checkpoints_lab import distill, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from client.audit.canaries import made_up
from offsite.artefacts.package import open_package
from offsite.evaluation.measure import perplexity
from offsite.generation.generate import generate
from offsite.generation.sampling import Settings
from offsite.text.batches import encode, pad_id
from offsite.text.records import Record

GAP = range(60, 110)
NUM_ROWS = 320  # of the embedding: more than the highest id


@pytest.fixture(scope="module")
def gapped(letters_tokenizer):
    """The bytes' tokenizer with fifty ids left out in its midst, so that letters have ids behind the gap."""
    pieces = sorted(letters_tokenizer.get_vocab(), key=letters_tokenizer.get_vocab().get)
    vocabulary = {piece: n if n < GAP.start else n + len(GAP) for n, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    assert max(tokenizer.get_vocab().values()) == 308 > len(tokenizer) == 259
    assert tokenizer.convert_ids_to_tokens(GAP.start) is None
    return tokenizer


@pytest.fixture(scope="module")
def model(full_llama):
    config = copy.deepcopy(full_llama.config)
    config.vocab_size = NUM_ROWS
    torch.manual_seed(0)
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return made


def records():
    texts = ["zebra and zoo", "\xff\xfe~}|{", "plain"]
    return [Record(((text, True),), text, number, place="") for number, text in enumerate(texts)]


def test_text_is_read_and_measured(model, gapped):
    examples = encode(records(), gapped, context=64).examples
    for record, example in zip(records(), examples, strict=True):
        text = record.segments[0][0]
        assert example.input_ids == [*gapped(text)["input_ids"], gapped.eos_token_id]
        assert gapped.decode(example.input_ids, skip_special_tokens=True) == text
    assert max(max(example.input_ids) for example in examples) > len(gapped)
    assert perplexity(model, examples, batch_size=2, pad_id=pad_id(gapped)).num_tokens > 0


def test_canaries_are_of_pieces_only_and_of_all_of_them(model, gapped, monkeypatch):
    from client.audit import canaries

    asked = []
    honest = canaries.continuations
    monkeypatch.setattr(canaries, "continuations", lambda *a, **s: asked.append(set(s["without"])) or honest(*a, **s))
    texts = made_up(model, gapped, count=6, tokens=16, temperature=2.0, batch_size=6)
    assert len(set(texts)) == 6
    pieces = set(gapped.get_vocab().values())
    assert asked[0] == (set(range(NUM_ROWS)) - pieces) | {0, 1, 2}


def test_the_loop_of_both_sides(model, gapped, tmp_path):
    from offsite import cli

    checkpoint = save(tmp_path / "model", model, gapped)
    assert distill(checkpoint, tmp_path / "package") == 0
    assert open_package(tmp_path / "package").load_tokenizer()("zebra~")["input_ids"] == gapped("zebra~")["input_ids"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"zebra {n} ~{n}~ zoo"}) + "\n" for n in range(40)))
    words = ["tune", str(tmp_path / "package"), "--data", str(data), "-o", str(tmp_path / "bundle"), "--steps", "2"]
    assert cli.run([*words, "--block-tokens", "32", "--batch-size", "4", "--device", "cpu"]) == 0


def test_a_server_says_nothing_for_an_id_without_a_piece(model, gapped):
    """A padded table gives such ids a score like any other."""
    mute = copy.deepcopy(model)
    with torch.no_grad():
        mute.lm_head.weight = torch.nn.Parameter(torch.zeros_like(mute.lm_head.weight))
        mute.lm_head.weight[GAP.start] = 1e-3  # the likeliest wherever the sum of the hidden state is positive
    prompt, settings = gapped("zebra")["input_ids"], Settings(4, temperature=0.0)
    pieces = list(generate(mute, gapped, prompt, settings, end_ids=frozenset()))
    assert len(pieces) == 4
    assert any(piece.token in GAP for piece in pieces)
    assert all(piece.text == "" for piece in pieces if piece.token in GAP)
