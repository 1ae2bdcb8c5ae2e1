"""The exploration's file: it opens as it was written, and a change of any figure is refused."""

from __future__ import annotations

import json
import math

import pytest

from emulator.dial.exploration import LIMIT_BYTES, Exploration, read_exploration
from emulator.dial.verb import run
from offsite.errors import ArtefactError, BadSchema, TooLarge, WrongBinding


@pytest.fixture
def explored(world, settings, tmp_path):
    """The file of an exploration with a target that one size gives."""
    run(settings(explore=True, target="recovery=0.7"))
    return tmp_path / "package.explore.json"


def test_it_opens_as_it_was_written(explored):
    found = read_exploration(explored)
    assert json.loads(explored.read_text()) == found.model_dump(mode="json")
    assert "made" not in json.loads(explored.read_text())
    assert Exploration.model_validate(found.model_dump()) == found


def put(*path, value):
    def change(stated):
        inner = stated
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value

    return change


def more(value):
    return value * 1.01 + 0.01


TAMPERED = {
    "another format": (put("format", value="offsite/exploration/2"), WrongBinding),
    "an unknown key": (put("extra", value=1), BadSchema),
    "a digest that is none": (put("base_digest", value="sha256:0"), BadSchema),
    "a recovery": (put("tried", 1, "figures", "recovery", value=more), BadSchema),
    "a recovery in nats": (put("tried", 1, "figures", "recovery_nats", value=more), BadSchema),
    "a gap": (put("tried", 1, "figures", "gap", value=more), BadSchema),
    "what is withheld": (put("tried", 0, "figures", "withheld", value=more), BadSchema),
    "what is withheld untuned": (put("tried", 0, "withheld_zero_shot", value=more), BadSchema),
    "a perplexity": (put("tried", 0, "emulator_tuned", value=more), BadSchema),
    "the full model's": (put("zero_shot", value=more), BadSchema),
    "the reference": (put("lora_full", value=more), BadSchema),
    "a reference that gained nothing": (lambda stated: put("lora_full", value=stated["zero_shot"])(stated), BadSchema),
    "the line's height": (put("lines", 0, "a", value=more), BadSchema),
    "the line's slope": (put("lines", 0, "b", value=more), BadSchema),
    "how near the line is": (put("lines", 0, "residual", value=more), BadSchema),
    "a line of nothing": (put("lines", 0, "method", value="drop"), BadSchema),
    "a size twice": (put("tried", 1, "size", value=0.2), BadSchema),
    "a size above one": (put("tried", 4, "size", value=1.5), BadSchema),
    "a rung of another method": (put("ladder", 0, "method", value="drop"), BadSchema),
    "no figure": (put("wanted", "target", value="taste"), BadSchema),
    "a size beyond those tried": (put("wanted", "size", value=0.9), BadSchema),
    "a negative distance": (put("tried", 0, "field_kl", value=-0.1), BadSchema),
    "a text of no rows": (put("tuned_on", "num_rows", value=0), BadSchema),
    "a number as a word": (put("zero_shot", value="13"), BadSchema),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_change_is_refused(name, explored):
    change, error = TAMPERED[name]
    stated = json.loads(explored.read_text())
    change(stated)
    explored.write_text(json.dumps(stated))
    with pytest.raises(error):
        read_exploration(explored)


def test_a_package_is_not_made_of_what_was_not_met(world, settings, tmp_path):
    run(settings(target="recovery=0.7"))
    path = tmp_path / "package.explore.json"
    stated = json.loads(path.read_text())
    assert stated["made"]["scale"] == 0.5
    for change in (put("wanted", "is_met", value=False), lambda stated: stated.pop("wanted")):
        changed = json.loads(path.read_text())
        change(changed)
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        with pytest.raises(BadSchema):
            read_exploration(tmp_path / "changed.json")


def test_what_is_no_file_or_too_long_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="no exploration"):
        read_exploration(tmp_path / "none.json")
    with (tmp_path / "long.json").open("wb") as out:
        out.truncate(LIMIT_BYTES + 1)
    with pytest.raises(TooLarge):
        read_exploration(tmp_path / "long.json")
    (tmp_path / "nan.json").write_text(json.dumps({"format": "offsite/exploration/1", "zero_shot": math.nan}))
    with pytest.raises(BadSchema):
        read_exploration(tmp_path / "nan.json")
