"""The mean of several runs against the mean of the dense updates, worked out here from nothing but the tensors."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.average import mean_of, mean_spec
from adapters.kinds import attach, declared
from adapters.norms import adapted_names, base_tensors
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError, NotFinite, WrongNames, WrongShape

KINDS = ("lora", "rslora", "blocks", "bitfit")
MODELS = ("llama", "gpt2", "phi3", "deepseek_v3")


@pytest.fixture(scope="module")
def packages(tmp_path_factory, tiny, make_package):
    made = {}
    for name in MODELS:
        out = tmp_path_factory.mktemp(name) / "package"
        made[name] = make_package(out, model=tiny(name), kept=tuple(range(6)))
    return made


def attached_to(package, spec):
    names = declared(spec, package.layout, package.block_tensors())
    return attach(package.load_model(), spec, package.layout.blocks, names)


def trained(package, spec, seed, *, size=0.1):
    """What a run might have ended with."""
    found, draw = attached_to(package, spec), torch.Generator().manual_seed(seed)
    return {name: t + size * torch.randn(t.shape, generator=draw) for name, t in found.tensors().items()}


def base_of(package, spec):
    return base_tensors(package, adapted_names(spec, package.layout, package.block_tensors()))


def scale(spec):
    return spec.alpha / (math.sqrt(spec.rank) if spec.kind == "rslora" else spec.rank)


def dense_updates(spec, tensors, base):
    """What the adapter adds to each module or parameter, in float64."""
    if spec.kind in ("blocks", "bitfit"):
        return {name: tensor.double() - base[name].double() for name, tensor in tensors.items()}
    modules = {name.rpartition(".")[0] for name in tensors}
    return {m: scale(spec) * tensors[f"{m}.lora_B"].double() @ tensors[f"{m}.lora_A"].double() for m in sorted(modules)}


def mean_update(spec, runs, base):
    each = [dense_updates(spec, run, base) for run in runs]
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def distance(first, second):
    return math.sqrt(sum(float((first[name] - second[name]).square().sum()) for name in first))


def size_of(update):
    return math.sqrt(sum(float(one.square().sum()) for one in update.values()))


@pytest.mark.parametrize("num_runs", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_exact_mean_is_the_mean_of_the_dense_updates(packages, name, kind, num_runs):
    package, spec = packages[name], AdapterSpec(kind=kind, placement="2+2", rank=3, alpha=5.0, dtype="float32")
    runs, base = [trained(package, spec, seed) for seed in range(num_runs)], base_of(package, spec)
    found, tensors, lost = mean_of(spec, runs, base)
    wanted = mean_update(spec, runs, base)
    assert distance(dense_updates(found, tensors, base), wanted) <= 1e-6 * size_of(wanted)
    assert lost == 0
    expected = declared(found, package.layout, package.block_tensors())
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {
        n: (one.shape, torch.float32) for n, one in expected.items()
    }


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_no_number_of_a_factor_is_touched(packages, kind):
    spec = AdapterSpec(kind=kind, placement="1+1", rank=2, alpha=6.0)
    runs = [trained(packages["llama"], spec, seed) for seed in range(3)]
    found, tensors, _ = mean_of(spec, runs, {})
    assert (found.rank, found.alpha) == (6, 6.0 if kind == "lora" else pytest.approx(6 / math.sqrt(3)))
    for name, tensor in tensors.items():
        axis = 0 if name.endswith("A") else 1
        assert all(torch.equal(part, run[name]) for part, run in zip(tensor.split(2, axis), runs, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_with_the_mean_says_what_its_dense_mean_says(packages, name):
    package, spec = packages[name], AdapterSpec(kind="rslora", placement="all", rank=2, alpha=2.0, dtype="float32")
    runs = [trained(package, spec, seed, size=0.05) for seed in range(2)]
    found, tensors, _ = mean_of(spec, runs, {})
    carrying = attached_to(package, found)
    carrying.load(tensors)
    plain = package.load_model()
    for module, update in mean_update(spec, runs, {}).items():
        role, number, inner = module.split(".", 2)
        weight = plain.get_submodule(f"{package.layout.blocks[f'{role}.{number}']}.{inner}").weight
        turned = name == "gpt2"
        weight.data = (weight.double() + (update.T if turned else update)).float()
    ids = torch.tensor([[5, 17, 200, 3, 44, 90, 12]])
    with torch.no_grad():
        given, wanted = carrying.model(input_ids=ids).logits, plain(input_ids=ids).logits
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_cut_is_the_nearest_of_its_rank_and_says_how_far_off(packages, name, kind, rank):
    package, spec = packages[name], AdapterSpec(kind=kind, placement="1+1", rank=3, alpha=5.0, dtype="float32")
    runs = [trained(package, spec, seed) for seed in range(2)]
    found, tensors, lost = mean_of(spec, runs, {}, rank=rank)
    assert (found.rank, found.alpha) == (rank, spec.alpha)
    wanted = mean_update(spec, runs, {})
    nearest, left_out = {}, 0.0
    for module, update in wanted.items():
        left, sizes, right = torch.linalg.svd(update, full_matrices=False)
        nearest[module] = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        left_out += float(sizes[rank:].square().sum())
    given = dense_updates(found, tensors, {})
    assert distance(given, nearest) <= 1e-5 * size_of(wanted)
    assert lost == pytest.approx(math.sqrt(left_out) / size_of(wanted), rel=1e-5)
    assert lost == pytest.approx(distance(given, wanted) / size_of(wanted), rel=1e-4)
    for module in wanted:  # balanced
        a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
        torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-3, atol=1e-4)


def test_a_module_smaller_than_the_rank_is_filled_up(packages):
    spec = AdapterSpec(kind="lora", placement="1+1", rank=40, alpha=40.0, dtype="float32")  # of 32 channels
    runs = [trained(packages["llama"], spec, seed) for seed in range(2)]
    found, tensors, lost = mean_of(spec, runs, {}, rank=40)
    wanted = mean_update(spec, runs, {})
    assert distance(dense_updates(found, tensors, {}), wanted) <= 1e-5 * size_of(wanted)
    assert lost <= 1e-6
    assert {t.shape[0] for n, t in tensors.items() if n.endswith("lora_A")} == {40}


def test_factors_that_all_runs_share_stay_and_nothing_is_cut(packages):
    spec = AdapterSpec(kind="lora", placement="1+1", rank=3, alpha=5.0, dtype="float32")
    runs = [trained(packages["llama"], spec, seed) for seed in range(3)]
    runs = [{n: runs[0][n] if n.endswith("lora_A") else t for n, t in run.items()} for run in runs]
    found, tensors, lost = mean_of(spec, runs, {}, rank=3)
    wanted = mean_update(spec, runs, {})
    assert (found, lost) == (spec, 0.0)
    assert all(torch.equal(tensors[n], runs[0][n]) for n in tensors if n.endswith("lora_A"))
    assert distance(dense_updates(found, tensors, {}), wanted) <= 1e-6 * size_of(wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [None, 3])
def test_of_one_run_it_is_the_run_bit_for_bit(packages, kind, rank):
    spec = AdapterSpec(kind=kind, placement="1+1", rank=3)
    run = trained(packages["llama"], spec, 4)
    found, tensors, lost = mean_of(spec, [run], {}, rank=rank)
    assert (found, lost) == (spec, 0.0)
    assert tensors.keys() == run.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in run.items())
    assert all(tensors[name].data_ptr() != tensor.data_ptr() for name, tensor in run.items())


def test_deltas_are_averaged_in_float64_and_rounded_once():
    spec = AdapterSpec(kind="blocks", placement="0+1", dtype="float32")
    draw = torch.Generator().manual_seed(3)
    base = {"top.0.w": (1000 * torch.randn(40, 40, generator=draw)).bfloat16()}
    runs = [{"top.0.w": base["top.0.w"].float() + torch.randn(40, 40, generator=draw)} for _ in range(3)]
    _, tensors, _ = mean_of(spec, runs, base)
    start = base["top.0.w"].double()
    exact = start + sum(run["top.0.w"].double() - start for run in runs) / 3
    assert torch.equal(tensors["top.0.w"], exact.float())


LORA = AdapterSpec(kind="lora", placement="0+1", rank=2)
BLOCKS = AdapterSpec(kind="blocks", placement="0+1")
PAIR = {"top.0.q.lora_A": torch.ones(2, 4), "top.0.q.lora_B": torch.ones(3, 2)}
W = {"top.0.w": torch.ones(3)}
REFUSED = [
    (LORA, [], {}, {}, ConfigError, "no run"),
    (AdapterSpec(kind="dora"), [PAIR, PAIR], {}, {}, ConfigError, "several runs have no mean"),
    (AdapterSpec(kind="mine"), [PAIR, PAIR], {}, {}, ConfigError, "several runs have no mean"),
    (LORA, [PAIR, PAIR], {}, {"rank": 0}, ConfigError, "would have rank 0"),
    (AdapterSpec(kind="lora", rank=2049), [PAIR, PAIR], {}, {}, ConfigError, "would have rank 4098"),
    (LORA, [PAIR, {**PAIR, "top.0.q.lora_B": torch.ones(3, 3)}], {}, {}, WrongShape, "run 2"),
    (LORA, [PAIR, {**PAIR, "top.0.q.lora_B": torch.ones(3, 2).bfloat16()}], {}, {}, WrongShape, "run 2"),
    (LORA, [PAIR, {"top.0.q.lora_A": torch.ones(2, 4)}], {}, {}, WrongNames, "run 2"),
    (LORA, [W, W], {}, {}, WrongNames, "no factor"),
    (LORA, [PAIR, {**PAIR, "top.0.q.lora_B": torch.full((3, 2), math.nan)}], {}, {}, NotFinite, "run 2"),
    (BLOCKS, [W, W], {}, {}, WrongNames, "base weight"),
    (BLOCKS, [W, W], {"top.0.w": torch.ones(1)}, {}, WrongShape, "its base"),
    (
        BLOCKS,
        [W, {"top.0.w": torch.full((3,), 3.4e38)}],
        {"top.0.w": torch.full((3,), -torch.inf)},
        {},
        NotFinite,
        "mean",
    ),
]


@pytest.mark.parametrize(("spec", "runs", "base", "more", "error", "words"), REFUSED)
def test_what_has_no_mean_is_refused(spec, runs, base, more, error, words):
    with pytest.raises(error, match=words):
        mean_of(spec, runs, base, **more)


def test_what_the_mean_is_follows_without_a_tensor():
    spec = AdapterSpec(kind="rslora", rank=8, alpha=16.0)
    assert mean_spec(spec, 4) == AdapterSpec(kind="rslora", rank=32, alpha=8.0)
    assert mean_spec(spec, 4, rank=8) == mean_spec(spec, 1) == spec
    assert mean_spec(BLOCKS, 4, rank=8) == mean_spec(BLOCKS, 4) == BLOCKS
