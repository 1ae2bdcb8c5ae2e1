"""A client's part in a secure round: what it tuned becomes a vector of bounded length, and leaves under masks alone.

The secrets of a round are in memory only. A client that was killed has dropped out of that round, and says so when it
is asked again; the number of the last round that it joined is on disk before its first message leaves.

What the client decides for itself, whatever the owner's terms say: who its peers are (the cards it pinned, and never
the owner's), how many of them it reckons to be in league with the owner, and that the terms are for this round as it
was asked here, weights and all, its own adapter and its clip.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from adapters.kinds import declared
from adapters.norms import base_tensors
from adapters.rounds import grown
from adapters.vector import WHOLE, clipped, require_summable, vector_of, vector_shapes
from client.federation.secagg import ClientRound
from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.package import Package
from offsite.artefacts.round import Round
from offsite.console import say
from offsite.errors import PolicyError, Untrusted, WrongBinding
from offsite.keys.identity import Identity, PublicKeys
from offsite.keys.trust import TrustStore
from offsite.secagg.terms import Terms, read_terms
from offsite.staging import staged_file

_LAST = "last-secure-round"


class SecureRound:
    """One round, from the first message to the last; a refusal ends it for this client.

    Args:
        owner: fingerprint of who asks; its card is pinned here as well, and it is nobody's peer.
        work: the client's folder for this federation.
        last_round: number of the last secure round that was joined with these keys, -1 for none.
        colluders: peers that this client reckons to be in league with the owner.

    Raises:
        WrongBinding: when the terms are not for this round, this client, its adapter and the round's clip.
        PolicyError: when the threshold does not keep an update secret from so many, or the sum could be that of this
            client and of those in league alone.
        Replayed: when this client joined this round before, or a later one.
        Untrusted: when a member is not among the peers whose cards are pinned here, or is the owner.
    """

    def __init__(
        self,
        round_: Round,
        package: Package,
        identity: Identity,
        trust: TrustStore,
        work: Path,
        *,
        owner: str,
        last_round: int,
        colluders: int,
    ) -> None:
        self.round, self._package, self._work = round_, package, work
        manifest = round_.manifest
        require_summable(manifest.adapter, share_a=bool(manifest.start))
        self._expected = declared(manifest.adapter, package.layout, package.block_tensors())
        self.terms = self._agreed(identity)
        if owner in self.terms.members:
            raise Untrusted("the terms of secure aggregation name the owner as a member: the sum would hide nothing")
        self._part = ClientRound(
            self.terms,
            identity,
            {**_pinned(trust), identity.public.fingerprint: identity.public},
            last_round=max(last_round, last_joined(work)),
            colluders=colluders,
        )
        if self.terms.threshold - colluders < 2:
            raise PolicyError(
                f"threshold {self.terms.threshold}: a sum may be of this client and {colluders} in the owner's league",
                hint="the owner has to set --threshold higher, or to ask more clients",
            )
        self._steps: list[Callable[[bytes], bytes]] = []

    def begin(self, bundle: Path) -> bytes:
        """Return the first message, once the disk remembers that this round was joined.

        Raises:
            RunFailed: when the disk does not take it; nothing has left then.
        """
        vector = self._vector(bundle)
        self._steps = [
            self._part.share,
            lambda raw: self._part.mask(raw, vector),
            self._part.confirm,
            self._part.reveal,
        ]
        with staged_file(self._work / _LAST, replace=True) as stage:
            stage.write_text(f"{self.terms.round}\n", encoding="ascii")
        return self._part.advertise()

    def follow(self, raw: bytes) -> bytes:
        """Return the answer to the owner's next message.

        Raises:
            PolicyError: when the round is over for this client, or the request would give away more than the sum.
            ArtefactError: when the message is not what peers signed.
        """
        if not self._steps:
            raise PolicyError(f"secure round {self.terms.round} is over for this client")
        return self._steps.pop(0)(raw)

    def _vector(self, bundle: Path) -> dict[str, Tensor]:
        manifest = self.round.manifest
        tensors = open_bundle(bundle).load_tensors(self._expected)
        start: dict[str, Tensor] = {}
        if manifest.adapter.kind in WHOLE:
            start = grown(base_tensors(self._package, list(self._expected)), self.round)
        vector, found = clipped(vector_of(manifest.adapter, tensors, start), float(manifest.clip or 0.0))
        if found > (manifest.clip or 0.0):
            say(f"the update is {found:.4g} long and goes in at {manifest.clip:g}, the round's clip")
        return vector

    def _agreed(self, identity: Identity) -> Terms:
        manifest = self.round.manifest
        terms = read_terms((manifest.secure or "").encode())
        problems = {
            "another federation": terms.federation != manifest.federation_id,
            "another round": terms.round != manifest.round,
            "others than this client": identity.public.fingerprint not in terms.members,
            "another adapter": terms.shapes != vector_shapes(self._expected),
            "another clip": terms.limit != manifest.clip,
            "other weights or another task than were asked here": terms.asked != manifest.asked,
        }
        for what, holds in problems.items():
            if holds:
                raise WrongBinding(f"the terms of secure aggregation are for {what}")
        return terms


def last_joined(work: Path) -> int:
    """Return the number of the last secure round that was joined from this folder, -1 for none.

    Raises:
        PolicyError: when the note of it is damaged: joining a round twice could show an update.
    """
    path = work / _LAST
    if not path.exists():
        return -1
    text = path.read_text(encoding="ascii", errors="replace").strip()
    if not (text.isascii() and text.isdecimal()):
        raise PolicyError(f"{_LAST!r} in the work folder is damaged", hint="begin in another --work, with a new job")
    return int(text)


def _pinned(trust: TrustStore) -> dict[str, PublicKeys]:
    now = int(time.time())
    return {peer.keys.fingerprint: peer.keys for peer in trust.peers() if peer.state(now=now) == "trusted"}
