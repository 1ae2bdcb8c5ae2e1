"""Who may see the dashboard: whoever has the token, for as long as a session lasts.

The token is 256 bits of the operating system's randomness, shown once; the file in the keys folder holds its SHA-256
alone, which for a secret of that kind needs no salt and no slow hash. Sessions are in memory: a restart ends them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from offsite.keys.files import parse_keys, read_private, write_private
from offsite.staging import staged_file
from offsite.strictjson import Strict

TOKEN_NAME = "dashboard.json"  # noqa: S105 - the file's name
TOKEN_LIMIT_CHARACTERS = 200

_PREFIX = "offsite-owner-"
_FILE_LIMIT_BYTES = 4096
_MAX_SESSIONS = 16
_LONGEST_SECONDS = 12 * 3600.0
_MAX_TRIES, _TRY_SECONDS, _MAX_ADDRESSES = 5, 60.0, 1024


class _Stored(Strict):
    format: Literal["offsite/dashboard/1"] = "offsite/dashboard/1"
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def has_token(keys: Path) -> bool:
    """Tell whether a token was made for this keys folder."""
    return (keys / TOKEN_NAME).is_file()


def make_token(keys: Path) -> str:
    """Return a new token, whose hash stands in the keys folder from now on; one that was there counts no longer.

    Raises:
        RunFailed: when it cannot be written.
    """
    token = _PREFIX + secrets.token_urlsafe(32)
    stored = _Stored(sha256=_hashed(token))
    raw = json.dumps(stored.model_dump(mode="json"), sort_keys=True).encode() + b"\n"
    with staged_file(keys / TOKEN_NAME, replace=True) as stage:
        write_private(stage, raw)
    return token


class Gatekeeper:
    """The token of one keys folder, and how often it may be tried.

    Args:
        clock: seconds that only go forward.

    Raises:
        BadKey: when the file is damaged, or open to others.
    """

    def __init__(self, keys: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        raw = read_private(keys / TOKEN_NAME, _FILE_LIMIT_BYTES, what="dashboard's token file")
        hint = "offsite owner up --new-token makes another"
        stored = parse_keys(raw, _Stored, what=TOKEN_NAME, format_name="offsite/dashboard/1", hint=hint)
        self._sha256, self._clock, self._mutex = stored.sha256, clock, threading.Lock()
        self._tries: OrderedDict[str, deque[float]] = OrderedDict()

    def judge(self, token: str, address: str) -> Literal["right", "wrong", "too many"]:
        """Tell whether it is the token; the time that takes says nothing about how near it was.

        An address has five wrong ones a minute. What is tried beyond them is not looked at, right or wrong.
        """
        with self._mutex:
            tries = self._recent(address)
            if len(tries) >= _MAX_TRIES:
                return "too many"
            tries.append(self._clock())  # before it is known, so that many at once are counted
            while len(self._tries) > _MAX_ADDRESSES:
                self._tries.popitem(last=False)
        if not hmac.compare_digest(_hashed(token[:TOKEN_LIMIT_CHARACTERS]), self._sha256):
            return "wrong"
        with self._mutex:
            self._tries.pop(address, None)
        return "right"

    def _recent(self, address: str) -> deque[float]:
        found = self._tries.setdefault(address, deque())
        self._tries.move_to_end(address)
        while found and self._clock() - found[0] >= _TRY_SECONDS:
            found.popleft()
        return found


@dataclass
class Session:
    """Somebody who gave the token. `form_token` stands in every form of theirs."""

    form_token: str
    began: float
    seen: float


class Sessions:
    """Those who are logged in, by the hash of what their cookie holds; the oldest of too many goes.

    Args:
        idle_seconds: after which one that was not used ends; each ends after twelve hours.
        clock: seconds that only go forward.
    """

    def __init__(self, *, idle_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_seconds, self._clock, self._mutex = idle_seconds, clock, threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def begin(self) -> str:
        """Return what the cookie of a new session holds."""
        secret, now = secrets.token_urlsafe(32), self._clock()
        with self._mutex:
            self._sessions[_hashed(secret)] = Session(secrets.token_urlsafe(32), now, now)
            while len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return secret

    def find(self, secret: str) -> Session | None:
        """Return the session of a cookie, which is used now; None when there is none, or it is over."""
        now, name = self._clock(), _hashed(secret)
        with self._mutex:
            found = self._sessions.get(name)
            if found is None:
                return None
            if now - found.seen >= self._idle_seconds or now - found.began >= _LONGEST_SECONDS:
                del self._sessions[name]
                return None
            found.seen = now
            return found

    def end(self, secret: str) -> None:
        """The session of that cookie is over."""
        with self._mutex:
            self._sessions.pop(_hashed(secret), None)


class LoginForms:
    """The token in a login form, which follows from a cookie: whoever has no session has no other secret yet."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def begin(self) -> str:
        """Return what the cookie of somebody who is to log in holds."""
        return secrets.token_urlsafe(16)

    def token(self, cookie: str) -> str:
        """Return what stands in the form that belongs to the cookie."""
        return hmac.digest(self._key, cookie.encode("utf-8", "replace"), "sha256").hex()


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
