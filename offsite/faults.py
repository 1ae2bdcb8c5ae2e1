"""Named points at which tests break the work: a kill, a full disk. Without a hook nothing happens.

Only code can set a hook, never the environment or a setting. The points are those where state on disk changes hands.
"""

from __future__ import annotations

from collections.abc import Callable

POINTS = (
    "upload-part",  # a part of an upload is on disk, the offset is not answered yet
    "intake-decrypted",  # the plain files are written, nothing is registered
    "intake-verified",  # every check has passed, nothing is registered
    "intake-stored",  # the bundle's files have their final name, the registry does not know it
    "commit-before",  # rows are written, not committed
    "commit-after",  # rows are committed; log and head do not have them yet
    "log-half",  # half of the log's new bytes are written
    "log-after",  # the log has them, the head not yet
    "head-after",  # database, log and head agree
    "plug-written",  # the adapted model is written and compared, not published
    "plug-published",  # it is published, the registry does not know it
)

ROUND_POINTS = (
    "round-asked",  # the registry knows of whom a round is asked, it is not sealed for all of them
    "round-summed",  # what the rounds added is written, the round is not finished
    "round-finished",  # it is finished, nothing was told
    "round-sealed",  # a client's answer is sealed, the owner does not have it
)
"""Those of a federation's rounds."""

_hook: Callable[[str], None] | None = None


def reach(point: str) -> None:
    """Call the hook with `point`, if a test has set one; whatever it raises passes through."""
    if _hook is not None:
        _hook(point)


def set_hook(hook: Callable[[str], None] | None) -> None:
    """Let `reach` call `hook` from now on in this process; None takes it off."""
    global _hook
    _hook = hook
