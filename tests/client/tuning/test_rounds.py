"""Tuning on a federation's round: the weights it starts from, the factors it shares, its pull, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

from adapters.kinds import attach, declared
from adapters.norms import adapted_names, base_tensors, scale_of
from adapters.updates import LowRank, fold, norm, to_tensors, update_of
from client.tuning.rounds import Begun, begin, first_step, with_proximal, work_of
from client.tuning.tune import attach_to_package, tune
from client.tuning.verb import run
from offsite.artefacts.bundle import AdapterSpec, open_bundle
from offsite.artefacts.job import Job, write_job
from offsite.artefacts.round import ROUND_FORMAT, RoundManifest, write_round
from offsite.errors import ConfigError, NotFinite, PolicyError, WrongBinding, WrongNames, WrongShape

OTHER = "sha256:" + "0" * 64
SMALL = {"placement": "1+1", "targets": "attention", "rank": 2, "dtype": "float32"}


def spec_of(kind="lora", **changes):
    return AdapterSpec(kind=kind, **{**SMALL, **changes})


@pytest.fixture
def make_round(tmp_path):
    numbers = iter(range(1000))

    def make(package, *, spec=None, update=None, start=None, **changes):
        stated = {
            "format": ROUND_FORMAT,
            "federation_id": "5" * 32,
            "round": 2,
            "num_rounds": 3,
            "package_digest": package.digest,
            "base_digest": package.manifest.base_digest,
            "adapter": spec or spec_of(),
            "steps": 6,
            "learning_rate": 0.02,
        }
        manifest = RoundManifest(**{**stated, **changes})
        return write_round(tmp_path / f"asked-{next(numbers)}", manifest, update=to_tensors(update or {}), start=start)

    return make


@pytest.fixture
def config(settings, tmp_path):
    """Settings of tuning on a round; what a round decides is left to it."""
    numbers = iter(range(1000))

    def make(package, round_, **changes):
        made = settings(package.path, output=tmp_path / f"bundle-{next(numbers)}", **changes)
        given = {name: getattr(made, name) for name in made.model_fields_set - {"steps"}}
        return type(made)(**given, **({} if round_ is None else {"round": round_.path}))

    return make


def drawn(package, spec, *, size=0.05, seed=0):
    """An update in factors where the tensor has two dimensions, dense elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    tensors = package.block_tensors()
    found = {}
    for name in adapted_names(spec, package.layout, tensors):
        shape = tensors[name].shape
        if len(shape) == 2:
            a, b = torch.randn(3, shape[1], generator=generator), torch.randn(shape[0], 3, generator=generator)
            found[name] = LowRank(a, size * b)
        else:
            found[name] = size * torch.randn(shape, generator=generator)
    return found


def tensors_of(config, package):
    spec = config.spec()
    bundle = open_bundle(config.output)
    spec = bundle.manifest.adapter
    return bundle.load_tensors(declared(spec, package.layout, package.block_tensors()))


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- where the weights start


@pytest.mark.parametrize("kind", ["lora", "blocks", "bitfit"])
def test_a_round_is_tuning_on_a_package_with_the_update_in_its_weights(
    kind, whole_package, full_llama, make_package, make_round, config, tmp_path
):
    spec = spec_of(kind, targets="all-linear")
    update = drawn(whole_package, spec)
    model = copy.deepcopy(full_llama)
    fold(model, update, whole_package.layout.blocks)
    folded = make_package(tmp_path / "folded", model=model, kept=tuple(range(8)))
    asked, plain = make_round(whole_package, spec=spec, update=update), make_round(folded, spec=spec)
    on_round, on_package = config(whole_package, asked), config(folded, plain)
    run(on_round)
    run(on_package)
    found, wanted = tensors_of(on_round, whole_package), tensors_of(on_package, folded)
    assert equal(found, wanted)
    untouched = config(whole_package, make_round(whole_package, spec=spec))
    run(untouched)
    assert not equal(found, tensors_of(untouched, whole_package))


@pytest.mark.parametrize("kind", ["lora", "blocks"])
def test_the_mean_of_a_rounds_runs_is_that_of_runs_on_a_package_with_the_update_in_it(
    kind, whole_package, full_llama, make_package, make_round, config, tmp_path
):
    spec = spec_of(kind)
    update = drawn(whole_package, spec)
    model = copy.deepcopy(full_llama)
    fold(model, update, whole_package.layout.blocks)
    folded = make_package(tmp_path / "folded", model=model, kept=tuple(range(8)))
    asked, plain = make_round(whole_package, spec=spec, update=update), make_round(folded, spec=spec)
    on_round, on_package = config(whole_package, asked, runs=2), config(folded, plain, runs=2)
    told = run(on_round)
    run(on_package)
    assert equal(tensors_of(on_round, whole_package), tensors_of(on_package, folded))
    assert open_bundle(on_round.output).manifest.adapter == spec
    assert told["mean"] == ("cut" if kind == "lora" else "exact")


def test_factors_that_the_round_shares_are_in_the_mean_as_they_came(whole_package, make_round, config):
    spec = spec_of()
    attached = attach_to_package(whole_package, spec, device=torch.device("cpu"), seed=9)
    start = {name: tensor for name, tensor in attached.tensors().items() if name.endswith("lora_A")}
    asked = config(whole_package, make_round(whole_package, start=start), runs=3)
    told = run(asked)
    found = tensors_of(asked, whole_package)
    assert all(torch.equal(found[name], tensor) for name, tensor in start.items())
    assert told["mean_lost"] == 0  # the mean of B alone is exact


def test_a_first_round_is_tuning_without_one(whole_package, make_round, config):
    asked = make_round(whole_package, round=1)
    on_round = config(whole_package, asked)
    own = {"adapter": "lora", "placement": "1+1", "targets": "attention", "rank": 2, "adapter_dtype": "float32"}
    plain = config(whole_package, None, **own).model_copy(update={"steps": 6, "learning_rate": 0.02})
    run(on_round)
    run(plain)
    assert equal(tensors_of(on_round, whole_package), tensors_of(plain, whole_package))
    assert open_bundle(on_round.output).manifest.round_digest == asked.digest
    assert open_bundle(plain.output).manifest.round_digest is None


def test_rounds_go_on_in_the_text_and_start_with_other_factors(whole_package, make_round, config, monkeypatch):
    """Every round with the first rows of the file would learn those rows alone, however many rounds there are."""
    read, started = [], []

    def looked_at(attached, text, settings, **kwargs):
        read.append([tuple(one.input_ids) for step in range(settings.steps) for one in text.batches.chosen(step)])
        started.append({name: tensor.clone() for name, tensor in attached.tensors().items()})
        return tune(attached, text, settings, **kwargs)

    monkeypatch.setattr("client.tuning.tune.tune", looked_at)
    for number in (1, 2, 3):
        run(config(whole_package, make_round(whole_package, round=number, steps=2)))
    assert first_step(None) == 0
    run(config(whole_package, make_round(whole_package, round=1, steps=6)))
    assert [*read[0], *read[1], *read[2]] == read[3]
    assert len(set(read[0]) | set(read[1]) | set(read[2])) == len(read[3])
    factors = [name for name in started[0] if name.endswith("lora_A")]
    assert factors
    assert all(not torch.equal(started[0][name], started[1][name]) for name in factors)
    assert all(not torch.equal(started[1][name], started[2][name]) for name in factors)
    assert all(torch.equal(started[0][name], started[3][name]) for name in factors)


BAD_UPDATES = {
    "of another tensor": (lambda found: found.update({"top.1.mlp.up_proj.weight": torch.zeros(48, 32)}), WrongNames),
    "of an embedding": (lambda found: found.update({"model.embed_tokens.weight": torch.zeros(259, 32)}), WrongNames),
    "of another shape": (lambda found: found.update({"top.1.self_attn.q_proj.weight": torch.zeros(2, 2)}), WrongShape),
    "beyond float32": (
        lambda found: found.update({"top.1.self_attn.q_proj.weight": torch.full((32, 32), 3e38)}),
        NotFinite,
    ),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_an_update_that_no_adapter_made(name, whole_package, make_round, config):
    change, error = BAD_UPDATES[name]
    update = drawn(whole_package, spec_of())
    change(update)
    made = config(whole_package, make_round(whole_package, update=update))
    with pytest.raises(error):
        run(made)
    assert not made.output.exists()


# --- shared A


def shared(package, spec):
    names = declared(spec, package.layout, package.block_tensors())
    generator = torch.Generator().manual_seed(9)
    return {name: torch.rand(one.shape, generator=generator) for name, one in names.items() if name.endswith("lora_A")}


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_shared_factors_are_not_trained_and_go_into_the_bundle(kind, whole_package, make_round, config):
    spec = spec_of(kind)
    start = shared(whole_package, spec)
    made = config(whole_package, make_round(whole_package, spec=spec, start=start))
    run(made)
    found = tensors_of(made, whole_package)
    assert all(torch.equal(found[name], tensor) for name, tensor in start.items())
    assert all(bool(found[name].any()) for name in found if name.endswith("lora_B"))


@pytest.mark.parametrize(
    ("spec", "change", "error"),
    [
        (spec_of(), lambda start: start.popitem(), WrongNames),
        (spec_of(), lambda start: start.update(x=torch.ones(2)), WrongNames),
        (spec_of(), lambda start: start.update({next(iter(start)): torch.ones(2, 31)}), WrongShape),
        (spec_of(), lambda start: start.update({next(iter(start)): torch.ones(2, 32).double()}), WrongShape),
        (spec_of("blocks"), lambda start: None, WrongNames),
    ],
    ids=["one less", "one more", "another shape", "another dtype", "blocks have none"],
)
def test_shared_factors_are_just_the_adapter_s(spec, change, error, whole_package, make_round):
    start = shared(whole_package, spec_of())
    change(start)
    asked = make_round(whole_package, spec=spec, start=start)
    attached = attach_to_package(whole_package, spec, device=torch.device("cpu"))
    before = list(attached.trainable)
    with pytest.raises(error):
        begin(attached, spec, asked)
    assert list(attached.trainable) == before


# --- FedProx


def dense_distance(attached, spec, started):
    """The squared Frobenius norm of what the adapter does to each weight, every product formed."""
    total = torch.zeros(())
    for name, parameter in attached.trainable.items():
        if name.endswith("lora_B"):
            a = {**started, **attached.trainable}[name.replace("lora_B", "lora_A")]
            total = total + (scale_of(spec) * parameter @ a).square().sum()
        elif not name.endswith("lora_A"):
            total = total + (parameter - started[name]).square().sum()
    return total


@pytest.mark.parametrize(
    ("kind", "share"),
    [("lora", False), ("lora", True), ("rslora", False), ("rslora", True), ("blocks", False), ("bitfit", False)],
)
def test_the_proximal_term_and_its_gradient_are_the_dense_ones(kind, share, whole_package, make_round):
    spec, mu, count = spec_of(kind, targets="all-linear"), 0.3, 7
    asked = make_round(whole_package, spec=spec, proximal=mu, start=shared(whole_package, spec) if share else None)
    names = declared(spec, whole_package.layout, whole_package.block_tensors())
    attached = attach(whole_package.load_model(), spec, whole_package.layout.blocks, names)
    begun = begin(attached, spec, asked)
    started = {name: p.detach().clone() for name, p in attached.trainable.items()} | dict(begun.frozen)
    total = with_proximal(lambda *_: (torch.tensor(2.0), torch.tensor(count)), attached, begun, spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.trainable.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    loss, found_count = total(attached.model, {})
    wanted = 2.0 + 0.5 * mu * count * dense_distance(attached, spec, started)
    assert int(found_count) == count
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    found = torch.autograd.grad(loss, list(attached.trainable.values()))
    dense = torch.autograd.grad(
        2.0 + 0.5 * mu * count * dense_distance(attached, spec, started), list(attached.trainable.values())
    )
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_mu_the_loss_is_the_same_function(whole_package, make_round):
    spec = spec_of()
    attached = attach_to_package(whole_package, spec, device=torch.device("cpu"))

    def loss(model, batch):
        raise AssertionError

    for begun in (Begun(), begin(attached, spec, make_round(whole_package))):
        assert with_proximal(loss, attached, begun, spec) is loss


@pytest.mark.parametrize("kind", ["lora", "blocks"])
def test_a_larger_mu_gives_a_smaller_update(kind, whole_package, make_round, config):
    spec = spec_of(kind)
    base = base_tensors(whole_package, adapted_names(spec, whole_package.layout, whole_package.block_tensors()))
    sizes = []
    for mu in (0.0, 1.0, 100.0):
        asked = make_round(whole_package, spec=spec, proximal=mu, steps=12, learning_rate=2e-3)
        made = config(whole_package, asked)
        run(made)
        sizes.append(norm(update_of(spec, tensors_of(made, whole_package), base)))
    assert sizes[0] > sizes[1] > sizes[2] > 0


# --- what does not go together


REFUSED = [
    ({"proximal": 0.1}, {"dp": {"epsilon": 8.0}}, ConfigError, "proximal term, which --dp"),
    ({"task": "finish"}, {}, PolicyError, "asks for nothing"),
    ({"package_digest": OTHER}, {}, WrongBinding, "is for package"),
    ({}, {"learning_rate": 0.1}, ConfigError, "--learning-rate 0.1: the round says 0.02"),
    ({}, {"adapter": "bitfit"}, ConfigError, "--adapter bitfit"),
    ({}, {"rank": 3}, ConfigError, "--rank 3"),
    ({}, {"epochs": 1.0}, ConfigError, "--epochs: the round says 6 steps"),
]


@pytest.mark.parametrize(("asked", "changes", "error", "message"), REFUSED)
def test_refused(asked, changes, error, message, whole_package, make_round, config):
    made = config(whole_package, make_round(whole_package, **asked), **changes)
    with pytest.raises(error, match=message):
        run(made)
    assert not made.output.exists()
    assert not (made.output.parent / f"{made.output.name}.work").exists()


def test_steps_are_given_once(whole_package, make_round, settings):
    with pytest.raises(ConfigError, match="--steps 7: the round says 6"):
        run(settings(whole_package.path, round=make_round(whole_package).path, steps=7))


@pytest.mark.parametrize(
    ("changes", "message"), [({"launch": 2, "batch_size": 4}, "--launch"), ({"adapter": "dora"}, "dora")]
)
def test_refused_before_anything_is_read(changes, message, settings, whole_package, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings(whole_package.path, round=tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"adapter": spec_of(rank=3)}, WrongBinding, "another adapter"),
        ({"rounds": 1}, WrongBinding, "round 2, the job has 1"),
        ({"package_digest": OTHER}, WrongBinding, "is for package"),
    ],
)
def test_a_round_of_another_job(changes, error, message, whole_package, make_round, config, tmp_path):
    parties = {name: "-".join([letter * 4] * 13) for name, letter in (("owner", "a"), ("client", "b"))}
    stated = {"package_digest": whole_package.digest, "base_digest": whole_package.manifest.base_digest}
    job = Job(
        job_id="1" * 32, created=1, expires=2**39, **parties, **{**stated, "adapter": spec_of(), "rounds": 3, **changes}
    )
    write_job(tmp_path / "job", job)
    made = config(whole_package, make_round(whole_package), job=tmp_path / "job")
    with pytest.raises(error, match=message):
        run(made)
    assert not made.output.exists()


def test_a_run_is_not_resumed_on_another_round(whole_package, make_round, config, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    first = config(whole_package, make_round(whole_package))
    with monkeypatch.context() as patch:
        patch.setattr("client.tuning.verb.record_of", stop)
        with pytest.raises(KeyboardInterrupt):
            run(first)
    other = make_round(whole_package, update=drawn(whole_package, spec_of()))
    with pytest.raises(ConfigError, match="round"):
        run(first.model_copy(update={"resume": True, "round": other.path}))
    told = run(first.model_copy(update={"resume": True}))
    assert told["bundle"] == first.output.name


def test_the_place_of_a_round(tmp_path):
    assert work_of(tmp_path, 7) == tmp_path / "round-0007"
