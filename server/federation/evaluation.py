"""The full model with what a federation's rounds added: measured after each round, and written at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adapters.updates import Update, dense, fold, lifted
from offsite.artefacts.owner import OwnerRecord
from offsite.digests import model_digest, sha256_bytes
from offsite.errors import ConfigError
from offsite.evaluation.measure import perplexity
from offsite.modelling.dtypes import cast_model
from offsite.modelling.load import load_model, load_tokenizer
from offsite.staging import staged_folder
from offsite.text.batches import Example, encode, pack, pad_id
from offsite.text.records import read_records
from server.federation.config import FederationConfig
from server.federation.federation import Federation
from server.federation.state import SHARED
from server.plugging.adapted import finish_folder
from server.plugging.card import Card
from server.plugging.fit import require_base
from server.plugging.fullmodel import called
from server.plugging.shares import shared_update

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def grown_model(
    model: PreTrainedModel, update: Update, record: OwnerRecord, *, stored: Mapping[str, torch.dtype] | None = None
) -> Iterator[PreTrainedModel]:
    """Yield the full model with the update in its weights; afterwards it is as it was.

    Args:
        stored: dtypes by parameter to which the sums are rounded, as in a checkpoint that holds the model.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        fold(model, lifted(model, update, record), record.sites)
        if stored is not None:
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(stored[name]).to(parameter.dtype)
        yield model
    finally:
        for parameter, data in before:
            parameter.data = data


class Watch:
    """Measures the full model with each state plugged in, on the owner's held-out texts.

    Sums are rounded as `write_adapted` stores them, so that what is measured is what is served; computed is in float32.

    Raises:
        ConfigError: when the model is not the package's, or a file is missing.
    """

    def __init__(self, federation: Federation) -> None:
        config = federation.config
        self._federation = federation
        self.model = load_model(config.model)
        require_base(self.model, model_digest(self.model), federation.record.base_digest, "the federation")
        self._tokenizer = load_tokenizer(config.model)
        self._texts = {name: self._examples(config, path) for name, path in config.heldout.items()}
        self._stored = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        cast_model(self.model, torch.float32)
        self.zero_shot = self._measure()
        self._known: tuple[int, dict[str, float]] = (0, {})

    def __call__(self, number: int) -> dict[str, float]:
        """Return perplexities after a round, by text; of personal adapters by text and client."""
        if self._known[0] != number:
            self._known = (number, self._measured())
        return self._known[1]

    def _measured(self) -> dict[str, float]:
        federation, found = self._federation, {}
        names = {key: one.name for key, one in federation.participants.items()}
        for key, state in federation.states.items():
            part = shared_update(self.model, state, federation.record.sites, federation.config.way)
            with grown_model(self.model, part, federation.record, stored=self._stored):
                scores = self._measure()
            suffix = "" if key == SHARED else f" by {names.get(key, key[:9])}"
            found.update({f"{text}{suffix}": score for text, score in scores.items()})
        return found

    def _measure(self) -> dict[str, float]:
        pad = pad_id(self._tokenizer)
        return {
            name: perplexity(self.model, examples, batch_size=8, pad_id=pad).perplexity
            for name, examples in self._texts.items()
        }

    def _examples(self, config: FederationConfig, path: str) -> list[Example]:
        if not Path(path).is_file():
            raise ConfigError(f"--heldout: no file named {Path(path).name!r}")
        encoded = encode(read_records(Path(path)), self._tokenizer, context=config.block_tokens, whole_text=True)
        blocks = pack(encoded.examples, block_tokens=config.block_tokens)
        return blocks[: max(1, config.heldout_tokens // config.block_tokens)]


def write_adapted(federation: Federation, out: Path) -> str:
    """Write the full model with the shared result merged in, as ``offsite serve`` opens it; return its digest.

    Of the sum of all rounds it holds the share that the settings name; the folder is bound to the whole sum.

    Raises:
        ConfigError: when `out` exists, or a share by module names nothing.
        RunFailed: when the disk is full.
    """
    config, record = federation.config, federation.record
    model = load_model(config.model)
    require_base(model, model_digest(model), record.base_digest, "the federation")
    state = federation.states[SHARED]
    part = shared_update(model, state, record.sites, config.way)
    fold(model, lifted(model, part, record), record.sites)
    card = Card(
        name=out.name,
        form="merged",
        base=called(config.model),
        base_digest=record.base_digest,
        adapter=federation.spec,
        licence=federation.package.manifest.licence,
        way=config.way,
    )
    with staged_folder(out) as stage:
        model.save_pretrained(stage)
        digest = model_digest(model)
        finish_folder(
            stage,
            load_tokenizer(config.model),
            card,
            package_digest=record.package_digest,
            bundle_digest=state_digest(state),
            merged_digest=digest,
            sites={},
            tensors={},
        )
    return digest


def state_digest(state: Update) -> str:
    """Return a digest of everything that the rounds added, by name."""
    from hashlib import sha256

    whole = sha256(b"offsite/v1/federation-state\0")
    for name in sorted(state):
        whole.update(name.encode() + b"\0" + sha256(dense(state[name]).numpy().tobytes()).digest())
    return sha256_bytes(whole.digest())


def better(zero_shot: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """Return the texts on which a result is no better than the full model as it was."""
    return sorted(label for label, score in found.items() if not score < zero_shot[text_of(label, zero_shot)])


def text_of(label: str, zero_shot: Mapping[str, float]) -> str:
    """Return the text that a row is of: ``TEXT``, or ``TEXT by CLIENT`` of a personal adapter."""
    fitting = [text for text in zero_shot if label == text or label.startswith(f"{text} by ")]
    return max(fitting, key=len)
