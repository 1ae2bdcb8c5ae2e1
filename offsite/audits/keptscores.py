"""Scores of the rows of a bundle's audit, as a file that stays with the client: what an output checker works with.

An audit holds curves and areas, no row's score. Where a research environment's output checker wants to work those out
again, the client keeps the scores beside the audit: of each attack, of the rows that were trained on and of those that
were not, in one order that is no order of the data. The file holds no text, no place in a file and no path; it is bound
to its audit by digest, and the audit's figures must be those that the scores give.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from offsite.audits.membership import membership_of
from offsite.audits.record import BundleAudit, Estimate, Membership, SignalName
from offsite.audits.runs import Digest
from offsite.console import say
from offsite.errors import ArtefactError, BadSchema, ConfigError, WrongBinding
from offsite.folders import read_own
from offsite.staging import staged_file
from offsite.strictjson import Strict, parse_strict, write_compact

SCORES_FORMAT: Final = "offsite/scores/1"
SCORES_LIMIT_BYTES = 256 * 2**20
_SAME = 1e-6

Scores = Annotated[tuple[float, ...], Field(min_length=1)]


class Sides(Strict):
    """One attack's scores, higher for more likely trained on."""

    members: Scores = Field(repr=False)
    nonmembers: Scores = Field(repr=False)


class KeptScores(Strict):
    """The content of the file: of which audit, and each attack's scores of the same rows in the same order."""

    format: Literal["offsite/scores/1"] = SCORES_FORMAT
    audit: Digest
    signals: dict[SignalName, Sides] = Field(min_length=1)

    @model_validator(mode="after")
    def _of_the_same_rows(self) -> KeptScores:
        if len({(len(one.members), len(one.nonmembers)) for one in self.signals.values()}) > 1:
            raise ValueError("attacks have scores of different numbers of rows")
        return self


@contextmanager
def kept_scores(
    out: Path | None, attacks: Mapping[SignalName, NDArray[np.float64]], num_members: int, *, audit: str
) -> Iterator[None]:
    """The scores stand at `out`, readable by its owner alone, once the block has ended well.

    Nothing stands there where no row was scored, which is said: the audit is worth keeping without them.

    Args:
        attacks: scores of the rows, members first, in the order of the data; they are written in another.
        audit: digest of the ``audit.json`` that they are of.

    Raises:
        ConfigError: when `out` exists.
        RunFailed: when the disk is full.
    """
    if out is None or not attacks:
        if out is not None:
            say(f"no row was scored: {out.name} is not written")
        yield
        return
    num_rows = len(next(iter(attacks.values())))
    inside, outside = _shuffled(range(num_members)), _shuffled(range(num_members, num_rows))
    kept = KeptScores(
        audit=audit,
        signals={
            name: Sides(members=tuple(by[inside].tolist()), nonmembers=tuple(by[outside].tolist()))
            for name, by in attacks.items()
        },
    )
    with staged_file(out) as stage:
        stage.touch(mode=0o600)
        stage.write_bytes(write_compact(kept))
        yield


def read_scores(path: Path, audit: BundleAudit, digest: str) -> KeptScores:
    """Return the scores in the file, known to be of this audit and to give its figures.

    Args:
        digest: of the ``audit.json``.

    Raises:
        ConfigError: when there is no such file.
        TooLarge, BadSchema: when it has another form.
        WrongBinding: when it is of another audit.
        ArtefactError: when a figure of the audit is not what its scores give.
    """
    if not path.is_file():
        raise ConfigError(
            f"no file of scores named {path.name!r}", hint="offsite audit bundle --keep-scores FILE writes it"
        )
    raw = read_own(path, SCORES_LIMIT_BYTES)
    kept = parse_strict(raw, KeptScores, path.name, {"format": SCORES_FORMAT})
    if kept.audit != digest:
        raise WrongBinding(
            f"{path.name!r} are scores of audit {kept.audit[:19]}, not of {digest[:19]}",
            hint="give the file that was written with this audit",
        )
    stated = {one.signal: one for one in audit.membership}
    if stated.keys() != kept.signals.keys():
        raise BadSchema(f"{path.name}: scores of other attacks than the audit's")
    for name, sides in kept.signals.items():
        if not _same(stated[name], membership_of(name, sides.members, sides.nonmembers)):
            raise ArtefactError(f"the audit's figures of {name!r} are not what {path.name!r} gives", hint="audit anew")
    return kept


def _shuffled(places: range) -> list[int]:
    """Return the places in an order that no seed leads to."""
    found = list(places)
    secrets.SystemRandom().shuffle(found)
    return found


def _same(stated: Membership, found: Membership) -> bool:
    counts = (stated.num_members, stated.num_nonmembers) == (found.num_members, found.num_nonmembers)
    one, other = list(_figures(stated)), list(_figures(found))
    return counts and len(one) == len(other) and np.allclose(one, other, rtol=0, atol=_SAME)


def _figures(found: Membership) -> Iterator[float]:
    yield found.balanced_accuracy
    for figure in (found.auc, found.tpr_at_1, found.tpr_at_01):
        yield from (-1.0, -1.0, -1.0) if figure is None else _interval(figure)
    for point in found.roc:
        yield from point


def _interval(figure: Estimate) -> tuple[float, float, float]:
    return figure.low, figure.value, figure.high
