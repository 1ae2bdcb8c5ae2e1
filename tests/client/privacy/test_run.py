"""The mean of private runs: charged for each, all in the budget or none, and claimed as what all of them spend."""

from __future__ import annotations

import json
import math

import pytest

import client.tuning.tune as module
from client.privacy.budget import BudgetLedger
from client.privacy.config import DPSettings
from client.privacy.dpsgd import plan
from client.privacy.run import release_mean
from client.tuning.averages import folder_of
from client.tuning.config import TuneConfig
from client.tuning.ready import work_folder
from client.tuning.verb import run
from offsite.audits.runs import read_run, run_path
from offsite.digests import tensors_digest
from offsite.errors import ConfigError, PolicyError
from offsite.text.records import Record

dp_accounting = pytest.importorskip("dp_accounting")


@pytest.fixture
def make(tmp_path, dropped_package, notes_file):
    def settings(name="bundle", dp=None, **changes):
        small = {"block_tokens": 32, "steps": 4, "precision": "fp32", "device": "cpu", "checkpoint_every": 2, "runs": 2}
        given = {"noise_multiplier": 1.0, "ledger": tmp_path / "ledger", **(dp or {})}
        if "epsilon" in given:
            del given["noise_multiplier"]
        return TuneConfig(
            package=dropped_package.path, data=notes_file, output=tmp_path / name, adapter="bitfit",
            learning_rate=0.01, dp=DPSettings(**given), **{**small, **changes},
        )  # fmt: skip

    return settings


def epsilon_of(claim, *, runs):
    """Epsilon by the accountant itself, run by run."""
    from dp_accounting.pld import PLDAccountant

    found = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_accounting.PoissonSampledDpEvent(
        claim["sample_rate"], dp_accounting.GaussianDpEvent(claim["noise_multiplier"])
    )
    for steps in runs:
        found.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(found.get_epsilon(claim["delta"]))


def test_what_is_claimed_is_what_all_runs_spend(make, tmp_path):
    told = run(make())
    claim = told["privacy"]
    assert claim["epsilon"] == pytest.approx(epsilon_of(claim, runs=[4, 4]), rel=1e-9)
    assert claim["epsilon"] > 1.05 * epsilon_of(claim, runs=[4])
    assert (claim["steps"], claim["num_runs"], claim["num_releases"]) == (8, 2, 2)
    assert claim["epsilon_total"] == claim["budget"] == claim["epsilon"]
    record = read_run(run_path(tmp_path / "bundle"))
    assert (record.claim.steps, record.steps) == (8, 8)
    assert [one.steps for one in record.averaged] == [4, 4]
    again = run(make("again", {"budget": claim["budget"], "ledger": tmp_path / "other"}, runs=1, steps=8))["privacy"]
    assert again["epsilon"] == pytest.approx(claim["epsilon"], rel=1e-9)


def test_epsilon_is_for_all_runs_together(make):
    claim = run(make(dp={"epsilon": 6.0}))["privacy"]
    assert claim["epsilon"] <= 6
    assert 0.97 * 6 <= epsilon_of(claim, runs=[4, 4]) <= 6


def test_no_run_begins_unless_the_budget_has_room_for_all(make, monkeypatch, tmp_path):
    one = plan(make().dp, num_units=54, batch_size=4, steps=4, epochs=1.0).spent.epsilon
    monkeypatch.setattr(module, "tune", lambda *_, **__: pytest.fail("a step was taken"))
    with pytest.raises(PolicyError, match="the budget of this data set is"):
        run(make(dp={"budget": 1.01 * one}))
    assert not (tmp_path / "bundle").exists()


def test_an_interrupted_series_is_charged_once_for_each(make, monkeypatch, tmp_path):
    real = module.tune

    def failing(*args, **kwargs):
        if kwargs["label"] == "run 2 of 2":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module, "tune", failing)
        with pytest.raises(KeyboardInterrupt):
            run(make())
    claim = run(make(resume=True))["privacy"]
    assert (claim["num_runs"], claim["num_resumes"], claim["num_releases"]) == (2, 1, 2)
    assert claim["epsilon"] == pytest.approx(epsilon_of(claim, runs=[4, 4]), rel=1e-9)


# A record that was edited cannot make two charges of one, or one noise of another


@pytest.fixture
def both_done(make, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    config = make()
    with monkeypatch.context() as patched:
        patched.setattr("client.tuning.several.mean_of", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    return config


def edited(config, number, **changes):
    path = folder_of(work_folder(config.output), number) / "finished.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_runs_charge_is_refused(both_done):
    path = folder_of(work_folder(both_done.output), 1) / "finished.json"
    edited(both_done, 2, charged=json.loads(path.read_text())["charged"])
    with pytest.raises(PolicyError, match="not the one that this ledger was charged for"):
        run(both_done.model_copy(update={"resume": True}))
    assert not both_done.output.exists()


@pytest.mark.parametrize("charged", [None, "0" * 32])
def test_a_run_that_was_never_charged_is_refused(both_done, charged):
    edited(both_done, 1, charged=charged)
    with pytest.raises(PolicyError, match="not the one that this ledger was charged for"):
        run(both_done.model_copy(update={"resume": True}))


def test_runs_of_different_noise_have_no_epsilon(both_done, tmp_path):
    work = work_folder(both_done.output)
    with BudgetLedger(both_done.dp.ledger) as ledger:
        charged = [ledger.newest(ledger.place(folder_of(work, number))) for number in (1, 2)]
        other = plan(
            both_done.dp.model_copy(update={"noise_multiplier": 2.0}), num_units=54, batch_size=4, steps=4, epochs=1.0
        )
        members = ledger.members([Record((("a row", True),), "own", 1)])
        run_id = ledger.charge(members, other, place=ledger.place(folder_of(work, 2)), settings="x", budget=None).run
    assert charged[0].mechanism == charged[1].mechanism != other.mechanism
    with pytest.raises(PolicyError, match="run 2 was charged for other draws or noise"):
        release_mean(
            both_done.dp, [folder_of(work, 1), folder_of(work, 2)], [charged[0].run, run_id], {},
            num_units=54, batch_size=4, engine=None,
        )  # fmt: skip


def test_other_weights_than_the_mean_released_are_refused(both_done):
    told = run(both_done.model_copy(update={"resume": True}))
    with BudgetLedger(both_done.dp.ledger) as ledger:
        runs = [ledger.newest(ledger.place(folder_of(work_folder(both_done.output), number))) for number in (1, 2)]
        assert all(one.is_released for one in runs)
        for one in runs:
            with pytest.raises(PolicyError, match="other weights of this run were released"):
                ledger.release(one.run, tensors_digest({}))
    assert math.isfinite(told["privacy"]["epsilon"])


def test_more_steps_than_are_accounted_for_are_refused(make):
    with pytest.raises(ConfigError, match="--runs 64: 1,280,000 steps in all"):
        plan(make().dp, num_units=54, batch_size=4, steps=20_000, epochs=1.0, num_runs=64)
