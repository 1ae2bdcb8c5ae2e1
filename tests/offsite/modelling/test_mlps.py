"""Finding MLPs by structure; narrowing them against a full-width oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling import blocks, mlps
from offsite.modelling.blocks import find_stacks
from offsite.modelling.mlps import find_mlp, resize_mlp, slice_mlp, zero_mlp_channels
from offsite.modelling.split import extract

# architecture: inputs, output and fused, as seen in a block of 48 channels
MLPS = {
    "llama": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", False),
    "mistral": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", False),
    "qwen2": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", False),
    "qwen3": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", False),
    "gemma2": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", False),
    "gemma3_text": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", False),
    "olmo2": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", False),
    "granite": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", False),
    "smollm3": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", False),
    "phi": (("mlp.fc1",), "mlp.fc2", False),
    "phi3": (("mlp.gate_up_proj",), "mlp.down_proj", True),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj", False),
    "gpt_neox": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", False),
    "gptj": (("mlp.fc_in",), "mlp.fc_out", False),
    "opt": (("fc1",), "fc2", False),
    "bloom": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", False),
    "falcon": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", False),
    "bert": (("intermediate.dense",), "output.dense", False),
    "vit": (("mlp.fc1",), "mlp.fc2", False),
}


def blocks_of(model):
    return blocks.block_list(model, find_stacks(model)[0])


def test_linears_are_told_apart(tiny_model):
    block = blocks_of(tiny_model("llama"))[0]
    attention = tuple(f"self_attn.{key}_proj" for key in "qkvo")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert blocks.attention_linears(block) == attention
    assert mlps.mlp_linears(block) == mlp
    assert blocks.linear_names(block) == attention + mlp


@pytest.mark.parametrize("name", [*MLPS, "t5", "clip"])
def test_attention_and_mlp_make_up_all_linears(name, tiny_model):
    block = blocks_of(tiny_model(name))[-1]
    attention, mlp = blocks.attention_linears(block), mlps.mlp_linears(block)
    assert attention
    assert mlp
    assert sorted(attention + mlp) == sorted(blocks.linear_names(block))


@pytest.mark.parametrize("name", MLPS)
def test_mlp_is_found(name, tiny_model):
    mlp = find_mlp(blocks_of(tiny_model(name))[0])
    channels = 128 if name in ("bloom", "falcon") else 48
    assert (mlp.inputs, mlp.output, mlp.fused) == MLPS[name]
    assert mlp.num_channels == channels


@pytest.mark.parametrize("gated", [False, True])
def test_mlp_of_t5_is_found(gated, tiny_model):
    model = tiny_model("t5", feed_forward_proj="gated-gelu" if gated else "relu")
    mlp = find_mlp(blocks.block_list(model, find_stacks(model)[1])[0])
    place = "layer.2.DenseReluDense."
    assert mlp.inputs == ((place + "wi_0", place + "wi_1") if gated else (place + "wi",))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4_text", "gpt_oss"])
def test_mixtures_of_experts_have_no_mlp(name, tiny_model):
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        find_mlp(blocks_of(tiny_model(name))[5])


def test_dense_block_of_a_mixture_has_an_mlp(tiny_model):
    assert find_mlp(blocks_of(tiny_model("deepseek_v3"))[0]).num_channels == 48
    assert find_mlp(blocks_of(tiny_model("qwen3_moe"))[3]).num_channels == 48


def test_a_norm_along_the_channels_is_refused():
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.for_model("bitnet", vocab_size=32, num_key_value_heads=2, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModel, match=r"not a linear's: mlp\.ffn_sub_norm\.weight"):
        find_mlp(blocks_of(model)[0])


def test_unknown_mlp_is_refused(tiny_model):
    block = blocks_of(tiny_model("llama"))[0]
    block.mlp = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    with pytest.raises(UnsupportedModel, match="found 0 MLPs in LlamaDecoderLayer"):
        find_mlp(block)


def test_mismatched_projections_are_refused(tiny_model):
    block = blocks_of(tiny_model("llama"))[0]
    block.mlp.up_proj = nn.Linear(32, 40)
    with pytest.raises(UnsupportedModel, match=r"mlp\.up_proj of LlamaDecoderLayer has 40 outputs"):
        find_mlp(block)


def with_channels_silenced(model, dropped):
    """The reference: the activations of the dropped channels are zeroed on their way into the output linear."""

    def silence(_module, args):
        hidden = args[0].clone()
        hidden[..., dropped] = 0
        return (hidden,)

    for block in blocks_of(model):
        block.get_submodule(find_mlp(block).output).register_forward_pre_hook(silence)
    return model


def whole_copy(model):
    """A second model on the same storage, to be narrowed without touching the first."""
    return extract(model, {stack.name: range(stack.num_blocks) for stack in find_stacks(model)})


@pytest.mark.parametrize("name", MLPS)
def test_compact_mlps_equal_full_ones_without_the_other_channels(name, tiny_model, logits):
    model = tiny_model(name)
    before = logits(model)
    mlp = find_mlp(blocks_of(model)[0])
    order = torch.randperm(mlp.num_channels, generator=torch.Generator().manual_seed(0))
    kept, dropped = order[: mlp.num_channels // 3], order[mlp.num_channels // 3 :]

    compact, zeroed = whole_copy(model), whole_copy(model)
    for block in blocks_of(compact):
        slice_mlp(block, mlp, kept)
        assert find_mlp(block).num_channels == len(kept)
    for block in blocks_of(zeroed):
        zero_mlp_channels(block, mlp, dropped)

    assert torch.equal(logits(model), before)  # the storage they shared was not written to
    expected = logits(with_channels_silenced(model, dropped))
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(zeroed), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(compact), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MLPS)
def test_keeping_every_channel_changes_nothing(name, tiny_model, logits):
    model = tiny_model(name)
    whole = whole_copy(model)
    for block in blocks_of(whole):
        slice_mlp(block, find_mlp(block), torch.arange(find_mlp(block).num_channels))
    assert torch.equal(logits(whole), logits(model))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_resized_mlp_has_the_compact_shapes(name, tiny_model):
    model = tiny_model(name).to(torch.bfloat16)
    block = blocks_of(model)[0]
    block.requires_grad_(False)
    untouched = {key: value for key, value in block.named_parameters() if "norm" in key or "attn" in key}
    resize_mlp(block, find_mlp(block), 20)
    mlp = find_mlp(block)
    assert mlp.num_channels == 20
    assert outgoing_shape(block, mlp) == (32, 20)
    assert {value.dtype for value in block.parameters()} == {torch.bfloat16}
    assert not any(value.requires_grad for value in block.parameters())
    assert all(block.get_parameter(key) is value for key, value in untouched.items())
    linear = block.get_submodule(mlp.output)
    assert (linear.nx, linear.nf) == (20, 32) if blocks.is_conv1d(linear) else linear.in_features == 20


def outgoing_shape(block, mlp):
    return tuple(mlps.outgoing_weight(block, mlp).shape)


def test_the_module_remembers_its_new_width(tiny_model):
    block = blocks_of(tiny_model("llama"))[0]
    resize_mlp(block, find_mlp(block), 20)
    assert block.mlp.intermediate_size == 20


@pytest.mark.parametrize("channels", [[], [0, 0], [-1], [48]])
def test_wrong_channels_are_refused(channels, tiny_model):
    block = blocks_of(tiny_model("llama"))[0]
    with pytest.raises(ConfigError, match="distinct channel numbers from 0 to 47"):
        slice_mlp(block, find_mlp(block), torch.tensor(channels, dtype=torch.int64))
    with pytest.raises(ConfigError, match="expected at least 1"):
        resize_mlp(block, find_mlp(block), 0)
