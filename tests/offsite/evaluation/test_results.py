"""The results folder: what is written is what is read, and logs hold numbers only."""

from __future__ import annotations

import json

import pytest

from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import BadSchema, ConfigError, DataError, TooLarge
from offsite.evaluation.results import (
    Crossing,
    Data,
    Parameters,
    Results,
    Row,
    Summary,
    read_log,
    read_logs,
    read_results,
    write_results,
)

DIGEST = "sha256:" + "a" * 64


def sample(**changes):
    one = Row(perplexity=Summary(mean=9.5, deviation=None, values={"once": 9.5}))
    given = {
        "model": "m",
        "base_digest": DIGEST,
        "method": {"name": "drop"},
        "adapter": AdapterSpec(),
        "data": Data(name="x", sha256=DIGEST, num_records=1, num_examples=1, num_tokens=9, num_truncated=0),
        "rows": dict.fromkeys(("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in"), one),
        "metrics": {"gap": None},
        "parameters": Parameters(full=4, middle=2, emulator=1, adapter=1),
        "package": Crossing(name="p", digest=DIGEST, files={}, num_parameters=3),
        "bundles": {"a": Crossing(name="b", digest=DIGEST, files={}, num_parameters=1)},
        "config": {"model": "m"},
        "command": "offsite evaluate m",
        "versions": {},
        "device": "cpu",
        "seconds": 1.0,
    }
    return Results(**{**given, **changes})


def test_what_is_written_is_what_is_read(tmp_path):
    write_results(tmp_path, sample(command="offsite evaluate café"))
    assert read_results(tmp_path) == sample(command="offsite evaluate café")
    assert list(json.loads((tmp_path / "results.json").read_text())["rows"]) == list(sample().rows)


def test_rows_are_scored_on_the_same_tasks(tmp_path):
    write_results(tmp_path, sample())
    stated = json.loads((tmp_path / "results.json").read_text())
    stated["rows"]["plugged_in"]["tasks"] = {"arc": {"acc": {"mean": 0.5, "values": {"a": 0.5}}}}
    (tmp_path / "results.json").write_text(json.dumps(stated))
    with pytest.raises(BadSchema, match="different tasks"):
        read_results(tmp_path)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_figures_are_finite(text, tmp_path):
    write_results(tmp_path, sample())
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace("9.5", text))
    with pytest.raises(BadSchema):
        read_results(tmp_path)


def test_a_file_over_the_limit_is_not_read(tmp_path, monkeypatch):
    write_results(tmp_path, sample())
    monkeypatch.setattr("offsite.evaluation.results.LIMIT_BYTES", 10)
    with pytest.raises(TooLarge):
        read_results(tmp_path)


def test_logs_are_read_by_name(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "tune.jsonl").write_text('{"step": 1, "loss": 2.5}\n\n{"step": 2, "loss": null}\n')
    assert read_logs(tmp_path) == {"tune": [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]}
    assert read_logs(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    "line",
    [
        *("words", "[1]", "{}", "[" * 9999),
        *('{"step": "1"}', '{"step": true}', '{"step": 1.5}'),
        *('{"step": 1, "loss": "2"}', '{"step": 1, "loss": true}', '{"step": 1, "loss": [1]}'),
        '{"step": 1, "loss": Infinity}',
    ],
)
def test_a_line_that_is_no_record_is_named_by_number(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=r"log 'x\.jsonl': line 2 is not a record") as caught:
        read_log(path)
    assert "words" not in str(caught.value)


def test_a_log_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot read log 'nowhere': no such file"):
        read_log(tmp_path / "nowhere")
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(DataError, match="log 'x' is not UTF-8 text"):
        read_log(tmp_path / "x")
