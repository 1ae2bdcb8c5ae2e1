"""Authentication: signed requests of trusted parties, each once and not too many; the owner's log lists the rest."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fastapi import Request

from offsite.errors import BadSchema, Replayed, RunFailed, Untrusted
from offsite.exchange.requests import WINDOW_SECONDS, SignedRequest, check_request
from offsite.keys.identity import PublicKeys
from offsite.keys.trust import TRUST_NAME, Peer, TrustStore
from server.http.refusals import busy

_CLEAN_EVERY = 1000
_LOG_LINES = 60
_LOG_SECONDS = 60.0


class Nonces:
    """Nonces that were used, on disk until no request that bears one can be in time.

    A kill does not lose them, so that a restart lets nobody repeat a request. How many there are is bounded by the
    rate at which signed requests are let in.
    """

    def __init__(self, path: Path) -> None:
        self._mutex, self._num_admitted = threading.Lock(), 0
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS nonces (key TEXT, nonce TEXT, expires INTEGER, PRIMARY KEY (key, nonce))"
                " STRICT, WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            raise RunFailed(f"cannot use {path.name!r}: {str(error).lower()}") from None
        path.chmod(0o600)
        self.clean(int(time.time()))

    def refuse_known(self, request: SignedRequest) -> None:
        """Return only if the request's nonce was not used so far.

        Raises:
            Replayed: its signer used it before.
        """
        query = "SELECT 1 FROM nonces WHERE key = ? AND nonce = ?"
        if self._connection.execute(query, (request.key, request.nonce)).fetchone():
            raise Replayed("its nonce was used before")

    def admit(self, request: SignedRequest) -> None:
        """Note the request's nonce.

        Raises:
            Replayed: its signer used it before.
        """
        expires = request.time + WINDOW_SECONDS
        with self._mutex:
            self._num_admitted += 1
            if self._num_admitted % _CLEAN_EVERY == 0:
                self.clean(int(time.time()))
            try:
                self._connection.execute("INSERT INTO nonces VALUES (?, ?, ?)", (request.key, request.nonce, expires))
            except sqlite3.IntegrityError:
                raise Replayed("its nonce was used before") from None

    def clean(self, now: int) -> None:
        """Nonces of requests that would be late by now are gone."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._connection.execute("DELETE FROM nonces WHERE expires < ?", (now,))

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM nonces").fetchone()[0])

    def close(self) -> None:
        """The file is closed."""
        self._connection.close()


class Peers:
    """The keys of trusted parties, read anew whenever ``trust.json`` was replaced, so that revoking counts at once."""

    def __init__(self, keys_folder: Path) -> None:
        self._trust, self._path = TrustStore(keys_folder), keys_folder / TRUST_NAME
        self._stamp: tuple[int, int] | None = None
        self._peers: dict[str, Peer] = {}

    def require(self, fingerprint: str, now: int) -> PublicKeys:
        """Return the keys of a party that is trusted at `now`.

        Raises:
            Untrusted: when it is unknown, revoked, expired or not yet valid.
        """
        stamp = self._stamp_now()
        if stamp != self._stamp:
            self._peers = {peer.keys.fingerprint: peer for peer in self._trust.peers()}
            self._stamp = stamp
        peer = self._peers.get(fingerprint)
        state = "unknown" if peer is None else peer.state(now=now)
        if peer is None or state != "trusted":
            raise Untrusted(f"the key is {state}")
        return peer.keys

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino


class Rates:
    """A bucket of requests per signer that refills steadily."""

    def __init__(self, *, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> None:
        """Take one request out of the bucket of `key`, which is trusted: there are as many buckets as parties.

        Raises:
            Refusal: 429 when it is empty.
        """
        now = self._clock()
        left, since = self._buckets.get(key, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        if left < 1:
            self._buckets[key] = (left, now)
            raise busy("too many requests", retry_seconds=max(1, round((1 - left) / self._per_second)))
        self._buckets[key] = (left - 1, now)


class Denials:
    """Lines in the owner's log on requests that were denied; at most so many a minute, the rest as a number."""

    def __init__(self, log: Callable[..., None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock, self._mutex = log, clock, threading.Lock()
        self._began, self._num_lines, self._num_left_out = clock(), 0, 0

    def note(self, **fields: object) -> None:
        """One denial is in the log, or counted."""
        with self._mutex:
            now = self._clock()
            if now - self._began > _LOG_SECONDS:
                self._sum_up()
                self._began, self._num_lines = now, 0
            self._num_lines += 1
            if self._num_lines > _LOG_LINES:
                self._num_left_out += 1
                return
            self._log("exchange-denied", **fields)

    def close(self) -> None:
        """What was only counted is in the log, as a number."""
        with self._mutex:
            self._sum_up()

    def _sum_up(self) -> None:
        if self._num_left_out:
            self._log("exchange-denied-more", count=self._num_left_out)
        self._num_left_out = 0


class Authenticator:
    """Checks a request before anything of it is used.

    Args:
        owner: this exchange's own keys.
        lookup: the keys of a trusted fingerprint, by time; raises Untrusted.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        *,
        owner: PublicKeys,
        lookup: Callable[[str, int], PublicKeys],
        nonces: Nonces,
        rates: Rates,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._owner, self._lookup, self._nonces, self._rates, self._clock = owner, lookup, nonces, rates, clock

    def check(self, request: Request) -> SignedRequest:
        """Return who asks for what.

        Raises:
            ArtefactError: naming the check that failed; the client hears none of it.
            Refusal: 429 when the client asks too often.
        """
        now = int(self._clock())
        if request.scope["query_string"]:
            raise BadSchema("a query string is not of this protocol")

        def admit(signed: SignedRequest) -> None:
            self._nonces.refuse_known(signed)  # first, so that repeating somebody's request does not cost them any
            self._rates.take(signed.key)
            self._nonces.admit(signed)

        return check_request(
            request.method,
            request.scope["raw_path"].decode("latin-1"),
            request.scope["headers"],
            owner=self._owner,
            lookup=lambda fingerprint: self._lookup(fingerprint, now),
            admit=admit,
            now=now,
        )
