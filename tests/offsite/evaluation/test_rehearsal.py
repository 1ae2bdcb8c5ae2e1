"""The rehearsal's file: old ones open, new ones as they were written, and a change of any figure is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from offsite.errors import ArtefactError, BadSchema, TooLarge, WrongBinding
from offsite.evaluation.rehearsal import LIMIT_BYTES, Rehearsal, read_rehearsal

COMMITTED = sorted((Path(__file__).parents[3] / "benchmarks" / "quality" / "results" / "rehearsals").glob("*.json"))
DIGEST = "sha256:" + "0" * 64
OLD = {
    "format": "offsite/rehearsal/1",
    "model": "m",
    "base_digest": DIGEST,
    "package_digest": DIGEST,
    "adapter": {"kind": "lora", "placement": "all"},
    "data_sha256": DIGEST,
    "heldout": {
        "name": "x",
        "sha256": DIGEST,
        "num_records": 1,
        "num_examples": 1,
        "num_tokens": 1,
        "num_truncated": 0,
    },
    "zero_shot": 13.0,
    "emulator_zero_shot": 70.0,
    "trials": [{"learning_rate": 0.004, "scale": 0.5, "plugged_in": 10.0, "emulator_tuned": 20.0}],
    "config": {},
    "command": "offsite rehearse",
    "versions": {},
    "seconds": 1.0,
}
NEW = {
    **OLD,
    "withheld_zero_shot": math.log(70 / 13),
    "reference": {"package_digest": DIGEST, "adapter": OLD["adapter"], "learning_rate": 0.004, "perplexity": 8.0},
    "trials": [
        {
            **OLD["trials"][0],
            "withheld_after_tuning": math.log(20 / 13),
            "recovery": 0.6,
            "recovery_nats": math.log(13 / 10) / math.log(13 / 8),
        }
    ],
}


@pytest.fixture
def write(tmp_path):
    def written(stated):
        (tmp_path / "found.json").write_text(json.dumps(stated))
        return tmp_path / "found.json"

    return written


def test_there_are_committed_ones():
    assert len(COMMITTED) == 2


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_those_of_before_open_and_are_written_as_they_were(path):
    found = read_rehearsal(path)
    assert found.model_dump(mode="json").keys() == json.loads(path.read_text()).keys()
    assert found.reference is None
    assert found.best.withheld_after_tuning is None


@pytest.mark.parametrize("stated", [OLD, NEW], ids=["old", "new"])
def test_it_opens_as_it_was_written(stated, write):
    found = read_rehearsal(write(stated))
    again = found.model_dump(mode="json")
    assert set(again) == set(stated)
    assert set(again["trials"][0]) == set(stated["trials"][0])
    assert Rehearsal.model_validate_json(json.dumps(again)) == found


def put(*path, value):
    def change(stated):
        inner = stated
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


TAMPERED = {
    "another format": (put("format", value="offsite/rehearsal/2"), WrongBinding),
    "an unknown key": (put("extra", value=1), BadSchema),
    "what is withheld": (put("trials", 0, "withheld_after_tuning", value=0.4), BadSchema),
    "what is withheld untuned": (put("withheld_zero_shot", value=0.4), BadSchema),
    "a recovery": (put("trials", 0, "recovery", value=0.61), BadSchema),
    "a recovery in nats": (put("trials", 0, "recovery_nats", value=0.61), BadSchema),
    "a perplexity": (put("trials", 0, "plugged_in", value=9.9), BadSchema),
    "the reference": (put("reference", "perplexity", value=8.1), BadSchema),
    "a reference of nothing": (put("reference", "perplexity", value=0), BadSchema),
    "a share above one": (put("trials", 0, "scale", value=1.1), BadSchema),
    "no trial": (put("trials", value=[]), BadSchema),
    "a recovery without a reference": (lambda stated: stated.pop("reference"), BadSchema),
    "a digest that is none": (put("base_digest", value="x"), BadSchema),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_change_is_refused(name, write):
    change, error = TAMPERED[name]
    stated = json.loads(json.dumps(NEW))
    change(stated)
    with pytest.raises(error):
        read_rehearsal(write(stated))


def test_no_file_and_a_long_one_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match="no rehearsal"):
        read_rehearsal(tmp_path / "none.json")
    with (tmp_path / "long.json").open("wb") as out:
        out.truncate(LIMIT_BYTES + 1)
    with pytest.raises(TooLarge):
        read_rehearsal(tmp_path / "long.json")
