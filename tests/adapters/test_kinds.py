"""What holds for every kind: declared without a model, attached to either model, everything else frozen."""

from __future__ import annotations

import copy

import pytest
import torch

from adapters import kinds as module
from adapters.kinds import Attached, attach, declared, kinds, register_kind
from offsite.artefacts.bundle import AdapterSpec, write_bundle
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.errors import ConfigError, WrongNames, WrongShape
from offsite.tensors import TensorSpec, spec_of

IDS = torch.tensor([[5, 17, 200, 3, 44, 90, 12]])
CASES = [
    ("blocks", "2+2", "dropped_package"),
    ("blocks", "1+2", "narrow_package"),
    ("blocks", "all", "whole_package"),
    ("bitfit", "2+2", "dropped_package"),
    ("bitfit", "all", "whole_package"),
    ("lora", "2+2", "dropped_package"),
    ("lora", "all", "narrow_package"),
    ("rslora", "0+2", "dropped_package"),
    ("dora", "2+1", "dropped_package"),
    ("dora", "all", "narrow_package"),
    ("dora", "all", "whole_package"),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request):
    kind, placement, package = request.param
    spec = AdapterSpec(kind=kind, placement=placement, rank=2, alpha=4.0, dtype="float32")
    package = request.getfixturevalue(package)
    return spec, package, declared(spec, package.layout, package.block_tensors())


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def shake(attached, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.trainable.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_what_is_declared_is_what_attaches(case):
    spec, package, names = case
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    assert {name: spec_of(parameter) for name, parameter in attached.trainable.items()} == names
    assert {name for name, p in attached.model.named_parameters() if p.requires_grad} == {
        name for name, p in attached.model.named_parameters() if any(p is own for own in attached.trainable.values())
    }
    assert all(parameter.dtype is torch.float32 for parameter in attached.trainable.values())


def test_an_untrained_adapter_changes_nothing(case):
    spec, package, names = case
    expected = logits(package.load_model())
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    torch.testing.assert_close(logits(attached.model), expected, rtol=1e-5, atol=1e-5)


def test_one_step_moves_the_adapter_and_nothing_else(case):
    spec, package, names = case
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    shake(attached)
    before = {name: p.detach().clone() for name, p in attached.model.named_parameters()}
    loss = attached.model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.optim.SGD(attached.trainable.values(), lr=0.1).step()
    own = {id(parameter) for parameter in attached.trainable.values()}
    for name, parameter in attached.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (id(parameter) in own), name


def test_an_adapter_travels_through_a_bundle(case, tmp_path):
    spec, package, names = case
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    shake(attached)
    bundle = write_bundle(tmp_path / "b", package=package, spec=spec, tensors=attached.tensors(), expected=names)
    other = attach(package.load_model(), spec, package.layout.blocks, names)
    assert not torch.equal(logits(other.model), logits(attached.model))
    other.load(bundle.load_tensors(names))
    assert torch.equal(logits(other.model), logits(attached.model))


@pytest.mark.parametrize(("kind", "package"), [("blocks", "dropped_package"), ("lora", "dropped_package")])
def test_the_same_adapter_sits_on_the_full_models_blocks(request, full_llama, kind, package):
    """Plugged into the full model it moves exactly the blocks that the owner's record names."""
    package = request.getfixturevalue(package)
    spec = AdapterSpec(kind=kind, placement="0+1", rank=2, dtype="float32")
    names = declared(spec, package.layout, package.block_tensors())
    tuned = attach(package.load_model(), spec, package.layout.blocks, names)
    shake(tuned)
    sites = read_owner_record(owner_record_path(package.path)).sites
    plugged = attach(copy.deepcopy(full_llama), spec, sites, names)
    plugged.load(tuned.tensors())
    reached = {
        name.split("layers.")[1].split(".")[0] for name, p in plugged.model.named_parameters() if p.requires_grad
    }
    assert reached == {"7"}
    assert len(plugged.blocks) == len(sites)
    assert not torch.equal(logits(plugged.model), logits(full_llama))


def test_tensors_are_copies(case):
    spec, package, names = case
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    before = attached.tensors()
    shake(attached)
    assert all(not torch.equal(before[name], tensor) for name, tensor in attached.tensors().items())


def test_loading_is_by_exact_names_and_shapes(case):
    spec, package, names = case
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    tensors = attached.tensors()
    first = next(iter(tensors))
    with pytest.raises(WrongNames):
        attached.load({name: tensor for name, tensor in tensors.items() if name != first})
    with pytest.raises(WrongNames):
        attached.load({**tensors, "more": torch.ones(1)})
    with pytest.raises(WrongShape):
        attached.load({**tensors, first: torch.ones(1, 1, 1)})
    attached.load({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})


def test_an_unknown_kind_and_a_new_one(dropped_package, monkeypatch):
    spec = AdapterSpec(kind="prefix", placement="0+1")
    with pytest.raises(ConfigError, match="--adapter: no kind 'prefix'") as caught:
        declared(spec, dropped_package.layout, {})
    assert caught.value.hint == "known: bitfit, blocks, dora, lora, rslora"
    monkeypatch.setattr(module, "_KINDS", dict(module._KINDS))
    shape = {"top.1.prefix": TensorSpec(shape=(3,), dtype="float32")}
    register_kind("prefix", lambda spec, layout, tensors: shape, lambda model, spec, sites, names: Attached(model, {}))
    assert "prefix" in kinds()
    assert declared(spec, dropped_package.layout, {}) == shape


def test_declared_needs_no_model_and_names_the_bundles_dtype(dropped_package):
    spec = AdapterSpec(kind="blocks", placement="0+1", dtype="bfloat16")
    found = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    assert {stated.dtype for stated in found.values()} == {"bfloat16"}
    assert all(name.startswith("top.1.") for name in found)
    assert len(found) == 9
