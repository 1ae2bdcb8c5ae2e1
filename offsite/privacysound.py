"""Whether an audit's figures can be what they say: curves that rise, numbers of a size that is measured."""

from __future__ import annotations

from itertools import pairwise

from offsite.audit import Audit, BundleAudit, CanaryAudit, Membership, PackageAudit
from offsite.errors import ArtefactError

LARGEST = 1e15
"""No figure of an audit is larger: none measures anything of that size."""


def require_sound(kind: str, audit: Audit) -> None:
    """Return only if the audit's numbers are of a size that is measured, and its curves go from nothing to all.

    Args:
        kind: what it is of, for messages.

    Raises:
        ArtefactError: naming what is not.
    """
    _require_numbers(kind, audit.model_dump())
    for one in _memberships(audit):
        if one.roc[0] != (0, 0) or one.roc[-1] != (1, 1):
            raise ArtefactError(f"audit of the {kind}: the curve of {one.signal!r} does not go from (0, 0) to (1, 1)")
        if any(later[0] < now[0] or later[1] < now[1] for now, later in pairwise(one.roc)):
            raise ArtefactError(f"audit of the {kind}: the curve of {one.signal!r} does not rise")


def _require_numbers(kind: str, found: object) -> None:
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    for part in parts:
        _require_numbers(kind, part)
    if isinstance(found, int | float) and abs(found) > LARGEST:
        raise ArtefactError(f"audit of the {kind}: it holds a figure beyond {LARGEST:g}")


def _memberships(audit: Audit) -> tuple[Membership, ...]:
    canaries: CanaryAudit | None = None if isinstance(audit, PackageAudit) else audit.canaries
    rows = audit.membership if isinstance(audit, BundleAudit) else ()
    return (*rows, *(canaries.membership if canaries else ()))
