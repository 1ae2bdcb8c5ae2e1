"""The oracles of cutting, on a tiny random model of every promised architecture and some more."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from offsite.modelling.blocks import block_list, find_stacks
from offsite.modelling.split import extract, largest_deviation

PROMISED = """llama mistral qwen2 qwen3 gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj opt bloom falcon olmo2
    smollm3 granite mixtral qwen3_moe deepseek_v3 t5 bert vit clip""".split()
MORE = ["bart", "cohere2", "exaone4", "glm4_moe", "gpt_neo", "gpt_oss", "llama4_text", "modernbert"]
MORE += """stablelm starcoder2 glm4 ernie4_5 hunyuan_v1_dense helium olmo3 olmoe qwen2_moe phimoe granitemoehybrid
    bamba lfm2 qwen3_next nemotron apertus bitnet seed_oss mpt ernie4_5_moe""".split()
GENERATIVE = [name for name in PROMISED + MORE if name not in ("bert", "vit", "clip", "modernbert", "llama4_text")]
CAUSAL = [name for name in GENERATIVE if name not in ("t5", "bart")]


def kept_blocks(num_blocks: int) -> list[int]:
    return [i for i in (0, 1, 3, 5) if i < num_blocks]


def with_blocks_skipped(model: PreTrainedModel, keep: Mapping[str, list[int]]) -> PreTrainedModel:
    """The reference: a copy of the full model whose other blocks hand their hidden state on unchanged."""
    reference = copy.deepcopy(model)
    for stack in find_stacks(reference):
        for number, block in enumerate(block_list(reference, stack)):
            if number not in keep[stack.name]:
                block.forward = _skipping(block.forward)
    return reference


def _skipping(forward):
    def skip(*args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        output = forward(*args, **kwargs)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    return skip


@pytest.fixture(scope="module", params=PROMISED + MORE)
def cut(request, tiny_model) -> SimpleNamespace:
    model = tiny_model(request.param)
    keep = {stack.name: kept_blocks(stack.num_blocks) for stack in find_stacks(model)}
    return SimpleNamespace(model=model, keep=keep, small=extract(model, keep))


def test_kept_blocks_compute_what_they_did(cut, logits):
    expected = logits(with_blocks_skipped(cut.model, cut.keep))
    torch.testing.assert_close(logits(cut.small), expected, rtol=0, atol=1e-6)
    assert (logits(cut.model) - expected).abs().max() > 1e-2  # the skipped blocks did matter


def test_saved_and_reloaded_is_equal(cut, logits, tmp_path):
    cut.small.save_pretrained(tmp_path)
    again, info = type(cut.small).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(logits(again.eval()), logits(cut.small))


@pytest.mark.parametrize("cut", GENERATIVE, indirect=True)
def test_generates_the_same_with_and_without_cache(cut, feed):
    ids = feed(cut.small)["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = cut.small.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, cut.small.generate(ids, use_cache=False, **settings))


def test_storage_is_shared_and_nothing_is_left_on_meta(cut):
    owned = {tensor.data_ptr() for tensor in [*cut.model.parameters(), *cut.model.buffers()]}
    for name, tensor in [*cut.small.named_parameters(), *cut.small.named_buffers()]:
        assert not tensor.is_meta, name
        assert tensor.data_ptr() in owned, name


def test_keeping_every_block_is_the_full_model(cut, logits):
    keep = {stack.name: list(range(stack.num_blocks)) for stack in find_stacks(cut.model)}
    whole = extract(cut.model, keep)
    assert torch.equal(logits(whole), logits(cut.model))
    assert whole.state_dict().keys() == cut.model.state_dict().keys()


@pytest.mark.proves("models", "causal language models")
@pytest.mark.parametrize("cut", CAUSAL, indirect=True)
def test_deviation_is_nil_for_the_kept_blocks_only(cut):
    assert largest_deviation(cut.model, cut.small, cut.keep) < 1e-5
    other = {name: [0, 2, 3, 5] for name in cut.keep}
    assert largest_deviation(cut.model, cut.small, other) > 1e-3
