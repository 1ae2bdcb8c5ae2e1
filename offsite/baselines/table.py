"""The table of baselines as a file: figures with their intervals and what they were measured with. It holds no text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from offsite.baselines.config import Method
from offsite.console import table
from offsite.digests import DIGEST_PATTERN
from offsite.errors import ArtefactError, ConfigError, TooLarge
from offsite.evaluation.preferences import wilson
from offsite.strictjson import Strict, parse_strict
from offsite.tasks.scores import SHARES
from offsite.tasks.task import NAME_PATTERN, Measure

FORMAT: Final = "offsite/baselines/1"
LIMIT_BYTES = 4 * 2**20
RESAMPLES = 2000


class Figure(Strict):
    """A mean over rows, with the interval that holds it at 95 % confidence."""

    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)


class BaselineRow(Strict):
    """One model asked in one way.

    ``num_short`` rows were asked with fewer samples or parts than wanted; ``num_too_long`` had no room for an answer
    and count as wrong.
    """

    model: str = Field(max_length=300)
    kind: Literal["package", "model"]
    digest: str = Field(pattern=DIGEST_PATTERN)
    method: Method
    prompt: int = Field(ge=1)
    num_short: int = Field(ge=0)
    num_too_long: int = Field(ge=0)
    figures: dict[Measure, Figure]
    seconds: float = Field(ge=0)


class Baselines(Strict):
    """The content of the file. ``data_sha256`` is null where the task's own tests were measured on."""

    format: Literal["offsite/baselines/1"] = FORMAT
    task: str = Field(pattern=NAME_PATTERN)
    task_digest: str = Field(pattern=DIGEST_PATTERN)
    measure: Measure
    data_sha256: str | None = Field(None, pattern=DIGEST_PATTERN)
    num_rows: int = Field(ge=1)
    seed: int = Field(ge=0)
    rows: tuple[BaselineRow, ...] = Field(min_length=1)
    config: dict[str, Any]
    versions: dict[str, str]
    device: str = Field(max_length=100)


def read_baselines(path: Path) -> Baselines:
    """Return the table in the file at `path`.

    Raises:
        ConfigError: when there is no such file.
        ArtefactError: when it is too large or no such table.
    """
    try:
        with path.open("rb") as handle:
            raw = handle.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    if len(raw) > LIMIT_BYTES:
        raise TooLarge(f"{path.name!r} is over {LIMIT_BYTES} bytes")
    try:
        return parse_strict(raw, Baselines, path.name, {"format": FORMAT})
    except ArtefactError as error:
        raise type(error)(str(error), hint="offsite task baseline writes this file") from None


def figure_of(values: Sequence[float], measure: Measure, *, seed: int = 0) -> Figure:
    """Return the mean of a measure with its 95 % interval: Wilson's of a share, else a percentile bootstrap.

    Args:
        values: of each row, at least one.
        seed: of the `RESAMPLES` draws of the bootstrap.
    """
    mean = min(1.0, math.fsum(values) / len(values))
    if measure in SHARES:
        low, high = wilson(mean, len(values))
        return Figure(value=mean, low=min(low, mean), high=max(high, mean))
    draw = random.Random(seed)  # noqa: S311 - of a statistic, not of a secret
    means = sorted(math.fsum(draw.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return Figure(value=mean, low=min(low, mean), high=min(1.0, max(high, mean)))


def show(found: Baselines) -> None:
    """The table is on stderr: a line for each model and way of asking."""
    measures = list(found.rows[0].figures)
    many = max(row.prompt for row in found.rows) > 1
    table(
        f"task {found.task}, {found.num_rows} rows, seed {found.seed}; 95 % intervals",
        ["", "asked", *measures, "short", "too long", "seconds"],
        [
            [
                row.model,
                row.method + (f", prompt {row.prompt}" if many else ""),
                *(spelled(row.figures[measure]) for measure in measures),
                str(row.num_short),
                str(row.num_too_long),
                f"{row.seconds:.0f}",
            ]
            for row in found.rows
        ],
    )


def spelled(figure: Figure) -> str:
    """Return a figure as people read it: ``0.45 (0.31 to 0.60)``."""
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"
