"""Effective updates against the dense arithmetic they stand for, against peft, and against tensors nobody may send."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapters.kinds import attach, declared
from adapters.lift import lift
from adapters.norms import adapted_names, base_tensors, update_norms
from adapters.updates import (
    LowRank,
    combined,
    dense,
    fold,
    from_tensors,
    lift_update,
    norm,
    placed,
    require_finite,
    scaled,
    shape_of,
    squared_distance,
    to_tensors,
    truncated,
    turned,
    update_of,
)
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import BadSchema, ConfigError, NotFinite, UnsupportedModel, WrongNames, WrongShape
from offsite.tensors import TensorSpec, write_tensors

IDS = torch.tensor([[5, 17, 200, 3, 44, 90, 12]])


@pytest.fixture(scope="module")
def packages(tmp_path_factory, tiny, make_package):
    made = {}
    for name in ("llama", "gpt2", "phi3"):
        out = tmp_path_factory.mktemp(name) / "package"
        made[name] = make_package(out, model=tiny(name), kept=tuple(range(6)))
    return made


def tuned(package, spec, *, seed=0, size=0.1):
    names = declared(spec, package.layout, package.block_tensors())
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.trainable.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return attached


def base_of(package, spec):
    return base_tensors(package, adapted_names(spec, package.layout, package.block_tensors()))


def updated(package, spec, attached, **more):
    return update_of(spec, attached.tensors(), base_of(package, spec), **more)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def random_update(seed=0, *, ranks=(2, 3), vector=True):
    draw = torch.Generator().manual_seed(seed)
    found = {
        "top.0.q.weight": LowRank(torch.randn(ranks[0], 24, generator=draw), torch.randn(16, ranks[0], generator=draw)),
        "top.0.up.weight": LowRank(
            torch.randn(ranks[1], 12, generator=draw), torch.randn(20, ranks[1], generator=draw)
        ),
    }
    return {**found, "top.0.norm.weight": torch.randn(12, generator=draw)} if vector else found


def as_dense(update):
    return {name: (part.b.double() @ part.a.double() if isinstance(part, LowRank) else part.double())
            for name, part in update.items()}  # fmt: skip


def assert_close(update, expected):
    assert update.keys() == expected.keys()
    for name, part in as_dense(update).items():
        torch.testing.assert_close(part, expected[name], rtol=1e-5, atol=1e-5)


# What an adapter changes


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "blocks", "bitfit"])
def test_folded_the_model_does_what_it_did_with_the_adapter(packages, architecture, kind):
    """The oracle is peft's own forward. GPT-2 has square weights that are stored turned."""
    package = packages[architecture]
    spec = AdapterSpec(kind=kind, placement="1+2", rank=3, alpha=5.0, dtype="float32")
    attached = tuned(package, spec)
    update = updated(package, spec, attached)
    assert set(update) == set(adapted_names(spec, package.layout, package.block_tensors()))
    if kind in {"lora", "rslora"}:
        assert all(isinstance(part, LowRank) and part.rank == 3 for part in update.values())
    model = package.load_model()
    before = logits(model)
    fold(model, update, package.layout.blocks)
    expected = logits(attached.model)
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rslora", "blocks"])
def test_the_norms_are_those_that_the_intake_measures(packages, kind):
    spec = AdapterSpec(kind=kind, placement="1+1", rank=3, dtype="float32")
    attached = tuned(packages["gpt2"], spec)
    update = updated(packages["gpt2"], spec, attached)
    for name, found in update_norms(spec, attached.tensors(), base_of(packages["gpt2"], spec)).items():
        tensor = name if kind == "blocks" else f"{name}.weight"
        assert norm({tensor: update[tensor]}) == pytest.approx(found.frobenius, rel=1e-5)


def test_an_orientation_that_square_weights_do_not_tell(packages):
    spec = AdapterSpec(kind="lora", placement="1+0", rank=2, dtype="float32")
    package = packages["gpt2"]
    assert turned(package.layout, package.block_tensors())
    for name in ("llama", "phi3"):
        assert not turned(packages[name].layout, packages[name].block_tensors())
    attached = tuned(package, spec)
    whole = updated(package, spec, attached)
    square = "bottom.0.attn.c_proj.weight"
    tensors = {n: t for n, t in attached.tensors().items() if n.startswith("bottom.0.attn.c_proj")}
    base = base_of(package, spec)
    said = update_of(spec, tensors, base, is_conv1d=True)
    assert torch.equal(dense(said[square]), dense(whole[square]))
    assert torch.allclose(dense(update_of(spec, tensors, base)[square]), dense(whole[square]).T)
    with pytest.raises(WrongShape):
        updated(packages["llama"], spec, tuned(packages["llama"], spec), is_conv1d=True)


def test_a_rank_beyond_the_weights_is_dense_and_a_scale_is_folded_in():
    spec = AdapterSpec(kind="lora", rank=4, alpha=6.0, dtype="float32")
    tensors = {"top.0.q.lora_A": torch.randn(4, 3), "top.0.q.lora_B": torch.randn(5, 4)}
    update = update_of(spec, tensors, {"top.0.q.weight": torch.zeros(5, 3)})["top.0.q.weight"]
    assert isinstance(update, torch.Tensor)
    torch.testing.assert_close(update, 1.5 * tensors["top.0.q.lora_B"] @ tensors["top.0.q.lora_A"])


@pytest.mark.parametrize(("kind", "reason"), [("dora", "depends on the weight"), ("own", "is not known")])
def test_kinds_without_an_update_of_their_own(kind, reason):
    with pytest.raises(ConfigError, match=reason):
        update_of(AdapterSpec(kind=kind), {}, {})


def test_what_does_not_fit_its_base():
    spec = AdapterSpec(kind="lora", rank=2, dtype="float32")
    pair = {"top.0.q.lora_A": torch.ones(2, 3), "top.0.q.lora_B": torch.ones(5, 2)}
    with pytest.raises(WrongNames, match="base weight"):
        update_of(spec, pair, {})
    with pytest.raises(WrongShape, match=r"\(5, 3\), expected \(5, 4\)"):
        update_of(spec, pair, {"top.0.q.weight": torch.ones(5, 4)})
    blocks = AdapterSpec(kind="blocks")
    with pytest.raises(WrongNames, match="base weight"):
        update_of(blocks, {"top.0.q.weight": torch.ones(1)}, {})
    with pytest.raises(WrongShape):
        update_of(blocks, {"top.0.q.weight": torch.ones(1)}, {"top.0.q.weight": torch.ones(4)})
    with pytest.raises(NotFinite):
        update_of(spec, {**pair, "top.0.q.lora_A": torch.full((2, 3), math.nan)}, {"top.0.q.weight": torch.ones(5, 3)})
    with pytest.raises(NotFinite, match="larger than float32 holds"):
        update_of(spec, {n: 1e30 * t for n, t in pair.items()}, {"top.0.q.weight": torch.ones(5, 3)})


# Arithmetic


def test_the_sum_is_the_dense_weighted_sum_and_rank_adds_up():
    updates, weights = [random_update(seed) for seed in range(3)], [0.5, -2.0, 0.25]
    found = combined(updates, weights)
    expected = {name: sum(w * as_dense(u)[name] for w, u in zip(weights, updates, strict=True)) for name in updates[0]}
    assert_close(found, expected)
    assert found["top.0.q.weight"].rank == 6
    assert isinstance(found["top.0.up.weight"], torch.Tensor)  # rank 9 of 20 x 12 is more than the dense matrix


def test_the_mean_of_the_factors_is_not_the_mean_of_the_updates():
    """Why factors are never averaged: the mean of the products is not the product of the means.

    Two clients that found the same update in other factors agree; averaged by factors, they cancel out.
    """
    one = random_update(0, vector=False)
    other = {name: LowRank(-part.a, -part.b) for name, part in one.items()}
    assert squared_distance(one, other) < 1e-20
    assert math.sqrt(squared_distance(combined([one, other], [0.5, 0.5]), one)) < 1e-6 * norm(one)
    factors = {name: LowRank((part.a + other[name].a) / 2, (part.b + other[name].b) / 2) for name, part in one.items()}
    assert norm(factors) == 0
    unlike = random_update(1, vector=False)
    mean = combined([one, unlike], [0.5, 0.5])
    averaged = {n: LowRank((p.a + unlike[n].a) / 2, (p.b + unlike[n].b) / 2) for n, p in one.items()}
    assert math.sqrt(squared_distance(mean, averaged)) > 0.5 * norm(mean)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 3))
def test_sums_distances_and_norms_are_those_of_dense_matrices(seed, first, second):
    one, other = random_update(seed), random_update(seed + 1, ranks=(3, 2))
    total = combined([one, other], [first, second])
    dense_one, dense_other = as_dense(one), as_dense(other)
    assert_close(total, {name: first * dense_one[name] + second * dense_other[name] for name in one})
    expected = sum(float((dense_one[name] - dense_other[name]).square().sum()) for name in one)
    assert squared_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert squared_distance(other, one) == pytest.approx(expected, rel=1e-12)
    assert norm(one) == pytest.approx(math.sqrt(sum(float(part.square().sum()) for part in dense_one.values())))
    mixed = {**other, "top.0.q.weight": dense(other["top.0.q.weight"])}
    assert squared_distance(one, mixed) == pytest.approx(expected, rel=1e-5)


def test_close_updates_in_factors_are_told_apart():
    """Through inner products the distance would drown in rounding at 1e-8 of the norm."""
    one = random_update()
    near = {**one, "top.0.q.weight": LowRank(one["top.0.q.weight"].a * (1 + 2**-20), one["top.0.q.weight"].b)}
    expected = float((as_dense(one)["top.0.q.weight"] - as_dense(near)["top.0.q.weight"]).norm())
    assert 0 < expected < 2e-6 * norm(one)
    assert math.sqrt(squared_distance(one, near)) == pytest.approx(expected, rel=1e-6)
    assert math.sqrt(squared_distance(one, one)) < 1e-13 * norm(one)


def test_scaling():
    one = random_update()
    assert_close(scaled(one, -0.5), {name: -0.5 * part for name, part in as_dense(one).items()})
    for factor in (math.nan, math.inf):
        with pytest.raises(ConfigError):
            scaled(one, factor)


def test_sums_that_are_refused():
    one = random_update()
    less = {name: part for name, part in one.items() if "norm" not in name}
    for other in (less, {**one, "top.1.q.weight": one["top.0.q.weight"]}):
        with pytest.raises(WrongNames, match="only one of two updates changes"):
            combined([one, other], [1, 1])
        with pytest.raises(WrongNames):
            squared_distance(one, other)
    wide = {**one, "top.0.norm.weight": torch.ones(1)}  # would be broadcast
    for pair in ((one, wide), (wide, one)):
        with pytest.raises(WrongShape):
            combined(pair, [1, 1])
        with pytest.raises(WrongShape):
            squared_distance(*pair)
    for updates, weights in (([], []), ([one], [1, 1]), ([one], [math.nan])):
        with pytest.raises(ConfigError):
            combined(updates, weights)


def test_truncation_is_the_best_there_is():
    update = {
        **random_update(ranks=(5, 4)),
        "top.0.dense.weight": torch.randn(9, 14),
        "top.0.stack": torch.ones(2, 3, 4),
    }
    found, error = truncated(update, 3)
    lost = 0.0
    for name, part in as_dense(update).items():
        if part.dim() != 2:
            assert found[name] is update[name]
            continue
        left, sizes, right = torch.linalg.svd(part, full_matrices=False)
        best = left[:, :3] * sizes[:3] @ right[:3]
        assert found[name].rank == 3
        torch.testing.assert_close(as_dense(found)[name], best, rtol=1e-5, atol=1e-5)
        lost += float(sizes[3:].square().sum())
    assert error == pytest.approx(math.sqrt(lost) / norm(update), rel=1e-9)
    assert error == pytest.approx(math.sqrt(squared_distance(update, found)) / norm(update), rel=1e-5)


def test_truncation_to_enough_loses_nothing():
    update = random_update()
    found, error = truncated(update, 3)
    assert all(found[name] is part for name, part in update.items())
    assert error == 0
    doubled, error = truncated(combined([update, update], [0.5, 0.5]), 3)
    assert error < 1e-7
    assert_close(doubled, as_dense(update))
    assert truncated({"x": torch.zeros(4, 5)}, 2)[1] == 0
    with pytest.raises(ConfigError):
        truncated(update, 0)
    with pytest.raises(NotFinite):
        truncated({"x": torch.full((4, 5), math.nan)}, 2)


# As files


def specs(update):
    return {name: TensorSpec(shape=shape_of(part), dtype="bfloat16") for name, part in update.items()}


def test_the_round_trip_through_a_file(tmp_path):
    update = random_update()
    shapes = {**specs(update), "top.1.unchanged.weight": TensorSpec(shape=(3,), dtype="float32")}
    write_tensors(tmp_path / "update.safetensors", to_tensors(update))
    found = from_tensors("the update", load_file(tmp_path / "update.safetensors"), shapes)
    assert found.keys() == update.keys()
    for name, part in update.items():
        assert type(found[name]) is type(part)
        assert torch.equal(dense(found[name]), dense(part))
    assert from_tensors("nothing", {}, shapes) == {}


Q = "top.0.q.weight"
TAMPERED = {
    "another name": (lambda t: t.update({"top.9.q.weight": torch.ones(16, 24)}), WrongNames),
    "factors of another name": (
        lambda t: t.update({"x.lora_A": torch.ones(1, 2), "x.lora_B": torch.ones(2, 1)}), WrongNames
    ),
    "a suffix twice": (lambda t: t.update({f"{Q}.lora_B.lora_A": torch.ones(2, 2)}), WrongNames),
    "a long name": (lambda t: t.update({"x" * 9999: torch.ones(2, 2)}), WrongNames),
    "one factor": (lambda t: t.pop(f"{Q}.lora_A"), WrongNames),
    "the other factor": (lambda t: t.pop(f"{Q}.lora_B"), WrongNames),
    "both forms": (lambda t: t.update({Q: torch.ones(16, 24)}), WrongNames),
    "one factor and the whole": (lambda t: (t.pop(f"{Q}.lora_A"), t.update({Q: torch.ones(16, 24)})), WrongNames),
    "ranks that differ": (lambda t: t.update({f"{Q}.lora_A": torch.ones(3, 24)}), WrongShape),
    "a factor of one dimension": (lambda t: t.update({f"{Q}.lora_A": torch.ones(24)}), WrongShape),
    "no rank": (lambda t: t.update({f"{Q}.lora_A": torch.ones(0, 24), f"{Q}.lora_B": torch.ones(16, 0)}), WrongShape),
    "too much rank": (
        lambda t: t.update({f"{Q}.lora_A": torch.ones(17, 24), f"{Q}.lora_B": torch.ones(16, 17)}), WrongShape
    ),
    "a product of another shape": (lambda t: t.update({f"{Q}.lora_B": torch.ones(15, 2)}), WrongShape),
    "a shape that would be broadcast": (lambda t: t.update({"top.0.norm.weight": torch.ones(1)}), WrongShape),
    "factors of a vector": (
        lambda t: (t.pop("top.0.norm.weight"), t.update({
            "top.0.norm.weight.lora_A": torch.ones(1, 12), "top.0.norm.weight.lora_B": torch.ones(1, 1)
        })), WrongShape,
    ),
    "another dtype": (lambda t: t.update({"top.0.norm.weight": torch.ones(12).double()}), WrongShape),
    "half precision": (lambda t: t.update({f"{Q}.lora_B": torch.ones(16, 2).bfloat16()}), WrongShape),
    "numbers": (lambda t: t.update({"top.0.norm.weight": torch.ones(12).long()}), WrongShape),
    "a sparse tensor": (lambda t: t.update({Q: torch.ones(16, 24).to_sparse()}), WrongShape),
    "a NaN": (lambda t: t["top.0.norm.weight"].fill_(math.nan), NotFinite),
    "an infinity": (lambda t: t[f"{Q}.lora_A"][0, :1].fill_(math.inf), NotFinite),
    "an infinite product": (lambda t: (t[f"{Q}.lora_A"].fill_(1e30), t[f"{Q}.lora_B"].fill_(1e30)), NotFinite),
    "subnormal numbers": (lambda t: t[f"{Q}.lora_A"].fill_(1e-39), BadSchema),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_what_is_refused(name):
    change, error = TAMPERED[name]
    update = random_update()
    tensors = {key: tensor.clone() for key, tensor in to_tensors(update).items()}
    change(tensors)
    with pytest.raises(error, match=r"^update of 'a': ") as caught:
        from_tensors("update of 'a'", tensors, specs(update))
    assert len(str(caught.value)) < 400
    require_finite("untouched", update)


@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 3)), ((3,), (3, 3)), ((0, 3), (3, 0))])
def test_factors_that_make_no_matrix(a, b):
    with pytest.raises(WrongShape):
        LowRank(torch.ones(a), torch.ones(b))
    with pytest.raises(WrongShape, match="float32"):
        LowRank(torch.ones(2, 3).double(), torch.ones(3, 2).double())


# In a model


def test_folding_keeps_dtypes_and_leaves_what_shares_storage(packages):
    package = packages["llama"]
    spec = AdapterSpec(kind="lora", placement="1+0", rank=2, dtype="float32")
    update = updated(package, spec, tuned(package, spec))
    model = package.load_model().bfloat16()
    shared = {name: parameter.data for name, parameter in model.named_parameters()}
    before = {name: data.clone() for name, data in shared.items()}
    fold(model, update, package.layout.blocks)
    changed = {placed(name, package.layout.blocks) for name in update}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(shared[name], before[name])
        assert torch.equal(parameter, before[name]) == (name not in changed)
    for name, part in update.items():
        path = placed(name, package.layout.blocks)
        expected = (before[path].double() + as_dense({name: part})[name]).bfloat16()
        assert torch.equal(model.get_parameter(path), expected)


def test_folding_that_is_refused_changes_nothing(packages):
    package = packages["llama"]
    model = package.load_model()
    before = copy.deepcopy(model.state_dict())
    fine = {"top.0.self_attn.q_proj.weight": torch.ones(32, 32)}
    blocks = package.layout.blocks
    for update, error in (
        ({**fine, "top.0.self_attn.none.weight": torch.ones(3)}, WrongNames),
        ({**fine, "top.7.self_attn.q_proj.weight": torch.ones(3)}, WrongNames),
        ({**fine, "lm_head": torch.ones(3)}, WrongNames),
        ({**fine, "top.0": torch.ones(3)}, WrongNames),
        ({**fine, "top.0.self_attn.k_proj.weight": torch.ones(1)}, WrongShape),
        ({**fine, "top.0.self_attn.k_proj.weight": torch.full((16, 32), math.nan)}, NotFinite),
    ):
        with pytest.raises(error):
            fold(model, update, blocks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    block = model.get_submodule(blocks["top.0"])
    block.self_attn.o_proj.weight = block.self_attn.q_proj.weight
    with pytest.raises(UnsupportedModel, match="is tied to another one"):
        fold(model, fine, blocks)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before if "o_proj" not in name)
    half = package.load_model().half()
    with pytest.raises(NotFinite, match="folded model"):
        fold(half, {"top.0.self_attn.q_proj.weight": torch.full((32, 32), 1e6)}, blocks)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_lifting_is_lifting_the_factors_and_multiplying(tmp_path, tiny, make_package, name):
    from offsite.artefacts.owner import owner_record_path, read_owner_record
    from offsite.modelling.blocks import linear_dims, linear_names

    full = tiny(name)
    channels = {"middle.0": (1, 2, 3, 7, 40), "middle.1": tuple(range(0, 48, 2))}
    package = make_package(tmp_path / "package", model=full, kept=tuple(range(6)), channels=channels)
    record = read_owner_record(owner_record_path(package.path))
    spec = AdapterSpec(kind="lora", placement="all", rank=3, dtype="float32")
    attached = tuned(package, spec)
    update = updated(package, spec, attached, is_conv1d=turned(package.layout, package.block_tensors()))
    dims, shapes = {}, {}
    for canonical, module in record.sites.items():
        block = full.get_submodule(module)
        dims.update({f"{canonical}.{inner}": linear_dims(block.get_submodule(inner)) for inner in linear_names(block)})
        shapes.update({f"{canonical}.{inner}": tuple(p.shape) for inner, p in block.named_parameters()})
    lifted = lift(attached.tensors(), record.channels, dims)
    base = {name: torch.zeros(shapes[name]) for name in update}
    expected = update_of(spec, lifted, base)
    found = lift_update(update, record.channels, shapes)
    whole = lift_update({n: dense(part) for n, part in update.items()}, record.channels, shapes)
    assert found.keys() == expected.keys()
    assert any(shape_of(found[n]) != shape_of(update[n]) for n in update)
    for key, part in found.items():
        assert shape_of(part) == shapes[key]
        torch.testing.assert_close(dense(part), dense(expected[key]))
        torch.testing.assert_close(whole[key], dense(expected[key]))
    fold(full, found, record.sites)


def test_lifting_that_is_refused():
    update = {"middle.0.up.weight": LowRank(torch.ones(2, 8), torch.ones(3, 2)), "top.0.up.weight": torch.ones(6, 8)}
    channels, shapes = {"middle.0": (0, 2, 4)}, {"middle.0.up.weight": (6, 8), "top.0.up.weight": (6, 8)}
    found = lift_update(update, channels, shapes)
    assert found["top.0.up.weight"] is update["top.0.up.weight"]
    assert dense(found["middle.0.up.weight"]).sum(1).tolist() == [16, 0, 16, 0, 16, 0]
    for changed, wrong, error in (
        (channels, {"top.0.up.weight": (6, 8)}, WrongNames),
        ({}, shapes, WrongShape),
        ({"middle.0": (0, 2)}, shapes, WrongShape),
        ({"middle.0": (0, 2, 6)}, shapes, WrongShape),
        (channels, {**shapes, "middle.0.up.weight": (6, 9)}, WrongShape),
        (channels, {**shapes, "middle.0.up.weight": (6, 8, 1)}, WrongShape),
        (channels, {**shapes, "top.0.up.weight": (6, 9)}, WrongShape),
    ):
        with pytest.raises(error):
            lift_update(update, changed, wrong)
