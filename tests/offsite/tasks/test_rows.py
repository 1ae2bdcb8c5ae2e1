from __future__ import annotations

import json

import colours
import pytest

from offsite.errors import ConfigError, DataError
from offsite.tasks.rows import read_task_rows, training_records


def test_rows_become_prompt_and_answer_and_tests_are_left_out(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    colours.write_rows(path, 3)
    with path.open("a") as out:
        out.write(json.dumps({"item": "frog", "kind": "green"}) + "\n")
    task = colours.task()
    rows = read_task_rows([path], task, fields=colours.COLUMNS)
    records = training_records(rows, task)
    assert len(rows) == 4
    assert [record.segments for record in records] == [
        ((f"Name the colour.\n\nThing: ball {number}\nColour:", False), (f" {label}", True))
        for number, label in enumerate(colours.LABELS)
    ]
    ending = colours.task(('Colour:"', 'Colour:\\n"'))
    assert training_records(rows, ending)[0].segments[1] == ("red", True)  # no blank after a line's end
    with pytest.raises(DataError, match="every row is a test"):
        training_records(rows[3:], task)


def test_a_row_that_is_none_of_the_task_is_told_without_its_content(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"thing": "secret-ward", "answer": "purple-word"}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: line 1: the answer is none of the labels") as caught:
        read_task_rows([path], colours.task())
    assert "purple" not in f"{caught.value}{caught.value.hint}"
    with pytest.raises(ConfigError, match="the task has no question"):
        read_task_rows([path], colours.task(), fields={"question": "thing"})


def test_choices_of_a_row_are_its_labels(tmp_path) -> None:
    task = colours.task(
        ("  thing: a thing of one colour", "  thing: a thing\n  options: its colours"),
        ("type: labels\n  labels: [red, green, blue]", "type: choice\n  field: options"),
        ("{{thing}}", "{{thing}}\\n{{options}}"),
        *(
            (f"{{thing: {name}}}", f"{{thing: {name}, options: [red, green, blue]}}")
            for name in ("blood", "grass", "sky", "sea", "frog")
        ),
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"thing": "coal", "options": ["black", "white"], "answer": "black"}) + "\n")
    (row,) = read_task_rows([path], task)
    assert task.labels_of(row.vars) == ("black", "white")
    assert task.asked(row.vars) == "Thing: coal\n- black\n- white\nColour:"
    path.write_text(json.dumps({"thing": "coal", "options": ["black"], "answer": "black"}) + "\n")
    with pytest.raises(DataError, match="two different texts"):
        read_task_rows([path], task)
