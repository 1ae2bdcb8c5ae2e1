"""Records as rows of a file again: what `offsite.text.records` reads as they were."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offsite.text.records import DOCUMENT, SHAPES, Record
from offsite.text.rows import Messages


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
    shapes: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        shapes.setdefault(tuple(_values(record)), []).append(record)
    names = [f"{name}{number}.jsonl" if number > 1 else f"{name}.jsonl" for number in range(1, len(shapes) + 1)]
    for file, rows in zip(names, shapes.values(), strict=True):
        write_records(folder / file, rows)
    return names


def _values(record: Record) -> dict[str, Any]:
    """Return what the row is written as, by the names of fields."""
    other = record.rejected
    named = {} if record.label is None else {"label": record.label.name}
    if record.image is not None:
        return {"image": base64.b64encode(record.image).decode(), **named}
    if record.messages:
        if other is None:
            return {"messages": _objects(record.messages)}
        return {"chosen": _objects(record.messages), "rejected": _objects(other.messages)}
    texts = [text for text, _ in record.segments]
    if record.words:
        return {"tokens": list(record.words), "tags": [tag.name for tag in record.tags]}
    if record.value is not None:
        return {"text": texts[0], "value": record.value}
    if named:
        return {"text": texts[0], **named}
    if other is None:
        if len(texts) == 1:
            return {"text" if record.segments[0][1] else "prompt": texts[0]}
        return dict(zip(SHAPES["prompt/completion"], texts, strict=True))
    others = [text for text, _ in other.segments]
    if len(texts) == len(others) == 2:
        return {"prompt": texts[0], "chosen": texts[1], "rejected": others[1]}
    return {"chosen": "".join(texts), "rejected": "".join(others)}


def _objects(messages: Messages) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]
