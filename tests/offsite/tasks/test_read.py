from __future__ import annotations

import json

import colours
import pytest

from offsite.errors import ConfigError, DataError
from offsite.tasks.read import LIMIT_BYTES, parse_task, read_task
from offsite.tasks.task import Task


def test_what_is_only_spelled_otherwise_is_the_same_task() -> None:
    task = colours.task()
    again = parse_task(json.dumps(task.model_dump(mode="json")).encode(), "task")  # JSON is YAML, too
    assert again == task
    assert again.digest == task.digest == colours.task(("name:", "# a remark\nname:")).digest
    assert colours.task(("Name the colour.", "Name its colour.")).digest != task.digest
    assert Task.model_validate_json(task.model_dump_json()) == task


def test_everything_that_is_wrong_is_told_at_once() -> None:
    wrong = colours.text(
        ("colours", "Colours!"), ("{{thing}}", "{{thing|upper}} {{other}}"), ("blue]", "Red]"), ("accuracy", "f2")
    )
    with pytest.raises(DataError) as caught:
        parse_task(wrong.encode(), "task 'x'")
    told = str(caught.value)
    for part in ("name: ", "labels: two labels are one", "measure: ", "prompt 1: holds braces"):
        assert part in told
    disagree = colours.text(("accuracy", "rouge-l"), ("answer: red", "answer: pink"), ("sea", "sky"))
    with pytest.raises(DataError) as caught:
        parse_task(disagree.encode(), "task 'x'")
    told = str(caught.value)
    for part in ("rouge-l is not one of accuracy", "sample 1: the answer is none of the labels", "sample 3: is a test"):
        assert part in told
    assert "pink" not in told


WRONG = {
    "code": ("!!python/object/apply:os.system [ls]", "not plain YAML"),
    "anchors": (colours.text(("{thing: blood}", "&x {thing: blood}"), ("{thing: grass}", "*x")), "anchors are not"),
    "twice": (colours.TEXT + "measure: accuracy\n", "'measure' is given twice"),
    "date": (colours.text(("vars: {thing: sea}", "vars: {thing: 2026-01-01}")), "what JSON cannot"),
    "deep": ("[" * 600, "task 'x'"),
    "file": (colours.text(('"Thing: {{thing}}\\nColour:"', '"file://prompt.txt {{thing}}"')), "names a file"),
    "block": (colours.text(("Thing: {{thing}}", "{% if thing %}{{thing}}{% endif %}")), "braces"),
    "number": (colours.text(("{thing: sky}", "{thing: 1}")), "samples.2.vars.thing"),
    "unseen": (colours.text(("Name the", "Name\u202e the")), r"U\+202E"),
    "foreign": (colours.text(("{thing: sky}", "{thing: sky, more: x}")), "1 of its names are none of the fields"),
    "nobody": (colours.TEXT + "providers: [openai]\n", "providers: is not a key of a task"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_task_is_data(case: str) -> None:
    text, told = WRONG[case]
    with pytest.raises(DataError, match=told):
        parse_task(text.encode(), "task 'x'")


def test_a_file_is_bounded(tmp_path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(colours.TEXT + "#" * LIMIT_BYTES)
    with pytest.raises(DataError, match="is over"):
        read_task(path)
    with pytest.raises(ConfigError, match=r"cannot read task 'none\.yaml'"):
        read_task(tmp_path / "none.yaml")
