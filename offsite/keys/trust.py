"""Whom this party trusts: cards pinned by a fingerprint that a person compared, until revoked or expired.

``trust.json`` lies in the keys folder and is read anew at each question, so that a revocation counts at once, also for
a running exchange. Every card in it is verified again when it is used.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from offsite.console import say
from offsite.errors import ArtefactError, BadKey, ConfigError, Replayed, Untrusted
from offsite.keys.files import check_folder, parse_keys, read_limited, read_private, write_private
from offsite.keys.identity import CARD_LIMIT_BYTES, FINGERPRINT_PATTERN, PublicKeys, read_card
from offsite.problems import meant
from offsite.staging import staged_file
from offsite.strictjson import Strict

if TYPE_CHECKING:
    from offsite.keys.config import TrustAddConfig, TrustListConfig, TrustRevokeConfig

TRUST_NAME = "trust.json"
TRUST_FORMAT = "offsite/trust/1"
TRUST_LIMIT_BYTES = 32 * 2**20
MAX_SKEW_SECONDS = 300
"""How far the clocks of two parties may differ."""

_FEWEST_CHARACTERS = 8  # of a fingerprint, with its hyphen: 35 bits
_MEND = "put a copy of it back, or delete it and add each party again"
_COMPARE = "compare it with the one the other party tells you over another channel, then give it with --fingerprint"


@dataclass(frozen=True)
class Peer:
    """A pinned party: its keys, when it was pinned and, if so, revoked (Unix seconds)."""

    keys: PublicKeys
    added: int
    revoked: int | None

    def state(self, *, now: int) -> Literal["trusted", "revoked", "expired", "not yet valid"]:
        """Return whether the peer counts at that moment, and why not."""
        if self.revoked is not None:
            return "revoked"
        if now >= self.keys.expires:
            return "expired"
        return "not yet valid" if self.keys.created > now + MAX_SKEW_SECONDS else "trusted"


class _Entry(Strict):
    card: str
    added: int = Field(ge=0, lt=2**40)
    revoked: int | None = Field(None, ge=0, lt=2**40)


class _Pinned(Strict):
    format: str = TRUST_FORMAT
    peers: dict[str, _Entry] = {}


class TrustStore:
    """The parties pinned in one keys folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError when there is no such folder, BadKey when it is open to others."""
        check_folder(folder)
        self._folder = folder
        self._path = folder / TRUST_NAME

    def add(self, raw_card: bytes, fingerprint: str, *, now: int | None = None) -> PublicKeys:
        """The card's holder is trusted from now on. The same card again changes nothing; a later card of the same
        keys, with other dates, takes the place of the former.

        Args:
            raw_card: the bytes of the other party's card.
            fingerprint: what that party said it is, over a channel that the card did not come by.

        Raises:
            BadKey, BadSignature, TooLarge, WrongBinding: when `read_card` refuses the card.
            Untrusted: when its fingerprint is another, it was revoked here, or its date is past or to come.
            Replayed: when a later card of the same keys is pinned.
        """
        now = int(time.time()) if now is None else now
        keys = read_card(raw_card)
        if keys.fingerprint != _normal(fingerprint):
            raise Untrusted(
                f"the card's fingerprint is {keys.fingerprint}, not the one given",
                hint="somebody may have changed the card on its way: ask for both again, over separate channels",
            )
        state = Peer(keys, now, None).state(now=now)
        if state != "trusted":
            raise Untrusted(f"the card of {keys.fingerprint} is {state}", hint="ask its holder for a new one")
        with self._locked():
            peers = dict(self._read().peers)
            old = peers.get(keys.fingerprint)
            if old is not None and old.revoked is not None:
                raise Untrusted(
                    f"{keys.fingerprint} was revoked here {_date(old.revoked)}", hint="ask its holder to make new keys"
                )
            if old is not None and _peer(keys.fingerprint, old).keys.created > keys.created:
                raise Replayed(f"a later card of {keys.fingerprint} is pinned here")
            added = now if old is None else old.added
            peers[keys.fingerprint] = _Entry(card=base64.b64encode(raw_card).decode(), added=added)
            self._write(_Pinned(peers=peers))
        return keys

    def revoke(self, fingerprint: str, *, now: int | None = None) -> Peer:
        """The peer is trusted no longer, and cannot be added again. Its entry stays, with the time of the first
        revocation.

        Raises:
            Untrusted: when no such peer is pinned.
        """
        wanted = _normal(fingerprint)
        with self._locked():
            peers = dict(self._read().peers)
            if wanted not in peers:
                raise Untrusted("no peer of that fingerprint is pinned here", hint="offsite trust list")
            if peers[wanted].revoked is None:
                time_now = int(time.time()) if now is None else now
                peers[wanted] = peers[wanted].model_copy(update={"revoked": time_now})
                self._write(_Pinned(peers=peers))
        return _peer(wanted, peers[wanted])

    def peers(self) -> list[Peer]:
        """Return every pinned peer, in whatever state, by name."""
        found = [_peer(fingerprint, entry) for fingerprint, entry in self._read().peers.items()]
        return sorted(found, key=lambda peer: (peer.keys.name, peer.keys.fingerprint))

    def require(self, fingerprint: str, *, now: int) -> PublicKeys:
        """Return the keys of a peer that is trusted at that moment.

        Args:
            now: Unix seconds.

        Raises:
            Untrusted: when it is unknown here, revoked, past its date, or dated in the future.
            BadKey: when ``trust.json`` was damaged.
        """
        entry = self._read().peers.get(fingerprint)
        if entry is None:
            shown = fingerprint if re.fullmatch(FINGERPRINT_PATTERN, fingerprint) else "that key"
            raise Untrusted(f"{shown} is not pinned here", hint="offsite trust add CARD --fingerprint FINGERPRINT")
        peer = _peer(fingerprint, entry)
        state = peer.state(now=now)
        if state != "trusted":
            raise Untrusted(f"the key {fingerprint} is {state}", hint="offsite trust list")
        return peer.keys

    def named(self, word: str, *, now: int) -> str:
        """Return the fingerprint of the party that a person means.

        It is given whole, by its first eight characters or more, or by the name on the card, in any case of letters. A
        whole one is taken as it is, pinned or not.

        Args:
            now: Unix seconds.

        Raises:
            Untrusted: when nobody who is trusted at that moment is called so, or several are.
        """
        wanted = _normal(word)
        if re.fullmatch(FINGERPRINT_PATTERN, wanted):  # before any name: a name may look like somebody's fingerprint
            return wanted
        trusted = [peer.keys for peer in self.peers() if peer.state(now=now) == "trusted"]
        found = [keys for keys in trusted if _is_called(keys, wanted)]
        if not found:
            nearest = meant(word, (keys.name for keys in trusted))
            raise Untrusted(f"nobody called {word[:64]!r} is trusted here{nearest}", hint="offsite trust list")
        if len(found) > 1:
            raise Untrusted(
                f"{len(found)} trusted parties are called {word[:64]!r}", hint="give the fingerprint instead"
            )
        return found[0].fingerprint

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process changes the store meanwhile."""
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # not by closing: a process forked meanwhile would hold it on
            os.close(handle)

    def _read(self) -> _Pinned:
        if not os.path.lexists(self._path):
            return _Pinned()
        raw = read_private(self._path, TRUST_LIMIT_BYTES, what="trust file")
        return parse_keys(raw, _Pinned, what=f"trust file {TRUST_NAME!r}", format_name=TRUST_FORMAT, hint=_MEND)

    def _write(self, pinned: _Pinned) -> None:
        raw = json.dumps(pinned.model_dump(mode="json"), sort_keys=True, indent=1).encode() + b"\n"
        with staged_file(self._path, replace=True) as stage:
            write_private(stage, raw)


def add(config: TrustAddConfig) -> dict[str, object]:
    """Carry out ``offsite trust add``."""
    store = TrustStore(config.keys)
    raw = read_limited(config.card, CARD_LIMIT_BYTES, what="card")
    shown = read_card(raw)
    fingerprint = _confirmed(shown) if config.fingerprint is None else config.fingerprint
    keys = store.add(raw, fingerprint)
    say(f"trusted until {_date(keys.expires)}: {keys.name} {keys.fingerprint}")
    return {"expires": keys.expires, "fingerprint": keys.fingerprint, "name": keys.name, "state": "trusted"}


def _is_called(keys: PublicKeys, wanted: str) -> bool:
    """Tell whether a word may mean that party: its name, or how its fingerprint begins. Both count, neither hides."""
    begins = len(wanted) >= _FEWEST_CHARACTERS and keys.fingerprint.startswith(wanted)
    return begins or keys.name.casefold() == wanted.casefold()


def _any_called(store: TrustStore, word: str) -> str:
    """Return the fingerprint that is meant, of a party in whatever state; what is typed where none is called so."""
    wanted = _normal(word)
    if re.fullmatch(FINGERPRINT_PATTERN, wanted):
        return wanted
    found = [peer.keys.fingerprint for peer in store.peers() if _is_called(peer.keys, wanted)]
    if len(found) > 1:
        raise Untrusted(f"{len(found)} parties are called {word[:64]!r}", hint="give the fingerprint instead")
    return found[0] if found else wanted


def show(config: TrustListConfig) -> dict[str, object]:
    """Carry out ``offsite trust list``."""
    now = int(time.time())
    listed = [
        {
            "added": peer.added,
            "expires": peer.keys.expires,
            "fingerprint": peer.keys.fingerprint,
            "name": peer.keys.name,
            "revoked": peer.revoked,
            "state": peer.state(now=now),
        }
        for peer in TrustStore(config.keys).peers()
    ]
    for item in listed:
        say(f"{item['state']:<13} {item['name']}  {item['fingerprint']}")
    if not listed:
        say("nobody is pinned here yet")
    return {"peers": listed}


def revoke(config: TrustRevokeConfig) -> dict[str, object]:
    """Carry out ``offsite trust revoke``."""
    store = TrustStore(config.keys)
    peer = store.revoke(_any_called(store, config.fingerprint))
    say(f"revoked: {peer.keys.name} {peer.keys.fingerprint}")
    return {"fingerprint": peer.keys.fingerprint, "name": peer.keys.name, "revoked": peer.revoked, "state": "revoked"}


def _confirmed(keys: PublicKeys) -> str:
    """Return the card's fingerprint once the person at the terminal has said that it is the right one."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError(f"--fingerprint is missing; the card's own is {keys.fingerprint}", hint=_COMPARE)
    say(f"the card of {keys.name} has the fingerprint\n  {keys.fingerprint}")
    say("did the other party tell you the same one over another channel? type yes:")
    if sys.stdin.readline().strip().lower() != "yes":
        raise ConfigError("not confirmed, nobody was added", hint=_COMPARE)
    return keys.fingerprint


def _peer(fingerprint: str, entry: _Entry) -> Peer:
    try:
        keys = read_card(base64.b64decode(entry.card, validate=True))
        if keys.fingerprint != fingerprint:
            raise BadKey("another fingerprint")
    except (ArtefactError, ValueError):
        what = "holds an entry that is not the card of its fingerprint"
        raise BadKey(f"trust file {TRUST_NAME!r} {what}", hint=_MEND) from None
    return Peer(keys, entry.added, entry.revoked)


def _normal(fingerprint: str) -> str:
    """Return a fingerprint as people type it in the form that is compared."""
    return fingerprint.strip().lower()


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
