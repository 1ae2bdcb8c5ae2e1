"""The one Flower app that a client answers, by its digest."""

from __future__ import annotations

from offsite.digests import sha256_bytes
from offsite.errors import PolicyError


def require_pinned(fab: bytes, pin: str) -> None:
    """Return only if the app that came is the pinned one.

    Args:
        fab: the bundle as received; it is hashed and not opened.
        pin: SHA-256, in hex.

    Raises:
        PolicyError: when it is another.
    """
    found = sha256_bytes(fab).removeprefix("sha256:")
    if found != pin:
        raise PolicyError(
            f"refused: app {found[:12]} came, {pin[:12]} is pinned; nothing of it was installed or run",
            hint="if the owner says that the app has changed, start the node anew with its --app",
        )
