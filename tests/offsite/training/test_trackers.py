"""Curves in other tools: a few figures under fixed names, and nothing of machine, user, place or text."""

from __future__ import annotations

import getpass
import json
import socket
import sqlite3
import sys

import pytest

import offsite.training.trackers as module
from offsite.errors import ConfigError
from offsite.training.config import Report
from offsite.training.journal import Journal
from offsite.training.trackers import FIGURES, figures_of, open_trackers, require_trackers

RECORD = {"step": 1, "loss": 0.5, "rate": 0.1, "tokens": 64, "gradient_norm": 2.0, "seconds": 1.0, "reward": 3.0}
MORE = {"tokens_per_second": 90.0, "epsilon": 8.0}
TOLD = {"loss": 0.5, "learning_rate": 0.1, "tokens_per_second": 90.0, "epsilon": 8.0}


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """Log two steps to a tool, with a machine, a user and a working folder whose names would be found; then go on."""
    monkeypatch.setattr(socket, "gethostname", lambda: "zanzibar-host")
    monkeypatch.setenv("USER", "quentin-user")
    monkeypatch.setenv("LOGNAME", "quentin-user")
    assert getpass.getuser() == "quentin-user"
    work = tmp_path / "clinic-records"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["offsite", "tune", "--data", "private-notes.jsonl"])

    def log(name, folder=work, **given):
        report = Report(to=(name,), folder=folder / "bundle.curves", epsilon=8.0, **given)
        for step, loss in ((0, 0.5), (1, 0.25)):
            trackers = open_trackers(report, label="tune", step=step)
            journal = Journal(folder / "log.jsonl", tensorboard=None, step=step, trackers=trackers)
            journal.write({**RECORD, "step": step + 1, "loss": loss, "evaluation_loss": None}, MORE)
            journal.close()
        return report.folder

    return log


def everything_in(folder):
    """Return the names and bytes of all files of a folder, together."""
    return b"\n".join(
        str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    )


def private_words():
    names = {socket.gethostname(), getpass.getuser(), "clinic-records", "private-notes", "reward", "gradient"}
    import platform

    return {*names, platform.node() if len(platform.node()) > 3 else "zanzibar-host"}


def test_only_the_figures_of_the_list_are_reported():
    assert figures_of({**RECORD, **MORE, "evaluation_loss": None, "reward": 1.0}) == TOLD
    assert set(FIGURES.values()) == {"loss", "evaluation_loss", "learning_rate", "tokens_per_second", "epsilon"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the tensorboard package at import
def test_tensorboard(logged):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = logged("tensorboard")
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert set(found.Tags()["scalars"]) == set(TOLD)
    assert not [word for word in private_words() if word.encode() in everything_in(folder)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the tensorboard package at import
def test_what_a_new_run_in_an_old_folder_says_replaces_the_old(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for loss, first, last in ((5.0, 0, 3), (4.0, 1, 3), (3.0, 0, 2)):
        tracker = module.EventFile(tmp_path, step=first)
        for step in range(first + 1, last + 1):
            tracker.write(step, {"loss": loss})
        tracker.close()
        found = EventAccumulator(str(tmp_path)).Reload()
        kept = {event.step: event.value for event in found.Scalars("loss")}
        assert kept == {step: loss if step > first else 5.0 for step in range(1, last + 1)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # inside the wandb package
def test_wandb_offline(logged, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = logged("wandb")
    runs = list((folder / "wandb").glob("offline-run-*"))
    known = json.loads((folder / "runs.json").read_text())["wandb"]
    assert {path.name.rpartition("-")[2] for path in runs} == {known}, "a run that goes on is the same run"
    held = everything_in(folder)
    for name in TOLD:
        assert name.encode() in held
    assert not [word for word in private_words() if word.encode() in held]
    assert "figures leave this machine" not in capfd.readouterr().err


def test_wandb_that_may_not_begin_is_one_line(logged, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_given):
        raise wandb.errors.UsageError("api_key SECRET not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"^--report-to wandb: it does not begin \(UsageError\)$") as caught:
        logged("wandb")
    assert "WANDB_MODE=offline" in caught.value.hint


def test_where_wandb_sends_figures_that_is_said(logged, monkeypatch, capsys, tmp_path):
    wandb = pytest.importorskip("wandb")
    sent = []

    class Sent:
        offline, disabled, id, dir = False, False, "abc", str(tmp_path / "run" / "files")

        def define_metric(self, *_given, **_more):
            pass

        def log(self, figures):
            sent.append(figures)

        def finish(self):
            pass

    given = {}
    monkeypatch.setattr(wandb, "init", lambda **more: given.update(more) or Sent())
    logged("wandb")
    err = capsys.readouterr().err
    assert "figures leave this machine, to Weights & Biases" in err
    assert "losses are functions of the private text that --dp does not cover" in err
    assert sent[0] == {"step": 1, **TOLD}
    assert (given["config"], given["resume"], given["id"]) == ({}, "allow", "abc")
    settings = given["settings"]
    assert (settings.disable_git, settings.disable_code, settings.x_disable_meta, settings.console) == (
        True, True, True, "off",
    )  # fmt: skip
    assert settings.host == settings.username == "unnamed"


@pytest.mark.slow  # the store's tables take seconds to be made
@pytest.mark.filterwarnings("ignore")  # inside packages that MLflow imports
def test_mlflow_beside_the_output(logged, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.invalid:1")  # which a sealed run does not look at
    folder = logged("mlflow", is_sealed=True)
    with sqlite3.connect(folder / "mlflow.db") as store:
        found = store.execute("select key, value, step from metrics order by step, key").fetchall()
        assert len(store.execute("select * from runs").fetchall()) == 1, "a run that goes on is the same run"
        assert store.execute("select count(*) from params").fetchone() == (0,)
        tags = dict(store.execute("select key, value from tags"))
        (artifacts,) = store.execute("select artifact_uri from runs").fetchone()
    assert {(key, value) for key, value, step in found if step == 1} == set(TOLD.items())
    assert ("loss", 0.25, 2) in found
    assert set(tags.values()) <= {"unnamed", "offsite", "tune"}
    held = everything_in(folder).replace(artifacts.encode(), b"")
    assert not [word for word in private_words() - {"clinic-records"} if word.encode() in held]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_one_line(monkeypatch, name):
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=f"^--report-to {name}: {name} is not installed$") as caught:
        require_trackers([name])
    assert "offsite-tuning[track]" in caught.value.hint


def test_a_store_that_is_lost_does_not_end_the_run(capsys):
    class Lost:
        def log_batch(self, *_given):
            raise OSError("gone")

    pytest.importorskip("mlflow")
    tracker = object.__new__(module._Mlflow)
    tracker._client, tracker._errors, tracker._id, tracker._is_lost = Lost(), (OSError,), "x", False
    for step in (7, 8):
        tracker.write(step, TOLD)
    assert capsys.readouterr().err == "--report-to mlflow: figures from step 7 on are not in it (OSError)\n"
