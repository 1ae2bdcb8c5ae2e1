"""The data before training: what was understood of it, in numbers that may be shown, and rows that the terminal alone
shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from client.audit.audit import num_asked
from client.audit.retunings import num_coins
from client.join.outlook import Expected, Numbers
from client.join.people import show_privately, show_verdicts
from client.tuning.data import split_records
from client.tuning.ready import every_row, loop_settings, make_ready, task_for
from offsite.console import muted, say
from offsite.errors import DataError
from offsite.text.records import Record
from offsite.text.rows import file_kind, files_in, read_rows

if TYPE_CHECKING:
    from client.tuning.config import TuneConfig
    from client.tuning.ready import Ready
    from offsite.text.batches import Example

NUM_SHOWN = 3
_SHOWN_LETTERS = 160
_USED = ("text", "prompt", "completion", "messages", "chosen", "rejected", "label", "value", "tokens", "tags", "image")


@dataclass(frozen=True)
class Checked:
    """What a check of the data found; numbers, and nothing of any row.

    ``num_alike`` counts rows that say what an earlier row says. Lengths are in tokens of one row, cut at the context.
    """

    num_rows: int
    num_documents: int
    num_alike: int
    num_train: int
    num_validation: int
    num_aside: int
    num_in_both: int
    num_truncated: int
    num_dropped: int
    median_tokens: int
    longest_tokens: int
    steps: int
    shapes: tuple[str, ...]
    numbers: Numbers

    def planting(self, num_canaries: int) -> Checked:
        """Return the same with so many made-up texts planted."""
        return replace(self, numbers=replace(self.numbers, num_canaries=num_canaries))

    def told(self) -> dict[str, object]:
        """Return the numbers, as JSON takes them."""
        names = ("num_rows", "num_documents", "num_alike", "num_train", "num_validation", "num_aside")
        more = ("num_in_both", "num_truncated", "num_dropped", "median_tokens", "longest_tokens", "steps")
        return {name: getattr(self, name) for name in (*names, *more)}


def check_data(
    config: TuneConfig, *, writes: bool, asks: bool, is_causal: bool = True, retunings: int | None = None
) -> Checked:
    """Return what these settings of ``offsite tune`` make of the data; it is read and cut as tuning reads and cuts it.

    Args:
        writes: whether what is tuned writes text, so that canaries go with it and secrets can be asked for.
        asks: whether the audit asks the model for the rest of rows, whatever it was tuned for.
        is_causal: whether the package's model reads text from left to right.
        retunings: how many the audit is to make; None for as many as the rows need.

    Raises:
        DataError: when a row cannot be read; on a terminal the columns that there are were shown.
        ConfigError, ArtefactError: as tuning would, before anything is computed.
    """
    try:
        with muted():
            ready = make_ready(config)
    except DataError:
        _show_columns(config)
        raise
    text = ready.text
    steps = loop_settings(ready.config, text).steps
    rows, held_out = _every_row(ready)
    lengths = sorted(_length(example) for example in text.rows)
    drawn = min(text.num_records, round(text.num_records * steps / max(1, text.batches.num_steps_per_epoch)))
    train, aside = _sides(ready, rows, held_out)
    dp = ready.config.dp
    return Checked(
        num_rows=len(rows),
        num_documents=len({record.document for record in rows}),
        num_alike=len(rows) - len({record.content for record in rows}),
        num_train=text.num_records,
        num_validation=len(rows) - text.num_records - text.num_aside - text.num_in_both + len(held_out or ()),
        num_aside=text.num_aside,
        num_in_both=text.num_in_both,
        num_truncated=text.num_truncated,
        num_dropped=text.num_dropped,
        median_tokens=round(statistics.median(lengths)),
        longest_tokens=lengths[-1],
        steps=steps,
        shapes=tuple(sorted({_shape(record) for record in rows})),
        numbers=Numbers(
            num_train=train,
            num_aside=aside,
            steps=steps,
            num_drawn=max(1, min(drawn, train)),
            num_asked=num_asked([side for row in _distinct(text.rows) for side in row.sides]) if asks else 0,
            num_canaries=0,
            num_coins=num_coins(ready.config, text.rows, is_causal=is_causal),
            retunings=retunings,
            writes=writes,
            epsilon=None if dp is None else dp.epsilon or math.inf,
        ),
    )


def show_check(config: TuneConfig, checked: Checked) -> None:
    """What was found is on stderr in numbers; columns and `NUM_SHOWN` rows are on the terminal, if there is one."""
    shapes = " and ".join(checked.shapes)
    say(f"the data: {checked.num_rows:,} rows, {checked.num_documents:,} documents, read as {shapes}")
    sides = f"{checked.num_train:,} to train on, {checked.num_validation:,} to choose the best weights by"
    say(f"  {sides}, {checked.num_aside:,} set aside for the audit")
    say(f"  a row has {checked.median_tokens} tokens in the middle, {checked.longest_tokens} at most")
    if checked.num_in_both:
        say(f"  {checked.num_in_both:,} rows stand in --eval, too: they are not trained on")
    if checked.num_truncated:
        say(f"  {checked.num_truncated:,} rows are longer than the context and are cut (--tune block_tokens=N)")
    if checked.num_dropped:
        say(f"  {checked.num_dropped:,} rows are dropped: nothing that counts is left of them")
    if checked.num_alike:
        say(f"  {checked.num_alike:,} rows say what another row says: they are learnt by heart more easily")
    _show_columns(config)


def show_expected(expected: Sequence[Expected]) -> None:
    """What is known of each gate beforehand is on stderr."""
    say("gates that the bundle is held to at the end, as far as they are known now:")
    show_verdicts([(one.name, one.outlook, one.told) for one in expected])


def _show_columns(config: TuneConfig) -> None:
    """Each column with what it is taken for, and the first rows, on the terminal alone: both may be private."""
    named = {column: name for name, column in config.fields.items()}
    lines = []
    for path in files_in(config.data)[:NUM_SHOWN]:
        lines += _of_file(path, named, config.document_field)
    show_privately(lines)


def _of_file(path: Path, named: dict[str, str], document: str | None) -> list[str]:
    lines = []
    try:
        if file_kind(path) == ".txt":
            return [f"{path.name}: plain text, documents between blank lines"]
        for number, row in enumerate(islice(read_rows(path), NUM_SHOWN)):
            if number == 0:
                lines.append(f"{path.name}: columns, by its first row:")
                lines += [f"  {_fit(name)}: {_taken_for(name, named, document)}" for name in row.values]
            lines.append(f"row {number + 1}:")
            lines += [f"  {_fit(name)}: {_fit(value)}" for name, value in row.values.items()]
    except DataError as error:
        lines.append(f"{error}")
    return lines


def _taken_for(name: str, named: dict[str, str], document: str | None) -> str:
    if name in named:
        return f"read as {named[name]}"
    if name == (document or "document"):
        return "tells documents apart"
    return f"read as {name}" if name in _USED and name not in named.values() else "not read, unless a task names it"


def _fit(value: object) -> str:
    """Return a value on one line that moves no cursor."""
    text = "".join(one if one.isprintable() else " " for one in str(value)[:_SHOWN_LETTERS])
    return text + ("..." if len(str(value)) > _SHOWN_LETTERS else "")


def _every_row(ready: Ready) -> tuple[list[Record], list[Record] | None]:
    """Return all rows, as the run reads them, and those of files that are validated on, if there are such."""
    config, task = ready.config, task_for(ready.config, ready.job)
    held_out = every_row(config, ready.package, task, of=config.eval) if config.eval else None
    return every_row(config, ready.package, task), held_out


def _sides(ready: Ready, rows: Sequence[Record], held_out: Sequence[Record] | None) -> tuple[int, int]:
    """Return how many different rows are trained on, and how many different ones, read by no run, are set aside."""
    config = ready.config
    share = config.held_out_share
    sides = split_records(rows, validation=share, audit_share=config.audit_share, seed=config.seed, held_out=held_out)
    read = {record.content for record in (*sides.train, *sides.validation)}
    aside = {record.content for record in sides.audit} - read
    return len({record.content for record in sides.train}), len(aside)


def _shape(record: Record) -> str:
    """Return in words what a row was read as; nothing of what it holds."""
    if record.rejected is not None:
        return "pairs of a chosen and a rejected answer"
    if record.image is not None:
        return "images with a label"
    if record.words:
        return "words with tags"
    if record.value is not None:
        return "texts with a value"
    if record.label is not None:
        return "texts with a label"
    if record.messages:
        return "conversations"
    return "running text" if len(record.segments) == 1 and record.segments[0][1] else "prompts with answers"


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """Return the examples in their order, of those that are alike the first."""
    return list({tuple(tuple(side.input_ids) for side in one.sides): one for one in reversed(examples)}.values())[::-1]


def _length(example: Example) -> int:
    return sum(len(side.input_ids) + len(side.source) for side in example.sides)
