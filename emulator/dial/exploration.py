"""``OUTPUT.explore.json``: every size that was tried, what it gave, the line through them, and what was asked for.

It stays with the owner. It holds file names, never paths, and no text.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from emulator.dial.line import fit
from emulator.dial.targets import KINDS
from offsite.artefacts.owner import DialFigures
from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import ArtefactError, TooLarge
from offsite.evaluation.figures import gap, recovery, recovery_nats, withheld
from offsite.staging import staged_file
from offsite.strictjson import Sparse, Strict, parse_strict

EXPLORATION_FORMAT = "offsite/exploration/1"
LIMIT_BYTES = 16 * 2**20


class Tried(Strict):
    """One size with a rehearsed client: the package, perplexities on text of the field, and what they come to.

    ``field_kl`` is KL(full || emulator) as sent, in nats per token; ``scale`` the share of the update that did best.
    """

    method: str
    size: float = Field(gt=0, le=1)
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    field_kl: float = Field(ge=0)
    emulator_zero_shot: float = Field(gt=0)
    emulator_tuned: float = Field(gt=0)
    plugged_in: float = Field(gt=0)
    scale: float = Field(gt=0, le=1)
    withheld_zero_shot: float
    figures: DialFigures


class Rung(Strict):
    """One size without a client: how far its emulator is from the model, and how large it is."""

    method: str
    size: float = Field(gt=0, le=1)
    field_kl: float = Field(ge=0)
    num_bytes: int = Field(gt=0)


class FittedLine(Strict):
    """recovery = a - b x, with x the nats withheld after tuning, through the tried sizes of one method."""

    method: str
    a: float
    b: float
    residual: float = Field(ge=0)


class Wanted(Sparse):
    """What was asked for, and the size that gives it by the line; where none does, the one that comes nearest."""

    optional: ClassVar[frozenset[str]] = frozenset({"is_met"})

    target: str
    value: float
    is_met: bool = False
    method: str
    size: float = Field(gt=0, le=1)
    predicted: DialFigures


class Made(Strict):
    """The package that was made for what was asked, and what a client that was rehearsed on it came to."""

    package_digest: str = Field(pattern=DIGEST_PATTERN)
    scale: float = Field(gt=0, le=1)
    learning_rate: float = Field(gt=0, le=1)
    measured: DialFigures


class FieldText(Strict):
    """Text that was used, after it was shared out: how many rows, and the digest of the files that hold them."""

    num_rows: int = Field(ge=1)
    sha256: str = Field(pattern=DIGEST_PATTERN)


class Exploration(Sparse):
    """The content of the file.

    ``lora_full`` is the perplexity of LoRA on the full model, tuned on the same text by the same client.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"wanted", "made"})

    format: Literal["offsite/exploration/1"] = "offsite/exploration/1"
    model: str
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    calibration: FieldText
    tuned_on: FieldText
    measured_on: FieldText
    client: dict[str, Any]
    zero_shot: float = Field(gt=0)
    lora_full: float = Field(gt=0)
    tried: tuple[Tried, ...] = Field(min_length=2, max_length=1000)
    ladder: tuple[Rung, ...] = Field(max_length=10_000)
    lines: tuple[FittedLine, ...] = Field(min_length=1)
    wanted: Wanted | None = None
    made: Made | None = None
    command: str
    versions: dict[str, str]
    seconds: float = Field(ge=0)

    @model_validator(mode="after")
    def _agree(self) -> Exploration:
        """Every figure follows from the perplexities, the lines from the figures; nothing is said of what was not."""
        if self.lora_full == self.zero_shot:
            raise ValueError("LoRA on the full model gained nothing, so that nothing can be recovered")
        sizes = [(one.method, one.size) for one in self.tried] + [(one.method, one.size) for one in self.ladder]
        if len(set(sizes)) != len(sizes):
            raise ValueError("a size stands twice")
        for one in self.tried:
            known = figures_of(
                self.zero_shot, self.lora_full, one.emulator_tuned, one.plugged_in, one.figures.num_bytes
            )
            if not _close(one.figures, known):
                raise ValueError("figures do not follow from the perplexities")
            if not math.isclose(
                one.withheld_zero_shot, withheld(one.emulator_zero_shot, self.zero_shot), rel_tol=1e-6, abs_tol=1e-9
            ):
                raise ValueError("withheld_zero_shot does not follow from the perplexities")
        methods = list(dict.fromkeys(one.method for one in self.tried))
        if [line.method for line in self.lines] != methods:
            raise ValueError("there is not one line for each method")
        if not {rung.method for rung in self.ladder} <= set(methods):
            raise ValueError("the ladder has a method that was not tried")
        for line in self.lines:
            found = fit([(one.figures.withheld, one.figures.recovery) for one in self.of(line.method)])
            stated = ((line.a, found.a), (line.b, found.b), (line.residual, found.residual))
            if not all(math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9) for one, other in stated):
                raise ValueError("a line does not follow from the sizes that were tried")
        self._wanted_agrees(methods)
        return self

    def _wanted_agrees(self, methods: list[str]) -> None:
        wanted = self.wanted
        if wanted is None:
            if self.made is not None:
                raise ValueError("a package was made and nothing was asked for")
            return
        if wanted.target not in KINDS or wanted.method not in methods:
            raise ValueError("what was asked for is no figure or method that is known here")
        sizes = [one.size for one in self.of(wanted.method)]
        if not min(sizes) <= wanted.size <= max(sizes):
            raise ValueError("the size lies outside of what was tried")
        if self.made is not None and not wanted.is_met:
            raise ValueError("a package was made that does not meet what was asked for")

    def of(self, method: str) -> list[Tried]:
        """Return the sizes of one method that were tried."""
        return [one for one in self.tried if one.method == method]


def figures_of(
    zero_shot: float, lora_full: float, emulator_tuned: float, plugged_in: float, num_bytes: int
) -> DialFigures:
    """Return what four perplexities come to.

    Raises:
        ValueError: when LoRA on the full model gained nothing.
    """
    shares = recovery(plugged_in, zero_shot, lora_full), recovery_nats(plugged_in, zero_shot, lora_full)
    over = gap(emulator_tuned, plugged_in)
    if shares[0] is None or shares[1] is None or over is None:
        raise ValueError("LoRA on the full model gained nothing, so that nothing can be recovered")
    return DialFigures(
        recovery=shares[0],
        recovery_nats=shares[1],
        withheld=withheld(emulator_tuned, zero_shot),
        gap=over,
        num_bytes=num_bytes,
    )


def write_exploration(path: Path, found: Exploration) -> str:
    """The file stands, in place of an earlier one. Returns its digest."""
    raw = (json.dumps(found.model_dump(mode="json"), indent=1, allow_nan=False) + "\n").encode()
    with staged_file(path, replace=True) as stage:
        stage.write_bytes(raw)
    return sha256_bytes(raw)


def read_exploration(path: Path) -> Exploration:
    """Return the exploration in the file at `path`.

    Raises:
        ArtefactError: when there is no such file.
        TooLarge, BadSchema, WrongBinding: when it is none of this format.
    """
    if not path.is_file():
        raise ArtefactError(f"no exploration {path.name!r}", hint="offsite distill --explore writes it")
    if path.stat().st_size > LIMIT_BYTES:
        raise TooLarge(f"exploration {path.name!r} is over {LIMIT_BYTES} bytes")
    return parse_strict(path.read_bytes(), Exploration, f"exploration {path.name!r}", {"format": EXPLORATION_FORMAT})


def _close(one: DialFigures, other: DialFigures) -> bool:
    pairs = zip(one.model_dump().values(), other.model_dump().values(), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs)
