"""Layers that compute together: peft's outputs and gradients, for less; and the cases that stay with peft."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import adapters.shared as module
from adapters.kinds import Attached, attach, declared
from adapters.shared import Weights, share_products, together
from offsite.artefacts.bundle import AdapterSpec


@pytest.fixture
def carried(dropped_package):
    """Make the package's model with LoRA on its ends in float64, its B away from zero."""

    def make(*, dropout: float = 0.0, kind: str = "rslora") -> Attached:
        spec = AdapterSpec(kind=kind, placement="1+1", rank=3, dropout=dropout)
        torch.manual_seed(0)
        names = declared(spec, dropped_package.layout, dropped_package.block_tensors())
        attached = attach(dropped_package.load_model(dtype="float32"), spec, dropped_package.layout.blocks, names)
        attached.model.double()
        with torch.no_grad():
            for parameter in attached.trainable.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.double))
        return attached

    return make


def gradients(attached: Attached) -> tuple[Tensor, dict[str, Tensor]]:
    ids_BT = torch.arange(3, 17).reshape(2, 7)
    attached.model.zero_grad()
    logits = attached.model(input_ids=ids_BT, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.double).view_as(logits)).sum().backward()
    return logits.detach(), {name: one.grad.clone() for name, one in attached.trainable.items()}


def test_outputs_and_gradients_are_pefts(carried) -> None:
    attached = carried()
    plain, expected = gradients(attached)
    names = [name for name, _ in attached.model.named_parameters()]
    assert share_products(attached) > 0
    assert [name for name, _ in attached.model.named_parameters()] == names
    found, got = gradients(attached)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_what_reads_one_input_is_one_operation(carried, monkeypatch) -> None:
    attached, sizes = carried(), []
    share_products(attached)

    def counting(x: Tensor, layers: list[Weights]) -> tuple[Tensor, ...]:
        sizes.append(len(layers))
        return together(x, layers)

    monkeypatch.setattr(module, "together", counting)
    attached.model(input_ids=torch.arange(3, 10)[None], use_cache=False)
    assert sizes == 2 * [3, 1, 2, 1]  # of each block: q, k, v; o; gate, up; down


def test_an_output_that_nothing_reads_has_no_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    layers = [
        Weights(torch.randn(4, 5).double(), torch.randn(4).double(), down, up, 0.7)
        for down, up in ((torch.randn(2, 5).double(), torch.randn(4, 2).double()) for _ in range(3))
    ]
    for layer in layers:
        layer.down.requires_grad_()
        layer.up.requires_grad_()
    one, _, other = together(x, layers)
    (one.sin().sum() + other.cos().sum()).backward()
    got = [x.grad, *(t.grad for layer in layers for t in (layer.down, layer.up))]
    for tensor in (x, *(t for layer in layers for t in (layer.down, layer.up))):
        tensor.grad = None

    def plain(layer: Weights) -> Tensor:
        return x @ layer.weight.T + layer.bias + layer.scale * (x @ layer.down.T) @ layer.up.T

    (plain(layers[0]).sin().sum() + plain(layers[2]).cos().sum()).backward()
    expected = [x.grad, *(t.grad for layer in layers for t in (layer.down, layer.up))]
    for found, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, rtol=1e-12, atol=1e-12)


def test_with_gradient_checkpointing_the_gradients_are_the_same(carried) -> None:
    attached = carried()
    share_products(attached)
    _, expected = gradients(attached)
    attached.model.train()
    attached.model.activation_checkpointing_enable({"use_reentrant": False})
    _, got = gradients(attached)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", ["dropout", "dora", "switched off", "autocast"])
def test_what_is_not_plain_is_left_to_peft(carried, monkeypatch, case: str) -> None:
    attached = carried(dropout=0.5 if case == "dropout" else 0.0, kind="dora" if case == "dora" else "lora")
    share_products(attached)
    monkeypatch.setattr(module, "together", lambda *_: pytest.fail("not plain"))
    ids_BT = torch.arange(3, 10)[None]
    attached.model.train()
    if case == "switched off":
        with attached.model.disable_adapter():
            attached.model(input_ids=ids_BT, use_cache=False)
    else:
        attached.model.to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            attached.model(input_ids=ids_BT, use_cache=False)


def test_a_probe_changes_no_mode_and_draws_nothing(carried) -> None:
    attached = carried(dropout=0.5)
    attached.model.train()
    attached.blocks[0].eval()
    modes = [each.training for each in attached.model.modules()]
    state = torch.get_rng_state()
    share_products(attached)
    assert [each.training for each in attached.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
