"""Encoders are cut, narrowed and loaded right: each oracle on every family that is taken."""

from __future__ import annotations

import pytest
import torch
from encoders_lab import CHANGES, config, encoder, padded_batch, saved
from transformers import AutoModel, AutoModelForSequenceClassification, ElectraConfig, ElectraForMaskedLM

from offsite.digests import model_digest
from offsite.encoders.outputs import outputs
from offsite.encoders.trunk import MODEL_TYPES, is_encoder
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import text_stack
from offsite.modelling.causal import reads_ahead
from offsite.modelling.load import is_encoder_name, load_model
from offsite.modelling.mlps import find_mlp, slice_mlp, zero_mlp_channels
from offsite.modelling.split import extract, largest_deviation, make_plan, own
from offsite.vision.models import VISION_TYPES

FAMILIES = list(CHANGES)


def states(model, batch):
    with torch.no_grad():
        return outputs(model, **{f"{name}_BT": tensor for name, tensor in batch.items()})


def test_every_family_that_is_taken_is_tried_here():
    assert set(FAMILIES) == set(MODEL_TYPES) - set(VISION_TYPES)


@pytest.mark.proves("models", "encoders")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_computes_what_the_full_model_does_without_the_other_blocks(name):
    model = encoder(name)
    batch = padded_batch(config(name).pad_token_id)
    plan = make_plan(model, num_bottom=1, num_top=1)
    whole = extract(model, {plan.stack.name: range(6)})
    assert is_encoder(whole)
    assert torch.equal(states(whole, batch), states(model, batch))
    kept = {plan.stack.name: [0, 2, 5]}
    small = extract(model, kept)
    assert largest_deviation(model, small, kept) < 1e-6
    cut_off = {key: tensor[1:, :7] for key, tensor in batch.items()}
    torch.testing.assert_close(states(small, batch)[1:, :7], states(small, cut_off), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrow_block_computes_what_zeroed_channels_do(name):
    model = encoder(name)
    stack = text_stack(model).name
    narrow, zeroed = (extract(model, {stack: range(6)}) for _ in range(2))
    own(zeroed)
    block = narrow.get_submodule(f"{stack}.2")
    part = find_mlp(block)
    assert part.num_channels == 48
    slice_mlp(block, part, torch.arange(0, 48, 3))
    gone = torch.tensor([i for i in range(48) if i % 3])
    zero_mlp_channels(zeroed.get_submodule(f"{stack}.2"), part, gone)
    batch = padded_batch(config(name).pad_token_id)
    found = states(narrow, batch)
    torch.testing.assert_close(found, states(zeroed, batch), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, states(model, batch), atol=1e-3)


def test_what_runs_behind_the_first_block_alone_keeps_its_place():
    """DeBERTa-v2's convolution stands behind block 0, whichever that is."""
    model = encoder("deberta-v2", conv_kernel_size=3, conv_act="gelu")
    stack = text_stack(model).name
    assert largest_deviation(model, small := extract(model, {stack: [0, 3, 5]}), {stack: [0, 3, 5]}) < 1e-6
    assert small.encoder.conv is not None
    with pytest.raises(UnsupportedModel, match=r"block 1 cannot be the first: .*conv_kernel_size"):
        extract(model, {stack: [1, 3, 5]})


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_a_trunk_is_the_same_whatever_head_its_checkpoint_has(name, tmp_path, letters_tokenizer, capsys):
    folder = saved(tmp_path / "masked", name, letters_tokenizer)
    assert is_encoder_name(str(folder))
    trunk = load_model(str(folder), encoders=True)
    assert is_encoder(trunk)
    assert reads_ahead(trunk)
    assert "left out" in capsys.readouterr().err
    assert getattr(trunk, "pooler", None) is None
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    others = [load_model(str(tmp_path / kind), encoders=True) for kind in ("classifier", "base")]
    assert {model_digest(one) for one in others} == {model_digest(trunk)}
    batch = padded_batch(trunk.config.pad_token_id)
    with torch.no_grad():
        theirs = classifier.eval().base_model(**batch).last_hidden_state
    assert torch.equal(states(trunk, batch), theirs)


def test_an_encoder_is_refused_where_text_is_written_before_a_weight_is_read(tmp_path, letters_tokenizer):
    folder = saved(tmp_path / "masked", "roberta", letters_tokenizer)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UnsupportedModel, match=r"'.*masked' is an encoder: it writes no text"):
        load_model(str(folder))


def test_a_checkpoint_of_other_depth_or_family(tmp_path, letters_tokenizer):
    """Blocks that the configuration has no place for are no head; encoders that no test has cut are named."""
    from checkpoints_lab import edit_config

    folder = saved(tmp_path / "masked", "bert", letters_tokenizer)
    edit_config(folder, num_hidden_layers=5)
    with pytest.raises(ConfigError, match="no place for"):
        load_model(str(folder), encoders=True)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "embedding_size": 16,
    }
    ElectraForMaskedLM(ElectraConfig(**sizes, intermediate_size=24)).save_pretrained(tmp_path / "electra")
    assert not is_encoder_name(str(tmp_path / "electra"))
