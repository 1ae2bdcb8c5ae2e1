"""The owner's part in one round of secure aggregation: from the clients' messages to the sum, and to nothing else.

A whole round; `send` and `receive` are the transport's, and who does not answer has dropped out::

    owner = ServerRound(terms, members)                      # terms: offsite.secagg.terms.make_terms
    replies = receive()                                      # each client: ClientRound(...).advertise()
    while owner.stage is not ServerStage.DONE:
        send(owner.advance(replies))                         # {fingerprint: bytes}; after the last stage, {}
        replies = receive()                                  # .share(), .mask(), .confirm(), .reveal()
    total = owner.total()                                    # of the updates of total.contributors

`advance` is `take` for each message, then `close`. A message that `take` rejects counts as not sent, and `refused` says
why. When fewer clients are left than the threshold, `RunFailed` ends the round, and no part of a sum is given. Masked
vectors are added up as they come: the owner's memory holds one vector, however many clients.

A client can spoil the sum by a wrong vector, and stop the round by a wrong share or box. Neither shows anybody more
than the sum.

Source: Bonawitz et al. 2017, https://doi.org/10.1145/3133956.3133982, figure 4, the server's side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from offsite.digests import sha256_bytes
from offsite.errors import (
    ArtefactError,
    BadDigest,
    BadKey,
    ConfigError,
    Replayed,
    RunFailed,
    Untrusted,
    WrongBinding,
    WrongNames,
)
from offsite.keys.identity import PublicKeys, is_sound
from offsite.secagg.fixedpoint import count_numbers, decode_tensors
from offsite.secagg.masking import add_pairwise_masks, commit, public_of, subtract_self_mask
from offsite.secagg.messages import (
    Answer,
    Delivery,
    Keys,
    Masked,
    Message,
    Roster,
    Shares,
    Signed,
    Stated,
    Statement,
    Survivors,
    UnmaskRequest,
    from_text,
    make_message,
    open_signed,
    read_envelope,
    roster_digest,
    split_masked,
    view_digest,
)
from offsite.secagg.shamir import read_share, recover_secret
from offsite.secagg.terms import Terms
from offsite.strictjson import write_compact


class ServerStage(StrEnum):
    """Which message of the clients the owner waits for."""

    KEYS = "keys"
    SHARES = "shares"
    MASKED = "masked"
    STATEMENTS = "statement"
    ANSWER = "answer"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Total:
    """The sum of the contributors' updates, exact up to the encoding's half step for each of them.

    Attributes:
        tensors: float64 by name, in the terms' shapes.
        contributors: fingerprints, sorted.
    """

    tensors: dict[str, torch.Tensor]
    contributors: tuple[str, ...]


class ServerRound:
    """One round at the owner's.

    Args:
        terms: agreed upon before.
        members: keys of every member by fingerprint; others may be among them.

    Attributes:
        refused: every message that `advance` rejected, as its error.

    Raises:
        ConfigError: when the threshold is not over half of the members (no client would take part), or a member's
            keys are missing or another's.
    """

    def __init__(self, terms: Terms, members: Mapping[str, PublicKeys]) -> None:
        if 2 * terms.threshold <= len(terms.members):
            raise ConfigError(f"threshold {terms.threshold} is not over half of {len(terms.members)} members")
        for member in terms.members:
            if member not in members or members[member].fingerprint != member:
                raise ConfigError(f"the keys of member {member[:9]} are missing, or another's")
        self.terms = terms
        self.stage = ServerStage.KEYS
        self.refused: list[ArtefactError] = []
        self._members = {member: members[member] for member in terms.members}
        self._signed: dict[str, Signed] = {}
        self._keys: dict[str, Keys] = {}
        self._shares: dict[str, Shares] = {}
        self._masked: set[str] = set()
        self._statements: dict[str, Signed] = {}
        self._answers: dict[str, Answer] = {}
        self._sum = np.zeros(count_numbers(terms.shapes), dtype=np.uint64)
        self._total: Total | None = None

    def __repr__(self) -> str:
        return f"ServerRound(round {self.terms.round}, {self.stage})"

    def advance(self, messages: Iterable[bytes]) -> dict[str, bytes]:
        """Take the messages of this stage, close it, and return what each client left gets; {} after the last.

        Raises:
            RunFailed, BadDigest, NormTooLarge: as `close`.
        """
        for raw in messages:
            try:
                self.take(raw)
            except ArtefactError as error:
                self.refused.append(error)
        return self.close()

    def take(self, raw: bytes, *, sender: str | None = None) -> str:
        """The message counts, and its sender is returned; when it is rejected, nothing has changed.

        Args:
            sender: who brought it, where the transport tells: nobody brings another's message.

        Raises:
            WrongBinding: when somebody else signed it than brought it.
            RunFailed: when the round is over.
            Untrusted, BadSignature: when it is not by a member who is still taking part.
            Replayed: when it is of an earlier round, or the sender's second at this stage.
            ArtefactError: with another subclass when it is not a sound message of this stage.
        """
        if self.stage is ServerStage.MASKED:
            signed, vector = split_masked(raw, self.terms)
            _require_own(signed, sender)
            message = self._open(signed, Masked, self._shares, self._masked)
            self._add(signed.sender, message, vector)
            return signed.sender
        takers: dict[ServerStage, Callable[[Signed], None]] = {
            ServerStage.KEYS: self._take_keys,
            ServerStage.SHARES: self._take_shares,
            ServerStage.STATEMENTS: self._take_statement,
            ServerStage.ANSWER: self._take_answer,
        }
        if self.stage not in takers:
            raise RunFailed(f"a message for round {self.terms.round}, which is {self.stage}")
        signed = read_envelope(raw, self.terms)
        _require_own(signed, sender)
        takers[self.stage](signed)
        return signed.sender

    def close(self) -> dict[str, bytes]:
        """Nobody is waited for any longer: return what each client that answered gets, and go on to the next stage.

        Raises:
            RunFailed: when fewer clients than the threshold have answered, or the round is over.
            BadDigest: when shares give back another secret than the one their client committed to.
            NormTooLarge: when the sum is beyond what updates within the limit add up to.
        """
        closers: dict[ServerStage, tuple[Callable[[], dict[str, bytes]], int, ServerStage]] = {
            ServerStage.KEYS: (self._send_roster, len(self._keys), ServerStage.SHARES),
            ServerStage.SHARES: (self._send_boxes, len(self._shares), ServerStage.MASKED),
            ServerStage.MASKED: (self._send_survivors, len(self._masked), ServerStage.STATEMENTS),
            ServerStage.STATEMENTS: (self._send_request, len(self._statements), ServerStage.ANSWER),
            ServerStage.ANSWER: (self._unmask, len(self._answers), ServerStage.DONE),
        }
        if self.stage not in closers:
            raise RunFailed(f"round {self.terms.round} is {self.stage}")
        send, num, then = closers[self.stage]
        stage, self.stage = self.stage, ServerStage.FAILED
        if num < self.terms.threshold:
            raise RunFailed(
                f"round {self.terms.round} ends at stage {stage}: {num} clients answered, "
                f"the threshold is {self.terms.threshold}",
                hint="begin another round when more clients can be reached",
            )
        messages = send()
        self.stage = then
        return messages

    def total(self) -> Total:
        """Return the sum.

        Raises:
            RunFailed: when the round is not done.
        """
        if self._total is None:
            raise RunFailed(f"round {self.terms.round} has no sum: it is at stage {self.stage}")
        return self._total

    def _open(self, signed: Signed, cls: type[Message], awaited: Iterable[str], seen: Iterable[str]) -> Message:
        """Return the message of a client that is still taking part and has not been heard at this stage."""
        if signed.sender in self._members and signed.sender not in awaited:
            raise Untrusted(f"a message from {signed.sender[:9]}, who has dropped out of this round")
        found = open_signed(signed, cls, self.terms, self._members)
        if signed.sender in seen:
            raise Replayed(f"a second {self.stage} message from {signed.sender[:9]}")
        return found

    def _take_keys(self, signed: Signed) -> None:
        found = self._open(signed, Keys, self._members, self._keys)
        known = {text for keys in self._keys.values() for text in (keys.masking_key, keys.sharing_key)}
        new = {found.masking_key, found.sharing_key}
        if len(new) != 2 or new & known or not all(is_sound("x25519", from_text(text)) for text in new):
            raise BadKey(f"a key of {signed.sender[:9]} is not sound, or was sent twice")
        self._keys[signed.sender], self._signed[signed.sender] = found, signed

    def _send_roster(self) -> dict[str, bytes]:
        self._roster = roster_digest(self._keys)
        listed = tuple(self._signed[member] for member in sorted(self._signed))
        return self._to_all(self._keys, make_message(Roster, self.terms, keys=listed))

    def _take_shares(self, signed: Signed) -> None:
        found = self._open(signed, Shares, self._keys, self._shares)
        if found.roster != self._roster:
            raise WrongBinding(f"shares of {signed.sender[:9]} are for another roster")
        if found.boxes.keys() != self._keys.keys() - {signed.sender}:
            raise WrongNames(f"shares of {signed.sender[:9]} are not for each other client on the roster")
        for box in found.boxes.values():
            from_text(box)
        self._shares[signed.sender] = found

    def _send_boxes(self) -> dict[str, bytes]:
        self._view = view_digest(self._roster, self._shares)
        messages = {}
        for receiver in self._shares:
            boxes = {sender: sent.boxes[receiver] for sender, sent in self._shares.items() if sender != receiver}
            messages[receiver] = write_compact(make_message(Delivery, self.terms, boxes=boxes))
        return messages

    def _add(self, sender: str, message: Masked, vector: bytes) -> None:
        if message.view != self._view:
            raise WrongBinding(f"the vector of {sender[:9]} is masked for other clients than shared their secrets")
        if sha256_bytes(vector) != message.sha256:
            raise BadDigest(f"the vector of {sender[:9]} is not the one that was signed")
        self._sum += self.terms.encoding.from_bytes(vector)
        self.terms.encoding.reduce(self._sum)
        self._masked.add(sender)

    def _send_survivors(self) -> dict[str, bytes]:
        self._view = view_digest(self._roster, self._shares, self._masked)
        return self._to_all(self._masked, make_message(Survivors, self.terms, survivors=tuple(sorted(self._masked))))

    def _take_statement(self, signed: Signed) -> None:
        found = self._open(signed, Statement, self._masked, self._statements)
        if found.view != self._view:
            raise WrongBinding(f"{signed.sender[:9]} states another list of survivors")
        self._statements[signed.sender] = signed

    def _send_request(self) -> dict[str, bytes]:
        first = sorted(self._statements)[: self.terms.threshold]  # more would not make a client answer sooner
        request = make_message(
            UnmaskRequest,
            self.terms,
            self_masks=tuple(sorted(self._masked)),
            masking_keys=tuple(sorted(self._lost())),
            statements=tuple(self._statements[member] for member in first),
        )
        return self._to_all(self._statements, request)

    def _take_answer(self, signed: Signed) -> None:
        found = self._open(signed, Answer, self._statements, self._answers)
        if found.self_masks.keys() != self._masked or found.masking_keys.keys() != self._lost():
            raise WrongNames(f"the shares from {signed.sender[:9]} are not those that were asked for")
        for text in (*found.self_masks.values(), *found.masking_keys.values()):
            read_share(from_text(text))
        self._answers[signed.sender] = found

    def _unmask(self) -> dict[str, bytes]:
        """Take every mask off the sum: a survivor's own, and what the lost would have added for the survivors."""
        terms, context, encoding = self.terms, self.terms.context, self.terms.encoding
        places = terms.places()
        for member in sorted(self._masked):
            given = {places[holder]: from_text(found.self_masks[member]) for holder, found in self._answers.items()}
            seed = recover_secret(given, terms.threshold, member[:9])
            if commit(seed, context, member) != self._shares[member].commitment:
                raise BadDigest(f"the shares of {member[:9]} do not give back the self-mask it committed to")
            subtract_self_mask(self._sum, seed, context, member, encoding)
        survivors = {member: from_text(self._keys[member].masking_key) for member in self._masked}
        for member in sorted(self._lost()):
            given = {places[holder]: from_text(found.masking_keys[member]) for holder, found in self._answers.items()}
            private = recover_secret(given, terms.threshold, member[:9])
            if public_of(private) != from_text(self._keys[member].masking_key):
                raise BadDigest(f"the shares of {member[:9]} do not give back its masking key")
            add_pairwise_masks(self._sum, private, member, survivors, context, encoding)
        contributors = tuple(sorted(self._masked))
        self._total = Total(decode_tensors(self._sum, terms.shapes, encoding, len(contributors)), contributors)
        return {}

    def _lost(self) -> set[str]:
        """Return who shared secrets, under whose masks the vectors lie, and sent none."""
        return self._shares.keys() - self._masked

    def _to_all(self, receivers: Iterable[str], message: Stated) -> dict[str, bytes]:
        raw = write_compact(message)
        return dict.fromkeys(receivers, raw)


def _require_own(signed: Signed, sender: str | None) -> None:
    if sender not in (None, signed.sender):
        raise WrongBinding("a message that another client signed than the one that brought it")
