"""Secure aggregation: every message that crosses in a round. The owner learns the sum of the updates alone.

::

    client sends, signed                        owner answers each, unsigned
    Keys: two X25519 keys for this round        Roster: everybody's signed Keys
    Shares: a box for each peer                 Delivery: the boxes for this client
    Masked, and the masked vector               Survivors: whose vectors have arrived
    Statement: the one list this client saw     UnmaskRequest: enough signed Statements
    Answer: one share for each client           nothing; the sum is the owner's

`client/federation/secagg.py` and `server/aggregation/secagg.py` are the two sides. Owner's messages need no signature:
a client believes nothing in them but what its peers signed. What a client signs names federation, round and the digest
of the terms, so a message fits one round of one agreement only. Small messages are JSON in its one compact form. The
masked vector follows its JSON line as raw bytes. Messages must travel encrypted (TLS, or sealed for the owner): whoever
hears the answers and the masked vectors learns what the owner learns.

Source: Bonawitz et al. 2017, https://doi.org/10.1145/3133956.3133982, figure 4 with the consistency check of the active
adversary. Beyond it, clients sign the roster and the sharers along with the survivors, and commit to their self-masks.
The graph of peers is complete; the sparse one of Bell et al. 2020, https://doi.org/10.1145/3372297.3417885, is not
built.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import BadSchema, Replayed, TooLarge, Untrusted, WrongBinding, WrongShape
from offsite.keys.identity import Identity, PublicKeys, Signatures
from offsite.sealed.recipients import Fingerprint, SignaturePair
from offsite.secagg.terms import ENVELOPE_BYTES, MAX_MEMBERS, SECAGG_FORMAT, Members, Terms
from offsite.strictjson import Strict, parse_strict, write_compact

SECAGG_PURPOSE = "secagg"

KeyText = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")]
ShareText = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{44}$")]
BoxText = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{110}==$")]
Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]


class Stated(Strict):
    """What every message holds: the round that it is for."""

    format: Literal["offsite/secagg/1"] = SECAGG_FORMAT
    federation: str = Field(max_length=64)
    round: int = Field(ge=0, lt=2**31)
    terms: Digest


class Keys(Stated):
    """A client's X25519 keys for this round: one to agree on masks, one to agree on keys of share boxes."""

    stage: Literal["keys"] = "keys"
    masking_key: KeyText
    sharing_key: KeyText


class Shares(Stated):
    """A box for each other client on the roster, and what later shows that a self-mask's seed is the right one."""

    stage: Literal["shares"] = "shares"
    roster: Digest
    commitment: str = Field(pattern=r"^[0-9a-f]{64}$")
    boxes: dict[Fingerprint, BoxText] = Field(max_length=MAX_MEMBERS)


class Masked(Stated):
    """The digest of the masked vector that follows, and which clients' masks it holds: the view before survivors."""

    stage: Literal["masked"] = "masked"
    view: Digest
    sha256: Digest


class Statement(Stated):
    """The one view of roster, sharers and survivors that this client was shown."""

    stage: Literal["statement"] = "statement"
    view: Digest


class Answer(Stated):
    """Of each survivor a share of the self-mask's seed, of each client that was lost a share of the masking key."""

    stage: Literal["answer"] = "answer"
    self_masks: dict[Fingerprint, ShareText] = Field(max_length=MAX_MEMBERS)
    masking_keys: dict[Fingerprint, ShareText] = Field(max_length=MAX_MEMBERS)


class Signed(Strict):
    """A client's message: the exact text that was signed, by whom, and both signatures."""

    sender: Fingerprint
    body: str = Field(max_length=2**20, pattern=r"^[\x20-\x7e]+$")
    signatures: SignaturePair


class Roster(Stated):
    """The signed `Keys` of every client that takes part."""

    stage: Literal["roster"] = "roster"
    keys: tuple[Signed, ...] = Field(max_length=MAX_MEMBERS)


class Delivery(Stated):
    """The boxes for one client by their senders: together with the client itself, the sharers."""

    stage: Literal["delivery"] = "delivery"
    boxes: dict[Fingerprint, BoxText] = Field(max_length=MAX_MEMBERS)


class Survivors(Stated):
    """The clients whose masked vectors the owner has added up."""

    stage: Literal["survivors"] = "survivors"
    survivors: Members


class UnmaskRequest(Stated):
    """Whose shares the owner wants, and the statements that make a client give them."""

    stage: Literal["request"] = "request"
    self_masks: Members
    masking_keys: Members
    statements: tuple[Signed, ...] = Field(max_length=MAX_MEMBERS)


Message = TypeVar("Message", bound=Stated)


def make_message(cls: type[Message], terms: Terms, **content: Any) -> Message:
    """Return a message of this round."""
    return cls(federation=terms.federation, round=terms.round, terms=terms.digest, **content)


def sign_message(message: Stated, identity: Identity) -> Signed:
    """Return the message as its sender signs it."""
    body = write_compact(message).rstrip(b"\n")
    pair = SignaturePair(**identity.sign(SECAGG_PURPOSE, body).to_json())
    return Signed(sender=identity.public.fingerprint, body=body.decode("ascii"), signatures=pair)


def read_envelope(raw: bytes, terms: Terms) -> Signed:
    """Return a client's message as received, of which nothing has been checked but size and form.

    Raises:
        TooLarge, BadSchema: when it is none.
    """
    _check_size(raw, terms.limit_bytes)
    return parse_strict(raw, Signed, "message", {})


def open_signed(signed: Signed, cls: type[Message], terms: Terms, members: Mapping[str, PublicKeys]) -> Message:
    """Return what a client signed, once its signature, form and binding to this round have been checked.

    Raises:
        Untrusted: when the sender is not one of `members`.
        BadSignature: when the text was not signed by the sender's known keys.
        BadSchema, WrongBinding, Replayed: as `read_message`.
    """
    if signed.sender not in members:
        raise Untrusted(f"a message from {signed.sender[:9]}, who is not a known member")
    raw = signed.body.encode("ascii")
    signatures = Signatures.from_json(signed.signatures.model_dump())
    members[signed.sender].verify(SECAGG_PURPOSE, raw, signatures)
    return _bound(raw, cls, terms, f"message from {signed.sender[:9]}")


def read_message(raw: bytes, cls: type[Message], terms: Terms) -> Message:
    """Return what the owner sent, in form and for this round; what it claims is still to be checked.

    Raises:
        TooLarge, BadSchema: when it is not such a message.
        WrongBinding: when it is of another stage, federation or agreement.
        Replayed: when it is of an earlier round.
    """
    _check_size(raw, terms.limit_bytes)
    return _bound(raw, cls, terms, "message from the owner")


def write_masked(signed: Signed, vector: bytes) -> bytes:
    """Return a signed `Masked` and its vector as one message: the JSON line, then the raw bytes."""
    return write_compact(signed) + vector


def split_masked(raw: bytes, terms: Terms) -> tuple[Signed, bytes]:
    """Return the signed `Masked` of a message, as `read_envelope` does, and its vector.

    Raises:
        TooLarge, BadSchema: when there is no such line.
        WrongShape: when the vector has another length than agreed.
    """
    _check_size(raw, ENVELOPE_BYTES + terms.num_vector_bytes)
    end = raw.find(b"\n", 0, ENVELOPE_BYTES) + 1
    signed = parse_strict(raw[:end], Signed, "message", {})
    vector = raw[end:]
    if len(vector) != terms.num_vector_bytes:
        raise WrongShape(f"a masked vector of {len(vector)} bytes, agreed were {terms.num_vector_bytes}")
    return signed, vector


def roster_digest(keys: Mapping[str, Keys]) -> str:
    """Return the digest of who takes part, with which keys."""
    listed = {sender: [found.masking_key, found.sharing_key] for sender, found in keys.items()}
    return sha256_bytes(json.dumps(listed, sort_keys=True).encode("ascii"))


def view_digest(roster: str, sharers: Iterable[str], survivors: Iterable[str] | None = None) -> str:
    """Return the digest of what a client was shown up to here: the roster's digest and who was left of it."""
    left = None if survivors is None else sorted(survivors)
    return sha256_bytes(json.dumps([roster, sorted(sharers), left]).encode("ascii"))


def to_text(raw: bytes) -> str:
    """Return `raw` in base64, as messages hold it."""
    return base64.b64encode(raw).decode("ascii")


def from_text(text: str) -> bytes:
    """Return the bytes of a field whose alphabet and length have been checked.

    Raises:
        BadSchema: when it is not their canonical base64.
    """
    raw = base64.b64decode(text)
    if to_text(raw) != text:
        raise BadSchema("a field is not canonical base64")
    return raw


def _check_size(raw: bytes, limit_bytes: int) -> None:
    if len(raw) > limit_bytes:
        raise TooLarge(f"a message of {len(raw)} bytes, limit {limit_bytes}")


def _bound(raw: bytes, cls: type[Message], terms: Terms, what: str) -> Message:
    stage = str(cls.model_fields["stage"].default)
    found = parse_strict(raw, cls, what, {"format": SECAGG_FORMAT, "stage": stage})
    if found.federation != terms.federation:
        raise WrongBinding(f"{what} is of another federation")
    if found.round < terms.round:
        raise Replayed(f"{what} is of round {found.round}, this is round {terms.round}")
    if (found.round, found.terms) != (terms.round, terms.digest):
        raise WrongBinding(f"{what} is of round {found.round} under other terms, this is round {terms.round}")
    return found
