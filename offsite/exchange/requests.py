"""Signed HTTP requests: how a client signs what it asks of an exchange, and how the exchange checks it.

A request carries its signer's fingerprint, the time, a nonce, the SHA-256 of its body and both signatures in headers.
Signed are, line by line: protocol, method, path, the owner it is meant for, signer, body digest, time and nonce. All
of what a request asks for therefore stands in its path or body: query strings are not used, and other headers decide
nothing that matters.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from offsite.errors import BadSchema, BadSignature, Expired, Untrusted
from offsite.keys.identity import FINGERPRINT_PATTERN, Identity, PublicKeys, Signatures

PROTOCOL = 1
PURPOSE = "request"
WINDOW_SECONDS = 300
EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()

PROTOCOL_HEADER = "offsite-protocol"
_KEY, _TIME, _NONCE, _BODY = "offsite-key", "offsite-time", "offsite-nonce", "offsite-body-sha256"
_ED25519, _MLDSA65 = "offsite-signature-ed25519", "offsite-signature-mldsa65"

_METHODS = ("GET", "POST", "PUT")
_PATH = re.compile(r"(/[a-z0-9][a-z0-9._-]{0,127}){1,8}")
_TIME_TEXT = re.compile(r"[1-9][0-9]{0,11}")
_NONCE_TEXT = re.compile(r"[0-9a-f]{32}")
_DIGEST_TEXT = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(FINGERPRINT_PATTERN)


@dataclass(frozen=True)
class SignedRequest:
    """What a request says of itself; true only once `check_request` has returned it."""

    method: str
    path: str
    owner: str
    key: str
    body_digest: str
    time: int
    nonce: str

    def message(self) -> bytes:
        """The bytes that are signed. No field can hold a line end, so that there is one way to read them."""
        fields = (self.method, self.path, self.owner, self.key, self.body_digest, str(self.time), self.nonce)
        return "\n".join((f"offsite/request/{PROTOCOL}", *fields)).encode("ascii")


def sign_request(
    identity: Identity, method: str, path: str, body: bytes = b"", *, owner: str, now: int
) -> dict[str, str]:
    """Return the headers that make a request `identity`'s own.

    Args:
        path: as it goes over the wire, without query.
        owner: fingerprint of the party whose exchange this is for; another one refuses the request.
        now: seconds since 1970.
    """
    request = SignedRequest(
        method=method,
        path=path,
        owner=owner,
        key=identity.public.fingerprint,
        body_digest=hashlib.sha256(body).hexdigest(),
        time=now,
        nonce=secrets.token_hex(16),
    )
    both = identity.sign(PURPOSE, request.message()).to_json()
    return {
        PROTOCOL_HEADER: str(PROTOCOL),
        _KEY: request.key,
        _TIME: str(request.time),
        _NONCE: request.nonce,
        _BODY: request.body_digest,
        _ED25519: both["ed25519"],
        _MLDSA65: both["mldsa65"],
    }


def check_request(
    method: str,
    path: str,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    owner: PublicKeys,
    lookup: Callable[[str], PublicKeys],
    admit: Callable[[SignedRequest], None],
    now: int,
) -> SignedRequest:
    """Return who asks for what; the body is still to be compared with `body_digest`.

    Args:
        headers: as received, names in lower case.
        owner: this exchange's own keys.
        lookup: the keys of a fingerprint, or Untrusted.
        admit: notes the nonce, or raises Replayed. Called last, so that only true signers take up room.
        now: seconds since 1970.

    Raises:
        BadSchema: a header is missing, doubled or malformed.
        Untrusted: by `lookup`: the signer is unknown, revoked or expired.
        BadSignature: either signature is missing or does not fit.
        Expired: signed more than WINDOW_SECONDS before or after `now`.
        Replayed: by `admit`.
    """
    request, signatures = _read(method, path, headers, owner.fingerprint)
    try:
        keys = lookup(request.key)
    except Untrusted:
        _take_as_long(owner, request, signatures)
        raise
    keys.verify(PURPOSE, request.message(), signatures)
    late_seconds = now - request.time
    if abs(late_seconds) > WINDOW_SECONDS:
        side = "ago" if late_seconds > 0 else "ahead"
        raise Expired(f"signed {abs(late_seconds)} seconds {side}, at most {WINDOW_SECONDS} are allowed")
    admit(request)
    return request


def _read(
    method: str, path: str, headers: Iterable[tuple[bytes, bytes]], owner: str
) -> tuple[SignedRequest, Signatures]:
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1")
        if name in (_KEY, _TIME, _NONCE, _BODY, _ED25519, _MLDSA65):
            if name in found:
                raise BadSchema(f"header {name} is given twice")
            found[name] = raw_value.decode("latin-1")
    if method not in _METHODS:
        raise BadSchema("the method is not one of this protocol's")
    if not _PATH.fullmatch(path):
        raise BadSchema("the path is not one of this protocol's")
    for name, pattern in ((_KEY, _FINGERPRINT), (_TIME, _TIME_TEXT), (_NONCE, _NONCE_TEXT), (_BODY, _DIGEST_TEXT)):
        if name not in found or not pattern.fullmatch(found[name]):
            raise BadSchema(f"header {name} is {'malformed' if name in found else 'missing'}")
    signatures = Signatures.from_json({"ed25519": found.get(_ED25519), "mldsa65": found.get(_MLDSA65)})
    request = SignedRequest(
        method=method,
        path=path,
        owner=owner,
        key=found[_KEY],
        body_digest=found[_BODY],
        time=int(found[_TIME]),
        nonce=found[_NONCE],
    )
    return request, signatures


def _take_as_long(owner: PublicKeys, request: SignedRequest, signatures: Signatures) -> None:
    """Spend what checking the signatures costs, so that time does not tell which fingerprints are known."""
    try:
        owner.verify(PURPOSE, request.message(), signatures)
    except BadSignature:
        return
