from __future__ import annotations

import json

import colours
import pytest

from offsite.baselines import verb
from offsite.baselines.asking import Asker
from offsite.baselines.config import BaselineConfig
from offsite.baselines.table import figure_of, read_baselines
from offsite.errors import ConfigError, DataError, RunFailed


@pytest.fixture
def baseline(tmp_path, llama_folder, dropped_package):
    (tmp_path / "task.yaml").write_text(colours.TEXT)
    colours.write_rows(tmp_path / "rows.jsonl", 3)

    def make(name: str = "table.json", **changes):
        small = {"rows_at_once": 2, "thought_tokens": 4, "part_tokens": 2, "shots": 2, "device": "cpu", "parts": 1}
        small |= {"method": ("zero-shot", "least-to-most")}
        given = {"data": (tmp_path / "rows.jsonl",), "fields": colours.COLUMNS, **small, **changes}
        models = given.pop("model", (str(llama_folder), str(dropped_package.path)))
        return BaselineConfig(task=tmp_path / "task.yaml", model=models, output=tmp_path / name, **given)

    return make


def figures(path):
    return [row.model_copy(update={"seconds": 0.0}) for row in read_baselines(path).rows]


def test_a_run_that_was_killed_goes_on_from_its_answers(baseline, monkeypatch) -> None:
    config = baseline()
    told = verb.run(config)
    assert [(row["kind"], row["method"]) for row in told["rows"]] == [
        (kind, method) for kind in ("model", "package") for method in config.method
    ]
    assert told["num_rows"] == 3
    broken, asked, times = baseline("again.json"), Asker.ask, []

    def ask(self, rows):
        times.append(len(rows))
        if len(times) == 4:
            raise RunFailed("killed")
        return asked(self, rows)

    monkeypatch.setattr(Asker, "ask", ask)
    with pytest.raises(RunFailed):
        verb.run(broken)
    work = broken.output.with_name("again.json.work")
    with (work / "answers.jsonl").open("a") as out:
        out.write('{"place": [1, 1], "ro')  # what a kill tears
    with pytest.raises(ConfigError, match="another task, data, model or setting"):
        verb.run(baseline("again.json", seed=1))
    verb.run(broken)
    assert len(times) == 4 + 8 - 3
    assert figures(broken.output) == figures(config.output)
    assert not work.exists()


def test_samples_are_not_measured_on(baseline, tmp_path, llama_folder) -> None:
    rows = [{"thing": "blood", "answer": "red"}, {"thing": "coal", "answer": "red"}]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"data": (tmp_path / "more.jsonl",), "fields": {}, "method": ("zero-shot",), "model": (str(llama_folder),)}
    assert verb.run(baseline(**few))["num_rows"] == 1
    (tmp_path / "more.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="every row is a sample"):
        verb.run(baseline("other.json", **few))


def test_intervals() -> None:
    share = figure_of([1.0] * 4 + [0.0] * 6, "accuracy")
    assert (share.value, round(share.low, 3), round(share.high, 3)) == (0.4, 0.168, 0.687)  # Wilson's, by hand
    mean = figure_of([0.5] * 10, "rouge-l")
    assert (mean.low, mean.value, mean.high) == (0.5, 0.5, 0.5)
    spread = figure_of([0.0, 1.0] * 50, "rouge-l")
    assert spread.low == pytest.approx(0.4, abs=0.03)
    assert spread.high == pytest.approx(0.6, abs=0.03)
