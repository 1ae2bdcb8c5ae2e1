"""Several runs and their mean: as one run each, resumed, cut for a job, refused, and read back from what was kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import client.tuning.tune as module
from adapters.average import mean_of
from adapters.kinds import declared
from adapters.norms import adapted_names, base_tensors
from adapters.shared import share_products
from client.tuning import averages
from client.tuning.ready import make_ready, work_folder
from client.tuning.tune import attach_to_package
from client.tuning.verb import run, train_one
from offsite.artefacts.bundle import DISCLOSABLE, AdapterSpec, open_bundle
from offsite.artefacts.job import Job, write_job
from offsite.audits.runs import read_run, run_path
from offsite.digests import sha256_bytes
from offsite.errors import (
    BadDigest,
    BadSchema,
    ConfigError,
    NotFinite,
    RunFailed,
    TooLarge,
    WrongBinding,
    WrongNames,
    WrongShape,
)
from offsite.tensors import TensorSpec
from offsite.training.loop import Outcome

LORA = {"adapter": "lora", "placement": "1+1", "rank": 2, "learning_rate": 0.02, "adapter_dtype": "float32"}


def tensors_of(package, bundle: Path):
    found = open_bundle(bundle)
    return found.load_tensors(declared(found.manifest.adapter, package.layout, package.block_tensors()))


def interrupted(config, monkeypatch, *, in_run: int, after: int):
    """Run it and break off before that step of that run."""
    real, count = module.next_token_loss, {"begun": 0, "steps": 0}

    def attaching(*args, **kwargs):
        count["begun"], count["steps"] = count["begun"] + 1, 0
        return attach_to_package(*args, **kwargs)

    def loss(model, batch):
        count["steps"] += 1
        if (count["begun"], count["steps"]) == (in_run, after):
            raise KeyboardInterrupt
        return real(model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(module, "attach_to_package", attaching)
        patched.setattr(module, "next_token_loss", loss)
        with pytest.raises(KeyboardInterrupt):
            run(config)


# What the mean is of


@pytest.mark.parametrize(("kind", "num_runs"), [("lora", 3), ("rslora", 2), ("blocks", 2)])
def test_each_is_as_a_run_of_its_seed_on_the_first_ones_split_and_the_bundle_is_their_mean(
    settings, dropped_package, tmp_path, monkeypatch, kind, num_runs
):
    given = {**LORA, "adapter": kind, "learning_rate": 0.01, "seed": 5}
    kept = []
    monkeypatch.setattr(
        averages, "keep", lambda folder, outcome, **more: kept.append(outcome) or real(folder, outcome, **more)
    )
    told = run(settings(dropped_package.path, **given, runs=num_runs))
    assert [one["seed"] for one in told["runs"]] == [5 + n for n in range(num_runs)]
    # the same run alone: other batches and another start, on the text of the first seed
    config = settings(dropped_package.path, **given, output=tmp_path / "alone")
    ready = make_ready(config)
    for number, outcome in enumerate(kept):
        attached = attach_to_package(dropped_package, config.spec(), device=torch.device("cpu"), seed=5 + number)
        share_products(attached)  # as a run does
        again = module.tune(
            attached,
            module.replace(ready.text, batches=ready.text.batches.reseeded(5 + number)),
            module.loop_settings(config, ready.text).model_copy(update={"seed": 5 + number}),
            work=tmp_path / f"again{number}",
        )
        assert again.best_loss == outcome.best_loss == told["runs"][number]["best_loss"]
        assert all(torch.equal(again.tensors[name], outcome.tensors[name]) for name in again.tensors)
    base = base_tensors(
        dropped_package, adapted_names(config.spec(), dropped_package.layout, dropped_package.block_tensors())
    )
    spec, wanted, _ = mean_of(config.spec(), [outcome.tensors for outcome in kept], base)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.adapter == spec
    found = tensors_of(dropped_package, tmp_path / "bundle")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert told["mean"] == "exact"
    assert told["mean_lost"] == 0
    assert told["best_loss"] == pytest.approx(loss_of(dropped_package, spec, found, ready.text), rel=1e-6)


def test_runs_with_another_objective_are_resumed_as_they_began_and_keep_it_in_their_record(
    settings, narrow_package, tmp_path
):
    given = {**LORA, "placement": "all", "objective": "dft", "channel_dropout": 0.2, "runs": 2}
    whole = run(settings(narrow_package.path, **given, output=tmp_path / "whole"))
    config = settings(narrow_package.path, **given)
    train_one(config, 1)
    told = run(config.model_copy(update={"resume": True}))
    assert told["bundle_digest"] == whole["bundle_digest"]
    assert (
        tensors_of(narrow_package, tmp_path / "bundle").keys() == tensors_of(narrow_package, tmp_path / "whole").keys()
    )
    record = read_run(run_path(tmp_path / "bundle"))
    assert (record.objective.loss, record.objective.channel_dropout, len(record.averaged)) == ("dft", 0.2, 2)
    plain = {**given, "objective": "next-token"}
    train_one(settings(narrow_package.path, **given, output=tmp_path / "third"), 1)
    with pytest.raises(ConfigError, match=r"objective\.loss 'dft'"):
        run(settings(narrow_package.path, **plain, resume=True, output=tmp_path / "third"))


real = averages.keep


def loss_of(package, spec, tensors, text):
    attached = attach_to_package(package, spec, device=torch.device("cpu"))
    attached.load(tensors)
    total = count = 0
    with torch.no_grad():
        for example in text.validation:
            ids = torch.tensor([example.input_ids])
            logits = attached.model(input_ids=ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(example.input_ids) - 1
    return total / count


def test_the_record_the_log_and_the_figures_are_of_all_runs(settings, dropped_package, tmp_path):
    told = run(settings(dropped_package.path, **LORA, runs=2, disclose=DISCLOSABLE, steps=6, evaluate_every=2))
    record = read_run(run_path(tmp_path / "bundle"))
    assert [(one.seed, one.steps_run) for one in record.averaged] == [(0, 6), (1, 6)]
    assert [one.steps for one in record.averaged] == [one["best_step"] for one in told["runs"]]
    assert (record.steps_run, record.steps) == (12, sum(one.steps for one in record.averaged))
    assert record.adapter.rank == 4
    disclosed = open_bundle(tmp_path / "bundle").manifest.disclosed
    assert disclosed == {
        "num_records": told["num_records"], "num_tokens": told["tokens"], "steps": 12,
        "validation_loss": told["best_loss"],
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "bundle.log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["run"] for line in lines] == [1] * 6 + [2] * 6
    assert lines[-1]["tokens"] == told["tokens"]
    assert not work_folder(tmp_path / "bundle").exists()


def test_one_run_writes_what_it_wrote_before(settings, dropped_package, tmp_path):
    run(settings(dropped_package.path, **LORA))
    assert b"averaged" not in run_path(tmp_path / "bundle").read_bytes()
    assert '"run"' not in (tmp_path / "bundle.log.jsonl").read_text()


def test_progress_says_which_run_and_losses_stand_side_by_side(settings, dropped_package, capsys):
    told = run(settings(dropped_package.path, **LORA, runs=2))
    said = capsys.readouterr().err
    assert "run 1 of 2  6/6" in said
    assert "run 2 of 2  6/6" in said
    for loss in (told["best_loss"], *(one["best_loss"] for one in told["runs"])):
        assert f"{loss:.4f}" in said
    assert f"validation loss of the mean {told['best_loss']:.4f}, before tuning" in said


@pytest.mark.parametrize(("mean", "is_warned"), [(9.0, True), (math.inf, True), (0.5, False)])
def test_a_mean_that_is_worse_than_the_best_run_is_written_and_said(
    settings, dropped_package, tmp_path, monkeypatch, capsys, mean, is_warned
):
    found = mean if math.isfinite(mean) else None
    monkeypatch.setattr("client.tuning.several._measured", lambda *_: (found, {}))
    told = run(settings(dropped_package.path, **LORA, runs=2))
    assert told["best_loss"] == (mean if math.isfinite(mean) else None)
    assert open_bundle(tmp_path / "bundle").digest == told["bundle_digest"]
    assert ("WARNING: the mean is worse on the emulator" in capsys.readouterr().err) is is_warned


def test_a_cut_mean_has_the_runs_rank_and_says_what_it_lost(settings, dropped_package, tmp_path, capsys):
    exact = run(settings(dropped_package.path, **LORA, runs=3, output=tmp_path / "exact"))
    cut = run(settings(dropped_package.path, **LORA, runs=3, output=tmp_path / "cut", mean="cut"))
    assert (exact["rank"], cut["rank"]) == (6, 2)
    assert open_bundle(tmp_path / "cut").manifest.adapter.rank == 2
    whole = dense(open_bundle(tmp_path / "exact").manifest.adapter, tensors_of(dropped_package, tmp_path / "exact"))
    given = dense(open_bundle(tmp_path / "cut").manifest.adapter, tensors_of(dropped_package, tmp_path / "cut"))
    distance = math.sqrt(sum(float((whole[m] - given[m]).square().sum()) for m in whole))
    size = math.sqrt(sum(float(one.square().sum()) for one in whole.values()))
    assert 0 < cut["mean_lost"] == pytest.approx(distance / size, rel=1e-4)
    assert f"cut to rank 2: {cut['mean_lost']:.1%} of its update's norm is lost" in capsys.readouterr().err


def dense(spec, tensors):
    modules = {name.rpartition(".")[0] for name in tensors}
    scale = spec.alpha / spec.rank
    return {m: scale * tensors[f"{m}.lora_B"].double() @ tensors[f"{m}.lora_A"].double() for m in modules}


# Under a job


@pytest.fixture
def job_of(tmp_path, dropped_package):
    def make(**changes):
        adapter = AdapterSpec(kind="lora", placement="1+1", rank=2, dtype="float32", **changes)
        content = {
            "job_id": "5" * 32, "owner": "-".join(["aaaa"] * 13), "client": "-".join(["bbbb"] * 13),
            "package_digest": dropped_package.digest, "base_digest": dropped_package.manifest.base_digest,
            "adapter": adapter, "created": 1_790_000_000, "expires": 4_000_000_000,
        }  # fmt: skip
        write_job(tmp_path / "job", Job(**content))
        return tmp_path / "job"

    return make


def test_a_job_names_the_rank_and_the_mean_is_cut_to_it(settings, dropped_package, tmp_path, job_of):
    folder = job_of()
    told = run(settings(dropped_package.path, job=folder, runs=3, learning_rate=0.02))
    assert (told["mean"], told["rank"]) == ("cut", 2)
    assert open_bundle(tmp_path / "bundle").manifest.adapter == AdapterSpec(
        kind="lora", placement="1+1", rank=2, dtype="float32"
    )
    with pytest.raises(ValidationError, match="--mean exact: --job says the rank"):
        settings(dropped_package.path, job=folder, runs=3, mean="exact")


def test_a_jobs_dora_is_refused_before_any_work(settings, dropped_package, tmp_path, job_of):
    folder = job_of()
    content = json.loads((folder / "job.json").read_text())
    content["adapter"]["kind"] = "dora"
    (folder / "job.json").write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")
    with pytest.raises(ConfigError, match="'dora': several runs have no mean"):
        run(settings(dropped_package.path, job=folder, runs=2))
    assert not work_folder(tmp_path / "bundle").exists()


# What does not go together

CONTRADICTIONS = [
    ({"adapter": "dora", "runs": 2}, "--runs: several runs of dora have no mean"),
    ({"mean": "cut"}, "--mean: there is one run"),
    ({"parallel": 2}, "--parallel: there is one run"),
    ({"runs": 0}, "greater than or equal to 1"),
    ({"runs": 65}, "less than or equal to 64"),
    ({"runs": 2, "launch": 2}, "--launch: several --runs"),
    ({"runs": 2, "parallel": 2, "sealed_off": True}, "--parallel: --sealed-off denies"),
    ({"runs": 2, "parallel": 2, "dp": {"epsilon": 8.0}}, "--parallel: --dp charges"),
    ({"runs": 2, "mean": "cut", "adapter": "blocks"}, "--mean: blocks has no rank"),
    ({"runs": 2, "mean": "exact", "adapter": "lora", "round": Path("round")}, "--mean exact: --round says the rank"),
]


@pytest.mark.parametrize(("changes", "words"), CONTRADICTIONS)
def test_contradictions_are_told_in_a_line(settings, dropped_package, changes, words):
    with pytest.raises(ValidationError, match=words):
        settings(dropped_package.path, **changes)


def test_a_rank_that_no_bundle_may_have_is_refused_before_any_work(settings, dropped_package, tmp_path):
    with pytest.raises(ConfigError, match="would have rank 8192"):
        run(settings(dropped_package.path, adapter="lora", rank=4096, runs=2))
    assert not work_folder(tmp_path / "bundle").exists()


# Broken off, resumed


@pytest.mark.parametrize(("in_run", "after"), [(1, 4), (2, 5)])
def test_interrupted_and_resumed_it_writes_the_same_bytes(
    settings, dropped_package, tmp_path, monkeypatch, capsys, in_run, after
):
    given = {**LORA, "runs": 2, "dropout": 0.1}
    whole = run(settings(dropped_package.path, **given, output=tmp_path / "whole"))
    config = settings(dropped_package.path, **given, output=tmp_path / "broken")
    interrupted(config, monkeypatch, in_run=in_run, after=after)
    assert not config.output.exists()
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        run(config)
    capsys.readouterr()
    told = run(config.model_copy(update={"resume": True}))
    assert ("run 1 of 2: done before" in capsys.readouterr().err) is (in_run == 2)
    assert told["bundle_digest"] == whole["bundle_digest"]
    assert [one["best_loss"] for one in told["runs"]] == [one["best_loss"] for one in whole["runs"]]
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / f"{name}.log.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert logs[0] == logs[1]


def test_a_run_that_fails_fails_the_verb_with_its_reason_and_keeps_the_others(
    settings, dropped_package, tmp_path, monkeypatch
):
    config = settings(dropped_package.path, **LORA, runs=3)
    real_tune = module.tune

    def failing(*args, **kwargs):
        if kwargs["label"] == "run 2 of 3":
            raise RunFailed("loss is not finite at step 3", hint="lower the rate")
        return real_tune(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module, "tune", failing)
        with pytest.raises(RunFailed, match=r"^run 2 of 3: loss is not finite at step 3$") as caught:
            run(config)
    assert caught.value.hint == "lower the rate"
    left = sorted(path.name for path in (work_folder(config.output) / "run1").iterdir())
    assert left == ["finished.json", "log.jsonl", "tensors.safetensors"]
    whole = run(settings(dropped_package.path, **LORA, runs=3, output=tmp_path / "whole"))
    assert run(config.model_copy(update={"resume": True}))["bundle_digest"] == whole["bundle_digest"]


def test_one_and_several_do_not_resume_each_other(settings, dropped_package, tmp_path, monkeypatch):
    one = settings(dropped_package.path, **LORA, output=tmp_path / "one")
    interrupted(one, monkeypatch, in_run=1, after=4)
    with pytest.raises(ConfigError, match="holds a single run"):
        run(one.model_copy(update={"resume": True, "runs": 2}))
    two = settings(dropped_package.path, **LORA, output=tmp_path / "two", runs=2)
    interrupted(two, monkeypatch, in_run=2, after=1)
    with pytest.raises(ConfigError, match="holds several runs"):
        run(two.model_copy(update={"resume": True, "runs": 1}))
    with pytest.raises(ConfigError, match=r"run1 was made with runs '2' \(now '3'\)"):
        run(two.model_copy(update={"resume": True, "runs": 3}))


# What was kept is not trusted


SETTINGS = {"learning_rate": 0.02, "seed": 0, "data": "sha256:1", "package": "sha256:2", "validation": "0.1"}
EXPECTED = {"top.0.q.lora_A": TensorSpec(shape=(2, 4), dtype="bfloat16"),
            "top.0.q.lora_B": TensorSpec(shape=(3, 2), dtype="bfloat16")}  # fmt: skip


@pytest.fixture
def done(tmp_path):
    """A run that is done, in its folder."""
    (tmp_path / "run1" / "checkpoint-4").mkdir(parents=True)
    tensors = {name: torch.rand(spec.shape) for name, spec in EXPECTED.items()}
    outcome = Outcome(6, 600, 2.0, 300.0, 1000, 3.0, 2.0, 4, 2.5, [(2, 2.75), (4, 2.5), (6, 2.625)], tensors, math.inf)
    averages.keep(tmp_path / "run1", outcome, settings=SETTINGS)
    return tmp_path / "run1", outcome


def test_what_is_kept_is_what_is_read_and_checkpoints_are_gone(done):
    folder, outcome = done
    assert sorted(path.name for path in folder.iterdir()) == ["finished.json", "tensors.safetensors"]
    found = averages.kept(folder, EXPECTED, seed=7, settings=SETTINGS)
    assert found is not None
    assert found.seed == 7
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in outcome.tensors.items())
    told = {**outcome.figures(), "before_loss": None}
    assert {name: getattr(found.record, name) for name in told} == told
    assert averages.kept(folder.with_name("run2"), EXPECTED, seed=8, settings=SETTINGS) is None


def of_record(change):
    def tamper(folder):
        content = json.loads((folder / "finished.json").read_text())
        change(content)
        (folder / "finished.json").write_text(json.dumps(content))

    return tamper


def of_tensors(change, *, bound: bool):
    def tamper(folder):
        tensors = load_file(folder / "tensors.safetensors")
        change(tensors)
        save_file(tensors, folder / "tensors.safetensors")
        if bound:
            digest = sha256_bytes((folder / "tensors.safetensors").read_bytes())
            of_record(lambda content: content.update(tensors_sha256=digest))(folder)

    return tamper


def first(tensors):
    return min(tensors)


TAMPERED = {
    "other format": (of_record(lambda c: c.update(format="offsite/finished-run/2")), WrongBinding, "format is"),
    "unknown field": (of_record(lambda c: c.update(more=1)), BadSchema, "more"),
    "missing field": (of_record(lambda c: c.pop("steps")), BadSchema, "steps"),
    "another type": (of_record(lambda c: c.update(steps="6")), BadSchema, "steps"),
    "beyond its steps": (of_record(lambda c: c.update(best_step=7)), BadSchema, "beyond its 6 steps"),
    "another setting": (
        of_record(lambda c: c["settings"].update(learning_rate=1.0)), ConfigError, "made with learning_rate 1.0",
    ),
    "another seed": (of_record(lambda c: c["settings"].update(seed=1)), ConfigError, "made with seed 1"),
    "another text": (of_record(lambda c: c["settings"].update(data="sha256:0")), ConfigError, "made with data"),
    "another package": (of_record(lambda c: c["settings"].update(package="x")), ConfigError, "made with package"),
    "a setting less": (of_record(lambda c: c["settings"].pop("validation")), ConfigError, "made with validation"),
    "a ledger's id": (of_record(lambda c: c.update(charged="me")), BadSchema, "charged"),
    "not json": (lambda f: (f / "finished.json").write_bytes(b"{"), BadSchema, "not JSON"),
    "too large": (lambda f: (f / "finished.json").write_bytes(b" " * (2**20 + 1)), TooLarge, "over 1048576 bytes"),
    "a folder": (
        lambda f: ((f / "finished.json").unlink(), (f / "finished.json").mkdir()), RunFailed, "cannot be read",
    ),
    "no tensors": (lambda f: (f / "tensors.safetensors").unlink(), RunFailed, "cannot be read"),
    "other tensors": (of_tensors(lambda t: t[first(t)].add_(1), bound=False), BadDigest, "finished.json binds"),
    "a tensor less": (of_tensors(lambda t: t.pop(first(t)), bound=True), WrongNames, "missing"),
    "another dtype": (
        of_tensors(lambda t: t.update({first(t): t[first(t)].bfloat16()}), bound=True), WrongShape, "BF16|bfloat16",
    ),
    "not finite": (of_tensors(lambda t: t[first(t)].fill_(math.nan), bound=True), NotFinite, "finite|NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_run_that_was_tampered_with_is_refused(done, name):
    tamper, error, words = TAMPERED[name]
    tamper(done[0])
    with pytest.raises(error, match=words) as caught:
        averages.kept(done[0], EXPECTED, seed=0, settings=SETTINGS)
    assert "\n" not in str(caught.value)


# Side by side


def test_one_of_them_alone_leaves_itself_and_nothing_else(settings, dropped_package, tmp_path):
    config = settings(dropped_package.path, **LORA, runs=2, resume=True)
    train_one(config, 2)
    assert sorted(path.name for path in work_folder(config.output).iterdir()) == ["run2"]
    assert not config.output.exists()
    whole = run(settings(dropped_package.path, **LORA, runs=2, output=tmp_path / "whole"))
    assert run(config)["bundle_digest"] == whole["bundle_digest"]
