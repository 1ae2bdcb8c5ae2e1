"""Computing in float32 with weights of fewer bits, against the same weights made float32 for good."""

from __future__ import annotations

import pytest
import torch
from recurrent import SHAPES, tiny

from offsite.modelling.precision import in_float32

IDS = torch.tensor([[5, 17, 40, 9, 33, 8, 100, 42]])


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", *SHAPES])
def test_logits_are_those_of_a_float32_model_and_the_weights_stay(kind, full_llama):
    model = tiny(kind) if kind in SHAPES else type(full_llama)(full_llama.config).eval()
    model.to(torch.bfloat16)
    before = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    with in_float32(model):
        found = logits(model)
    assert found.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert torch.equal(parameter.data, before[name])
    torch.testing.assert_close(found, logits(model.float()), rtol=0, atol=2e-4 * float(found.abs().max()))


def test_the_weights_come_back_when_a_forward_fails(full_llama):
    model = type(full_llama)(full_llama.config).to(torch.bfloat16).eval()
    with in_float32(model), pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
