"""A client that hands in something else than what it tuned: the benchmark's, and no part of the product.

Its Flower app is the product's, around a `Member` whose bundle is changed before it is sealed. Which client and how
stand in the environment, as ``OFFSITE_POISON=JOB:WAY``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import client.flower as honest
from adapters.kinds import declared
from client.member import BUNDLE, SEALED, Member
from offsite.bundle import open_bundle, write_bundle
from offsite.round import Round

SCALE_VARIABLE, CLIENT_VARIABLE = "OFFSITE_POISON_SCALE", "OFFSITE_POISON_CLIENT"
app = ClientApp()


class Poisoner(Member):
    """Multiplies every factor B of what it tuned, or fills it with NaN, and seals that."""

    def answer(self, round_: Round) -> Path:
        """Return the sealed bundle of a changed adapter."""
        folder = round_.path.parent
        if not (folder / SEALED).is_dir():
            honest_sealed = super().answer(round_)
            bundle = open_bundle(folder / BUNDLE)
            spec = bundle.manifest.adapter
            expected = declared(spec, self.package.layout, self.package.block_tensors())
            scale = float(os.environ[SCALE_VARIABLE])
            tensors = {
                name: tensor * scale if name.endswith("lora_B") else tensor
                for name, tensor in bundle.load_tensors(expected).items()
            }
            shutil.rmtree(honest_sealed)
            shutil.rmtree(folder / BUNDLE)
            write_bundle(
                folder / BUNDLE, package=self.package, spec=spec, tensors=tensors, expected=expected,
                round_digest=round_.digest,
            )  # fmt: skip
        return super().answer(round_)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say whose node this is, truly."""
    return honest.hello(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer as an honest client does, but for the one that is named."""
    if f"/{os.environ[CLIENT_VARIABLE]}/" in str(context.node_config["client"]):
        kept, honest.Member = honest.Member, Poisoner  # type: ignore[misc]
        honest._member.cache_clear()
        try:
            return honest.train(message, context)
        finally:
            honest.Member = kept  # type: ignore[misc]
            honest._member.cache_clear()
    return honest.train(message, context)
