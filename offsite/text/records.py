"""Text files as records: what each row holds, where it stands, and which document it belongs to.

A row has one of three shapes: ``text``; ``prompt`` and ``completion``; or ``messages``. Who learns from
preferences reads a fourth instead: ``chosen`` and ``rejected``, with or without ``prompt``; who trains a head
that of its task, a text with a label or a value, words with tags (`offsite.text.headrows`), or an ``image`` with
a label. Who learns from rewards reads prompts, with or without an answer (`offsite.text.questions`). Errors
name the file and the row and say what was expected. They never repeat what a row holds, and for that reason no
column names either: a table without a header has its first row for column names.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from offsite.errors import ConfigError, DataError
from offsite.text.dialects import told_in_shapes
from offsite.text.files import pieces
from offsite.text.headrows import (
    CLASSIFIED,
    HEAD_FIELDS,
    MISSING,
    NAMED,
    TAGGED,
    VALUED,
    WANTED,
    Label,
    label_in,
    shape_of,
    value_in,
    words_in,
)
from offsite.text.preferences import PAIR, PAIR_FIELDS, Answers, answers_in
from offsite.text.questions import ANSWER_FIELD, QUESTIONS, question_in
from offsite.text.rows import NAME_COLUMNS, Messages, Row, checked_string, file_kind, messages_in, read_rows
from offsite.vision.images import image_bytes

SHAPES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
}
IMAGE = "image"
DOCUMENT = "document"
Purpose = Literal["split", "audit", "rehearsal", "dial"]
BUNDLED = ("heldout", "private", "public")


@dataclass(frozen=True)
class Record:
    """One row: either `segments` of running text, each with whether it counts in the loss, or `messages`.

    A row of preferences is that of the chosen answer, and has in `rejected` the same beginning with the other one. Of
    their messages the first `num_given` are that beginning, and nothing of them counts. So are a question's, which may
    have nothing behind them. Of words with tags, the text is the words with a space between each two.
    """

    segments: tuple[tuple[str, bool], ...] = field(repr=False)
    document: str = field(repr=False)
    row: int
    messages: Messages = field(default=(), repr=False)
    place: str = ""  # "notes.jsonl: line 7", for errors
    rejected: Record | None = field(default=None, repr=False)
    num_given: int = 0
    label: Label | None = field(default=None, repr=False)
    value: float | None = field(default=None, repr=False)
    words: tuple[str, ...] = field(default=(), repr=False)
    tags: tuple[Label, ...] = field(default=(), repr=False)
    image: bytes | None = field(default=None, repr=False)

    @property
    def whole_text(self) -> str:
        """All its text as one: a prompt and its completion, every message, both answers of a pair; no image has any."""
        own = [text for text, _ in self.segments] + [content for _, content in self.messages]
        return " ".join(own if self.rejected is None else [*own, self.rejected.whole_text])

    @property
    def content(self) -> tuple[object, ...]:
        """What two rows that say the same have in common."""
        answer = () if self.label is None else (self.label.name,)
        answer = answer if self.value is None else (str(self.value),)
        answer = answer if self.image is None else (*answer, hashlib.sha256(self.image).hexdigest())
        own = (self.segments, self.messages, *answer, *(tag.name for tag in self.tags))
        return own if self.rejected is None else (*own, self.rejected.content)


def read_records(
    path: Path,
    *,
    fields: Mapping[str, str] | None = None,
    document_field: str | None = None,
    separator: str | None = None,
    document_label: str = "",
    pairs: bool | None = False,
    questions: bool = False,
    labels: Sequence[str] = (),
    of_head: str = "",
    images: bool = False,
) -> list[Record]:
    """Every row of a ``.txt``, ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` (each maybe ``.gz``) or ``.parquet`` file.

    Rows of other tools' shapes are read as `offsite.text.dialects` says, unless `fields` names columns.

    Args:
        fields: where the columns have other names, ``{"text": "body"}``; also settles the shape when a
            row has the fields of two.
        document_field: the column that says which rows belong together. Without it, the column
            ``document`` if the file has one; otherwise every row is a document of its own.
        separator: for ``.txt``, what stands between documents; without it, blank lines.
        document_label: put before the names of documents that have one in the file.
        pairs: whether rows are to be preferences, which are refused otherwise; None takes what is there. Those with one
            beginning are one document: its answers are compared with one another.
        questions: rows are to be prompts with or without an answer; those with one prompt are one document.
        labels: names of a head's labels or tags; rows are then a text and one of them, and nothing else. Those of one
            text are one document.
        of_head: what the head that rows are for is tuned to, where not to classify: ``regress`` for a text and a value,
            ``tag`` for words and their tags.
        images: rows are to be images, with a label where there are labels, and nothing else.

    Raises:
        DataError: the file is missing, empty, of an unknown kind, not Unicode text, or a row has the wrong form.
        ConfigError: `fields`, `document_field` or `separator` does not fit the file or is unknown.
    """
    path = Path(path)
    kind = file_kind(path)
    head_shape = None if images else shape_of(of_head, labels)
    shapes = QUESTIONS if questions else _shapes(pairs)
    shapes = shapes if head_shape is None else {head_shape: HEAD_FIELDS[head_shape]}
    shapes = {IMAGE: (IMAGE, "label")[: 2 if labels else 1]} if images else shapes
    wanted = _shape_of_fields(fields or {}, shapes, pairs, questions)
    if kind == ".txt":
        if images:
            raise DataError(f"{path.name}: plain text, expected rows of an image", hint=_PICTURED)
        if head_shape is not None:
            what = f"{path.name}: plain text, expected rows of {NAMED[head_shape]}"
            raise DataError(what, hint=WANTED[head_shape])
        if pairs:
            raise DataError(f"{path.name}: plain text, expected pairs of a chosen and a rejected answer", hint=_PAIRED)
        if questions:
            raise DataError(f"{path.name}: plain text, expected rows with a prompt", hint=_ASKED)
        if fields or document_field:
            raise ConfigError(f"{path.name}: plain text has no fields to name")
        records = [_text_record(path, number, text) for number, text in pieces(path, separator)]
    else:
        if separator is not None:
            raise ConfigError(f"{path.name}: a separator applies to .txt files only")
        numbers = {name: number for number, name in enumerate(labels)}
        rows = _table_records(
            read_rows(path, images=images),
            fields or {},
            shapes,
            wanted,
            document_field,
            document_label,
            questions,
            numbers,
        )
        records = list(rows)
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
    pairs: bool | None = False,
    questions: bool = False,
    labels: Sequence[str] = (),
    of_head: str = "",
    images: bool = False,
) -> list[Record]:
    """Every row of several files in their order, each file read as `read_records` does.

    Documents of different files are different even if they have one name; rows without one that are alike stay one
    document wherever they stand, so that a split never parts them.

    Args:
        share_documents: documents of one name are the same in every file: where they stand for users.
        pairs: as of `read_records`; under None the files hold preferences, all of them, or none does.
        questions: as of `read_records`.
        labels, of_head, images: as of `read_records`.

    Raises:
        DataError, ConfigError: as `read_records` and `require_files`.
    """
    require_files(paths)
    how: dict[str, Any] = {"fields": fields, "document_field": document_field, "separator": separator}
    how |= {"pairs": pairs, "questions": questions, "labels": labels, "of_head": of_head, "images": images}
    if len(paths) == 1:
        return read_records(paths[0], **how)
    names = [path.name for path in paths]
    found: list[Record] = []
    for number, path in enumerate(paths, 1):
        folder = f"{path.absolute().parent.name}/" if names.count(path.name) > 1 else ""
        label = "" if share_documents else f"{number}/"
        try:
            records = read_records(path, document_label=label, **how)
        except DataError as error:
            raise DataError(f"{folder}{error}", hint=error.hint) from None
        found += [_moved(record, folder) for record in records] if folder else records
        if found[0].rejected is None and records[0].rejected is not None:
            raise DataError(f"{folder}{records[0].place}: holds preferences where earlier files hold none", hint=_APART)
        if found[0].rejected is not None and records[0].rejected is None:
            raise DataError(f"{folder}{records[0].place}: holds no preferences where earlier files do", hint=_APART)
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


def answer_of(record: Record) -> str | None:
    """Return the right answer of a row that was read as a question; None where it has none."""
    if record.messages:
        return record.messages[-1][1] if len(record.messages) > record.num_given else None
    return record.segments[1][0] if len(record.segments) > 1 else None


def bundled(name: str) -> Path:
    """The path of a text file that comes with offsite: ``public``, ``private`` or ``heldout``."""
    if name not in BUNDLED:
        raise ConfigError(f"no bundled text '{name}', expected one of: {', '.join(BUNDLED)}")
    return Path(str(importlib.resources.files("offsite").joinpath("data", f"{name}.jsonl.gz")))


def _moved(record: Record, folder: str) -> Record:
    """Return the row with the folder's name before its place."""
    other = None if record.rejected is None else _moved(record.rejected, folder)
    return replace(record, place=folder + record.place, rejected=other)


def _draw(document: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = hashlib.blake2b(document.encode(), key=f"offsite/v1/{purpose}/{seed}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


# --- rows to records


_PAIRED = "give rows of 'prompt', 'chosen' and 'rejected', or of whole dialogues 'chosen' and 'rejected'"
_ASKED = "give rows of 'prompt', with or without 'completion', or of 'messages'"
_PICTURED = "give rows of 'image', base64 of a PNG or JPEG, and 'label', in .jsonl or .parquet"
_APART = "give text and preferences to different runs"


def _shapes(pairs: bool | None) -> dict[str, tuple[str, ...]]:
    """Return the shapes that a row may have, each with the fields that it must have."""
    if pairs is None:
        return {**SHAPES, PAIR: PAIR_FIELDS}
    return {PAIR: PAIR_FIELDS} if pairs else SHAPES


_BESIDE = {PAIR: ["prompt"], "prompt": [ANSWER_FIELD]}
"""What rows of a shape may hold beside what they must."""


def _shape_of_fields(
    fields: Mapping[str, str], allowed: Mapping[str, Sequence[str]], pairs: bool | None, questions: bool
) -> str | None:
    names = {shape: [*own, *_BESIDE.get(shape, [])] for shape, own in allowed.items()}
    known = list(dict.fromkeys(name for own in names.values() for name in own))
    unknown = sorted(set(fields) - set(known))
    if unknown:
        of_pairs = pairs is False and not questions and set(unknown) <= set(PAIR_FIELDS)
        raise ConfigError(
            f"unknown field name(s) {', '.join(unknown)}, expected some of: {', '.join(known)}",
            hint="--objective dpo reads pairs of answers" if of_pairs else None,
        )
    shapes = [shape for shape, own in names.items() if set(fields) <= set(own)]
    if not shapes:
        shown = [shape for shape, own in names.items() if set(own) & set(fields)]
        raise ConfigError(f"fields of {' and '.join(shown)} named together, expected those of one")
    return shapes[0] if len(shapes) == 1 and fields else None


def _table_records(
    rows: Iterator[Row],
    fields: Mapping[str, str],
    shapes: Mapping[str, Sequence[str]],
    wanted: str | None,
    document_field: str | None,
    label: str,
    questions: bool,
    numbers: Mapping[str, int],
) -> Iterator[Record]:
    names = [name for own in (*SHAPES.values(), PAIR_FIELDS, *HEAD_FIELDS.values(), (IMAGE,)) for name in own]
    columns = {name: fields.get(name, name) for name in names}
    shape: str | None = wanted
    first = ""
    for row in rows if fields or IMAGE in shapes else map(told_in_shapes, rows):
        found = _shape_of(row, columns, shapes)
        if shape is None:
            shape = _only_shape(row, found, shapes, columns, questions)
        elif wanted is None and found and shape not in found:
            raise row.error(f"holds {found[0]} where {first} holds {shape}, expected one shape in a file")
        if not first:
            first = row.place.rpartition(": ")[2]
            if document_field is None and DOCUMENT in row.values and DOCUMENT not in fields.values():
                document_field = DOCUMENT
        if questions:
            yield _question(row, shape, columns, document_field, label)
            continue
        if shape == IMAGE:
            yield _pictured(row, columns, document_field, label, numbers)
            continue
        if shape in HEAD_FIELDS:
            yield _headed(row, shape, columns, document_field, label, numbers)
            continue
        yield _table_record(row, shape, columns, document_field, label, needs_prompt="prompt" in fields)


def _pictured(
    row: Row, columns: Mapping[str, str], document_field: str | None, label: str, numbers: Mapping[str, int]
) -> Record:
    """Return an image, with its label where there are labels; its document is the image itself."""
    raw = image_bytes(row.values.get(columns[IMAGE]), row.error)
    own = hashlib.sha256(raw).hexdigest()[:32]
    named = own if document_field is None else label + _document(row, document_field)
    found = label_in(row, columns["label"], numbers) if numbers else None
    return Record((), named, row.number, place=row.place, label=found, image=raw)


def _headed(
    row: Row,
    shape: str,
    columns: Mapping[str, str],
    document_field: str | None,
    label: str,
    numbers: Mapping[str, int],
) -> Record:
    """Return a row that a head learns from, its text with what is to be said of it."""
    words, tags = words_in(row, columns, numbers) if shape == TAGGED else ((), ())
    segments = ((" ".join(words) if words else row.string(columns["text"]), True),)
    document = _digest(segments) if document_field is None else label + _document(row, document_field)
    return Record(
        segments,
        document,
        row.number,
        place=row.place,
        label=label_in(row, columns["label"], numbers) if shape == CLASSIFIED else None,
        value=value_in(row, columns["value"]) if shape == VALUED else None,
        words=words,
        tags=tags,
    )


def _shape_of(row: Row, columns: Mapping[str, str], shapes: Mapping[str, Sequence[str]]) -> list[str]:
    return [shape for shape, names in shapes.items() if all(columns[name] in row.values for name in names)]


def _only_shape(
    row: Row, found: Sequence[str], allowed: Mapping[str, Sequence[str]], columns: Mapping[str, str], questions: bool
) -> str:
    if not found and IMAGE in allowed:
        raise row.error("an image or its label is missing", hint=f"{_PICTURED}, or {NAME_COLUMNS}")
    for shape in () if found else HEAD_FIELDS.keys() & allowed.keys():
        raise row.error(MISSING[shape], hint=f"{WANTED[shape]}, or {NAME_COLUMNS}")
    if not found and not questions:
        others = _shape_of(row, columns, {**SHAPES, PAIR: PAIR_FIELDS})
        if PAIR in others:
            raise row.error(
                "holds pairs of a chosen and a rejected answer, expected text",
                hint="offsite tune --objective dpo learns from such rows",
            )
        if others:
            raise row.error(
                f"holds {others[0]}, expected a chosen and a rejected answer",
                hint=f"offsite tune --objective next-token learns from such rows; else {_PAIRED}",
            )
    if not found:
        shapes = "; or ".join(" and ".join(f"'{name}'" for name in names) for names in allowed.values())
        raise row.error(f"a field is missing, expected {shapes}", hint=NAME_COLUMNS)
    if len(found) > 1:
        raise row.error(f"has the fields of {' and '.join(found)}, expected those of one", hint=_name_one(found))
    return found[0]


def _name_one(shapes: Sequence[str]) -> str:
    return NAME_COLUMNS + (", or fields.chosen=chosen" if PAIR in shapes else "")


def _table_record(
    row: Row, shape: str, columns: Mapping[str, str], document_field: str | None, label: str, *, needs_prompt: bool
) -> Record:
    segments: tuple[tuple[str, bool], ...] = ()
    messages: Messages = ()
    if shape == PAIR:
        answers = answers_in(row, columns, needs_prompt=needs_prompt)
        named = "" if document_field is None else label + _document(row, document_field)
        return _pair(row, answers, named or _digest(answers.beginning))
    if shape == "text":
        segments = ((row.string(columns["text"]), True),)
    elif shape == "messages":
        messages = messages_in(row, columns["messages"])
        if not any(role == "assistant" for role, _ in messages):
            raise row.error("no message of role assistant, so nothing to learn", hint="give an answer per row")
    else:
        prompt = row.string(columns["prompt"], empty=True)
        segments = ((prompt, False), (row.string(columns["completion"]), True))
    document = _digest(segments or messages) if document_field is None else label + _document(row, document_field)
    return Record(segments, document, row.number, messages, row.place)


def _question(row: Row, shape: str, columns: Mapping[str, str], document_field: str | None, label: str) -> Record:
    """Return a prompt, with its answer where the row has one."""
    found = question_in(row, columns, shape)
    document = _digest(found.prompt) if document_field is None else label + _document(row, document_field)
    return Record(found.segments, document, row.number, found.messages, row.place, num_given=found.num_given)


def _pair(row: Row, answers: Answers, document: str) -> Record:
    """Return the chosen row, with the other one in it."""
    chosen, rejected = (
        Record(segments, document, row.number, messages, row.place, num_given=answers.num_given)
        for segments, messages in (answers.chosen, answers.rejected)
    )
    return replace(chosen, rejected=rejected)


def _document(row: Row, name: str) -> str:
    value = row.values.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return checked_string(value, f"field '{name}'", row)


def _digest(parts: Sequence[object]) -> str:
    """A document name for a row that has none: of its content, so that equal rows stay together."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _text_record(path: Path, number: int, text: str) -> Record:
    row = Row({"text": text}, number, f"{path.name}: line {number}")
    segments = ((row.string("text"), True),)
    return Record(segments, _digest(segments), number, place=row.place)
