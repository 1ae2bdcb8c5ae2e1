"""Signed requests to one owner's exchange: tried again while it is busy or the line breaks, and never trusted.

No redirects, no proxies from the environment, no cookies, no content encodings. An answer has a size limit and a strict
form; its words are shown only as plain text.
"""

from __future__ import annotations

import email.utils
import ipaddress
import os
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import ValidationError

from offsite import errors
from offsite.errors import ArtefactError, BadSchema, ConfigError, RunFailed, Untrusted, WrongBinding
from offsite.exchange.requests import PROTOCOL, PROTOCOL_HEADER, WINDOW_SECONDS, sign_request
from offsite.exchange.wire import ANSWER_LIMIT_BYTES, Problem
from offsite.keys.identity import Identity
from offsite.strictjson import Strict

Answer = TypeVar("Answer", bound=Strict)
Result = TypeVar("Result")

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_CLASSES = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ArtefactError)
}


class WrongOffset(Exception):
    """The exchange has come further, or less far, with an upload; `offset` says how far, if it is known."""

    def __init__(self, offset: int | None) -> None:
        super().__init__(offset)
        self.offset = offset


class NotAccepted(Untrusted):
    """The exchange answers these keys as it answers anybody: they are not pinned there, or the clocks are far apart."""


class _TryAgain(Exception):
    """What went wrong may pass; `pause_seconds` is what the exchange asks for."""

    def __init__(self, why: str, pause_seconds: float = 0.0) -> None:
        super().__init__(why)
        self.pause_seconds = pause_seconds


class ExchangeClient:
    """A connection to the exchange at `url`, which is `owner`'s.

    Args:
        url: scheme, host and port; ``http`` only for this machine.
        owner: fingerprint; requests are signed for that owner and count for no other.
        certificate: PEM file of the only certificate trusted; None for the usual authorities.
        patience_seconds: how long without progress a request is tried again.
        timeout_seconds: for each connection, and between any two bytes.

    Raises:
        ConfigError: when `url` is none of an exchange, or `certificate` is no certificate.
    """

    def __init__(
        self,
        url: str,
        identity: Identity,
        owner: str,
        *,
        certificate: Path | None = None,
        patience_seconds: float = 60.0,
        timeout_seconds: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity, self._owner, self._clock = identity, owner, clock
        self._patience_seconds, self._timeout_seconds = patience_seconds, timeout_seconds
        self._client = httpx.Client(
            base_url=_base(url),
            verify=_trusting(certificate),
            trust_env=False,
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=timeout_seconds,
            headers={"Accept-Encoding": "identity", "User-Agent": "offsite"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._client.close()

    @property
    def owner(self) -> str:
        """Fingerprint of the exchange's owner."""
        return self._owner

    def ask(self, method: str, path: str, cls: type[Answer], body: bytes = b"") -> Answer:
        """Return the exchange's answer.

        Raises:
            WrongOffset: an upload stands elsewhere.
            ArtefactError: what the exchange refused, by the class it names; Untrusted when it does not accept the
                request; WrongBinding when it speaks another protocol.
            RunFailed: it cannot be reached, or stays busy beyond the patience.
        """

        def attempt() -> Answer:
            with self._sent(method, path, body) as response:
                raw = self._read(response)
                if response.status_code in (200, 202):
                    return _parsed(raw, cls)
                raise self._problem(response, raw)

        return self._patiently(attempt)

    def fetch(self, path: str, limit_bytes: int) -> bytes:
        """Return a small file.

        Raises:
            TooLarge: over `limit_bytes`; otherwise as `ask`.
        """

        def attempt() -> bytes:
            with self._sent("GET", path) as response:
                raw = self._read(response, limit_bytes if response.status_code == 200 else ANSWER_LIMIT_BYTES)
                if response.status_code == 200:
                    return raw
                raise self._problem(response, raw)

        return self._patiently(attempt)

    def download(self, path: str, target: Path, size: int, progress: Callable[[int], None]) -> None:
        """The file at `target` has its `size` bytes, continued from where it ends.

        Raises:
            As `ask`; what arrived stays for another try.
        """
        began_at = -1

        def attempt() -> None:
            nonlocal began_at
            with target.open("ab") as handle:
                start = handle.tell()
                if start == size:
                    return
                with self._sent("GET", path, more={"Range": f"bytes={start}-"}) as response:
                    if response.status_code not in (200, 206):
                        raise self._problem(response, self._read(response))
                    _check_part(response, start, size)
                    try:
                        for piece in response.iter_raw(256 * 2**10):
                            if handle.tell() + len(piece) > size:
                                raise BadSchema(f"the exchange sent more than the {size} bytes of a file")
                            handle.write(piece)
                            progress(handle.tell())
                    finally:
                        handle.flush()
                        os.fsync(handle.fileno())
                if handle.tell() < size:
                    raise _TryAgain("the connection broke off")

        while not target.exists() or target.stat().st_size < size:
            reached = target.stat().st_size if target.exists() else 0
            if reached == began_at:
                raise RunFailed("the download does not go on", hint="run the same command again to continue")
            began_at = reached
            try:
                self._patiently(attempt)
            except RunFailed:
                if target.exists() and target.stat().st_size > began_at:
                    continue  # it did go on: patience starts anew
                raise

    @contextmanager
    def _sent(
        self, method: str, path: str, body: bytes = b"", more: dict[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """Yield the answer's head; what the line does wrong becomes `_TryAgain`, what the other side is, an error."""
        signed = sign_request(self._identity, method, path, body, owner=self._owner, now=int(self._clock()))
        has_body = method != "GET"
        try:
            with self._client.stream(
                method, path, content=body if has_body else None, headers={**signed, **(more or {})}
            ) as response:
                self._check_head(response)
                yield response
        except httpx.TransportError as error:
            if _is_certificate(error):
                raise Untrusted(
                    "the exchange does not show the TLS certificate expected",
                    hint="--certificate FILE names the one its owner gave you",
                ) from None
            raise _TryAgain(_words(error)) from None

    def _check_head(self, response: httpx.Response) -> None:
        stated = response.headers.get(PROTOCOL_HEADER)
        if stated == str(PROTOCOL) and "content-encoding" not in response.headers:
            return
        if stated is None and response.status_code in _TRANSIENT:
            raise _TryAgain(f"something before the exchange answered {response.status_code}")
        if stated is not None and stated.isascii() and stated.isdigit() and len(stated) < 7 and stated != str(PROTOCOL):
            raise WrongBinding(
                f"the exchange speaks protocol {stated}, this offsite protocol {PROTOCOL}",
                hint="both sides need the same offsite",
            )
        raise WrongBinding("what answers at this address is no offsite exchange", hint="check the address")

    def _read(self, response: httpx.Response, limit_bytes: int = ANSWER_LIMIT_BYTES) -> bytes:
        """Return the whole body, within limits of size and time."""
        found, began = bytearray(), time.monotonic()
        for piece in response.iter_raw(64 * 2**10):
            found += piece
            if len(found) > limit_bytes:
                raise errors.TooLarge(f"the exchange's answer is over {limit_bytes} bytes")
            if time.monotonic() - began > 4 * self._timeout_seconds:
                raise _TryAgain("the exchange answers too slowly")
        return bytes(found)

    def _problem(self, response: httpx.Response, raw: bytes) -> Exception:
        """Return what an answer other than the one asked for stands for."""
        status = response.status_code
        problem = _parsed(raw, Problem)
        message = plain(problem.message)
        if status in _TRANSIENT:
            return _TryAgain(message, _seconds(response.headers.get("retry-after", "")))
        if status == 401:
            return NotAccepted(
                "the exchange does not accept this request", hint=self._clock_hint(response.headers.get("date", ""))
            )
        if status == 409 and problem.reason == "WrongOffset":
            return WrongOffset(problem.offset)
        kind = _CLASSES.get(problem.reason, ArtefactError)
        if kind is WrongBinding and status == 400:
            return kind(message, hint="both sides need the same offsite")
        return kind(f"the exchange refuses: {message}")

    def _clock_hint(self, date: str) -> str:
        try:
            apart_seconds = self._clock() - email.utils.parsedate_to_datetime(date).timestamp()
        except (ValueError, OverflowError):
            apart_seconds = 0.0
        if abs(apart_seconds) > WINDOW_SECONDS:
            return f"this clock and the owner's are {abs(apart_seconds):.0f} seconds apart; set the wrong one"
        return "the owner must have pinned this key (offsite trust add), and --owner must be their fingerprint"

    def _patiently(self, attempt: Callable[[], Result]) -> Result:
        began, pause_seconds = time.monotonic(), _FIRST_PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except _TryAgain as error:
                wait_seconds = min(max(pause_seconds, error.pause_seconds), 30.0)
                if time.monotonic() - began + wait_seconds > self._patience_seconds:
                    raise RunFailed(
                        f"the exchange cannot be used: {error}", hint="run the same command again to continue"
                    ) from None
                time.sleep(wait_seconds * (0.75 + os.urandom(1)[0] / 512))
                pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)


def plain(text: str, limit: int = 300) -> str:
    """Return text of the other side as it may be shown: printable ASCII, on one line, not long."""
    shown = "".join(letter if " " <= letter <= "~" else "?" for letter in text[:limit])
    return shown + ("..." if len(text) > limit else "")


def _base(url: str) -> httpx.URL:
    hint = "as in https://owner.example:8443"
    try:
        found = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        raise ConfigError(f"{url!r} is not an address", hint=hint) from None
    if found.scheme not in ("http", "https") or not found.host or found.userinfo or found.query or found.fragment:
        raise ConfigError(f"{url!r} is not the address of an exchange", hint=hint)
    if found.path not in ("", "/"):
        raise ConfigError(f"{url!r} has a path; an exchange has none", hint=hint)
    if found.scheme == "http" and not _is_loopback(found.host):
        raise ConfigError(f"{url!r} would go over the network without encryption", hint=hint)
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _trusting(certificate: Path | None) -> ssl.SSLContext | bool:
    if certificate is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(certificate))
    except (OSError, ssl.SSLError):
        raise ConfigError(f"--certificate {certificate.name!r} is not a certificate in PEM") from None


def _is_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _words(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "it does not answer in time"
    if isinstance(error, httpx.ConnectError):
        return "no connection"
    return "the connection broke off"


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def _parsed(raw: bytes, cls: type[Answer]) -> Answer:
    try:
        return cls.model_validate_json(raw)
    except (ValidationError, RecursionError):
        raise BadSchema("the exchange's answer does not have the form of this protocol") from None


def _check_part(response: httpx.Response, start: int, size: int) -> None:
    """Return only if what follows are the bytes from `start` to the end of a file of `size` bytes."""
    expected = f"bytes {start}-{size - 1}/{size}"
    if response.status_code == 206 and response.headers.get("content-range") != expected:
        raise BadSchema("the exchange sends another part of a file than the one asked for")
    if response.status_code == 200 and start:
        raise BadSchema("the exchange sends a file from its beginning, not the part asked for")
    if response.headers.get("content-length") != str(size - start):
        raise BadSchema(f"the exchange sends another number of bytes than the {size - start} signed for")
