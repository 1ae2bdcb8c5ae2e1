"""A head on an encoder computes what transformers' own classifier of the family does, under its names."""

from __future__ import annotations

import pytest
import torch
from encoders_lab import CHANGES, config, encoder, padded_batch, shaken
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from offsite.encoders.classifier import as_encoder_classifier, classifier_name
from offsite.encoders.head import EncoderHead, head_shapes
from offsite.encoders.outputs import outputs
from offsite.errors import UnsupportedModel

CASES = [(name, {}) for name in CHANGES] + [("modernbert", {"classifier_pooling": "mean"})]
AUTO = {"classify": AutoModelForSequenceClassification, "tag": AutoModelForTokenClassification}


@pytest.mark.parametrize("task", AUTO)
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_it_is_the_familys_own(name, changes, task):
    settings = config(name, num_labels=5, **changes)
    theirs = shaken(AUTO[task].from_config(settings))
    trunk = encoder(name, **changes)
    trunk.load_state_dict(theirs.base_model.state_dict(), strict=False)
    head = EncoderHead(settings, 5, task)
    own = {key: tuple(tensor.shape) for key, tensor in head.state_dict().items()}
    assert own == head_shapes(name, 5, 32, task)
    named = dict(theirs.named_parameters())
    head.load_state_dict({key: named[classifier_name(name, key, task)] for key in own})
    batch = padded_batch(settings.pad_token_id)
    with torch.no_grad():
        wanted = theirs(**batch).logits
        states = outputs(trunk, batch["input_ids"], batch["attention_mask"])
        assert torch.equal(head(states, batch["attention_mask"]), wanted)
        rebuilt = as_encoder_classifier(trunk, head, settings)
        assert torch.equal(rebuilt(**batch).logits, wanted)
    assert rebuilt.state_dict().keys() == theirs.state_dict().keys()


def test_a_head_begins_without_an_opinion_and_can_learn():
    head = EncoderHead(config("bert"), 3, "classify")
    states = torch.randn(2, 4, 32)
    scores = head(states, torch.ones(2, 4))
    assert not scores.any()
    torch.nn.functional.cross_entropy(scores, torch.tensor([0, 2])).backward()
    assert head.weight.grad.any()


def test_a_form_that_the_family_may_have_and_bundles_do_not():
    with pytest.raises(UnsupportedModel, match="classifier_bias"):
        EncoderHead(config("modernbert", classifier_bias=True), 3, "classify")
