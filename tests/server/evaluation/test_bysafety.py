"""Refusals before and after plugging in: against transformers' own greedy answers, and what is flagged and refused."""

from __future__ import annotations

import json

import pytest

import server.evaluation.bysafety as module
from offsite.errors import BadSchema, ConfigError
from offsite.evaluation.preferences import wilson
from offsite.evaluation.results import parse_results, read_results
from offsite.report.page import page
from offsite.safety.prompts import of_kind, read_requests, set_path
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import run

NUM_NEW = 4


@pytest.fixture
def asked(monkeypatch):
    """Twelve of the requests, and a rule that random letters meet about half of the time."""
    requests = read_requests(set_path())
    few = [requests[at] for kind in ("harmful", "harmless") for at in of_kind(requests, kind)[:6]]
    monkeypatch.setattr(module, "read_requests", lambda _path: few)
    monkeypatch.setattr(module, "is_refusal", by_letters)
    return few


def by_letters(text):
    return sum(map(ord, "".join(text.split()))) % 2 == 0


@pytest.fixture
def evaluated(llama_folder, dropped_package, make_bundle, tmp_path, asked):
    """Evaluate a shaken adapter with refusals; keywords change the settings."""
    data = tmp_path / "held.jsonl"
    data.write_text("".join(json.dumps({"text": f"ward {number} has a cough"}) + "\n" for number in range(8)))
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora", shake=0.5)

    def make(**changes):
        given = {"model": str(llama_folder), "package": dropped_package.path, "bundle": (str(bundle.path),)}
        given |= {"data": (data,), "device": "cpu", "block_tokens": 64, "answer_tokens": NUM_NEW, "safety": True}
        return run(EvaluateConfig(output=tmp_path / "results", **{**given, **changes}))

    return make


def test_rows_have_their_shares_and_plugging_in_its_change(evaluated, asked, llama_folder, tmp_path, capsys, greedy):
    told = evaluated(safety_limit=0.0)
    results = read_results(tmp_path / "results")
    before = [by_letters(text) for text, _ in greedy(llama_folder, [one.prompt for one in asked], NUM_NEW)]
    row = results.rows["zero_shot"].tasks["safety"]
    assert row["refuses_harmful"].mean == pytest.approx(sum(before[:6]) / 6)
    assert row["refuses_harmless"].mean == pytest.approx(sum(before[6:]) / 6)
    assert {name for name, found in results.rows.items() if "safety" in found.tasks} == set(results.rows)
    assert results.tasks["safety"] == 12
    assert "safety" not in results.task_metrics
    (change,) = results.safety.changes.values()
    shares = [results.rows[name].tasks["safety"]["refuses_harmful"].mean for name in ("zero_shot", "plugged_in")]
    assert change["harmful"].difference == pytest.approx(shares[1] - shares[0])
    assert (change["harmful"].num_gained - change["harmful"].num_lost) / 6 == pytest.approx(shares[1] - shares[0])
    assert change["harmful"].num_lost + change["harmful"].num_gained > 0, "the adapter changes no answer"
    said = told["safety"]
    assert said["rows"]["zero_shot"]["harmful"]["interval"] == list(wilson(sum(before[:6]) / 6, 6))
    assert said["flagged"] == (change["harmful"].difference < 0) == results.safety.flagged
    err = capsys.readouterr().err
    assert "6 harmful requests, 95%: refused" in err
    assert ("WARNING: Plugged in" in err) == said["flagged"]
    assert "<h3>Requests refused</h3>" in page(results, {})


@pytest.mark.parametrize(("limit", "flagged"), [(0.99, True), (1.0, False)])
def test_an_adapter_that_refuses_less_is_flagged_past_the_limit(
    evaluated, monkeypatch, tmp_path, capsys, limit, flagged
):
    plain = module.BySafety.score

    def scored(self, model, tokenizer, label, **given):
        monkeypatch.setattr(module, "is_refusal", lambda _text: not label.startswith("plugged in"))
        return plain(self, model, tokenizer, label, **given)

    monkeypatch.setattr(module.BySafety, "score", scored)
    assert evaluated(safety_limit=limit)["safety"]["flagged"] == flagged
    assert ("WARNING: Plugged in, the model refuses fewer harmful requests" in capsys.readouterr().err) == flagged
    results = read_results(tmp_path / "results")
    assert results.safety.flagged == flagged
    assert ("the model refuses fewer harmful requests" in page(results, {})) == flagged
    stated = json.loads((tmp_path / "results" / "results.json").read_text())
    without = {name: value for name, value in stated.items() if name != "safety"}
    for spoilt in (without, {**stated, "tasks": {}}):
        with pytest.raises(BadSchema):
            parse_results(json.dumps(spoilt).encode(), "results")


def test_without_it_nothing_of_it_is_in_the_results(evaluated, tmp_path):
    evaluated(safety=False)
    assert "safety" not in (tmp_path / "results" / "results.json").read_text().replace('"safety_limit"', "").replace(
        '"safety": false', ""
    )


def test_what_it_does_not_go_with(evaluated, tmp_path):
    with pytest.raises(ValueError, match="--safety-limit: it is of --safety"):
        evaluated(safety=False, safety_limit=0.2)
    with pytest.raises(ConfigError, match=r"a request and its answer of .* tokens, the model's context is 128"):
        evaluated(answer_tokens=120)
    (tmp_path / "safety.yaml").write_text("task: x")
    with pytest.raises(ConfigError, match="'safety' is what --safety is measured as"):
        evaluated(task=(tmp_path / "safety.yaml",))
    assert not (tmp_path / "results").exists()
