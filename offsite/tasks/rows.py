"""Rows of a task from files: a column for each field, and ``answer``. Errors name file and row, never content."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offsite.console import say
from offsite.digests import sha256_bytes
from offsite.errors import ConfigError, DataError
from offsite.tasks.forms import JsonForm, object_in
from offsite.tasks.task import ANSWER, Answer, Task
from offsite.tasks.templates import Value
from offsite.text.records import DOCUMENT, Record, require_files
from offsite.text.rows import Row, checked_string, read_rows


@dataclass(frozen=True)
class TaskRow:
    """An input, its answer, and the document that it belongs to."""

    vars: Mapping[str, Value] = field(repr=False)
    answer: Answer = field(repr=False)
    document: str = field(repr=False)
    number: int = 0
    place: str = ""


def read_task_rows(
    paths: Sequence[Path],
    task: Task,
    *,
    fields: Mapping[str, str] | None = None,
    document_field: str | None = None,
    share_documents: bool = False,
) -> list[TaskRow]:
    """Return every row of the files, in their order.

    Args:
        fields: columns under other names, as ``{"question": "text", "answer": "category"}``.
        document_field: the column that says which rows belong together; without it, the column ``document`` if there is
            one that is no field, else each input is a document.
        share_documents: documents of one name are the same in every file.

    Raises:
        DataError: when a file cannot be read, is empty, or a row is not one of the task.
        ConfigError: when `fields` names what the task has not, or a file is given twice.
    """
    require_files(paths)
    columns = {name: (fields or {}).get(name, name) for name in (*task.fields, ANSWER)}
    if unknown := sorted(set(fields or {}) - set(columns)):
        raise ConfigError(f"--fields: the task has no {', '.join(unknown)}, it has {', '.join(columns)}")
    found = []
    for number, path in enumerate(paths, 1):
        label = "" if share_documents or len(paths) == 1 else f"{number}/"
        rows = [_task_row(row, task, columns, document_field, label) for row in read_rows(path)]
        if not rows:
            raise DataError(f"{path.name}: empty, expected at least one row", hint="is it the right file?")
        found += rows
    return found


def test_rows(task: Task) -> list[TaskRow]:
    """Return the rows of the task's own tests."""
    return [TaskRow(one.vars, one.answer, f"test {n}", n, f"test {n}") for n, one in enumerate(task.tests, 1)]


def without(rows: Sequence[TaskRow], others: Iterable[Mapping[str, Value]]) -> list[TaskRow]:
    """Return the rows whose input is none of the others."""
    held = {_key(one) for one in others}
    return [row for row in rows if _key(row.vars) not in held]


def training_records(rows: Sequence[TaskRow], task: Task) -> list[Record]:
    """Return the rows as prompt and answer, of which the answer counts; the task's tests are not among them.

    Raises:
        DataError: when nothing is left.
    """
    kept = without(rows, (test.vars for test in task.tests))
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} rows are tests of task {task.name!r}: they are not tuned on")
    if not kept:
        raise DataError(f"every row is a test of task {task.name!r}", hint="give other rows by --data")
    return records_of(kept, task)


def records_of(rows: Sequence[TaskRow], task: Task) -> list[Record]:
    """Return the rows as prompt and answer, of which the answer counts."""
    found = []
    for row in rows:
        prompt = task.introduced(task.asked(row.vars))
        segments = ((prompt + task.led(prompt).rstrip(" "), False), (_answer_after(prompt, row, task), True))
        found.append(Record(segments, row.document, row.number, place=row.place))
    return found


def _answer_after(prompt: str, row: TaskRow, task: Task) -> str:
    """Return the answer with the blank before it, which tokenizers take for a part of its first word."""
    return (" " if task.led(prompt) == " " else "") + task.spelled(row.answer)


def _task_row(row: Row, task: Task, columns: Mapping[str, str], document_field: str | None, label: str) -> TaskRow:
    values = {name: _value(row, columns[name]) for name in task.fields}
    answer: Answer = _answer(row, columns[ANSWER], task)
    if problems := task.problems_of(values, answer):
        raise row.error("; ".join(problems), hint=f"columns expected: {', '.join(columns.values())}")
    if document_field is None and DOCUMENT in row.values and DOCUMENT not in columns.values():
        document_field = DOCUMENT
    document = _key(values) if document_field is None else label + str(_document(row, document_field))
    return TaskRow(values, answer, document, row.number, row.place)


def _value(row: Row, column: str) -> Value:
    value = row.values.get(column)
    if isinstance(value, list):
        return tuple(checked_string(one, f"a text of field '{column}'", row) for one in value)
    return row.string(column)


def _answer(row: Row, column: str, task: Task) -> Answer:
    value = row.values.get(column)
    if not isinstance(task.answer, JsonForm):
        return row.string(column)
    found = object_in(value, task.answer.schema_) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise row.error(f"field '{column}' is not a JSON object of the task's schema")
    return found


def _document(row: Row, name: str) -> object:
    value = row.values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else row.string(name)


def _key(values: Mapping[str, Value]) -> str:
    return sha256_bytes(json.dumps(values, sort_keys=True).encode())[7:39]
