"""Rows of an evaluation by rules: answers against transformers' own greedy ones, and what is refused."""

from __future__ import annotations

import json

import pytest

from offsite.errors import DataError
from offsite.evaluation.results import read_results
from offsite.tasks.config import RuleSettings
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import run

NUM_NEW = 6


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_row_answers_and_is_held_to_the_rules(
    llama_folder, dropped_package, make_bundle, tmp_path, capsys, greedy
):
    prompts = [f"ward {number}?" for number in range(8)]
    own, emulated = (greedy(folder, prompts, NUM_NEW) for folder in (llama_folder, dropped_package.path))
    # the right answer of every other row is what the full model says
    rows = [
        {"prompt": prompt, "completion": f" {text} " if number % 2 and text.strip() else "rash"}
        for number, (prompt, (text, _)) in enumerate(zip(prompts, own, strict=True))
    ]
    data = write(tmp_path / "asked.jsonl", rows)
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora", shake=0.5)
    rules = RuleSettings(exact=2.0, min_tokens=NUM_NEW, tokens_weight=0.5)
    given = {
        "model": str(llama_folder),
        "package": dropped_package.path,
        "bundle": (str(bundle.path),),
        "device": "cpu",
    }
    given |= {"block_tokens": 64, "rules": rules, "answer_tokens": NUM_NEW, "data": (data,)}
    run(EvaluateConfig(output=tmp_path / "results", **given))
    results = read_results(tmp_path / "results")
    assert results.tasks == {"rules": 8}
    for row, answers in (("zero_shot", own), ("emulator_zero_shot", emulated)):
        exact = [
            " ".join(text.split()) == " ".join(one["completion"].split())
            for (text, _), one in zip(answers, rows, strict=True)
        ]
        long = [num >= NUM_NEW for _, num in answers]
        found = {name: one.mean for name, one in results.rows[row].tasks["rules"].items()}
        assert found["exact"] == pytest.approx(sum(exact) / 8)
        assert found["tokens"] == pytest.approx(sum(long) / 8)
        assert found["reward"] == pytest.approx((2 * sum(exact) + 0.5 * sum(long)) / 8)
    assert 0 < results.rows["zero_shot"].tasks["rules"]["exact"].mean < 1
    assert {row for row in results.rows if "rules" in results.rows[row].tasks} == set(results.rows)
    assert "--rules exact=2.0,min_tokens=6,tokens_weight=0.5" in results.command
    assert "rules reward" in capsys.readouterr().err

    for changes, error, told in (
        ({"data": (write(tmp_path / "plain.jsonl", [{"text": "ward"}] * 4),)}, DataError, "prompt"),
        ({"answer_tokens": 60}, DataError, "none of 8 prompts leaves room for 60 tokens"),
        (
            {"rules": RuleSettings(json_schema=tmp_path / "none.json")},
            DataError,
            "no such file, expected a JSON schema",
        ),
    ):
        with pytest.raises(error, match=told):
            run(EvaluateConfig(output=tmp_path / "refused", **{**given, **changes}))
        assert not (tmp_path / "refused").exists()
    for changes, told in (
        ({"rules": RuleSettings()}, "--rules: nothing is rewarded"),
        ({"task_file": tmp_path / "task.yaml"}, "--rules: rows of --task-file are held to the task's form"),
    ):
        with pytest.raises(ValueError, match=told):
            EvaluateConfig(output=tmp_path / "refused", **{**given, **changes})
