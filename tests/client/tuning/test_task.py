"""Runs by a task file: the same bundle as from prompts and answers, bound to the job that carries the task, audited."""

from __future__ import annotations

import json

import colours
import pytest

from client.tuning.runrecord import read_as
from client.tuning.verb import run
from offsite.artefacts.bundle import AdapterSpec, open_bundle
from offsite.artefacts.job import parse_job, task_at, write_job
from offsite.audits.runs import read_run, run_path
from offsite.errors import ConfigError, DataError, WrongBinding

LORA = {
    "adapter": "lora",
    "rank": 1,
    "placement": "1+0",
    "targets": "attention",
    "adapter_dtype": "float32",
    "steps": 1,
}


@pytest.fixture
def by_task(settings, tmp_path, dropped_package):
    """Make settings of a run on rows of the colours, by the task's file."""
    path, rows = tmp_path / "task.yaml", tmp_path / "rows.jsonl"
    path.write_text(colours.TEXT)
    colours.write_rows(rows)
    rows.write_text(rows.read_text() + json.dumps({"item": "frog", "kind": "green"}) + "\n")  # a test's input

    def make(**changes):
        given = {"data": rows, "fields": colours.COLUMNS, "block_tokens": 64, "pack": False, "task": path}
        return settings(dropped_package.path, **{**LORA, **given, **changes})

    return make


@pytest.mark.proves("rows", "rows of a task file", "next-token")
def test_rows_of_a_task_tune_as_their_prompts_and_answers_do(by_task, settings, tmp_path, dropped_package, capsys):
    told = run(by_task())
    assert "1 rows are tests of task 'colours'" in capsys.readouterr().err
    plain = tmp_path / "plain.jsonl"
    task = colours.task()
    rows = [{"prompt": task.introduced(task.asked({"thing": row["item"]})), "completion": f" {row['kind']}"}
            for row in colours.write_rows(tmp_path / "again.jsonl")]  # fmt: skip
    records = read_as([tmp_path / "rows.jsonl"], read_run(run_path(tmp_path / "bundle")).text)  # as an audit reads them
    named = zip(rows, [record.document for record in records], strict=True)
    plain.write_text("".join(json.dumps({**row, "document": document}) + "\n" for row, document in named))
    other = run(settings(dropped_package.path, **{**LORA, "block_tokens": 64, "pack": False},
                         data=plain, output=tmp_path / "other"))  # fmt: skip
    assert told["bundle_digest"] == other["bundle_digest"]  # without a job nothing of the task is disclosed


def test_a_job_carries_its_task_to_the_bundle(by_task, make_job, tmp_path):
    spec = AdapterSpec(kind="lora", placement="1+0", targets="attention", rank=1, dtype="float32")
    write_job(tmp_path / "job", make_job(adapter=spec, task=colours.task()))
    assert task_at(tmp_path / "job") == colours.task()
    (tmp_path / "other.yaml").write_text(colours.text(("Name the", "Tell the")))
    with pytest.raises(WrongBinding, match="--task: the job carries task 'colours'"):
        run(by_task(job=tmp_path / "job", task=tmp_path / "other.yaml"))
    config = by_task(job=tmp_path / "job", task=None)
    run(config)
    assert open_bundle(config.output).manifest.task_digest == colours.task().digest
    assert "ball" not in run_path(config.output).read_text()


def test_a_job_without_a_task_is_written_as_ever(make_job, tmp_path):
    write_job(tmp_path / "job", make_job())
    raw = (tmp_path / "job" / "job.json").read_bytes()
    assert b"task" not in raw
    with pytest.raises(ConfigError, match="at most 262144 are read"):
        write_job(tmp_path / "large", make_job(terms="\u00e4" * 20_000, task=colours.task(("blood", "\u00e4" * 16_000)))
                  .model_copy(update={"learning_rate": None, "terms": "\u00e4" * 40_000}))  # fmt: skip
    with pytest.raises(DataError, match="carries no task"):
        task_at(tmp_path / "job")
    carried = json.loads(raw) | {"task": colours.task().model_dump(mode="json")}
    assert parse_job(json.dumps(carried).encode()).job.task == colours.task()


def test_settings_that_do_not_go_with_a_task(by_task):
    for changes, told in (
        ({"objective": "dpo"}, "--task: its rows"),
        ({"separator": "--"}, "--separator: rows of a task"),
    ):
        with pytest.raises(ValueError, match=told):
            by_task(**changes)
    with pytest.raises(ConfigError, match="the task has no text"):
        run(by_task(fields={"text": "item"}))
