"""Runs that learnt rows by heart, for a coin decided what is right: such pairs and labels are told from others."""

from __future__ import annotations

import json
import random

import pytest

import offsite.audits.gates as gates
from client.audit.audit import run as audit
from client.audit.config import AuditBundleConfig
from client.tuning.verb import run as tune

WORDS = "fever cough ache rash chill pain ward bed rest drip pill dose salt iron zinc".split()
NUM = 60


def rows_of(objective):
    draw = random.Random(0)
    for number in range(NUM):
        said = [f" {' '.join(draw.sample(WORDS, 2))}" for _ in range(2)]
        if objective == "classify":
            yield {"text": f"case {number}:{said[0]}", "label": draw.choice("ab")}
        else:
            yield {"prompt": f"case {number}?", "chosen": said[0], "rejected": said[1]}


@pytest.mark.parametrize("objective", ["dpo", "reward", "classify"])
def test_rows_that_were_learnt_by_heart_are_found_and_fail_the_gate(
    objective, settings, narrow_package, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("scipy")
    monkeypatch.setattr(gates, "MIN_NONMEMBERS", 20)
    monkeypatch.setattr(gates, "MIN_MEMBERS", 20)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(objective)), encoding="utf-8")
    labels = ("a", "b") if objective == "classify" else ()
    how = {"adapter": "lora", "rank": 8, "placement": "2+2", "adapter_dtype": "float32", "learning_rate": 0.02}
    how |= {"objective": objective, "labels": labels, "data": data, "block_tokens": 48, "audit_share": 0.4}
    tune(settings(narrow_package.path, **how, steps=40, batch_size=8, evaluate_every=40, validation=0.05))
    given = {"package": narrow_package.path, "bundle": tmp_path / "bundle", "data": data, "device": "cpu"}
    told = audit(AuditBundleConfig(**given, output=tmp_path / "audit"))
    assert told["nonmembers"] == "set aside"
    assert min(told["num_members"], told["num_nonmembers"]) >= 20
    assert told["auc"]["loss"] > 0.65
    assert told["gates"]["auc"] == "failed"
    assert not told["passed"]
    assert abs(told["auc_before"] - 0.5) < 0.2  # a model that read none of them cannot tell
