"""What a round of a federation changes about tuning: where weights and text start, how far to go, for how long.

The package's weights with the round's update folded in are what is tuned; a LoRA starts anew on them every round, so
its rank does not grow. FedProx's term pulls on what the adapter does to the weights, not on its factors: those of a
LoRA can move without the weights moving. A round goes on in the client's text where the one before it ended, or every
round would train on the same few rows.

Source: FedProx, arXiv:1812.06127, equation 2; the effective update, ``adapters/updates.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapters.kinds import Attached
from adapters.norms import adapted_names, scale_of
from adapters.updates import fold, from_tensors
from offsite.artefacts.round import Round, open_round
from offsite.audits.runs import AnsweredRound
from offsite.errors import ConfigError, PolicyError, WrongBinding, WrongNames
from offsite.tensors import check_exact, spec_of
from offsite.training.step import StepLoss

if TYPE_CHECKING:
    from client.tuning.config import TuneConfig
    from offsite.artefacts.bundle import AdapterSpec
    from offsite.artefacts.job import Job
    from offsite.artefacts.package import Package


@dataclass(frozen=True)
class Begun:
    """A run's place in a federation; without a round, an ordinary run.

    Attributes:
        frozen: shared factors A, which go into the bundle as they came.
    """

    round: Round | None = None
    frozen: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def digest(self) -> str | None:
        """The round's digest, None without one."""
        return None if self.round is None else self.round.digest


def round_for(config: TuneConfig, package: Package, job: Job | None) -> Round | None:
    """Return the opened round in ``--round``, which asks for this package and job; None when there is none.

    Raises:
        ConfigError: when a setting cannot go together with it.
        WrongBinding: when it is for another package or job.
        PolicyError: when there is nothing left to train.
        ArtefactError: when it is unsound.
    """
    if config.round is None:
        return None
    found = open_round(config.round)
    manifest = found.manifest
    if job is not None:
        found.bind(job)
    elif manifest.package_digest != package.digest:
        raise WrongBinding(
            f"round {config.round.name!r} is for package {manifest.package_digest[:19]}, this is {package.digest[:19]}"
        )
    if manifest.task == "finish":
        raise PolicyError("the federation is finished, this round asks for nothing")
    if manifest.proximal and config.dp is not None:
        raise ConfigError("--dp: the round asks for a proximal term, which --dp does not train with")
    return found


def first_step(round_: Round | None) -> int:
    """Return how many steps of the client's text the rounds before this one took, had it answered all of them."""
    return 0 if round_ is None else (round_.manifest.round - 1) * round_.manifest.steps


def answered(round_: Round | None) -> AnsweredRound | None:
    """Return what the run's record says of the round; None without one."""
    if round_ is None:
        return None
    return AnsweredRound(digest=round_.digest, number=round_.manifest.round, first_step=first_step(round_))


def start_seed(seed: int, round_: Round | None) -> int:
    """Return the seed of a fresh adapter: another in every round, or a LoRA would start in the same subspace each time.

    Source: restarts with new factors, arXiv:2307.05695.
    """
    if round_ is None or round_.manifest.round == 1:
        return seed
    digest = hashlib.blake2b(f"offsite/v1/round-start/{seed}/{round_.manifest.round}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def grow(model: nn.Module, package: Package, spec: AdapterSpec, round_: Round | None) -> None:
    """The package's model holds what earlier rounds added, in place; to be done before an adapter is on it.

    Raises:
        WrongNames, WrongShape, NotFinite: when the round's update is not one that this adapter can have made.
    """
    if round_ is None:
        return
    block_tensors = package.block_tensors()
    names = adapted_names(spec, package.layout, block_tensors)
    update = from_tensors("the round's update", round_.load_update(), {name: block_tensors[name] for name in names})
    fold(model, update, package.layout.blocks)
    middle = {name: one for name, one in block_tensors.items() if name.startswith("middle.")}
    fold(model, from_tensors("the round's emulator", round_.load_emulator(), middle), package.layout.blocks)


def begin(attached: Attached, spec: AdapterSpec, round_: Round | None) -> Begun:
    """The adapter holds the factors A that the round shares, and does not train them.

    Raises:
        WrongNames, WrongShape: when they are not just those of the adapter.
    """
    start = {} if round_ is None else round_.load_start()
    if start:
        own = {
            name: spec_of(parameter, dtype=spec.dtype)
            for name, parameter in attached.trainable.items()
            if name.endswith(".lora_A")
        }
        if not own:
            raise WrongNames(f"the round shares factors A, an adapter of kind {spec.kind} has none")
        check_exact("the round's start", {name: spec_of(tensor) for name, tensor in start.items()}, own)
    for name, tensor in start.items():
        parameter = attached.trainable.pop(name)
        with torch.no_grad():
            parameter.copy_(tensor)
        parameter.requires_grad_(False)
    return Begun(round_, start)


def with_proximal(loss: StepLoss, attached: Attached, begun: Begun, spec: AdapterSpec) -> StepLoss:
    """Return the loss with FedProx's term: mu / 2 times the squared Frobenius norm of the adapter's effective update.

    The term is times the number of positions that count, as the loss is a sum over those.
    """
    mu = 0.0 if begun.round is None else begun.round.manifest.proximal
    if mu == 0:
        return loss
    distance = _Distance(attached, spec)

    def total(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found, count = loss(model, batch)
        return found + 0.5 * mu * count * distance(), count

    return total


class _Distance:
    """The squared Frobenius norm of what the adapter does to the weights, differentiable; no dense matrix is formed."""

    def __init__(self, attached: Attached, spec: AdapterSpec) -> None:
        parameters = dict(attached.model.named_parameters())
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._whole: list[tuple[Tensor, Tensor]] = []
        self._scale = scale_of(spec)
        by_id = {id(parameter): name for name, parameter in parameters.items()}
        for name, parameter in attached.trainable.items():
            if name.endswith(".lora_B"):
                factor = parameters[by_id[id(parameter)].replace("lora_B", "lora_A")]
                self._pairs.append((factor, parameter))
            elif not name.endswith(".lora_A"):
                self._whole.append((parameter, parameter.detach().clone()))

    def __call__(self) -> Tensor:
        total = torch.zeros(())
        device = (self._pairs or self._whole)[0][0].device.type
        with torch.autocast(device, enabled=False):  # a penalty in bfloat16 would be off by half a percent
            for a, b in self._pairs:  # |BA|^2 = <B'B, AA'>
                total = total + self._scale**2 * ((b.T @ b) * (a @ a.T)).sum().cpu()
            for parameter, start in self._whole:
                total = total + (parameter - start).square().sum().cpu()
        return total


def work_of(folder: Path, number: int) -> Path:
    """Return where a client keeps what belongs to one round of a federation."""
    return folder / f"round-{number:04d}"
