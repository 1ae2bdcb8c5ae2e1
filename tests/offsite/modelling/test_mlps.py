"""Finding MLPs by structure; narrowing them against a full-width oracle."""

from __future__ import annotations

import pytest
import torch
from tiny_architectures import tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling import blocks, mlps
from offsite.modelling.blocks import find_stacks
from offsite.modelling.mlps import find_mlp, find_mlps, resize_mlp, slice_mlp, zero_mlp_channels
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
    "nemotron": (("mlp.up_proj",), "mlp.down_proj", False),
    "apertus": (("mlp.up_proj",), "mlp.down_proj", False),
    "mpt": (("ffn.up_proj",), "ffn.down_proj", False),
    "lfm2": (("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2", False),
    "glm4": (("mlp.gate_up_proj",), "mlp.down_proj", True),
    "starcoder2": (("mlp.c_fc",), "mlp.c_proj", False),
}
WIDER = {"bloom": 128, "falcon": 128, "mpt": 128, "lfm2": 32}  # the last one's config says 48: it takes two thirds


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
    channels = WIDER.get(name, 48)
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


# architecture: what its block 3 has: (place, channels), or (place, experts, channels, halves, interleaved, turned)
PARTS = {
    "mixtral": [("mlp.experts", 4, 48, 2, False, False)],
    "gpt_oss": [("mlp.experts", 4, 48, 2, True, True)],
    "llama4_text": [("feed_forward.shared_expert", 48), ("feed_forward.experts", 4, 48, 2, False, True)],
    "qwen2_moe": [("mlp.shared_expert", 24), ("mlp.experts", 4, 16, 2, False, False)],
    "deepseek_v3": [("mlp.shared_experts", 16), ("mlp.experts", 4, 16, 2, False, False)],
    "granitemoehybrid": [("shared_mlp", 24), ("block_sparse_moe.experts", 4, 48, 2, False, False)],
    "hunyuan_v1_moe": [("mlp.shared_mlp", 48), ("mlp.experts", 4, 48, 2, False, False)],
}


@pytest.mark.parametrize("name", PARTS)
def test_the_mlps_of_a_mixture_are_found(name):
    block = blocks_of(tiny(name))[3]
    found = [
        (part.place, part.num_channels)
        if isinstance(part, mlps.Mlp)
        else (part.place, part.num_experts, part.num_channels, part.halves, part.interleaved, part.turned)
        for part in find_mlps(block)
    ]
    assert found == PARTS[name]


@pytest.mark.parametrize("name", PARTS)
def test_resized_experts_have_the_compact_shapes(name):
    block = blocks_of(tiny(name))[3]
    before = {key: tuple(value.shape) for key, value in block.named_parameters()}
    for part in find_mlps(block):
        resize_mlp(block, part, 5)
    assert {part.num_channels for part in find_mlps(block)} == {5}
    inside = tuple(f"{part.place}." for part in find_mlps(block))
    for key, value in block.named_parameters():
        alike = [one == other for one, other in zip(value.shape, before[key], strict=True)]
        is_output_bias = key.endswith("down_proj_bias")
        assert alike.count(False) == (1 if key.startswith(inside) and not is_output_bias else 0), key


def test_views_of_channels_write_through():
    block = blocks_of(tiny("gpt_oss"))[3]
    [part] = find_mlps(block)
    (gate, gate_bias), (up, _) = mlps.incoming(block, part, 2)
    gate[7], gate_bias[7], up[5] = 1, 2, 3
    mlps.outgoing_weight(block, part, 2)[:, 4] = 4
    mlps.outgoing_bias(block, part, 2)[0] = 5
    experts = block.mlp.experts
    assert (experts.gate_up_proj[2, :, 14] == 1).all()
    assert experts.gate_up_proj_bias[2, 14] == 2
    assert (experts.gate_up_proj[2, :, 11] == 3).all()
    assert (experts.down_proj[2, 4] == 4).all()
    assert experts.down_proj_bias[2, 0] == 5


def test_experts_in_a_form_that_is_not_known_are_refused():
    block = blocks_of(tiny("mixtral"))[3]
    block.mlp.experts.scale = nn.Parameter(torch.ones(4, 48))
    with pytest.raises(UnsupportedModel, match=r"not a linear's: mlp\.experts\.scale"):
        find_mlps(block)
    del block.mlp.experts.scale
    block.mlp.experts.down_proj = nn.Parameter(torch.ones(4, 40, 32))
    with pytest.raises(UnsupportedModel, match=r"the experts mlp\.experts of MixtralDecoderLayer are in a form"):
        find_mlps(block)
    block.mlp.experts = nn.Identity()
    with pytest.raises(UnsupportedModel, match=r"the experts mlp\.experts of MixtralDecoderLayer are in a form"):
        find_mlps(block)


@pytest.mark.parametrize("channels", [[[0, 1]], [[0, 1]] * 3 + [[0, 0]], [[0, 1]] * 3 + [[0, 48]], [0, 1], [[]] * 4])
def test_wrong_channels_of_experts_are_refused(channels):
    block = blocks_of(tiny("mixtral"))[3]
    [part] = find_mlps(block)
    with pytest.raises(ConfigError, match=r"numbers from 0 to 47, .* equally many for each of 4 experts"):
        slice_mlp(block, part, torch.tensor(channels, dtype=torch.int64))
