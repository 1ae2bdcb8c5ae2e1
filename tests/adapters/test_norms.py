"""Norms of effective updates against what peft itself merges, and the attacks they are there for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import norms as module
from adapters.kinds import attach, declared
from adapters.norms import (
    MATRIX_FLOOR,
    VECTOR_FLOOR,
    UpdateNorms,
    adapted_names,
    base_tensors,
    check_norms,
    update_norms,
)
from offsite.artefacts import package as package_module
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.package import open_package
from offsite.errors import BadSchema, ConfigError, NormTooLarge, NotFinite, WrongNames, WrongShape

KINDS = ["lora", "rslora", "dora", "blocks", "bitfit"]
LORA = AdapterSpec(kind="lora", rank=2, alpha=3.0, dtype="float32")
CAPS = {"max_relative_frobenius": 1.0, "max_relative_spectral": 2.0}


def tuned(package, spec, *, seed=0, size=0.05):
    """An adapter on the package's model in float64, moved from where it starts by noise."""
    names = declared(spec, package.layout, package.block_tensors())
    attached = attach(package.load_model().double(), spec, package.layout.blocks, names)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.trainable.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return attached


def norms_of(package, spec, tensors):
    names = adapted_names(spec, package.layout, package.block_tensors())
    return update_norms(spec, tensors, base_tensors(package, names))


@pytest.fixture(scope="module")
def packages(tmp_path_factory, tiny, make_package):
    made = {}
    for name in ("llama", "gpt2", "phi3"):
        out = tmp_path_factory.mktemp(name) / "package"
        made[name] = make_package(out, model=tiny(name), kept=(0, 1, 2, 4, 5))
    return made


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_the_merged_weights_difference(packages, architecture, kind):
    """The oracle: merge with peft, subtract, take dense norms. GPT-2 has square weights that are stored turned."""
    package = packages[architecture]
    spec = AdapterSpec(kind=kind, placement="1+2", rank=3, alpha=5.0, dtype="float32")
    attached = tuned(package, spec)
    found = norms_of(package, spec, attached.tensors())
    merged = attached.model.merge_and_unload() if hasattr(attached.model, "merge_and_unload") else attached.model
    before, after = package.load_model().double().state_dict(), merged.state_dict()
    assert found
    for name, norms in found.items():
        block, inner = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:])
        stored = f"{package.layout.blocks[block]}.{inner}" + ("" if kind in {"blocks", "bitfit"} else ".weight")
        base = before[stored].double()
        update = after[stored].double() - base
        assert update.norm() > 0
        wide = (lambda tensor: tensor) if base.dim() == 2 else (lambda tensor: tensor[None])
        expected = UpdateNorms(
            float(update.norm()),
            float(torch.linalg.svdvals(wide(update))[0]),
            float(base.norm()),
            float(torch.linalg.svdvals(wide(base))[0]),
        )
        for field in ("frobenius", "spectral", "base_frobenius", "base_spectral"):
            assert getattr(norms, field) == pytest.approx(getattr(expected, field), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_changes_nothing(packages, kind):
    spec = AdapterSpec(kind=kind, placement="1+1", rank=2, dtype="float32")
    found = norms_of(packages["gpt2"], spec, tuned(packages["gpt2"], spec, size=0.0).tensors())
    assert max(norms.relative_spectral for norms in found.values()) < 1e-6
    check_norms(found, max_relative_frobenius=1e-6, max_relative_spectral=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_named_base_tensors_are_read(tmp_path, make_package, monkeypatch, kind):
    monkeypatch.setattr(package_module, "SHARD_LIMIT_BYTES", 60_000)
    package = open_package(make_package(tmp_path / "package").path)
    assert len(list(package.path.glob("*.safetensors"))) > 2
    spec = AdapterSpec(kind=kind, placement="1+2", targets="attention", rank=2)
    names = adapted_names(spec, package.layout, package.block_tensors())
    reads = []
    import safetensors

    class Watched:
        def __init__(self, path, framework):
            self.inner = original(path, framework=framework)

        def __enter__(self):
            self.inner.__enter__()
            return self

        def __exit__(self, *of):
            self.inner.__exit__(*of)

        def get_tensor(self, name):
            reads.append(name)
            return self.inner.get_tensor(name)

    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    found = base_tensors(package, names)
    assert tuple(found) == names
    assert len(reads) == len(names) == len(set(reads))
    state = package.load_model().state_dict()
    for name, tensor in found.items():
        role, number, inner = name.split(".", 2)
        assert torch.equal(tensor, state[f"{package.layout.blocks[f'{role}.{number}']}.{inner}"])
    in_lora = {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
    }
    if kind in {"lora", "rslora", "dora"}:
        assert {name.split(".", 2)[2] for name in names} == in_lora


@pytest.mark.parametrize("name", ["top.9.mlp.up_proj.weight", "top.0.mlp.none.weight", "lm_head.weight", "x", "top.0"])
def test_a_base_tensor_that_is_not_there(dropped_package, name):
    with pytest.raises(WrongNames):
        base_tensors(dropped_package, ["top.0.mlp.up_proj.weight", name])


def pair(k=1.0, *, size=0.1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    a = size * torch.randn(2, 24, generator=generator)
    b = size * torch.randn(16, 2, generator=generator)
    return {"top.0.q.lora_A": (k * a).to(dtype), "top.0.q.lora_B": (b / k).to(dtype)}


def weight(size=0.2):
    return {"top.0.q.weight": size * torch.randn(16, 24, generator=torch.Generator().manual_seed(2))}


@settings(max_examples=60, deadline=None)
@given(st.floats(-6, 6), st.sampled_from(["lora", "rslora", "dora"]))
def test_row_19_the_scale_may_move_between_the_factors(exponent, kind):
    spec = LORA.model_copy(update={"kind": kind})
    more = {"top.0.q.magnitude": weight()["top.0.q.weight"].norm(dim=1)} if kind == "dora" else {}
    plain = update_norms(spec, {**pair(), **more}, weight())["top.0.q"]
    moved = update_norms(spec, {**pair(10**exponent), **more}, weight())["top.0.q"]
    assert moved.frobenius == pytest.approx(plain.frobenius, rel=1e-6)
    assert moved.spectral == pytest.approx(plain.spectral, rel=1e-6)
    for share, refused in ((0.999, True), (1.001, False)):  # the same verdict on both sides of the border
        caps = {"max_relative_frobenius": share * plain.relative_frobenius, "max_relative_spectral": 9.0}
        for norms in (plain, moved):
            assert verdict({"top.0.q": norms}, caps) is refused


def verdict(norms, caps=CAPS):
    try:
        check_norms(norms, **caps)
    except NormTooLarge:
        return True
    return False


@pytest.mark.parametrize("size", [30.0, 1e10, 3e18])
def test_row_19_a_norm_bomb(size):
    with pytest.raises(
        NormTooLarge, match=r"^'top\.0\.q': the update's Frobenius norm is .* times .*, at most 1 is all"
    ):
        check_norms(
            update_norms(LORA, pair(size=size), weight()), max_relative_frobenius=1.0, max_relative_spectral=1e99
        )


@pytest.mark.parametrize("kind", ["lora", "blocks"])
@pytest.mark.parametrize("size", [256, 700])
def test_row_19_a_spike_of_rank_one(kind, size):
    """Within the Frobenius limit, and many times what the base weight does to any input."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, size, generator=generator) / size**0.5
    left, right = (torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0) for _ in range(2))
    spike = 0.9 * base.norm() * torch.outer(left, right)
    if kind == "lora":
        zeros = torch.zeros(1, size)
        tensors = {"m.lora_A": torch.cat([right[None], zeros]), "m.lora_B": torch.cat([left[None], zeros]).T}
        tensors["m.lora_B"] = 0.9 * base.norm() * tensors["m.lora_B"] / 1.5
        found = update_norms(LORA, tensors, {"m.weight": base})
    else:
        spec = AdapterSpec(kind="blocks")
        found = update_norms(spec, {"m.weight": base + spike}, {"m.weight": base})
    (norms,) = found.values()
    assert norms.relative_frobenius == pytest.approx(0.9, rel=1e-5)
    with pytest.raises(NormTooLarge, match=r"the update's spectral norm is .* at most 2 is allowed"):
        check_norms(found, **CAPS)


def test_row_18_a_norm_that_overflows_half_precision():
    """The norm of these values is infinite in float16 and clipping by it would give zero; here it is what it is."""
    new = torch.full((16, 24), 6e4, dtype=torch.float16)
    assert not torch.isfinite(new.norm())
    found = update_norms(AdapterSpec(kind="blocks"), {"top.0.q.weight": new}, weight())
    assert found["top.0.q.weight"].frobenius == pytest.approx(6e4 * (16 * 24) ** 0.5, rel=1e-4)
    with pytest.raises(NormTooLarge):
        check_norms(found, **CAPS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["top.0.q.lora_A", "top.0.q.lora_B"])
def test_row_18_what_is_not_finite(name, value):
    tensors = pair()
    tensors[name][1, 1] = value
    with pytest.raises(NotFinite, match="holds NaN or infinity"):
        update_norms(LORA, tensors, weight())


def test_row_18_a_norm_that_overflows():
    tensors = {name: torch.full_like(tensor, 1e200, dtype=torch.float64) for name, tensor in pair().items()}
    with pytest.raises(NotFinite, match="has no finite norm"):
        update_norms(LORA, tensors, weight())
    dead = {"top.0.q.weight": torch.zeros(16, 24)}
    still = {name: torch.zeros_like(tensor) for name, tensor in pair().items()}
    with pytest.raises(NotFinite, match="has no finite norm"):  # DoRA divides by the rows' norms
        update_norms(LORA.model_copy(update={"kind": "dora"}), {**still, "top.0.q.magnitude": torch.ones(16)}, dead)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_row_18_a_flood_of_subnormal_numbers(dtype):
    tensors = pair(dtype=dtype)
    tensors["top.0.q.lora_A"].fill_(torch.finfo(dtype).tiny / 4)
    with pytest.raises(BadSchema, match=r"48 of 48 values of tensor 'top\.0\.q\.lora_A' are subnormal"):
        update_norms(LORA, tensors, weight())


def test_a_base_of_nothing_counts_as_small():
    spec = AdapterSpec(kind="bitfit")
    bias = {"top.0.q.bias": torch.zeros(400)}
    for rms, refused in ((0.9 * VECTOR_FLOOR, False), (1.1 * VECTOR_FLOOR, True)):
        assert verdict(update_norms(spec, {"top.0.q.bias": torch.full((400,), rms)}, bias)) is refused
    nothing = {"top.0.q.weight": torch.zeros(16, 24)}
    low = update_norms(LORA, pair(size=0.4 * MATRIX_FLOOR**0.5), nothing)
    assert low["top.0.q"].base_frobenius == 0
    assert not verdict(low)
    assert verdict(update_norms(LORA, pair(size=3 * MATRIX_FLOOR**0.5), nothing))
    assert UpdateNorms(0, 0, 0, 0).relative_spectral == 0
    assert verdict({"x": UpdateNorms(1e-9, 1e-9, 0, 0)})


def test_a_stack_of_matrices_counts_by_its_largest():
    base = torch.randn(3, 8, 5, dtype=torch.float64)
    new = base.clone()
    new[1] += 1.0
    found = update_norms(AdapterSpec(kind="blocks"), {"top.0.experts": new}, {"top.0.experts": base})["top.0.experts"]
    assert found.spectral == pytest.approx(40**0.5)
    assert found.base_spectral == pytest.approx(max(float(torch.linalg.svdvals(one)[0]) for one in base))


def noise(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)


def entry(rows, columns, value):
    found = torch.zeros(rows, columns, dtype=torch.float64)
    found[7, 9] = value
    return found


LARGE = {
    "random": noise(600, 900),
    "rank three": noise(600, 3) @ noise(3, 700),
    "nothing": torch.zeros(600, 700, dtype=torch.float64),
    "equal values": torch.eye(600, dtype=torch.float64),
    "one entry": entry(600, 700, 7.0),
    "an entry just above the noise": noise(600, 700) + entry(600, 700, 55.0),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_matrices_are_measured_in_a_krylov_space(name):
    matrix = LARGE[name]
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    assert module._largest_lanczos(matrix) == pytest.approx(exact, rel=1e-6)
    assert module.spectral(matrix) <= exact * (1 + 1e-12)


def test_the_worst_is_named():
    fine = UpdateNorms(0.5, 0.5, 1.0, 1.0)
    norms = {"a": fine, "b": dataclasses.replace(fine, spectral=2.5), "c": dataclasses.replace(fine, frobenius=1.5)}
    with pytest.raises(
        NormTooLarge, match=r"^'c': the update's Frobenius norm is 1\.5 times the base weight's"
    ) as caught:
        check_norms(norms, **CAPS)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    check_norms({"a": fine, "d": UpdateNorms(1.0, 2.0, 1.0, 1.0)}, **CAPS)
    assert verdict({"n": UpdateNorms(float("nan"), 0.0, 1.0, 1.0)})


def test_what_does_not_fit_is_refused():
    with pytest.raises(WrongNames, match=r"base weight 'top\.0\.q\.weight'"):
        update_norms(LORA, pair(), {})
    for base in (torch.ones(16, 25), torch.ones(15, 24), torch.ones(24)):
        with pytest.raises(WrongShape):
            update_norms(LORA, pair(), {"top.0.q.weight": base})
    with pytest.raises(WrongShape):
        update_norms(AdapterSpec(kind="blocks"), {"top.0.q.weight": torch.ones(1)}, weight())
    for change in ({"top.0.q.lora_B": torch.ones(16, 3)}, {"top.0.q.lora_A": torch.ones(24)}):
        with pytest.raises(WrongShape, match="can be multiplied"):
            update_norms(LORA, {**pair(), **change}, weight())
    spec = LORA.model_copy(update={"kind": "dora"})
    with pytest.raises(WrongShape, match="magnitude"):
        update_norms(spec, {**pair(), "top.0.q.magnitude": torch.ones(1)}, weight())


def test_a_kind_without_known_update_is_refused(dropped_package):
    spec = AdapterSpec(kind="own")
    with pytest.raises(ConfigError, match="what it changes in the model is not known"):
        update_norms(spec, {}, {})
    with pytest.raises(ConfigError):
        adapted_names(spec, dropped_package.layout, dropped_package.block_tensors())
