"""Rows of an evaluation by a task's own measure, beside the baselines of the same task and data."""

from __future__ import annotations

import json

import colours
import pytest

from offsite.baselines import verb
from offsite.baselines.config import BaselineConfig
from offsite.errors import WrongBinding
from offsite.evaluation.results import read_results
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import run


def test_rows_by_the_tasks_measure_and_the_baselines_beside_them(
    llama_folder, dropped_package, make_bundle, tmp_path, capsys
):
    (tmp_path / "task.yaml").write_text(colours.TEXT)
    rows = [{"thing": f"ball {n}", "answer": colours.LABELS[n % 3]} for n in range(9)]
    rows += [{"thing": "sky", "answer": "blue"}]  # a sample of the task
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data": (tmp_path / "rows.jsonl",), "device": "cpu"}
    models = (str(llama_folder), str(dropped_package.path))
    asked = BaselineConfig(
        task=tmp_path / "task.yaml", model=models, method=("zero-shot",), output=tmp_path / "table.json", **data
    )
    baselines = {row["kind"]: row["figures"]["accuracy"]["value"] for row in verb.run(asked)["rows"]}
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora", shake=0.5)
    given = {"model": str(llama_folder), "package": dropped_package.path, "bundle": (str(bundle.path),), **data}
    given |= {"block_tokens": 64, "task_file": tmp_path / "task.yaml", "baselines": tmp_path / "table.json"}
    found = run(EvaluateConfig(output=tmp_path / "results", **given))
    measured = {row: one["accuracy"]["value"] for row, one in found["task"]["rows"].items()}
    assert measured["zero_shot"] == baselines["model"]
    assert measured["emulator_zero_shot"] == baselines["package"]
    assert len({*measured.values()}) > 1
    low, high = (found["task"]["rows"]["plugged_in"]["accuracy"][name] for name in ("low", "high"))
    assert low <= measured["plugged_in"] <= high
    assert read_results(tmp_path / "results").tasks == {"colours": 9}
    assert "as tuned" in capsys.readouterr().err
    for changes, told in (
        ({"task_limit": 3}, "on other rows"),
        ({"task_file": tmp_path / "other.yaml"}, "of task sha256"),
    ):
        (tmp_path / "other.yaml").write_text(colours.text(("Name the", "Tell the")))
        with pytest.raises(WrongBinding, match=told):
            run(EvaluateConfig(output=tmp_path / "refused", **{**given, **changes}))
        assert not (tmp_path / "refused").exists()


def test_baselines_need_their_task(llama_folder, dropped_package, tmp_path):
    with pytest.raises(ValueError, match="--baselines: they are of a task"):
        EvaluateConfig(
            model=str(llama_folder), package=dropped_package.path, bundle=("b",), data=(tmp_path / "x.jsonl",),
            output=tmp_path / "results", baselines=tmp_path / "table.json",
        )  # fmt: skip
