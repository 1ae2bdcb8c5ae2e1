"""A secure round of a federation of three, carried by hand: a test hands on what each side's own code gives.

What clients hold is drawn, not trained.
"""

from __future__ import annotations

import torch

from adapters.kinds import declared
from adapters.vector import vector_of
from offsite.artefacts.bundle import open_bundle
from offsite.exchange.packing import pack
from server.federation.securerounds import SecureRounds

SECURE = {"secure": True, "share_a": True, "clip": 3.0, "threshold": 2}


class Carried:
    """One round, asked of everybody. `parts` are what clients sealed last, by name, `inbox` what the owner did."""

    def __init__(self, federated, federation, number=1, *, sizes=None):
        self.federated, self.federation, self.number = federated, federation, number
        self.owner = SecureRounds(federation)
        self.names = {federated.key(name): name for name in federated.NAMES}
        self.asked = {self.names[key]: path for key, path in federation.ask(number).items()}
        self.rounds = {name: federated.member(name).take(path) for name, path in self.asked.items()}
        for seed, (name, round_) in enumerate(sorted(self.rounds.items())):
            size = (sizes or {}).get(name, 0.02)
            if not (round_.path.parent / "bundle").exists():
                federated.bundle(round_.path.parent / "bundle", round_, seed=10 * number + seed, size=size)
        self.part = self.owner.owner_part(number)
        self.step, self.replies, self.inbox = 0, {}, {}

    def join(self, *names):
        """These clients answer with their first message."""
        for name in names:
            self.replies[name] = self.federated.member(name).answer(self.rounds[name])
        return self

    def close(self):
        """The owner takes what was sealed, closes the stage and seals its messages for whoever is left."""
        for name, sealed in self.replies.items():
            key = self.federated.key(name)
            self.part.take(self.owner.read_note(key, self.number, pack(sealed)), sender=key)
        self.step, self.replies = self.step + 1, {}
        self.inbox = {
            self.names[key]: self.owner.note_for(key, self.number, self.step, raw)
            for key, raw in self.part.close().items()
        }
        return self

    def follow(self, *, lost=()):
        """Clients that are not lost answer what is in the inbox."""
        for name, sealed in self.inbox.items():
            if name not in lost:
                self.replies[name] = self.federated.member(name).follow(sealed)
        return self

    def until(self, step):
        """The round has come to where the owner's message of that number is in the inbox."""
        if self.step == 0:
            self.join(*(set(self.federated.NAMES) - self.replies.keys())).close()
        while self.step < step:
            self.follow().close()
        return self

    def total(self):
        """The round has come to its end; return the sum."""
        self.until(4).follow().close()
        return self.part.total()

    def vector(self, name):
        """What goes in for that client, as its own disk has it, before it is clipped."""
        round_ = self.rounds[name]
        spec, package = round_.manifest.adapter, self.federated.package
        expected = declared(spec, package.layout, package.block_tensors())
        return vector_of(spec, open_bundle(round_.path.parent / "bundle").load_tensors(expected), {})

    def mean(self, *names):
        """The mean of the named clients' vectors, float64."""
        vectors = [self.vector(name) for name in names or self.federated.NAMES]
        return {name: torch.stack([one[name].double() for one in vectors]).mean(0) for name in vectors[0]}
