"""A client that hands in something else than what it tuned: the benchmark's, and no part of the product.

Its Flower app is the product's, around a `Member` whose bundle is changed before it is sealed. Which client, and by
what its factors B are multiplied, stand in the environment (`CLIENT_VARIABLE`, `SCALE_VARIABLE`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file, save_file

import client.federation.flower as honest
from client.federation.member import BUNDLE, SEALED, Member
from offsite.artefacts.bundle import TENSOR_FILE, open_bundle
from offsite.artefacts.manifest import entries, write_manifest
from offsite.artefacts.round import Round

SCALE_VARIABLE, CLIENT_VARIABLE = "OFFSITE_POISON_SCALE", "OFFSITE_POISON_CLIENT"
app = ClientApp()


class Poisoner(Member):
    """Multiplies every factor B of what it tuned, by NaN too, and seals that: the product's own code would refuse."""

    def answer(self, round_: Round) -> Path:
        """Return the sealed bundle of a changed adapter."""
        folder = round_.path.parent
        if not (folder / SEALED).is_dir():
            shutil.rmtree(super().answer(round_))
            bundle = open_bundle(folder / BUNDLE)
            scale = float(os.environ[SCALE_VARIABLE])
            tensors = {
                name: tensor * scale if name.endswith("lora_B") else tensor
                for name, tensor in load_file(bundle.path / TENSOR_FILE).items()
            }
            save_file(tensors, bundle.path / TENSOR_FILE, metadata={"format": "pt"})
            changed = bundle.manifest.model_copy(update={"files": entries(bundle.path, [TENSOR_FILE])})
            write_manifest(bundle.path, changed)
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
