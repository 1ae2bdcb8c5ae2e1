"""Text shared out: what emulators are calibrated on, what clients are tuned on, what all is measured on. No overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emulator.dial.exploration import FieldText
from offsite.console import say
from offsite.digests import joined_digest, sha256_bytes, sha256_file
from offsite.errors import DataError
from offsite.text.records import Record, read_files, split_by_document
from offsite.text.writing import write_by_shape

MEASURED_SHARE = 0.2
TUNED_SHARE = 0.4
"""Of the documents of one text that serves for everything; of a field's text of its own the rest is tuned on."""


@dataclass(frozen=True)
class Texts:
    """The three texts as files of the work folder: their names, and what is stated of each."""

    calibration: tuple[str, ...]
    tuned: tuple[str, ...]
    measured: tuple[str, ...]
    stated: dict[str, FieldText]

    def digest(self, *names: str) -> str:
        """Return one digest over the texts of these names."""
        return joined_digest([self.stated[name].sha256 for name in names])


def share_out(public: Sequence[Record], field: Sequence[Record] | None, *, seed: int) -> dict[str, list[Record]]:
    """Return the rows of ``calibration``, ``tuned`` and ``measured``; no row's words stand in two of them.

    Documents are shared out whole. Where one text serves for everything (`field` is None) it is cut in three; else the
    field's is cut in two, and of the public text go the documents that stand in the field's, too.

    Raises:
        DataError: when too little is left of one.
    """
    if field is None:
        rest, measured = split_by_document(public, fraction=MEASURED_SHARE, seed=seed, purpose="dial")
        share = MEASURED_SHARE + TUNED_SHARE  # the same draw: those below the first bound are gone
        calibration, tuned = split_by_document(rest, fraction=share, seed=seed, purpose="dial")
    else:
        calibration = list(public)
        tuned, measured = split_by_document(field, fraction=MEASURED_SHARE, seed=seed, purpose="dial")
    tuned = _without(tuned, measured)
    left = _without(calibration, [*tuned, *measured])
    if len(left) < len(calibration):
        say(f"{len(calibration) - len(left):,} rows of the public text stand in the field's, too: they are left out")
    found = {"calibration": left, "tuned": tuned, "measured": measured}
    for name, fewest in (("calibration", 1), ("tuned", 2), ("measured", 1)):
        if (num := len({record.document for record in found[name]})) < fewest:
            raise DataError(
                f"{num} document(s) are left to be {_WHAT[name]}, expected at least {fewest}",
                hint="give more text; where --public is the field's own text, leave out --field-text",
            )
    return found


_WHAT = {"calibration": "calibrated on", "tuned": "tuned on", "measured": "measured on"}


def write_texts(work: Path, shared: dict[str, list[Record]]) -> Texts:
    """The rows are files of `work`, which is there; the same rows give the same files."""
    names, stated = {}, {}
    for name, records in shared.items():
        names[name] = tuple(write_by_shape(work, name, records))
        digest = joined_digest([sha256_file(work / file) for file in names[name]])
        stated[name] = FieldText(num_rows=len(records), sha256=digest)
    return Texts(names["calibration"], names["tuned"], names["measured"], stated)


def read_texts(
    public: Sequence[Path],
    field: Sequence[Path],
    *,
    fields: dict[str, str],
    document_field: str | None,
    separator: str | None,
    own: Path | None,
) -> tuple[list[Record], list[Record] | None]:
    """Return the public rows, and the field's where that is a text of its own.

    Args:
        own: file that the model wrote, in place of `public`.

    Raises:
        DataError, ConfigError: as `read_files`.
    """

    def read(paths: Sequence[Path]) -> list[Record]:
        return read_files(paths, fields=fields, document_field=document_field, separator=separator)

    records = read_files([own]) if own is not None else read(public)
    if not field or (own is None and {path.resolve() for path in field} == {path.resolve() for path in public}):
        return records, None
    return records, read(field)


def _without(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """Return the rows of documents that have no row with the words of one of the others."""
    theirs = {_words(record) for record in others}
    shared = {record.document for record in records if _words(record) in theirs}
    return [record for record in records if record.document not in shared]


def _words(record: Record) -> str:
    return sha256_bytes(" ".join(record.whole_text.split()).encode())
