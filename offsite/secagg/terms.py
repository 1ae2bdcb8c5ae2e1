"""Terms of a round of secure aggregation: what owner and clients agree upon before any message of it.

Every message of the round (`offsite/secagg/messages.py`) names their digest, so that two clients who were told
different terms cannot take part in one round.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import ConfigError, TooLarge
from offsite.sealed.recipients import Fingerprint
from offsite.secagg.fixedpoint import BITS, Encoding, TensorShape, count_numbers
from offsite.secagg.masking import Context
from offsite.strictjson import Strict, parse_strict, write_compact
from offsite.tensors import MAX_TENSORS

SECAGG_FORMAT: Final = "offsite/secagg/1"
MAX_MEMBERS = 1024
MAX_NUMBERS = 2**30
TERMS_LIMIT_BYTES = 8 * 2**20
ENVELOPE_BYTES = 16 * 2**10

_MEMBER_BYTES = 8 * 2**10  # a signed message of a peer takes 5.1 KiB, most of it the ML-DSA signature

Members = Annotated[tuple[Fingerprint, ...], Field(max_length=MAX_MEMBERS)]


class Terms(Strict):
    """What all sides agreed upon before the round; `digest` stands in every message.

    Attributes:
        federation: its id.
        round: its number; no client takes part twice in a round of that number.
        members: fingerprints of all clients invited, sorted.
        threshold: how many clients must last to the end, and how many shares give back a secret. Over half of the
            members, or a lying owner gets both kinds of share of one client from two disjoint sets of them. With c
            members in league with the owner, ``2 * threshold > len(members) + c`` is needed.
        limit: largest absolute value of an update's numbers.
        bits: the modulus is ``2**bits``.
        shapes: the tensors of an update in the order of the vector.
        asked: digest of what is asked of every member alike, the weights to start from above all; None where that is
            no part of the agreement. Without it an owner gives all members but one weights on which they learn nothing:
            the sum is then the one's update (Pasquini et al. 2022, https://doi.org/10.1145/3548606.3560557).
    """

    format: Literal["offsite/secagg/1"] = SECAGG_FORMAT
    federation: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    round: int = Field(ge=0, lt=2**31)
    members: Members = Field(min_length=2)
    threshold: int = Field(ge=2, le=MAX_MEMBERS)
    limit: float
    bits: Literal[32, 48, 64] = BITS[0]
    shapes: tuple[TensorShape, ...] = Field(min_length=1, max_length=MAX_TENSORS)
    asked: str | None = Field(None, pattern=DIGEST_PATTERN)

    @model_validator(mode="after")
    def _coherent(self) -> Terms:
        if list(self.members) != sorted(set(self.members)):
            raise ValueError("members are not sorted and distinct")
        if self.threshold > len(self.members):
            raise ValueError(f"threshold {self.threshold} is over the number of members, {len(self.members)}")
        if len({shape.name for shape in self.shapes}) != len(self.shapes):
            raise ValueError("two tensors have one name")
        if any(length < 1 for shape in self.shapes for length in shape.shape):
            raise ValueError("a tensor is empty")
        if count_numbers(self.shapes) > MAX_NUMBERS:
            raise ValueError(f"an update has over {MAX_NUMBERS} numbers")
        try:
            _ = self.encoding
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @cached_property
    def encoding(self) -> Encoding:
        """How updates become whole numbers; made for the sum of all members."""
        return Encoding(limit=self.limit, bits=self.bits, num_summands=len(self.members))

    @property
    def context(self) -> Context:
        """What keys of this round are derived for."""
        return Context(self.federation, self.round)

    @cached_property
    def digest(self) -> str:
        """Digest of all terms in their one written form."""
        return sha256_bytes(write_compact(self))

    @property
    def num_vector_bytes(self) -> int:
        """Bytes of a masked vector."""
        return count_numbers(self.shapes) * self.encoding.num_bytes

    @property
    def limit_bytes(self) -> int:
        """What a message may take, beside a masked vector."""
        return ENVELOPE_BYTES + _MEMBER_BYTES * len(self.members)

    def places(self) -> dict[str, int]:
        """Return the place of each member's shares, from 1 on."""
        return {member: place for place, member in enumerate(self.members, start=1)}


def make_terms(**given: Any) -> Terms:
    """Return the terms of these fields; members are sorted, lists may stand for tuples.

    Raises:
        ConfigError: listing everything that is wrong with them.
    """
    try:
        fixed = {"members": tuple(sorted(given.get("members", ()))), "shapes": tuple(given.get("shapes", ()))}
        return Terms(**{**given, **fixed})
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [": ".join(filter(None, [".".join(map(str, one["loc"])), one["msg"].lower()])) for one in found]
        raise ConfigError("terms of secure aggregation: " + "; ".join(problems)) from None


def read_terms(raw: bytes) -> Terms:
    """Return the terms that the other side sent; whether to agree to them is the caller's to decide.

    Raises:
        TooLarge, BadSchema, WrongBinding: when they do not have the form of terms.
    """
    if len(raw) > TERMS_LIMIT_BYTES:
        raise TooLarge(f"terms of {len(raw)} bytes, limit {TERMS_LIMIT_BYTES}")
    return parse_strict(raw, Terms, "terms", {"format": SECAGG_FORMAT})
