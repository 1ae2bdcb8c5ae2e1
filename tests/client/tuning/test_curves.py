"""Curves of a tuning in TensorBoard's files: of a private run with what it was charged, and of each of several."""

from __future__ import annotations

import json

import pytest

from client.privacy.config import DPSettings
from client.tuning.verb import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the tensorboard package at import


def read(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_private_runs_epsilon_is_one_of_its_figures(settings, dropped_package, tmp_path):
    dp = DPSettings(noise_multiplier=1.0, ledger=tmp_path / "ledger")
    config = settings(dropped_package.path, adapter="bitfit", learning_rate=0.01, dp=dp, report_to=("tensorboard",))
    told = run(config)["privacy"]
    found = read(tmp_path / "bundle.curves" / "tensorboard")
    assert [value for _, value in found["epsilon"]] == pytest.approx([told["epsilon"]] * told["steps"], rel=1e-6)
    assert set(found) <= {"loss", "learning_rate", "tokens_per_second", "epsilon"}


def test_each_of_several_runs_has_curves_of_its_own(settings, dropped_package, tmp_path):
    config = settings(dropped_package.path, adapter="lora", rank=2, runs=2, report_to=("tensorboard",))
    run(config)
    logged = [json.loads(line) for line in (tmp_path / "bundle.log.jsonl").read_text().splitlines()]
    for number in (1, 2):
        found = read(tmp_path / "bundle.curves" / f"run{number}" / "tensorboard")
        losses = [record["loss"] for record in logged if record["run"] == number]
        assert [value for _, value in found["loss"]] == pytest.approx(losses, rel=1e-6)
