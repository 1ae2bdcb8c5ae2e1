"""Frozen weights in bfloat16: under autocast the same bits as without, and nothing that would not be is held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adapters.held import hold_frozen
from adapters.kinds import Attached, attach, declared
from offsite.artefacts.bundle import AdapterSpec


@pytest.fixture
def carried(dropped_package):
    """Make the package's model with an adapter on its ends, its values away from where they begin."""

    def make(kind: str = "lora", *, is_exact: bool = True) -> Attached:
        spec = AdapterSpec(kind=kind, placement="1+1", rank=3)
        torch.manual_seed(0)
        names = declared(spec, dropped_package.layout, dropped_package.block_tensors())
        attached = attach(dropped_package.load_model(dtype="float32"), spec, dropped_package.layout.blocks, names)
        with torch.no_grad():
            for parameter in attached.trainable.values():
                parameter.add_(0.1 * torch.randn(parameter.shape))
            for parameter in attached.model.parameters():
                if not parameter.requires_grad:
                    rounded = parameter.bfloat16().float()
                    parameter.copy_(rounded if is_exact else rounded * (1 + 2**-12))
        return attached

    return make


def gradients(attached: Attached) -> tuple[Tensor, dict[str, Tensor]]:
    ids_BT = torch.arange(3, 17).reshape(2, 7)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 4:] = 0
    attached.model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logits = attached.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: one.grad.clone() for name, one in attached.trainable.items()}


def dtypes(attached: Attached, kind: type[nn.Module]) -> set[torch.dtype]:
    return {one.weight.dtype for one in attached.model.modules() if type(one) is kind and not one.weight.requires_grad}


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora", "blocks", "bitfit"])
def test_scores_and_gradients_are_the_same_bits(carried, kind, is_exact) -> None:
    attached = carried(kind, is_exact=is_exact)
    expected, slopes = gradients(attached)
    before = sum(one.numel() * one.element_size() for one in attached.model.parameters())
    saved = hold_frozen(attached)
    assert saved == before - sum(one.numel() * one.element_size() for one in attached.model.parameters())
    assert saved > 0
    found, got = gradients(attached)
    assert torch.equal(found, expected)
    for name, slope in slopes.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], slope), name
    assert all(one.dtype == torch.float32 for one in attached.trainable.values())
    assert dtypes(attached, nn.Embedding) == {torch.bfloat16 if is_exact else torch.float32}
    left = {torch.float32} if kind == "dora" else set()  # its norms are of the weights themselves
    assert dtypes(attached, nn.Linear) == {torch.bfloat16} | left


def test_a_model_that_looks_at_a_weights_dtype_is_left_as_it_was(carried) -> None:
    attached = carried()
    layer = attached.blocks[1].mlp.down_proj

    def doubled(module, _args, found):
        return found * 2 if module.weight.dtype == torch.float32 else found

    layer.register_forward_hook(doubled)
    expected, _ = gradients(attached)
    own = {name: (id(one), one.dtype) for name, one in attached.model.named_parameters()}
    assert hold_frozen(attached) == 0
    assert {name: (id(one), one.dtype) for name, one in attached.model.named_parameters()} == own
    assert torch.equal(gradients(attached)[0], expected)
