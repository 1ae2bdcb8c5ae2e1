"""A client's part in one round of secure aggregation: its update leaves only under masks that cancel in the sum.

A `ClientRound` is called once at each stage, in this order, and answers with the bytes for the owner::

    advertise() -> share(roster) -> mask(delivery, update) -> confirm(survivors) -> reveal(request)

It believes peers, by the keys it was given for them, and never the owner. Whatever it refuses ends the round for it:
a lying owner gets no second try. A call out of turn is refused and changes nothing; lost answers are sent again by the
transport as the bytes they were.

The secrets live in this object alone and cannot be copied out of it. A client that was killed therefore drops out of
the round, and can never mask a second vector with the same masks. It must not join the same round anew, either:
it would count as one more in league with the owner, because it could sign a second list of survivors. Hence
`last_round`: write the round's number to disk before the first message leaves. An update must also not be sent again in
another round, because the difference of two sums can show it.

Source: Bonawitz et al. 2017, https://doi.org/10.1145/3133956.3133982, figure 4, the user's side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch

from offsite.digests import sha256_bytes
from offsite.errors import BadKey, ConfigError, PolicyError, Replayed, Untrusted, WrongBinding
from offsite.keys.identity import Identity, PublicKeys, is_sound
from offsite.secagg.fixedpoint import encode_tensors
from offsite.secagg.masking import add_pairwise_masks, add_self_mask, commit, new_secret, public_of
from offsite.secagg.messages import (
    Answer,
    Delivery,
    Keys,
    Masked,
    Roster,
    Shares,
    Statement,
    Survivors,
    UnmaskRequest,
    from_text,
    make_message,
    open_signed,
    read_message,
    roster_digest,
    sign_message,
    to_text,
    view_digest,
    write_masked,
)
from offsite.secagg.shamir import split_secret
from offsite.secagg.sharebox import SharePair, open_shares, seal_shares
from offsite.secagg.terms import Terms
from offsite.strictjson import write_compact


class ClientStage(StrEnum):
    """What a client does next in a round."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    CONFIRM = "confirm"
    REVEAL = "reveal"
    DONE = "done"
    REFUSED = "refused"


class ClientRound:
    """One client in one round, from its keys to its answer; made anew for every round.

    Args:
        terms: agreed upon before, with this client among the members.
        identity: signs every message.
        peers: keys of the members as this client knows them, by fingerprint; others may be among them.
        last_round: number of the last round of this federation that this client joined, -1 for none.
        colluders: how many members this client reckons to be in league with the owner.

    Raises:
        PolicyError: when the threshold does not keep an update secret from the owner and so many members.
        Untrusted: when a member is not among `peers`.
        Replayed: when the round is not after `last_round`.
        ConfigError: when `identity` is no member, or keys stand under another's fingerprint.
    """

    def __init__(
        self,
        terms: Terms,
        identity: Identity,
        peers: Mapping[str, PublicKeys],
        *,
        last_round: int,
        colluders: int = 0,
    ) -> None:
        self.terms = terms
        self.stage = ClientStage.ADVERTISE
        self._identity = identity
        self._own = identity.public.fingerprint
        self._members = _known_members(terms, identity, peers)
        num = len(terms.members)
        if not 0 <= colluders < num:
            raise ConfigError(f"{colluders} members in league with the owner, of {num} in all")
        if 2 * terms.threshold <= num + colluders:
            raise PolicyError(
                f"threshold {terms.threshold} of {num} members does not hold against the owner and {colluders} of them",
                hint=f"the least that does is {(num + colluders) // 2 + 1}",
            )
        if terms.round <= last_round:
            raise Replayed(f"round {terms.round} is not after round {last_round}, the last this client joined")
        self._masking_key, self._sharing_key, self._seed = new_secret(), new_secret(), new_secret()
        self._keys: dict[str, Keys] = {}
        self._sharers: dict[str, SharePair] = {}
        self._survivors: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"ClientRound({self._own[:9]}, round {self.terms.round}, {self.stage})"

    def __reduce__(self) -> Any:
        raise TypeError("a round is not copied or serialised: its masks would be used twice")

    def advertise(self) -> bytes:
        """Return this client's keys for the round.

        Raises:
            PolicyError: when it has done so before.
        """
        with self._turn(ClientStage.ADVERTISE, ClientStage.SHARE):
            keys = {
                "masking_key": to_text(public_of(self._masking_key)),
                "sharing_key": to_text(public_of(self._sharing_key)),
            }
            return self._signed(make_message(Keys, self.terms, **keys))

    def share(self, roster: bytes) -> bytes:
        """Return a box for each client on the roster with its shares of this client's secrets.

        Raises:
            PolicyError: when this client or too many others are not on it, or it shows others keys for this client.
            Untrusted, BadSignature: when it lists somebody who is no member, or keys that a member did not sign.
            BadKey, BadSchema, WrongBinding, Replayed, TooLarge: when it is not a sound roster of this round.
        """
        with self._turn(ClientStage.SHARE, ClientStage.MASK):
            self._keys = self._read_roster(roster)
            self._roster = roster_digest(self._keys)
            places = self.terms.places()
            taking_part = [places[member] for member in self._keys]
            seeds = split_secret(self._seed, self.terms.threshold, taking_part)
            keys = split_secret(self._masking_key, self.terms.threshold, taking_part)
            pairs = {member: SharePair(seeds[places[member]], keys[places[member]]) for member in self._keys}
            self._sharers = {self._own: pairs.pop(self._own)}
            shares = make_message(
                Shares,
                self.terms,
                roster=self._roster,
                commitment=commit(self._seed, self.terms.context, self._own),
                boxes={member: self._seal(member, pair) for member, pair in pairs.items()},
            )
            return self._signed(shares)

    def mask(self, delivery: bytes, update: Mapping[str, torch.Tensor]) -> bytes:
        """Return the update, encoded and under the masks shared with every client whose box was delivered.

        Raises:
            RunFailed, PolicyError, WrongNames, WrongShape: when the update is not as agreed (`encode_tensors`).
            PolicyError: when fewer clients shared than the threshold.
            BadEncryption: when a box does not open.
            WrongBinding: when a box comes from somebody not on the roster, or the message is not of this stage.
            BadSchema, Replayed, TooLarge: when it is not a sound delivery of this round.
        """
        with self._turn(ClientStage.MASK, ClientStage.CONFIRM):
            encoding = self.terms.encoding
            vector = encode_tensors(update, self.terms.shapes, encoding)
            for sender, box in read_message(delivery, Delivery, self.terms).boxes.items():
                self._sharers[sender] = self._open(sender, box)
            self._check_enough(self._sharers, "shared their secrets")
            others = {peer: from_text(self._keys[peer].masking_key) for peer in self._sharers if peer != self._own}
            add_self_mask(vector, self._seed, self.terms.context, self._own, encoding)
            add_pairwise_masks(vector, self._masking_key, self._own, others, self.terms.context, encoding)
            raw = encoding.to_bytes(vector)
            view = view_digest(self._roster, self._sharers)
            masked = make_message(Masked, self.terms, view=view, sha256=sha256_bytes(raw))
            return write_masked(sign_message(masked, self._identity), raw)

    def confirm(self, survivors: bytes) -> bytes:
        """Return the statement of which survivors this client was shown; it signs one such list a round.

        Raises:
            PolicyError: when this client or too many others are not on it.
            WrongBinding: when it lists somebody who did not share, or is not of this stage.
            BadSchema, Replayed, TooLarge: when it is not a sound list of this round.
        """
        with self._turn(ClientStage.CONFIRM, ClientStage.REVEAL):
            listed = read_message(survivors, Survivors, self.terms).survivors
            found = frozenset(listed)
            if len(found) != len(listed) or not found <= self._sharers.keys():
                raise WrongBinding("the list of survivors repeats a client, or names one who did not share secrets")
            if self._own not in found:
                raise PolicyError("the list of survivors leaves out this client, whose vector has left")
            self._check_enough(found, "are left")
            self._survivors = found
            self._view = view_digest(self._roster, self._sharers, found)
            return self._signed(make_message(Statement, self.terms, view=self._view))

    def reveal(self, request: bytes) -> bytes:
        """Return one share for each client: of the self-mask for survivors, of the masking key for those lost.

        After this the object holds no secret.

        Raises:
            PolicyError: when the request asks for both shares of one client, or for others than follow from the
                survivors this client confirmed, or fewer clients than the threshold signed that very list.
            Untrusted, BadSignature: when a statement is not by a member.
            BadSchema, WrongBinding, Replayed, TooLarge: when it is not a sound request of this round.
        """
        with self._turn(ClientStage.REVEAL, ClientStage.DONE):
            found = read_message(request, UnmaskRequest, self.terms)
            self._check_request(found)
            self._check_statements(found)
            lost = self._sharers.keys() - self._survivors
            answer = make_message(
                Answer,
                self.terms,
                self_masks={member: to_text(self._sharers[member].self_mask) for member in self._survivors},
                masking_keys={member: to_text(self._sharers[member].masking_key) for member in lost},
            )
            self._forget()
            return self._signed(answer)

    @contextmanager
    def _turn(self, stage: ClientStage, then: ClientStage) -> Iterator[None]:
        """Whatever is raised within, the round is over for this client; otherwise it goes on to `then`."""
        if self.stage is not stage:
            raise PolicyError(f"asked to {stage} in round {self.terms.round}, where this client is at: {self.stage}")
        self.stage = ClientStage.REFUSED
        try:
            yield
            self.stage = then
        finally:
            if self.stage is ClientStage.REFUSED:
                self._forget()

    def _forget(self) -> None:
        self._masking_key = self._sharing_key = self._seed = b""
        self._sharers = {}

    def _signed(self, message: Any) -> bytes:
        return write_compact(sign_message(message, self._identity))

    def _read_roster(self, raw: bytes) -> dict[str, Keys]:
        """Return the keys of everybody on the roster, each signed by the member known under that fingerprint."""
        found: dict[str, Keys] = {}
        for signed in read_message(raw, Roster, self.terms).keys:
            if signed.sender in found:
                raise WrongBinding(f"the roster lists {signed.sender[:9]} twice")
            found[signed.sender] = open_signed(signed, Keys, self.terms, self._members)
        stated = [text for keys in found.values() for text in (keys.masking_key, keys.sharing_key)]
        if len(set(stated)) != len(stated) or not all(is_sound("x25519", from_text(text)) for text in stated):
            raise BadKey("the roster holds one key twice, or one that is not sound")
        own = [to_text(public_of(key)) for key in (self._masking_key, self._sharing_key)]
        if self._own not in found or [found[self._own].masking_key, found[self._own].sharing_key] != own:
            raise PolicyError("the roster does not hold the keys that this client sent")
        self._check_enough(found, "take part")
        return found

    def _seal(self, receiver: str, pair: SharePair) -> str:
        public = from_text(self._keys[receiver].sharing_key)
        context = self.terms.context
        box = seal_shares(pair, self._sharing_key, public, context, sender=self._own, receiver=receiver)
        return to_text(box)

    def _open(self, sender: str, box: str) -> SharePair:
        if sender == self._own or sender not in self._keys:
            raise WrongBinding(f"a box from {sender[:9]}, who is not another client on the roster")
        public = from_text(self._keys[sender].sharing_key)
        context = self.terms.context
        return open_shares(from_text(box), self._sharing_key, public, context, sender=sender, receiver=self._own)

    def _check_enough(self, clients: Collection[str], what: str) -> None:
        if len(clients) < self.terms.threshold:
            raise PolicyError(f"only {len(clients)} clients {what}, the threshold is {self.terms.threshold}")

    def _check_request(self, found: UnmaskRequest) -> None:
        both = set(found.self_masks) & set(found.masking_keys)
        if both:
            raise PolicyError(f"the owner asks for both shares of {min(both)[:9]}, which would unmask its update")
        lost = self._sharers.keys() - self._survivors
        wanted = (sorted(found.self_masks), sorted(found.masking_keys))
        if wanted != (sorted(self._survivors), sorted(lost)):
            raise PolicyError("the owner asks for other shares than follow from the survivors that it stated")

    def _check_statements(self, found: UnmaskRequest) -> None:
        signers = set()
        for signed in found.statements:
            if signed.sender not in self._survivors:
                raise PolicyError(f"a statement by {signed.sender[:9]}, who is not among the survivors")
            if open_signed(signed, Statement, self.terms, self._members).view != self._view:
                raise PolicyError(f"{signed.sender[:9]} was shown other clients or survivors than this client")
            signers.add(signed.sender)
        self._check_enough(signers, "signed this list of survivors")


def _known_members(terms: Terms, identity: Identity, peers: Mapping[str, PublicKeys]) -> dict[str, PublicKeys]:
    own = identity.public.fingerprint
    if own not in terms.members:
        raise ConfigError(f"{own[:9]} is not a member of this round")
    known = {**peers, own: identity.public}
    for member in terms.members:
        if member not in known:
            raise Untrusted(f"member {member[:9]} of this round is not known here")
        if known[member].fingerprint != member:
            raise ConfigError(f"the keys given for {member[:9]} are those of {known[member].fingerprint[:9]}")
    return {member: known[member] for member in terms.members}
