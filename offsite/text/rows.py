"""Lines of a file as rows of a table, unexamined, and what a row's fields must be to be read on.

Errors name the file and the row and say what was expected; they never repeat what a row holds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.text.files import lines
from offsite.text.parquet import parquet_rows

KINDS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
NAME_COLUMNS = "name the columns to read, as in fields.text=COLUMN"

Messages = tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True)
class Row:
    """One row of a table as it stands in the file."""

    values: Mapping[str, Any] = field(repr=False)
    number: int
    place: str

    def error(self, problem: str, *, hint: str | None = None) -> DataError:
        """The error to raise about this row."""
        return DataError(f"{self.place}: {problem}", hint=hint)

    def string(self, name: str, *, empty: bool = False) -> str:
        """The text in field `name`; DataError when it is missing, not text, or (unless `empty`) blank."""
        return checked_string(self.values.get(name), f"field '{name}'", self, empty=empty)


_LEFT_BESIDE = (".log.jsonl", ".run.json", ".owner.json", ".release.json", ".card.json", ".offsite.json")
"""Endings of what verbs write beside an output, which is never anybody's data."""


def files_in(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the files that these paths name: a file stands for itself, a folder for those in it that can be read.

    Of a folder they come in the order of their names; what has another ending, is hidden, lies in a folder below, or is
    what a verb left beside its output (`_LEFT_BESIDE`) is left out. Paths that name nothing are returned as they are,
    for whoever reads them to refuse.

    Raises:
        DataError: when a folder holds no such file, or a link to what lies outside of it.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        try:
            inside = [one for one in sorted(path.iterdir()) if _can_be_read(one)]
        except OSError as error:
            raise DataError(f"{path.name}: cannot be read: {(error.strerror or 'i/o error').lower()}") from None
        for one in inside:
            if one.is_symlink() and not one.resolve().is_relative_to(path.resolve()):
                raise DataError(
                    f"{path.name}/{one.name}: a link to what lies outside of the folder",
                    hint="give that file by its own path, or move it there",
                )
        if not inside:
            raise DataError(
                f"{path.name}: a folder without a file of text", hint=f"expected files that end in {', '.join(KINDS)}"
            )
        found += inside
    return tuple(found)


def _can_be_read(path: Path) -> bool:
    """Tell whether the name in a folder is that of a file of text; a link that leads nowhere is, too."""
    if path.name.startswith(".") or path.is_dir() or path.name.endswith(_LEFT_BESIDE):
        return False
    try:
        file_kind(path)
    except DataError:
        return path.suffixes[-2:] == [".parquet", ".gz"]  # which is refused where it is read, not left out
    return True


def read_rows(path: Path, *, images: bool = False) -> Iterator[Row]:
    """The rows of a ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file, each optionally ``.gz``, or a ``.parquet`` file.

    A ``.jsonl`` row is numbered by its line; others count from 1, the header of a ``.csv`` or ``.tsv`` apart.

    Args:
        images: columns of bytes in Parquet are read, too.

    Raises:
        DataError: the file or a row cannot be read.
    """
    path = Path(path)
    match file_kind(path):
        case ".jsonl":
            return _jsonl_rows(path)
        case ".json":
            return _json_rows(path)
        case ".csv":
            return _csv_rows(path, ",")
        case ".tsv":
            return _csv_rows(path, "\t")
        case ".parquet":
            return _parquet_rows(path, images)
        case kind:
            raise DataError(f"{path.name}: {kind} has no fields", hint=f"give one of {', '.join(KINDS[1:])}")


def file_kind(path: Path) -> str:
    """The ending that says how to read `path`, without ``.gz``; DataError for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    if packed:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in KINDS:
        raise DataError(
            f"{path.name}: unknown kind of file",
            hint=f"expected {', '.join(KINDS)}, each but the last optionally followed by .gz",
        )
    if packed and suffixes[-1] == ".parquet":
        raise DataError(f"{path.name}: Parquet files compress themselves", hint="gunzip it")
    return suffixes[-1]


def checked_string(value: Any, what: str, row: Row, *, empty: bool = False) -> str:
    """`value`, known to be text that a tokenizer can take; DataError naming `what` and the row otherwise."""
    if value is None:
        raise row.error(f"{what} is missing", hint=NAME_COLUMNS)
    if not isinstance(value, str):
        raise row.error(f"{what} is {_json_type(value)}, expected text")
    if not empty and not value.strip():
        raise row.error(f"{what} is empty", hint="remove the row or fill it in")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair; no tokenizer can read one
        raise row.error(f"{what} holds half of a surrogate pair, which is not Unicode text") from None
    return value


def messages_in(row: Row, column: str, *, where: str = "") -> Messages:
    """The messages in field `column`, at least one; DataError naming the row when they are none.

    Args:
        where: put behind a message's number in errors.
    """
    values = row.values.get(column)
    if not isinstance(values, list) or not values:
        raise row.error(f"field '{column}' is not a list of messages, expected objects with role and content")
    messages = []
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict) or set(value) != {"role", "content"}:
            raise row.error(f"message {number}{where} does not have exactly the fields role and content")
        role = checked_string(value["role"], f"role of message {number}{where}", row)
        messages.append((role, checked_string(value["content"], f"content of message {number}{where}", row)))
    return tuple(messages)


def _json_type(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), "null")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in lines(path):
        if line.strip():
            place = f"{path.name}: line {number}"
            yield _object_row(_parsed(line, place), number, place)


def _json_rows(path: Path) -> Iterator[Row]:
    whole = "".join(line for _, line in lines(path))
    values = _parsed(whole, path.name) if whole.strip() else []
    if not isinstance(values, list):
        raise DataError(
            f"{path.name}: holds {_json_type(values)}, expected a list of rows",
            hint="name the file .jsonl if it has one object per line",
        )
    for number, value in enumerate(values, 1):
        yield _object_row(value, number, f"{path.name}: row {number}")


def _parquet_rows(path: Path, with_bytes: bool) -> Iterator[Row]:
    for number, values in enumerate(parquet_rows(path, with_bytes=with_bytes), 1):
        yield Row(values, number, f"{path.name}: row {number}")


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    text = (line for _, line in lines(path))
    if delimiter == ",":
        reader = csv.reader(text, strict=True)
    else:  # no cell can hold a tab or a line end, so that a quote is a character like any other
        reader = csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{path.name}: two columns have the same name")
        for number, cells in enumerate(filter(None, reader), 1):
            place = f"{path.name}: row {number}"
            if len(cells) != len(header):
                raise DataError(f"{place}: {len(cells)} columns, the header has {len(header)}")
            yield Row(dict(zip(header, cells, strict=True)), number, place)
    except csv.Error:
        raise DataError(
            f"{path.name}: line {reader.line_num}: not valid {'CSV' if delimiter == ',' else 'TSV'}",
            hint="check the quotes; fields over 131072 characters belong in .jsonl",
        ) from None


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise DataError(
            f"{place}: not valid JSON at {position}", hint=".jsonl has an object per line, .json one list"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits; nesting of thousands of levels
        raise DataError(f"{place}: JSON beyond what can be read") from None


def _object_row(value: Any, number: int, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: holds {_json_type(value)}, expected an object with fields")
    return Row(value, number, place)
