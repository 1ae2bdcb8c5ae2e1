"""The probe: float32 arithmetic on weights of any dtype, which are as they were afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

from offsite.digests import model_digest
from offsite.errors import NotFinite
from server.plugging.probe import deviation, probe_logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_arithmetic_is_float32_whatever_the_weights_are(dtype, full_llama):
    model = copy.deepcopy(full_llama).to(dtype)
    before = model_digest(model)
    found = probe_logits(model)
    assert found.dtype == torch.float32
    assert model_digest(model) == before
    widened = copy.deepcopy(model).float()
    torch.testing.assert_close(found, probe_logits(widened), rtol=1e-4, atol=1e-4)
    if dtype == torch.bfloat16:  # the model's own arithmetic is far coarser
        ids = torch.randint(259, (2, 32), generator=torch.Generator().manual_seed(0))
        rough = model(input_ids=ids, use_cache=False).logits.detach().float()
        assert deviation(rough - rough.mean(-1, keepdim=True), found) > 1e-3


def test_weights_are_restored_when_the_forward_pass_fails(full_llama):
    model = copy.deepcopy(full_llama).to(torch.bfloat16)
    before = model_digest(model)

    def fail(*_):
        raise RuntimeError("broken")

    handle = model.model.layers[3].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        probe_logits(model)
    handle.remove()
    assert model_digest(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_constant_on_all_logits_is_no_deviation(full_llama):
    found = probe_logits(full_llama)
    assert found.mean(-1).abs().max() < 1e-5


def test_an_infinite_logit_is_refused(full_llama):
    model = copy.deepcopy(full_llama)
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(NotFinite, match="output of the broken model"):
        probe_logits(model, "the broken model")


def test_deviation_is_relative():
    logits = torch.tensor([3.0, 4.0])
    assert deviation(logits, logits) == 0
    assert deviation(logits * 1.1, logits) == pytest.approx(0.1)
    assert deviation(torch.tensor([3.0]), torch.tensor([0.0])) == 3.0
