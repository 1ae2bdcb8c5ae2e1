"""The file that ``rehearse`` writes: what a played client gave, by learning rate and share of the update.

``distill --target`` reads it too. It holds file names, never paths, and no text.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from offsite.artefacts.bundle import AdapterSpec
from offsite.digests import DIGEST_PATTERN
from offsite.errors import ArtefactError, TooLarge
from offsite.evaluation.figures import recovery, recovery_nats, withheld
from offsite.evaluation.results import WAY_PATTERN, Data
from offsite.strictjson import Sparse, Strict, parse_strict

REHEARSAL_FORMAT = "offsite/rehearsal/1"
LIMIT_BYTES = 16 * 2**20


class Trial(Sparse):
    """One rate and one way to plug in: perplexities on the held-out text, and what they come to.

    ``way`` is there where more is to be said than a share of all modules (``server/plugging/ways.py``).

    ``withheld_after_tuning`` is in nats per token. Recoveries are there when a reference was run. All three are
    defined in ``offsite/evaluation/figures.py``.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"way", "withheld_after_tuning", "recovery", "recovery_nats"})

    learning_rate: float = Field(gt=0, le=1)
    scale: float = Field(gt=0, le=1)
    way: str = Field("", pattern=WAY_PATTERN)
    plugged_in: float = Field(gt=0, allow_inf_nan=False)
    emulator_tuned: float = Field(gt=0, allow_inf_nan=False)
    withheld_after_tuning: float | None = None
    recovery: float | None = None
    recovery_nats: float | None = None


class Reference(Strict):
    """LoRA on the full model, tuned on the same text: its rate is the best of those tried, its update whole."""

    package_digest: str = Field(pattern=DIGEST_PATTERN)
    adapter: AdapterSpec
    learning_rate: float = Field(gt=0, le=1)
    perplexity: float = Field(gt=0, allow_inf_nan=False)


class Rehearsal(Sparse):
    """The content of the file. Perplexities are of the held-out text; ``trials`` stand in the order they were run.

    ``data_files`` are the digests of several files, ``data_sha256`` is one over them then. ``withheld_zero_shot``, in
    nats per token, is no measure of what a client is left with.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"data_files", "withheld_zero_shot", "reference"})

    format: Literal["offsite/rehearsal/1"] = "offsite/rehearsal/1"
    model: str
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    adapter: AdapterSpec
    data_sha256: str = Field(pattern=DIGEST_PATTERN)
    data_files: tuple[str, ...] = ()
    heldout: Data
    zero_shot: float = Field(gt=0, allow_inf_nan=False)
    emulator_zero_shot: float = Field(gt=0, allow_inf_nan=False)
    withheld_zero_shot: float | None = None
    reference: Reference | None = None
    trials: tuple[Trial, ...] = Field(min_length=1)
    config: dict[str, Any]
    command: str
    versions: dict[str, str]
    seconds: float = Field(ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _agree(self) -> Rehearsal:
        """Every figure that is stated follows from the perplexities."""
        stated = [("withheld_zero_shot", self.withheld_zero_shot, withheld(self.emulator_zero_shot, self.zero_shot))]
        against = self.reference.perplexity if self.reference is not None else None
        for one in self.trials:
            known = withheld(one.emulator_tuned, self.zero_shot)
            stated.append(("withheld_after_tuning", one.withheld_after_tuning, known))
            for name, function in (("recovery", recovery), ("recovery_nats", recovery_nats)):
                worked_out = function(one.plugged_in, self.zero_shot, against)
                if worked_out is None and getattr(one, name) is not None:
                    raise ValueError(f"{name} is stated without a reference to recover against")
                stated.append((name, getattr(one, name), worked_out or 0.0))
        for name, found, worked_out in stated:
            if found is not None and not math.isclose(found, worked_out, rel_tol=1e-6, abs_tol=1e-9):
                raise ValueError(f"{name} does not follow from the perplexities")
        return self

    @property
    def best(self) -> Trial:
        """The trial with the lowest perplexity of the full model; the first of several."""
        return min(self.trials, key=lambda trial: trial.plugged_in)


def read_rehearsal(path: Path) -> Rehearsal:
    """Return the rehearsal in the file at `path`.

    Raises:
        ArtefactError: when there is no such file.
        TooLarge, BadSchema, WrongBinding: when it is none of this format.
    """
    if not path.is_file():
        raise ArtefactError(f"no rehearsal {path.name!r}", hint="offsite rehearse writes it")
    if path.stat().st_size > LIMIT_BYTES:
        raise TooLarge(f"rehearsal {path.name!r} is over {LIMIT_BYTES} bytes")
    return parse_strict(path.read_bytes(), Rehearsal, f"rehearsal {path.name!r}", {"format": REHEARSAL_FORMAT})
