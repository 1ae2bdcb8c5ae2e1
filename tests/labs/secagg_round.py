"""A round of secure aggregation in one process, for the tests of both sides: the whole flow of messages.

Parties are the same in every run, so that with a fixed source of secrets a round is the same to the last byte but for
its ML-DSA signatures.
"""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache
from types import SimpleNamespace
from unittest import mock

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.federation.secagg import ClientRound
from offsite.keys import identity as keys
from offsite.secagg import masking, shamir
from offsite.secagg.fixedpoint import TensorShape, encode_tensors
from offsite.secagg.terms import make_terms
from server.aggregation.secagg import ServerRound

FEDERATION = "0123456789abcdef0123456789abcdef"
SHAPES = (TensorShape(name="b.weight", shape=(3, 5)), TensorShape(name="a.bias", shape=(7,)))
STEPS = ("advertise", "share", "mask", "confirm", "reveal")


@lru_cache
def party(number):
    """The identity of that number, always the same."""
    seed = lambda name: hashlib.sha512(f"{name} of test party {number}".encode()).digest()  # noqa: E731
    make = {
        "ed25519": lambda: Ed25519PrivateKey.from_private_bytes(seed("ed25519")[:32]),
        "mldsa65": lambda: MLDSA65PrivateKey.from_seed_bytes(seed("mldsa65")[:32]),
        "mlkem768": lambda: MLKEM768PrivateKey.from_seed_bytes(seed("mlkem768")),
        "x25519": lambda: X25519PrivateKey.from_private_bytes(seed("x25519")[:32]),
    }
    files = {name: (name, SimpleNamespace(generate=make[name])) for name in make}
    with mock.patch.object(keys, "_FILES", files):
        return keys.generate(f"party {number}", days=30)


def seed_secrets(monkeypatch, seed):
    """Secrets and coefficients come from a seeded generator, no longer from the operating system."""
    source = random.Random(seed)
    monkeypatch.setattr(masking, "token_bytes", source.randbytes)
    monkeypatch.setattr(shamir, "randbelow", source.randrange)


def terms_of(num, threshold, /, **changes):
    members = [party(number).public.fingerprint for number in range(num)]
    given = {"federation": FEDERATION, "round": 3, "members": members, "threshold": threshold, "limit": 2.0}
    return make_terms(**{**given, "shapes": SHAPES, **changes})


class Arena:
    """An owner and its clients before the first message. `names` are the fingerprints, sorted."""

    def __init__(self, num=5, threshold=3, *, last_round=-1, **changes):
        self.terms = terms_of(num, threshold, **changes)
        identities = [party(number) for number in range(num)]
        self.identities = {identity.public.fingerprint: identity for identity in identities}
        self.cards = {name: identity.public for name, identity in self.identities.items()}
        self.names = self.terms.members
        self.clients = {
            name: ClientRound(self.terms, self.identities[name], self.cards, last_round=last_round)
            for name in self.names
        }
        self.owner = ServerRound(self.terms, self.cards)
        generator = torch.Generator().manual_seed(num)
        self.updates = {
            name: {
                shape.name: torch.rand(shape.shape, generator=generator) * 4 * (self.terms.limit / 2) - self.terms.limit
                for shape in self.terms.shapes
            }
            for name in self.names
        }

    def answer(self, step, name, received):
        """What that client says at that step to what it received."""
        words = {"advertise": (), "mask": (received, self.updates[name])}.get(step, (received,))
        return getattr(self.clients[name], step)(*words)

    def step(self, step, inbox, lost=()):
        """One stage: clients that are not lost answer, the owner makes of it what everybody gets next."""
        replies = [self.answer(step, name, raw) for name, raw in inbox.items() if name not in lost]
        return self.owner.advance(replies)

    def inbox_for(self, step, lost=None):
        """Everything before `step`: what each client has in hand when its turn for it comes."""
        inbox = dict.fromkeys(self.names, b"")
        for earlier in STEPS[: STEPS.index(step)]:
            inbox = self.step(earlier, inbox, (lost or {}).get(earlier, ()))
        return inbox

    def run(self, lost=None):
        """The whole round; `lost` names who drops out before answering at a step."""
        inbox = self.inbox_for("reveal", lost)
        assert self.step("reveal", inbox, (lost or {}).get("reveal", ())) == {}
        return self.owner.total()

    def expected(self, contributors):
        """The sum of the encoded updates as whole numbers, modulo the modulus."""
        encoding = self.terms.encoding
        total = 0
        for name in contributors:
            total = total + encode_tensors(self.updates[name], self.terms.shapes, encoding)
        return encoding.reduce(total)
