"""A small task of labels, as a file and as data, and rows of it."""

from __future__ import annotations

import json
from pathlib import Path

from offsite.tasks.read import parse_task
from offsite.tasks.task import Task

TEXT = """\
name: colours
description: Name the colour.
fields:
  thing: a thing of one colour
prompts:
  - "Thing: {{thing}}\\nColour:"
answer:
  type: labels
  labels: [red, green, blue]
samples:
  - {vars: {thing: blood}, answer: red}
  - {vars: {thing: grass}, answer: green}
  - {vars: {thing: sky}, answer: blue}
tests:
  - vars: {thing: sea}
    assert: [{type: equals, value: blue}]
  - vars: {thing: frog}
    assert: [{type: equals, value: green}]
measure: accuracy
"""
LABELS = ("red", "green", "blue")


def task(*changes: tuple[str, str]) -> Task:
    """Return the task, with pieces of its file replaced."""
    return parse_task(text(*changes).encode(), "task 'colours'")


def text(*changes: tuple[str, str]) -> str:
    """Return the file, with pieces replaced; a piece that is not there is an error."""
    found = TEXT
    for old, new in changes:
        assert old in found
        found = found.replace(old, new)
    return found


def write_rows(path: Path, num: int = 40) -> list[dict[str, str]]:
    """Write rows of the task, all different, under names of their own; return them."""
    rows = [{"item": f"ball {number}", "kind": LABELS[number % 3]} for number in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


COLUMNS = {"thing": "item", "answer": "kind"}
