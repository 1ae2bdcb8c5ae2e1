"""A checkpoint with biases on queries, keys and values whose configuration says llama without them.

The library loads it, drops the biases with a remark, and the model says something else. What has no place is refused
by name; constants that older versions saved beside the weights are left out with a line.
"""

from __future__ import annotations

import pytest
import torch
from checkpoints_lab import distill, edit_config, edit_tensors, random_model, save

from offsite.errors import ConfigError
from offsite.modelling.load import load_model


@pytest.fixture
def with_biases(tmp_path, letters_tokenizer):
    """A model with attention biases, and a configuration that forgot them."""
    model = random_model("llama", attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 1)
    folder = save(tmp_path / "model", model, letters_tokenizer)
    edit_config(folder, attention_bias=False)
    return folder


def test_weights_without_a_place_are_named(with_biases):
    with pytest.raises(ConfigError, match=r"24 tensor\(s\) that its config.json has no place for: 'model\.layers\.0"):
        load_model(str(with_biases))


def test_distill_does_not_go_on_without_them(with_biases, tmp_path, capsys):
    assert distill(with_biases, tmp_path / "package") == 2
    assert "24 tensor(s)" in capsys.readouterr().err
    assert not (tmp_path / "package").exists()


def test_fewer_blocks_than_the_checkpoint_has(tmp_path, full_llama, letters_tokenizer):
    folder = save(tmp_path / "model", full_llama, letters_tokenizer)
    edit_config(folder, num_hidden_layers=7)
    with pytest.raises(ConfigError, match=r"holds 9 tensor\(s\) .* 'model\.layers\.7\.input_layernorm\.weight'"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("architecture", "constant", "value"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("llama", "model.rotary_emb.inv_freq", torch.ones(4)),
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 128, 128, dtype=torch.bool)),
        ("gpt2", "transformer.h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 128, 128, dtype=torch.bool)),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", torch.tensor(-1e9)),
        ("llama", "model.position_ids", torch.arange(128)),
    ],
)
def test_constants_of_older_versions_pass(tmp_path, letters_tokenizer, architecture, constant, value):
    model = random_model(architecture)
    folder = save(tmp_path / "model", model, letters_tokenizer)
    edit_tensors(folder, lambda tensors: tensors.update({constant: value}))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load_model(str(folder))(input_ids=ids).logits, model(input_ids=ids).logits)


def test_leaving_out_a_constant_is_said(tmp_path, full_llama, letters_tokenizer, capsys):
    folder = save(tmp_path / "model", full_llama, letters_tokenizer)
    constant = {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)}
    edit_tensors(folder, lambda tensors: tensors.update(constant))
    load_model(str(folder))
    assert "1 tensor(s) of the checkpoint, such as 'model.layers.0.self_attn.masked_bias'" in capsys.readouterr().err


def test_a_bias_is_no_mask_because_of_its_name(tmp_path, letters_tokenizer):
    folder = save(tmp_path / "model", random_model("llama"), letters_tokenizer)
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.attn.bias": torch.ones(32)}))
    with pytest.raises(ConfigError, match=r"holds 1 tensor\(s\)"):
        load_model(str(folder))
