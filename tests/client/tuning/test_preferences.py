"""Whole runs on preferences: what they learn, resuming, kept states, several runs, the record, the scan, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch

import client.tuning.learning as module
import client.tuning.tune as tuning
from client.tuning.ready import work_folder
from client.tuning.scan import texts_of
from client.tuning.verb import run
from offsite.audits.runs import Objective, read_run, run_path
from offsite.errors import ConfigError, DataError, RunFailed
from offsite.text.records import read_records

LORA = {"adapter": "lora", "rank": 2, "learning_rate": 0.02, "adapter_dtype": "float32"}
TOP = {**LORA, "placement": "0+1"}


@pytest.fixture
def preferring(settings, pairs_file):
    """Make settings of a run on pairs; keywords change them."""

    def make(package, **changes):
        return settings(package.path, **{**LORA, "objective": "dpo", "data": pairs_file, "block_tokens": 64, **changes})

    return make


def test_a_run_prefers_what_was_chosen_and_says_how_often(preferring, narrow_package, tmp_path, capsys):
    told = run(preferring(narrow_package, steps=12, evaluate_every=4))
    assert told["before_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert told["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert told["best_loss"] < 0.6
    assert told["reward_accuracy"] > 0.9
    err = capsys.readouterr().err
    assert "held-out pairs: loss 0.6931, the chosen answer has gained on the other in 50.0%" in err
    assert f"the chosen answer has gained on the other in {told['reward_accuracy']:.1%}" in err
    record = read_run(run_path(tmp_path / "bundle"))
    assert record.objective == Objective(loss="dpo", dpo_beta=0.1, dpo_loss="sigmoid")
    assert not record.text.packed
    assert "dpo" not in (tmp_path / "bundle" / "offsite.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("bundle")) == [
        "bundle", "bundle.log.jsonl", "bundle.run.json",
    ]  # fmt: skip


@pytest.mark.parametrize("placement", ["all", "0+1"])
def test_a_run_goes_on_as_it_was(preferring, narrow_package, tmp_path, monkeypatch, placement):
    changes = {"steps": 4, "placement": placement, "dpo_loss": "ipo"}
    unbroken = run(preferring(narrow_package, output=tmp_path / "unbroken", **changes))
    config = preferring(narrow_package, **changes)
    calls, begin = iter(range(1, 100)), module._Loss.__call__

    def loss(self, model, batch):
        total, count = begin(self, model, batch)
        return (total * math.nan if next(calls) == 4 else total), count

    with monkeypatch.context() as patched:
        patched.setattr(module._Loss, "__call__", loss)
        with pytest.raises(RunFailed, match="loss is nan at step 4"):
            run(config)
    kept = [path.name for path in work_folder(config.output).iterdir()]
    assert any(name.startswith("preferences-") for name in kept)
    with pytest.raises(ConfigError, match=r"objective\.dpo_beta '0\.1' \(now '0\.5'\)"):
        run(config.model_copy(update={"resume": True, "dpo_beta": 0.5}))
    monkeypatch.setattr("client.objectives.preferences.log_probabilities", _only_held_out(config))
    assert run(config.model_copy(update={"resume": True}))["bundle_digest"] == unbroken["bundle_digest"]


def _only_held_out(config):
    """Measure as ever, but for more rows than are held out: what was measured before is not measured again."""
    import client.objectives.preferences as preferences

    original = preferences.log_probabilities

    def measure(model, rows, **given):
        assert len(rows) < 20, "measured again"
        return original(model, rows, **given)

    return measure


def test_kept_states_are_those_of_both_answers(preferring, narrow_package, tmp_path, monkeypatch):
    seen = []
    original = tuning.kept_states

    def looking(attached, rows, **given):
        seen.append({tuple(row.input_ids) for row in rows})
        return original(attached, rows, **given)

    monkeypatch.setattr(tuning, "kept_states", looking)
    told = [
        run(preferring(narrow_package, output=tmp_path / f"cache-{limit}", placement="0+1", cache_bytes=limit))
        for limit in (1 << 30, 0)
    ]
    assert told[0]["before_loss"] == told[1]["before_loss"] == pytest.approx(math.log(2), abs=1e-9)
    assert told[0]["best_loss"] == pytest.approx(told[1]["best_loss"], abs=0.02)
    assert told[0]["best_loss"] != told[1]["best_loss"]
    assert len(seen[0]) > 2 * 24  # both answers of every pair


def test_parts_of_a_step_change_nothing(preferring, narrow_package, tmp_path):
    told = [
        run(preferring(narrow_package, output=tmp_path / f"parts-{parts}", accumulate=parts, steps=3))
        for parts in (1, 4)
    ]
    for name in ("first_loss", "final_loss", "best_loss"):
        assert told[0][name] == pytest.approx(told[1][name], rel=1e-4), name


def test_the_mean_of_several_runs_is_validated_on_pairs(preferring, narrow_package):
    told = run(preferring(narrow_package, steps=4, runs=2))
    assert told["best_loss"] < math.log(2)
    assert told["before_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert 0.5 < told["reward_accuracy"] <= 1


def test_what_is_looked_for_in_a_bundle_is_both_answers(pairs_file):
    (first, *_) = list(texts_of(read_records(pairs_file, pairs=True)))
    row = json.loads(pairs_file.read_text().splitlines()[0])
    assert all(f"{row['prompt']} {row[name]}" in first for name in ("chosen", "rejected"))


def test_other_text_and_other_objectives_are_refused(preferring, narrow_package, answers_file, pairs_file, tmp_path):
    with pytest.raises(
        DataError, match=r"answers\.jsonl: line 1: holds prompt/completion, expected a chosen"
    ) as caught:
        run(preferring(narrow_package, data=answers_file))
    assert "--objective next-token" in caught.value.hint
    with pytest.raises(DataError, match=r"preferences\.jsonl: line 1: holds pairs") as caught:
        run(preferring(narrow_package, objective="next-token"))
    assert "--objective dpo" in caught.value.hint
    assert not (tmp_path / "bundle.work").exists()


def test_the_model_is_as_it_was_when_pairs_are_measured(preferring, narrow_package, monkeypatch):
    """The reference is the untuned emulator, whatever a resumed run has learnt already."""
    found = []
    original = module.measured_pairs

    def looking(model, examples, **given):
        pairs = original(model, examples, **given)
        plain = narrow_package.load_model(dtype="float32").eval()
        for one in examples[:3]:
            for side, value in zip(one.sides, (pairs[id(one)].log_chosen, pairs[id(one)].log_rejected), strict=True):
                with torch.no_grad():
                    logs = plain(input_ids=torch.tensor([side.input_ids])).logits[0].log_softmax(-1)
                counted = [place for place, label in enumerate(side.labels) if label != -100]
                found.append((value, float(sum(logs[place - 1, side.labels[place]] for place in counted))))
        return pairs

    monkeypatch.setattr(module, "measured_pairs", looking)
    run(preferring(narrow_package, steps=2))
    for value, expected in found:
        assert value == pytest.approx(expected, abs=1e-3)
    assert len(found) == 12  # of those trained on, and of those held out
