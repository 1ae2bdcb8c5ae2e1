"""Vision encoders are cut, narrowed, loaded and given heads right: each oracle on every family that is taken."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, CLIPModel
from vision_lab import FAMILIES, config, encoder, pixels, saved

from offsite.digests import model_digest
from offsite.encoders.classifier import as_encoder_classifier, classifier_name
from offsite.encoders.head import head_shapes, head_size, make_head
from offsite.encoders.outputs import outputs_of
from offsite.encoders.trunk import is_encoder
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import text_stack
from offsite.modelling.causal import reads_ahead
from offsite.modelling.load import is_encoder_name, is_vision_name, load_model, load_reader
from offsite.modelling.mlps import find_mlp, slice_mlp, zero_mlp_channels
from offsite.modelling.split import extract, largest_deviation, make_plan, own
from offsite.vision.models import VISION_TYPES


def states(model, values=None):
    with torch.no_grad():
        return outputs_of(model, {"pixel_values": pixels() if values is None else values})


def test_every_family_that_is_taken_is_tried_here():
    assert set(FAMILIES) == set(VISION_TYPES)


@pytest.mark.proves("models", "vision encoders")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_computes_what_the_full_model_does_without_the_other_blocks(name):
    model = encoder(name)
    plan = make_plan(model, num_bottom=1, num_top=1)
    whole = extract(model, {plan.stack.name: range(6)})
    assert is_encoder(whole)
    assert torch.equal(states(whole), states(model))
    kept = {plan.stack.name: [0, 2, 5]}
    small = extract(model, kept)
    assert small.config.num_hidden_layers == 3
    assert largest_deviation(model, small, kept) < 1e-6
    skipped = [model.get_submodule(f"{plan.stack.name}.{number}") for number in (1, 3, 4)]
    for block in skipped:  # an identity in their place, worked out here
        block.forward = lambda hidden_states, *_, **__: hidden_states
    torch.testing.assert_close(states(small), states(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrow_block_computes_what_zeroed_channels_do(name):
    model = encoder(name)
    stack = text_stack(model).name
    narrow, zeroed = (extract(model, {stack: range(6)}) for _ in range(2))
    own(zeroed)
    block = narrow.get_submodule(f"{stack}.2")
    part = find_mlp(block)
    assert part.num_channels == 64
    slice_mlp(block, part, torch.arange(0, 64, 4))
    gone = torch.tensor([i for i in range(64) if i % 4])
    zero_mlp_channels(zeroed.get_submodule(f"{stack}.2"), part, gone)
    found = states(narrow)
    torch.testing.assert_close(found, states(zeroed), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, states(model), atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trunk_is_the_same_whatever_head_its_checkpoint_has(name, tmp_path):
    folder = saved(tmp_path / "labels", name)
    assert is_encoder_name(str(folder))
    assert is_vision_name(str(folder))
    trunk = load_model(str(folder), encoders=True)
    assert is_encoder(trunk)
    assert reads_ahead(trunk)
    assert getattr(trunk, "pooler", None) is None
    classifier = AutoModelForImageClassification.from_pretrained(folder).eval()
    if name == "clip_vision_model":  # both towers, and the one alone
        CLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "both")
        trunk.save_pretrained(tmp_path / "tower")
        others = [load_model(str(tmp_path / kind), encoders=True) for kind in ("both", "tower")]
    else:
        AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
        others = [load_model(str(tmp_path / "base"), encoders=True)]
    assert {model_digest(one) for one in others} == {model_digest(trunk)}
    inner = classifier.vision_model if name == "clip_vision_model" else classifier.base_model
    with torch.no_grad():
        assert torch.equal(states(trunk), inner(pixel_values=pixels()).last_hidden_state)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_is_that_of_transformers(name):
    trunk = encoder(name)
    head = make_head(trunk.config, 3, "classify")
    assert not any(parameter.count_nonzero() for parameter in head.parameters())
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    named = {key: tuple(one.shape) for key, one in head.named_parameters()}
    assert named == head_shapes(name, 3, head_size(trunk.config), "classify")
    labelled = config(name)
    labelled.num_labels = 3
    theirs = as_encoder_classifier(trunk, head, labelled)
    assert {classifier_name(name, key, "classify") for key in named} == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        wanted = theirs(pixel_values=pixels()).logits
        torch.testing.assert_close(head(states(trunk)), wanted, atol=1e-6, rtol=1e-5)
    assert wanted.std() > 0.1


def test_dinov2_reads_images_of_other_sizes_than_it_was_trained_on():
    """Its checkpoints are of 518 pixels, and their images of 224: a cut model interpolates positions as it does."""
    model = encoder("dinov2")
    small = extract(model, {text_stack(model).name: range(6)})
    values = pixels(size=24)
    assert torch.equal(states(small, values), states(model, values))


def test_a_checkpoint_without_the_numbers_or_as_a_writer_of_text_is_refused(tmp_path):
    folder = saved(tmp_path / "eye", "vit")
    with pytest.raises(UnsupportedModel, match=r"'.*eye' is an encoder: it writes no text"):
        load_model(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no preprocessor_config.json stands with model 'eye'"):
        load_reader(str(folder))
