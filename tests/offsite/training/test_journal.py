from __future__ import annotations

import json
import sys

import pytest

from offsite.errors import ConfigError, RunFailed
from offsite.training.journal import Journal, truncate


def test_records_are_appended_one_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in (1, 2):
        log = Journal(path, tensorboard=None, step=step - 1)
        log.write({"step": step, "loss": 0.1})
        log.sync()
        log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.1},
    ]  # fmt: skip


def test_truncating_drops_later_torn_and_foreign_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\nnot json\n[1]\n{"step": "2"}\n{"step": 3}\n{"step": 2')
    truncate(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate(path, 0)
    assert path.read_text() == ""
    truncate(tmp_path / "none", 1)
    assert [found.name for found in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_full_disk_is_said(tmp_path):
    log = Journal(tmp_path / "log.jsonl", tensorboard=None, step=0)

    class Full:
        def write(self, line):
            return len(line) - 1

    log._file.close()
    log._file = Full()
    with pytest.raises(RunFailed, match="no space left on device"):
        log.write({"step": 1})


def test_without_the_tensorboard_package_it_is_refused_before_the_log_is_touched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed") as caught:
        Journal(tmp_path / "log.jsonl", tensorboard=tmp_path / "board", step=0)
    assert "pip install tensorboard" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the tensorboard package at import
def test_a_file_where_tensorboard_wants_a_folder_is_refused(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "board").write_text("mine")
    with pytest.raises(ConfigError, match="--tensorboard: cannot write in 'board': "):
        Journal(tmp_path / "log.jsonl", tensorboard=tmp_path / "board", step=0)
    assert (tmp_path / "board").read_text() == "mine"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the tensorboard package at import
def test_tensorboard_gets_every_figure(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Journal(tmp_path / "log.jsonl", tensorboard=tmp_path / "board", step=0)
    log.write({"step": 1, "loss": 0.5, "rate": 0.1})
    log.write({"step": 2, "loss": None, "rate": 0.2})
    log.close()
    found = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5)]
    assert [event.step for event in found.Scalars("rate")] == [1, 2]
