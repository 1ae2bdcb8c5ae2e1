"""The weights that a round starts from: as a client's model has them once the round is folded in."""

from __future__ import annotations

import pytest
import torch

from adapters.norms import base_tensors
from adapters.rounds import grown
from adapters.updates import LowRank, fold, to_tensors
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.round import ROUND_FORMAT, RoundManifest, write_round
from offsite.errors import NotFinite, WrongNames, WrongShape


@pytest.fixture
def made(tmp_path, whole_package):
    """Write a round that adds these updates to the package's weights."""

    def write(update=None, emulator=None):
        manifest = RoundManifest(
            format=ROUND_FORMAT, federation_id="5" * 32, round=1, num_rounds=1, steps=1,
            package_digest=whole_package.digest, base_digest=whole_package.manifest.base_digest,
            adapter=AdapterSpec(kind="lora", rank=2),
        )  # fmt: skip
        parts = {"update": to_tensors(update or {}), "emulator": to_tensors(emulator or {})}
        return write_round(tmp_path / f"round-{len(list(tmp_path.iterdir()))}", manifest, **parts)

    return write


def updates_of(package):
    """A low-rank and a dense part of each: what rounds added, and how the emulator was realigned."""
    names = [name for name in package.block_tensors() if name.endswith(("q_proj.weight", "input_layernorm.weight"))]
    generator = torch.Generator().manual_seed(0)
    found = ({}, {})
    for name in names:
        shape = package.block_tensors()[name].shape
        for which, update in enumerate(found):
            if which and not name.startswith("middle."):
                continue
            if len(shape) == 2:
                a, b = (torch.randn(size, generator=generator) for size in ((3, shape[1]), (shape[0], 3)))
                update[name] = LowRank(a, b)
            else:
                update[name] = torch.randn(shape, generator=generator)
    return found


def test_grown_tensors_are_those_of_the_model_that_a_client_tunes(whole_package, made):
    update, emulator = updates_of(whole_package)
    names = sorted(whole_package.block_tensors())
    base = base_tensors(whole_package, names)
    found = grown(base, made(update, emulator))
    model = whole_package.load_model()
    for part in (update, emulator):
        fold(model, part, whole_package.layout.blocks)
    own = dict(model.named_parameters())
    for name in names:
        role, number, inner = name.split(".", 2)
        expected = own[f"{whole_package.layout.blocks[f'{role}.{number}']}.{inner}"].detach()
        changed = name in update
        assert torch.allclose(found[name], expected, rtol=1e-6 * changed, atol=1e-6 * changed), name
        assert found[name].dtype == torch.float32
    assert emulator.keys() < update.keys()


def test_what_no_round_changed_is_the_package_s_own(whole_package, made):
    update, _ = updates_of(whole_package)
    changed = min(update)
    other = next(name for name in whole_package.block_tensors() if name.endswith("up_proj.weight"))
    base = base_tensors(whole_package, [changed, other])
    found = grown(base, made(update))
    assert found[other] is base[other]
    assert not torch.equal(found[changed], base[changed])
    assert grown(base, made()) == base  # the very tensors


def test_only_what_was_asked_for_is_grown(whole_package, made):
    update, emulator = updates_of(whole_package)
    name = max(update)
    base = base_tensors(whole_package, [name])
    assert grown(base, made(update, emulator)).keys() == {name}


def test_a_round_that_is_no_update_of_the_package(whole_package, tmp_path, made):
    name = next(name for name in whole_package.block_tensors() if name.endswith("q_proj.weight"))
    base = base_tensors(whole_package, [name])
    rows = (
        (WrongShape, {name: torch.zeros(3)}),
        (WrongShape, {name: LowRank(torch.zeros(2, 5), torch.zeros(5, 2))}),
        (NotFinite, {name: LowRank(torch.full((1, 32), 3e38), torch.full((32, 1), 3e38))}),
    )
    for expected, update in rows:
        for parts in ({"update": update}, {"emulator": update}):
            with pytest.raises(expected):
                grown(base, made(**parts))
    half = made({name: LowRank(torch.zeros(1, 32), torch.zeros(32, 1))})
    loaded = {end: tensor for end, tensor in half.load_update().items() if end.endswith(".lora_A")}

    class Half:
        """A round whose file holds one factor of two."""

        def load_update(self):
            return loaded

        def load_emulator(self):
            return {}

    with pytest.raises(WrongNames):
        grown(base, Half())
