"""What is summed up in secret: the mean of vectors makes the mean of updates, and a clipped vector always fits."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.kinds import declared
from adapters.norms import adapted_names, base_tensors
from adapters.updates import combined, dense, norm, squared_distance, turned, update_of
from adapters.vector import clipped, length, require_summable, update_from, vector_of, vector_shapes
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError, NotFinite, RunFailed, WrongNames, WrongShape
from offsite.secagg.fixedpoint import Encoding, encode_tensors
from offsite.tensors import torch_dtype


@pytest.fixture(scope="module")
def packages(tmp_path_factory, make_package, tiny):
    folder = tmp_path_factory.mktemp("packages")
    return {
        name: make_package(folder / name, model=tiny(name), kept=(0, 1, 2, 4, 5), ends=(2, 2))
        for name in ("llama", "gpt2")
    }


def drawn(spec, package, *, seed, shared):
    """An adapter's tensors as a client holds them: near the package's for whole tensors, on a shared A for LoRA."""
    expected = declared(spec, package.layout, package.block_tensors())
    generator = torch.Generator().manual_seed(seed)
    base = base_tensors(package, expected) if spec.kind in ("blocks", "bitfit") else {}
    found = {}
    for name, one in expected.items():
        tensor = 0.1 * torch.randn(one.shape, generator=generator)
        found[name] = (base[name].float() + tensor if base else tensor).to(torch_dtype(one.dtype))
        if name.endswith(".lora_A"):
            found[name] = shared.setdefault(name, found[name])
    return found


def base_of(spec, package):
    return base_tensors(package, adapted_names(spec, package.layout, package.block_tensors()))


SPECS = {
    "lora": {"kind": "lora", "rank": 3, "alpha": 5.0},
    "rslora": {"kind": "rslora", "rank": 4},
    "lora, bfloat16": {"kind": "lora", "rank": 2, "dtype": "bfloat16"},
    "lora of more rank than a weight has": {"kind": "lora", "rank": 40},
    "blocks": {"kind": "blocks"},
    "bitfit": {"kind": "bitfit"},
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", SPECS)
def test_the_mean_of_vectors_makes_the_mean_of_updates(packages, architecture, kind):
    package, shared = packages[architecture], {}
    spec = AdapterSpec(**{"dtype": "float32", "placement": "1+1", **SPECS[kind]})
    base, clients = base_of(spec, package), [drawn(spec, package, seed=seed, shared=shared) for seed in range(4)]
    is_conv1d = turned(package.layout, package.block_tensors())
    assert is_conv1d is (architecture == "gpt2")
    vectors = [vector_of(spec, tensors, base) for tensors in clients]
    mean = {name: torch.stack([one[name].double() for one in vectors]).mean(0) for name in vectors[0]}
    found = update_from(spec, mean, shared, base, is_conv1d=is_conv1d)
    expected = combined([update_of(spec, tensors, base, is_conv1d=is_conv1d) for tensors in clients], [0.25] * 4)
    assert math.sqrt(squared_distance(found, expected)) <= 1e-6 * norm(expected)
    shapes = vector_shapes(declared(spec, package.layout, package.block_tensors()))
    assert [shape.name for shape in shapes] == sorted(vectors[0])
    assert {shape.name: shape.shape for shape in shapes} == {n: tuple(t.shape) for n, t in vectors[0].items()}
    assert all(tensor.dtype == torch.float32 for tensor in vectors[0].values())


def test_a_vector_has_storage_of_its_own(packages):
    spec = AdapterSpec(kind="lora", rank=2, dtype="float32", placement="1+1")
    tensors = drawn(spec, packages["llama"], seed=0, shared={})
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in vector_of(spec, tensors, {}).values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_a_mean_that_is_none_makes_no_update(packages):
    package = packages["llama"]
    spec = AdapterSpec(kind="blocks", dtype="float32", placement="1+0")
    base = base_of(spec, package)
    good = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in base.items()}
    name = min(good)
    rows = (
        (WrongNames, {key: tensor for key, tensor in good.items() if key != name}),
        (WrongNames, {**good, "middle.0.x": torch.zeros(1)}),
        (WrongShape, {**good, name: torch.zeros(1)}),
    )
    for expected, mean in rows:
        with pytest.raises(expected):
            update_from(spec, mean, {}, base, is_conv1d=False)
    spec, shared = AdapterSpec(kind="lora", rank=2, dtype="float32", placement="1+0"), {}
    mean = vector_of(spec, drawn(spec, package, seed=0, shared=shared), {})
    base = base_of(spec, package)
    name = min(mean)
    for expected, changed in (
        (WrongShape, {**mean, name: mean[name][:1]}),
        (NotFinite, {**mean, name: mean[name] / 0}),
    ):
        with pytest.raises(expected):
            update_from(spec, changed, shared, base, is_conv1d=False)


@pytest.mark.parametrize(
    ("kind", "share_a", "is_summable"),
    [
        ("lora", True, True), ("rslora", True, True), ("blocks", False, True), ("bitfit", False, True),
        ("lora", False, False), ("rslora", False, False), ("dora", True, False), ("dora", False, False),
    ],
)  # fmt: skip
def test_kinds_that_may_be_added_up(kind, share_a, is_summable):
    spec = AdapterSpec(kind=kind, rank=2)
    if is_summable:
        require_summable(spec, share_a=share_a)
        return
    with pytest.raises(ConfigError):
        require_summable(spec, share_a=share_a)


@pytest.mark.parametrize("clip", [1e-6, 0.37, 1.0, 3.0, 1e4])
@pytest.mark.parametrize("numbers", [1, 3, 10_000])
def test_a_clipped_vector_is_no_longer_than_the_clip_and_goes_into_the_encoding(clip, numbers):
    generator = torch.Generator().manual_seed(numbers)
    long = torch.randn(numbers, generator=generator, dtype=torch.float64).float()
    one = {"a": torch.zeros(2, 2), "b": (long * (7 * clip / long.norm())).to(torch.bfloat16).float()}
    found, before = clipped(one, clip)
    assert before == pytest.approx(7 * clip, rel=1e-2)
    assert clip * (1 - 2**-18) <= length(found) <= clip
    cosine = torch.nn.functional.cosine_similarity(found["b"].double(), one["b"].double(), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-6)
    shapes = vector_shapes({name: _Spec(tensor) for name, tensor in found.items()})
    encode_tensors(found, shapes, Encoding(limit=clip, bits=32, num_summands=5))


class _Spec:
    def __init__(self, tensor):
        self.shape = tuple(tensor.shape)


@pytest.mark.parametrize("size", [0.0, 0.5, 1 - 2**-10, 1 - 2**-21, 1.0, 1 + 2**-21, 1 + 2**-10])
def test_at_the_clip_exactly_nothing_is_refused(size):
    """One number may be as large as the whole vector is long."""
    found, before = clipped({"a": torch.tensor([size], dtype=torch.float32)}, 1.0)
    assert before == pytest.approx(size, abs=1e-7)
    assert float(found["a"]) <= 1
    assert float(found["a"]) == pytest.approx(min(size, 1.0), abs=2**-19)
    if size < 1 - 2**-20:
        assert float(found["a"]) == before
    Encoding(limit=1.0, bits=32, num_summands=1024).encode(found["a"].numpy())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_does_not_pass_for_a_clipped_one(value):
    found, _ = clipped({"a": torch.tensor([value, 1.0])}, 1.0)
    with pytest.raises(RunFailed, match="NaN or infinity"):
        Encoding(limit=1.0, bits=32, num_summands=3).encode(found["a"].numpy())


def test_length_is_over_all_tensors():
    assert length({"a": torch.full((2, 2), 3.0), "b": torch.tensor([8.0])}) == 10.0
    assert length({}) == 0.0
    assert dense(torch.ones(2)).sum() == 2
