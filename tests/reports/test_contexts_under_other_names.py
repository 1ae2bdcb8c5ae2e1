"""Models that state how many tokens they read under another name than the usual one.

An MPT says ``max_seq_len``; blocks longer than that failed inside attention, and a server promised 2,048. Some tables
of positions keep their first rows for padding, so that a RoBERTa of 514 positions reads 512.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints_lab import distill, random_model, save

from client.tuning.data import prepare, require_fit
from offsite.errors import ConfigError, DataError
from offsite.evaluation.measure import perplexity
from offsite.generation.generate import context_length
from offsite.modelling.context import CONTEXT_KEYS, context_of
from offsite.text.batches import Example
from offsite.text.records import Record
from server.plugging.probe import probe_logits

MODELS = {
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 6, "expansion_ratio": 2, "max_seq_len": 16}, 16),
    "gpt2": ({"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 16}, 16),
    "codegen": ({"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 16, "n_ctx": 64, "rotary_dim": 4}, 16),
    "opt": ({"max_position_embeddings": 16, "word_embed_proj_dim": 32, "ffn_dim": 48}, 16),
    "roberta": ({"max_position_embeddings": 18, "pad_token_id": 1, "is_decoder": True}, 16),
    "xglm": ({"d_model": 32, "num_layers": 6, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 16}, 16),
    "biogpt": ({"max_position_embeddings": 16}, 16),
    "llama": ({"max_position_embeddings": 16}, 16),
    "bloom": ({"n_head": 4, "n_layer": 6}, None),
}


@pytest.fixture(scope="module", params=list(MODELS))
def case(request):
    changes, context = MODELS[request.param]
    return random_model(request.param, **changes), context


def reads(model, num_tokens):
    ids = torch.full((1, num_tokens), 7)
    try:
        with torch.no_grad():
            return bool(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all())
    except (IndexError, RuntimeError):
        return False


def test_the_number_is_found_and_that_many_can_be_read(case):
    model, context = case
    assert context_of(model) == context
    assert reads(model, context or 64)


@pytest.mark.parametrize("name", ["mpt", "gpt2", "opt", "roberta", "biogpt"])
def test_where_positions_are_a_table_one_more_is_too_many(name):
    """The oracle is the model itself."""
    changes, context = MODELS[name]
    assert not reads(random_model(name, **changes), context + 1)


@pytest.mark.parametrize("key", CONTEXT_KEYS)
def test_every_name_counts_where_no_better_one_is(key):
    model = random_model("bloom", n_head=4, n_layer=6)
    setattr(model.config, key, 24)
    assert context_of(model) == 24


@pytest.mark.parametrize("value", [None, 0, -1, True, "16", 16.0, [16]])
def test_what_is_no_number_of_tokens_is_no_limit(value):
    model = random_model("bloom", n_head=4, n_layer=6)
    model.config.max_seq_len = value
    assert context_of(model) is None


@pytest.fixture
def mpt():
    return random_model("mpt", **MODELS["mpt"][0])


def test_every_step_says_the_number(mpt, letters_tokenizer, tmp_path, capsys):
    text = tmp_path / "public.txt"
    text.write_text("\n\n".join(f"public text number {number}" for number in range(40)))
    checkpoint = save(tmp_path / "model", mpt, letters_tokenizer)
    words = ["--method", "drop", "--blocks", "2", "--choice", "influence", "--bottom", "1", "--top", "1"]
    words += ["--public", str(text), "--block-tokens"]
    assert distill(checkpoint, tmp_path / "package", *words, "32") == 2
    assert "blocks of 32 tokens, the model's context is 16" in capsys.readouterr().err
    assert distill(checkpoint, tmp_path / "package", *words, "16") == 0

    records = [Record((("some private text " * 4, True),), str(number), number, place="") for number in range(20)]
    private = prepare(records, letters_tokenizer, block_tokens=32, batch_size=2)
    with pytest.raises(ConfigError, match="sequences of 32 tokens, the package's context is 16"):
        require_fit(private, mpt)
    with pytest.raises(ConfigError, match="text in sequences of 32 tokens, the model's context is 16"):
        perplexity(mpt, [Example([7] * 32, [7] * 32, "one")], batch_size=1, pad_id=0)
    assert context_length(mpt, letters_tokenizer) == 16
    with pytest.raises(ConfigError, match="--context 32: the model reads at most 16 tokens"):
        context_length(mpt, letters_tokenizer, 32)
    assert probe_logits(mpt).shape[1] == 16


def test_audits_say_it_too(mpt, letters_tokenizer):
    from client.audit.canaries import made_up
    from offsite.audits.extraction import require_context

    with pytest.raises(DataError, match="a canary takes 33 tokens, the model's context is 16"):
        made_up(mpt, letters_tokenizer, count=2, tokens=32, temperature=1.0, batch_size=2)
    require_context(mpt, 16, "a secret")


def test_no_other_module_reads_it_off_a_configuration():
    """One function knows; a new place that asks a configuration itself would know one name of many."""
    import offsite

    root = Path(offsite.__file__).parents[1]
    packages = ("offsite", "emulator", "client", "server", "adapters")
    sources = {path for name in packages for path in (root / name).rglob("*.py")}
    users = {path.name for path in sources if "max_position_embeddings" in path.read_text(encoding="utf-8")}
    assert users == {"context.py"}
