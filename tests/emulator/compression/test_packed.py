"""Packed weights against levels and scales that are tried one by one, and middles that are made of them."""

from __future__ import annotations

import pytest
import torch

from emulator.compression.compress import Recipe, compress, middle_blocks
from emulator.compression.lowrank import low_rank  # noqa: F401 - registers the method
from emulator.compression.matrices import matrices
from emulator.compression.packed import RATIOS, pack_middle, quantised
from offsite.artefacts.encodings import BITS, Encoding, decode, levels
from offsite.errors import ConfigError
from offsite.modelling.split import make_plan
from offsite.tensors import TensorSpec, spec_of

ARCHITECTURES = ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "mixtral"]
LARGEST = {"int8": 0.02, "int4": 0.2, "nf4": 0.14, "nf3": 0.25}
"""Relative errors that packing normal numbers in groups of 64 stays below."""


def unpacked(weight: torch.Tensor, packing: str) -> torch.Tensor:
    return decode("w", spec_of(weight), Encoding(kind=packing, group=64), quantised(weight, packing))


@pytest.mark.parametrize("packing", list(BITS))
def test_every_group_has_the_best_scale_that_is_tried_and_the_nearest_levels(packing):
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [50.0]])
    found = unpacked(weight, packing)
    table = torch.tensor([level for level in levels(packing) if level == level])
    for row, mine in zip(weight, found, strict=True):
        for start in (0, 64):
            group, own = row[start : start + 64], mine[start : start + 64]
            errors = []
            for ratio in RATIOS if packing != "int8" else RATIOS[:1]:
                scale = float((ratio * group.abs().max() / table[-1]).bfloat16())
                nearest = (table[None] * scale - group[:, None]).abs().amin(1)
                errors.append(float(nearest.square().sum()))
            assert float((own - group).square().sum()) == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("packing", list(BITS))
def test_the_error_is_what_so_few_bits_leave(packing):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = float((unpacked(weight, packing) - weight).norm() / weight.norm())
    assert 0 < error < LARGEST[packing]


def test_zeros_and_single_values_stay_what_they_are():
    weight = torch.zeros(2, 70)
    assert torch.equal(unpacked(weight, "nf3"), weight)
    for packing, value in {"nf3": -0.5, "nf4": 0.5, "int4": -7 / 16, "int8": 127 / 256}.items():
        weight[1, 3] = value  # whose scale a bfloat16 holds
        assert torch.equal(unpacked(weight, packing), weight)


def test_rows_are_packed_alike_together_and_apart(monkeypatch):
    weight = torch.randn(7, 65, generator=torch.Generator().manual_seed(0))
    together = quantised(weight, "nf3")
    monkeypatch.setattr("emulator.compression.packed._AT_ONCE", 130)
    apart = quantised(weight, "nf3")
    assert all(torch.equal(together[key], apart[key]) for key in together)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("packing", ["int8", "nf3"])
def test_the_middle_is_the_full_models_to_the_stated_error(tiny, batch, architecture, packing):
    full = tiny(architecture)
    plan = make_plan(full, num_bottom=1, num_top=1)
    before = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    found = compress(full, plan, "packed", Recipe(packing=packing))
    assert all(torch.equal(before[name], tensor) for name, tensor in full.state_dict().items())
    assert len(found.encoded) == sum(len(matrices(block)) for block in middle_blocks(full, plan))
    changed = whole = 0.0
    for name, parameter in found.model.named_parameters():
        theirs = full.get_parameter(name)
        if name not in found.encoded:
            assert parameter.data_ptr() == theirs.data_ptr()
            continue
        one = found.encoded[name]
        assert torch.equal(decode(name, spec_of(parameter), one.encoding, one.parts), parameter)
        changed += float((parameter.detach().double() - theirs.double()).square().sum())
        whole += float(theirs.double().square().sum())
    assert found.figures["packing_error"] == pytest.approx((changed / whole) ** 0.5, rel=1e-6)
    assert found.figures["packing_error"] < LARGEST[packing]
    sizes = sum(part.nbytes for one in found.encoded.values() for part in one.parts.values())
    assert found.figures["packed_bytes"] == sizes


def test_groups_lie_along_the_inputs(tiny):
    """One input a thousand times larger spoils its own group alone, also where a weight is (inputs, outputs)."""
    for architecture, name in (("llama", "self_attn.q_proj.weight"), ("gpt2", "attn.c_attn.weight")):
        full = tiny(architecture)
        plan = make_plan(full)
        block = middle_blocks(full, plan)[0]
        [one] = [one for one in matrices(block) if one.name == name]
        found = compress(full, plan, "packed", Recipe(packing="int8"))
        encoded = found.encoded[f"{plan.stack.name}.{plan.num_bottom}.{name}"]
        _, outputs, _ = one.weight(block).shape
        assert encoded.parts["scales"].shape == (outputs, 1)
        assert encoded.encoding.turned == (architecture == "gpt2")


def test_packing_factors_packs_both(tiny, batch):
    full = tiny("llama")
    plan = make_plan(full)
    low = compress(full, plan, "low-rank", Recipe(rank_share=0.5, calibration=[batch]))
    dense = {name: low.model.get_parameter(name).detach().clone() for name in low.encoded}
    done = pack_middle(low.model, plan, "int8", low.encoded)
    for name, one in done.encoded.items():
        assert set(one.parts) == {"left.codes", "left.scales", "right.codes", "right.scales"}
        assert one.encoding.rank == low.encoded[name].encoding.rank
        left, right = (
            decode(
                side,
                TensorSpec(shape=tuple(low.encoded[name].parts[side].shape), dtype="float32"),
                Encoding(kind="int8", group=64),
                {key: one.parts[f"{side}.{key}"] for key in ("codes", "scales")},
            )
            for side in ("left", "right")
        )
        torch.testing.assert_close(low.model.get_parameter(name).detach(), left @ right)
    changed = 0.0
    for name, one in dense.items():
        changed += float((low.model.get_parameter(name).detach().double() - one.double()).square().sum())
    whole = sum(float(one.double().square().sum()) for one in dense.values())
    assert done.error == pytest.approx((changed / whole) ** 0.5, rel=1e-5)


def test_what_would_not_get_smaller_stays(tiny):
    full = tiny("llama", intermediate_size=2)  # a scale for every two entries is more than the two
    plan = make_plan(full)
    found = compress(full, plan, "packed", Recipe(packing="int8"))
    names = {name.split(".", 3)[3] for name in found.encoded}
    assert "mlp.up_proj.weight" in names
    assert "mlp.down_proj.weight" not in names
    theirs = full.get_parameter("model.layers.2.mlp.down_proj.weight")
    assert found.model.get_parameter("model.layers.2.mlp.down_proj.weight").data_ptr() == theirs.data_ptr()


def test_packing_needs_a_kind(tiny):
    full = tiny("llama")
    with pytest.raises(ConfigError, match="int8, int4, nf4, nf3"):
        compress(full, make_plan(full), "packed", Recipe())
