"""Text files as records: what each row holds, where it stands, and which document it belongs to.

A row has one of three shapes: ``text``; ``prompt`` and ``completion``; or ``messages``. Errors name the
file and the row and say what was expected. They never repeat what a row holds, and for that reason no
column names either: a table without a header has its first row for column names.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from offsite.errors import ConfigError, DataError
from offsite.text.files import lines

KINDS = (".txt", ".jsonl", ".json", ".csv")
SHAPES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
}
DOCUMENT = "document"
_NAME_COLUMNS = "name the columns to read, as in fields.text=COLUMN"
Purpose = Literal["split", "audit", "rehearsal", "dial"]
BUNDLED = ("heldout", "private", "public")


@dataclass(frozen=True)
class Record:
    """One row: either `segments` of running text, each with whether it counts in the loss, or `messages`."""

    segments: tuple[tuple[str, bool], ...] = field(repr=False)
    document: str = field(repr=False)
    row: int
    messages: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # (role, content)
    place: str = ""  # "notes.jsonl: line 7", for errors

    @property
    def whole_text(self) -> str:
        """All of its text as one: a prompt and its completion, or every message."""
        return " ".join([text for text, _ in self.segments] + [content for _, content in self.messages])


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


def read_records(
    path: Path,
    *,
    fields: Mapping[str, str] | None = None,
    document_field: str | None = None,
    separator: str | None = None,
    document_label: str = "",
) -> list[Record]:
    """Every row of a ``.txt``, ``.jsonl``, ``.json`` or ``.csv`` file, each optionally ``.gz``.

    Args:
        fields: where the columns have other names, ``{"text": "body"}``; also settles the shape when a
            row has the fields of two.
        document_field: the column that says which rows belong together. Without it, the column
            ``document`` if the file has one; otherwise every row is a document of its own.
        separator: for ``.txt``, what stands between documents; without it, blank lines.
        document_label: put before the names of documents that have one in the file.

    Raises:
        DataError: the file is missing, empty, of an unknown kind, not Unicode text, or a row has the wrong form.
        ConfigError: `fields`, `document_field` or `separator` does not fit the file or is unknown.
    """
    path = Path(path)
    kind = file_kind(path)
    wanted = _shape_of_fields(fields or {})
    if kind == ".txt":
        if fields or document_field:
            raise ConfigError(f"{path.name}: plain text has no fields to name")
        records = [_text_record(path, number, text) for number, text in _pieces(path, separator)]
    else:
        if separator is not None:
            raise ConfigError(f"{path.name}: a separator applies to .txt files only")
        records = list(_table_records(read_rows(path), fields or {}, wanted, document_field, document_label))
    if not records:
        raise DataError(f"{path.name}: empty, expected at least one row", hint="is it the right file?")
    return records


def read_files(
    paths: Sequence[Path],
    *,
    fields: Mapping[str, str] | None = None,
    document_field: str | None = None,
    separator: str | None = None,
    share_documents: bool = False,
) -> list[Record]:
    """Every row of several files in their order, each file read as `read_records` does.

    Documents of different files are different even if they have one name; rows without one that are alike stay one
    document wherever they stand, so that a split never parts them.

    Args:
        share_documents: documents of one name are the same in every file: where they stand for users.

    Raises:
        DataError, ConfigError: as `read_records` and `require_files`.
    """
    require_files(paths)
    if len(paths) == 1:
        (path,) = paths
        return read_records(path, fields=fields, document_field=document_field, separator=separator)
    names = [path.name for path in paths]
    found: list[Record] = []
    for number, path in enumerate(paths, 1):
        folder = f"{path.absolute().parent.name}/" if names.count(path.name) > 1 else ""
        label = "" if share_documents else f"{number}/"
        try:
            records = read_records(
                path, fields=fields, document_field=document_field, separator=separator, document_label=label
            )
        except DataError as error:
            raise DataError(f"{folder}{error}", hint=error.hint) from None
        found += [replace(record, place=folder + record.place) for record in records] if folder else records
    return found


def require_files(paths: Sequence[Path]) -> None:
    """Return only if every file is there, and none is given twice.

    Raises:
        DataError: naming a file that is missing or no file.
        ConfigError: naming a file that is given twice.
    """
    for number, path in enumerate(paths):
        if not path.is_file():
            what = "a folder, expected a file" if path.is_dir() else "not a file" if path.exists() else "no such file"
            raise DataError(f"{path.name}: {what}", hint="check the path")
        if any(path.samefile(other) for other in paths[:number]):
            raise ConfigError(f"{path.name}: given twice, its rows would count twice", hint="give each file once")


def split_by_document(
    records: Sequence[Record], *, fraction: float, seed: int, purpose: Purpose = "split"
) -> tuple[list[Record], list[Record]]:
    """Records to train on and records held out; a document is on one side as a whole.

    The side follows from `seed` and the document's name alone, so neither the order of rows nor added
    rows move the others. Only when the hash would leave a side empty does the document nearest to the
    boundary change sides.

    Args:
        fraction: of the documents to hold out, between 0 and 1, both excluded.
        purpose: splits for different purposes are independent of one another.

    Raises:
        DataError: fewer than two documents.
        ConfigError: `fraction` is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"held-out fraction {fraction}, expected a number between 0 and 1")
    draws = {record.document: _draw(record.document, seed, purpose) for record in records}
    if len(draws) < 2:
        raise DataError(
            f"{len(draws)} document(s), expected at least two to hold one out",
            hint="give held-out text in a file of its own, or name the field that tells documents apart",
        )
    lowest, *_, highest = sorted(draws.values())
    boundary = min(max(fraction, lowest), highest)
    held = {document for document, draw in draws.items() if draw < boundary or draw == lowest}
    train = [record for record in records if record.document not in held]
    return train, [record for record in records if record.document in held]


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write the rows as ``.jsonl`` under the names that `read_records` knows by itself; it reads them as they are.

    What they held beside, and their places in the file they came from, is not kept.
    """
    with path.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps({**_values(record), DOCUMENT: record.document}) + "\n")


def write_by_shape(folder: Path, name: str, records: Sequence[Record]) -> list[str]:
    """Write the rows into `folder`, those of one shape in one file, and return the files' names: ``NAME.jsonl`` first.

    Read together by `read_files` they are the same rows: a document keeps its name within a file.
    """
    shapes: dict[tuple[bool, int], list[Record]] = {}
    for record in records:
        shapes.setdefault((bool(record.messages), len(record.segments)), []).append(record)
    names = [f"{name}{number}.jsonl" if number > 1 else f"{name}.jsonl" for number in range(1, len(shapes) + 1)]
    for file, rows in zip(names, shapes.values(), strict=True):
        write_records(folder / file, rows)
    return names


def bundled(name: str) -> Path:
    """The path of a text file that comes with offsite: ``public``, ``private`` or ``heldout``."""
    if name not in BUNDLED:
        raise ConfigError(f"no bundled text '{name}', expected one of: {', '.join(BUNDLED)}")
    return Path(str(importlib.resources.files("offsite").joinpath("data", f"{name}.jsonl.gz")))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a ``.jsonl``, ``.json`` or ``.csv`` file, each optionally ``.gz``, unexamined.

    A ``.jsonl`` row is numbered by its line; ``.json`` and ``.csv`` rows count from 1, the header of a
    ``.csv`` apart.

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
            return _csv_rows(path)
        case kind:
            raise DataError(f"{path.name}: {kind} has no fields", hint="give a .jsonl, .json or .csv file")


def file_kind(path: Path) -> str:
    """The ending that says how to read `path`, without ``.gz``; DataError for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in KINDS:
        raise DataError(
            f"{path.name}: unknown kind of file", hint=f"expected {', '.join(KINDS)}, each optionally followed by .gz"
        )
    return suffixes[-1]


def checked_string(value: Any, what: str, row: Row, *, empty: bool = False) -> str:
    """`value`, known to be text that a tokenizer can take; DataError naming `what` and the row otherwise."""
    if value is None:
        raise row.error(f"{what} is missing", hint=_NAME_COLUMNS)
    if not isinstance(value, str):
        raise row.error(f"{what} is {_json_type(value)}, expected text")
    if not empty and not value.strip():
        raise row.error(f"{what} is empty", hint="remove the row or fill it in")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair; no tokenizer can read one
        raise row.error(f"{what} holds half of a surrogate pair, which is not Unicode text") from None
    return value


def _values(record: Record) -> dict[str, Any]:
    if record.messages:
        return {"messages": [{"role": role, "content": content} for role, content in record.messages]}
    texts = [text for text, _ in record.segments]
    return {"text": texts[0]} if len(texts) == 1 else dict(zip(SHAPES["prompt/completion"], texts, strict=True))


def _draw(document: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = hashlib.blake2b(document.encode(), key=f"offsite/v1/{purpose}/{seed}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _json_type(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), "null")


# --- lines to rows


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


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader((line for _, line in lines(path)), strict=True)
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
            f"{path.name}: line {reader.line_num}: not valid CSV",
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


# --- rows to records


def _shape_of_fields(fields: Mapping[str, str]) -> str | None:
    known = [name for names in SHAPES.values() for name in names]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(f"unknown field name(s) {', '.join(unknown)}, expected some of: {', '.join(known)}")
    shapes = [shape for shape, names in SHAPES.items() if set(names) & set(fields)]
    if len(shapes) > 1:
        raise ConfigError(f"fields of {' and '.join(shapes)} named together, expected those of one")
    return shapes[0] if shapes else None


def _table_records(
    rows: Iterator[Row], fields: Mapping[str, str], wanted: str | None, document_field: str | None, label: str
) -> Iterator[Record]:
    columns = {name: fields.get(name, name) for names in SHAPES.values() for name in names}
    shape: str | None = wanted
    first = ""
    for row in rows:
        found = _shape_of(row, columns)
        if shape is None:
            shape = _only_shape(row, found)
        elif wanted is None and found and shape not in found:
            raise row.error(f"holds {found[0]} where {first} holds {shape}, expected one shape in a file")
        if not first:
            first = row.place.rpartition(": ")[2]
            if document_field is None and DOCUMENT in row.values and DOCUMENT not in fields.values():
                document_field = DOCUMENT
        yield _table_record(row, shape, columns, document_field, label)


def _shape_of(row: Row, columns: Mapping[str, str]) -> list[str]:
    return [shape for shape, names in SHAPES.items() if all(columns[name] in row.values for name in names)]


def _only_shape(row: Row, found: Sequence[str]) -> str:
    if not found:
        shapes = "; or ".join(" and ".join(f"'{name}'" for name in names) for names in SHAPES.values())
        raise row.error(f"a field is missing, expected {shapes}", hint=_NAME_COLUMNS)
    if len(found) > 1:
        raise row.error(f"has the fields of {' and '.join(found)}, expected those of one", hint=_NAME_COLUMNS)
    return found[0]


def _table_record(row: Row, shape: str, columns: Mapping[str, str], document_field: str | None, label: str) -> Record:
    segments: tuple[tuple[str, bool], ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    if shape == "text":
        segments = ((row.string(columns["text"]), True),)
    elif shape == "messages":
        messages = _messages(row, columns["messages"])
    else:
        prompt = row.string(columns["prompt"], empty=True)
        segments = ((prompt, False), (row.string(columns["completion"]), True))
    document = _digest(segments or messages) if document_field is None else label + _document(row, document_field)
    return Record(segments, document, row.number, messages, row.place)


def _messages(row: Row, column: str) -> tuple[tuple[str, str], ...]:
    values = row.values.get(column)
    if not isinstance(values, list) or not values:
        raise row.error(f"field '{column}' is not a list of messages, expected objects with role and content")
    messages = []
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict) or set(value) != {"role", "content"}:
            raise row.error(f"message {number} does not have exactly the fields role and content")
        role = checked_string(value["role"], f"role of message {number}", row)
        messages.append((role, checked_string(value["content"], f"content of message {number}", row)))
    if not any(role == "assistant" for role, _ in messages):
        raise row.error("no message of role assistant, so nothing to learn", hint="give an answer per row")
    return tuple(messages)


def _document(row: Row, name: str) -> str:
    value = row.values.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return checked_string(value, f"field '{name}'", row)


def _digest(parts: Sequence[tuple[str, object]]) -> str:
    """A document name for a row that has none: of its content, so that equal rows stay together."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _text_record(path: Path, number: int, text: str) -> Record:
    row = Row({"text": text}, number, f"{path.name}: line {number}")
    segments = ((row.string("text"), True),)
    return Record(segments, _digest(segments), number, place=row.place)


def _pieces(path: Path, separator: str | None) -> Iterator[tuple[int, str]]:
    """Documents of a plain text file, each with the number of the line on which it begins."""
    if separator == "":
        raise ConfigError("the separator between documents is empty")
    if separator is None:
        start, kept = 0, list[str]()
        for number, line in lines(path):
            if line.strip():
                start = start if kept else number
                kept.append(line)
            elif kept:
                yield start, "".join(kept).rstrip()
                kept = []
        if kept:
            yield start, "".join(kept).rstrip()
        return
    number = 1
    for piece in "".join(line for _, line in lines(path)).split(separator):
        if piece.strip():
            lead = len(piece) - len(piece.lstrip())
            yield number + piece.count("\n", 0, lead), piece.strip()
        number += piece.count("\n") + separator.count("\n")
