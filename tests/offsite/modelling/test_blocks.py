"""Finding stacks, linears and MLPs by structure; narrowing MLPs against a full-width oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling import blocks
from offsite.modelling.blocks import Stack, find_stacks

STACKS = {
    "llama": [Stack("model.layers", 6, (), "num_hidden_layers")],
    "gpt2": [Stack("transformer.h", 6, (), "n_layer")],
    "gptj": [Stack("transformer.h", 6, (), "n_layer")],
    "gpt_neox": [Stack("gpt_neox.layers", 6, (), "num_hidden_layers")],
    "opt": [Stack("model.decoder.layers", 6, (), "num_hidden_layers")],
    "bloom": [Stack("transformer.h", 6, (), "n_layer")],
    "falcon": [Stack("transformer.h", 6, (), "num_hidden_layers")],
    "bert": [Stack("bert.encoder.layer", 6, (), "num_hidden_layers")],
    "vit": [Stack("vit.layers", 6, (), "num_hidden_layers")],
    "t5": [Stack("encoder.block", 6, (), "num_layers"), Stack("decoder.block", 6, (), "num_decoder_layers")],
    "bart": [
        Stack("model.encoder.layers", 6, (), "encoder_layers"),
        Stack("model.decoder.layers", 5, (), "decoder_layers"),
    ],
    "clip": [
        Stack("text_model.encoder.layers", 6, ("text_config",), "num_hidden_layers"),
        Stack("vision_model.encoder.layers", 6, ("vision_config",), "num_hidden_layers"),
    ],
}


def blocks_of(model):
    return blocks.block_list(model, find_stacks(model)[0])


@pytest.mark.parametrize("name", STACKS)
def test_stacks_are_found_with_their_depth(name, tiny_model):
    assert list(find_stacks(tiny_model(name))) == STACKS[name]


def test_a_model_without_blocks_is_refused():
    model = AutoModel.from_config(AutoConfig.for_model("mobilenet_v1", depth_multiplier=0.1))
    with pytest.raises(UnsupportedModel, match="no block stack found in MobileNetV1Model"):
        find_stacks(model)


def test_a_stack_whose_depth_no_field_holds_is_refused(tiny_model):
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModel, match=r"holds the depth of its block stacks: model\.layers of 6"):
        find_stacks(model)


def test_decoder_stack_is_the_one_of_a_causal_language_model(tiny_model):
    assert blocks.decoder_stack(tiny_model("opt")).name == "model.decoder.layers"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5", r"several block stacks \(encoder\.block, decoder\.block\)"),
        ("clip", "several block stacks"),
        ("bert", "no head that generates text"),
        ("vit", "no head that generates text"),
    ],
)
def test_other_models_have_no_decoder_stack(name, reason, tiny_model):
    with pytest.raises(UnsupportedModel, match=reason):
        blocks.decoder_stack(tiny_model(name))


def test_block_list_refuses_another_models_stack(tiny_model):
    with pytest.raises(ConfigError, match="does not have the 4 blocks planned"):
        blocks.block_list(tiny_model("llama"), Stack("model.layers", 4, (), "num_hidden_layers"))


def test_hidden_of_reads_tensors_and_tuples():
    hidden = torch.zeros(1, 2, 3)
    assert blocks.hidden_of(hidden) is hidden
    assert blocks.hidden_of((hidden, None)) is hidden
    with pytest.raises(UnsupportedModel, match="returned dict"):
        blocks.hidden_of({"hidden": hidden})


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4_text", "gpt_oss"])
def test_routers_and_experts_are_no_linears(name, tiny_model):
    block = blocks_of(tiny_model(name))[1 if name == "llama4_text" else 2]
    assert blocks.linear_names(block) == blocks.attention_linears(block)


def test_linear_dims_are_in_then_out_for_both_kinds():
    assert blocks.linear_dims(nn.Linear(3, 5)) == (3, 5)
    assert blocks.linear_dims(Conv1D(5, 3)) == (3, 5)
    assert blocks.is_conv1d(Conv1D(5, 3))
    assert not blocks.is_conv1d(nn.Linear(3, 5))
    with pytest.raises(ConfigError, match="LayerNorm is no linear"):
        blocks.linear_dims(nn.LayerNorm(3))
