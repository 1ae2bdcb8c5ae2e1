"""What stands around the figures: names instead of paths, a command that gives them again, and numbers as text."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from offsite.config import build
from offsite.evaluation.results import Summary
from server.evaluation.config import EvaluateConfig
from server.evaluation.summary import read_outcomes, reproduce, spread

FLAGS = {
    "model": "/home/someone/models/big",
    "output": "/home/someone/out/results",
    "package": "/home/someone/packages/p1",
    "bundle": ["/mnt/a/b1", "s2=/mnt/b/b1"],
    "data": "/data/held out.jsonl",
    "reference": ["ceiling=/mnt/c/r1"],
    "prompt": ["a prompt", "another, with a comma"],
    "pack": False,
    "fields": "text=body,prompt=q",
    "task": ["/tasks/arc.jsonl"],
    "precision": "bf16",
}


def test_the_settings_hold_names_and_no_folders():
    settings, command = reproduce(build(EvaluateConfig, flags=FLAGS))
    for text in (str(settings), command):
        for folder in ("/home", "someone", "/mnt", "/data", "/tasks"):
            assert folder not in text
    assert settings["bundle"] == ["b1=b1", "s2=b1"]
    assert settings["data"] == "held out.jsonl"


def test_the_command_gives_the_same_settings_again():
    config = build(EvaluateConfig, flags=FLAGS)
    settings, command = reproduce(config)
    words = shlex.split(command)
    assert words[:3] == ["offsite", "evaluate", "big"]
    flags: dict[str, object] = {"model": words[2], "pack": True}
    rest = words[3:]
    while rest:
        flag = rest.pop(0).removeprefix("--").replace("-", "_")
        if flag == "no_pack":
            flags["pack"] = False
        elif (EvaluateConfig.model_fields[flag].json_schema_extra or {}).get("repeated"):
            flags.setdefault(flag, []).append(rest.pop(0))
        else:
            flags[flag] = rest.pop(0)
    assert reproduce(build(EvaluateConfig, flags=flags)) == (settings, command)


def test_a_share_that_was_given_is_in_the_command_also_where_it_is_all():
    """A package may have a share of its own, which no share given would take."""
    assert "--scale 1.0" in reproduce(build(EvaluateConfig, flags={**FLAGS, "scale": "1"}))[1]
    assert "--scale" not in reproduce(build(EvaluateConfig, flags=FLAGS))[1]


@pytest.mark.parametrize(
    ("mean", "deviation", "shown"),
    [(9.3456, None, "9.346"), (9.3456, 0.123, "9.346 ± 0.12"), (4907.3, None, "4907"), (123456.7, None, "123,457")],
)
def test_a_spread_as_text(mean, deviation, shown):
    assert spread(Summary(mean=mean, deviation=deviation, values={"a": mean})) == shown


def test_outcomes_keep_known_numbers_only(tmp_path):
    path: Path = tmp_path / "tune.json"
    path.write_text('{"steps": 3, "seconds": NaN, "peak_bytes": true, "num_records": 9, "bundle": "x"}')
    assert read_outcomes([("tune", path)]) == {"tune": {"steps": 3.0}}
    path.write_text('{\n "steps": 3\n}\n')
    assert read_outcomes([("tune", path)]) == {"tune": {"steps": 3.0}}
