"""Generation against transformers' own `generate`, and text that comes in pieces against text decoded at once."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from offsite.errors import RunFailed
from offsite.generation.generate import (
    Detokenizer,
    StopMatcher,
    context_length,
    end_of_turn_tokens,
    end_tokens,
    generate,
    next_tokens,
)
from offsite.generation.sampling import Sampler, Settings

HARD = [
    "plain words",
    "naïve café",
    "日本語のテキスト",
    "🙂🙃 a👩‍👩‍👧‍👦b",
    "e\u0301 \u200f עברית",
    "a\ufffdb",
    "tab\tline\nend ",
]

SHAPES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
    "gemma2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "sliding_window": 6,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
}


def tiny(kind: str) -> torch.nn.Module:
    torch.manual_seed(3)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    config = CONFIG_MAPPING[kind](vocab_size=97, initializer_range=0.4, init_std=0.4, **SHAPES[kind], **ends)
    return AutoModelForCausalLM.from_config(config).eval()


def said(model, tokenizer, prompt, settings, **options):
    ends = options.pop("end_ids", end_tokens(model, tokenizer))
    return list(generate(model, tokenizer, prompt, settings, end_ids=ends, **options))


@pytest.mark.parametrize("kind", SHAPES)
def test_greedy_tokens_equal_those_of_transformers(kind):
    model, prompt = tiny(kind), [5, 17, 40, 9]
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None)
    ours = list(itertools.islice(next_tokens(model, prompt, Settings(20, temperature=0)), 20))
    assert ours == theirs[0, len(prompt) :].tolist()
    assert len(set(ours)) > 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_greedy_tokens_of_an_adapter_equal_those_of_transformers():
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    theirs = model.generate(input_ids=torch.tensor([[4, 8]]), do_sample=False, max_new_tokens=12, eos_token_id=None)
    ours = list(itertools.islice(next_tokens(model, [4, 8], Settings(12, temperature=0)), 12))
    assert ours == theirs[0, 2:].tolist()


def test_an_end_token_ends_where_transformers_ends(spread_llama, bytes_tokenizer):
    prompt = bytes_tokenizer("the fever")["input_ids"]
    long = spread_llama.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=None)
    end = long[0, len(prompt) + 7].item()
    theirs = spread_llama.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=end)
    pieces = said(
        spread_llama, bytes_tokenizer, prompt, Settings(30, temperature=0), end_ids=frozenset({end}), continues=False
    )
    assert [piece.token for piece in pieces] == theirs[0, len(prompt) :].tolist()
    assert pieces[-1].finish == "stop"
    whole = bytes_tokenizer.decode([piece.token for piece in pieces][:-1], skip_special_tokens=True)
    assert "".join(piece.text for piece in pieces) == whole


def test_nan_scores_stop_the_run(spread_llama):
    with torch.no_grad():
        broken = type(spread_llama)(spread_llama.config).eval()
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="NaN"):
        next(next_tokens(broken, [1], Settings(1)))


@pytest.mark.parametrize("text", HARD)
def test_pieces_hold_whole_characters(bytes_tokenizer, text):
    detokenizer = Detokenizer(bytes_tokenizer)
    ids = bytes_tokenizer(text)["input_ids"]
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_of_random_bytes_equal_the_whole_decoded_at_once(bytes_tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        prompt = [draw.randrange(len(bytes_tokenizer)) for _ in range(draw.randrange(4))]
        ids = [draw.randrange(len(bytes_tokenizer)) for _ in range(draw.randrange(1, 30))]
        detokenizer = Detokenizer(bytes_tokenizer, prompt)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert text == bytes_tokenizer.decode(ids, skip_special_tokens=True)


def test_words_keep_the_space_between_prompt_and_answer():
    vocabulary = {
        "<unk>": 0,
        "▁Hello": 1,
        "▁world": 2,
        "▁again": 3,
        **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)},
    }
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    euro = [4 + byte for byte in "€".encode()]

    continued = Detokenizer(tokenizer, [1])
    assert [continued.push(token) for token in [2, *euro, 3]] == [" world", "", "", "€", " again"]
    anew = Detokenizer(tokenizer)
    assert [anew.push(token) for token in [2, 3]] == ["world", " again"]


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Return `text` before the stop string that is the first to be complete; the slow, obvious way."""
    for end in range(1, len(text) + 1):
        begins = [end - len(one) for one in stop if text[:end].endswith(one)]
        if begins:
            return text[: min(begins)]
    return text


def test_stop_strings_end_text_that_comes_letter_by_letter():
    draw = random.Random(1)
    for _ in range(500):
        text = "".join(draw.choices("ab", k=12))
        stop = tuple("".join(draw.choices("ab", k=draw.randrange(1, 5))) for _ in range(draw.randrange(5)))
        matcher, given = StopMatcher(stop), ""
        for letter in text:
            part, stopped = matcher.push(letter)
            given += part
            if stopped:
                break
        else:
            given += matcher.flush()
        assert given == cut(text, stop), (text, stop)


def test_no_more_than_the_start_of_a_stop_string_is_held_back():
    matcher = StopMatcher(["END"])
    assert [matcher.push(part) for part in ["a E", "N", "x", "EN"]] == [
        ("a ", False),
        ("", False),
        ("ENx", False),
        ("", False),
    ]
    assert matcher.flush() == "EN"


@pytest.mark.parametrize(
    ("stop", "text", "finish"),
    [
        ((), "the doctor asks: how long?", "stop"),
        ((" asks: how",), "the doctor", "stop"),
        (("zzz", "r ask"), "the docto", "stop"),
        (("the",), "", "stop"),
        (("long?!",), "the doctor asks: how long?", "stop"),
    ],
)
def test_a_stop_string_across_tokens_is_never_in_the_text(parrot, bytes_tokenizer, stop, text, finish):
    model = parrot("the doctor asks: how long?")
    pieces = said(model, bytes_tokenizer, [1], Settings(99, stop=stop))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + [finish]
    assert model.num_forwards == len(pieces)


def test_the_limit_ends_the_answer_and_gives_out_what_was_held_back(parrot, bytes_tokenizer):
    pieces = said(parrot("ab日"), bytes_tokenizer, [1], Settings(4, stop=("b日本",)))
    assert [piece.finish for piece in pieces] == [None, None, None, "length"]
    assert "".join(piece.text for piece in pieces) == "ab\ufffd"


def test_the_same_seed_draws_the_same_tokens(spread_llama, bytes_tokenizer):
    def tokens(seed):
        return [piece.token for piece in said(spread_llama, bytes_tokenizer, [5], Settings(12, seed=seed))]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


def test_draws_follow_the_softmax_at_a_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler, num = Sampler(Settings(1, temperature=2.0, seed=0)), 5_000
    drawn = torch.bincount(torch.tensor([sampler.pick(logits) for _ in range(num)]), minlength=4) / num
    expected = torch.softmax(logits / 2.0, dim=-1)
    assert torch.allclose(drawn, expected, atol=4 * (0.25 / num) ** 0.5)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {2}), (0.5, {2}), (0.7, {1, 2}), (0.95, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    logits = torch.tensor([0.15, 0.25, 0.55, 0.05]).log()
    sampler = Sampler(Settings(1, top_p=top_p, seed=0))
    assert {sampler.pick(logits) for _ in range(400)} == kept


def test_a_tiny_temperature_takes_the_likeliest():
    sampler = Sampler(Settings(1, temperature=1e-30, seed=0))
    assert sampler.pick(torch.tensor([3.0, 80.0, 79.0])) == 1


def test_what_ends_an_answer(spread_llama, bytes_tokenizer):
    assert end_tokens(spread_llama, bytes_tokenizer) == {bytes_tokenizer.eos_token_id}
    assert end_of_turn_tokens(bytes_tokenizer) == {bytes_tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_template_that_refuses_a_chat_declares_no_end_of_turn(bytes_tokenizer):
    refusing = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer.backend_tokenizer)
    refusing.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn_tokens(refusing) == frozenset()


def test_context_is_what_the_model_declares_or_else_the_tokenizer(spread_llama, bytes_tokenizer):
    assert context_length(spread_llama, bytes_tokenizer) == 256
    bloom = tiny("bloom")
    assert context_length(bloom, bytes_tokenizer) == 2048
    limited = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer.backend_tokenizer, model_max_length=77)
    assert context_length(bloom, limited) == 77
