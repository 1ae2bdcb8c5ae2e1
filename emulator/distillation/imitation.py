"""Distillation: an emulator's middle is trained on public text to imitate the full model's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.compress import Compressed, middle_blocks
from emulator.distillation.objective import Fidelity, Pair, Weights, measure, step_loss
from emulator.distillation.public import PublicText
from offsite.errors import ConfigError
from offsite.modelling.blocks import block_list
from offsite.modelling.split import Plan
from offsite.training.config import LoopConfig
from offsite.training.loop import Outcome, train
from offsite.training.processes import Processes, world
from offsite.training.step import uses_bf16


@dataclass(frozen=True)
class Distilled:
    """A trained emulator: what the run did, how close it came, and the model to publish.

    `model` is the emulator with its ends, its middle in float32; with several processes it is whole on the main
    one and none elsewhere.
    """

    outcome: Outcome
    fidelity: Fidelity
    model: PreTrainedModel | None


def distill(
    full: PreTrainedModel,
    compressed: Compressed,
    plan: Plan,
    text: PublicText,
    loop: LoopConfig,
    *,
    weights: Weights,
    work: Path,
    resume: bool = False,
    binding: Mapping[str, str] | None = None,
    processes: Processes | None = None,
) -> Distilled:
    """The middle of ``compressed.model`` has learnt on public text to stand in for that of `full`.

    Only that middle trains, as float32 copies; ends, embeddings and head are frozen and stay the full model's own
    storage. Of the measured weights those with the least KL on held-out text are kept. With several processes the
    blocks of both models are sharded, and neither can be used afterwards.

    Args:
        full: where the work is to be done (several processes: on the CPU); no parameter of it requires a gradient
            afterwards.
        compressed: from `compress`, of the same `full` and `plan`.
        work: folder for checkpoints and log; removed by the caller when no longer needed.
        resume: go on from the newest checkpoint in `work`.
        binding: what a resumed run must share with the run it goes on from, besides settings and text.

    Raises:
        ConfigError: `work` holds another run, or a run of other settings; nothing is held out.
        RunFailed: NaN, or the disk is full; checkpoints stay.
    """
    if not text.held_out:
        raise ConfigError("distilling needs held-out public text to choose its best weights")
    emulator, processes = compressed.model, processes or world()
    full.requires_grad_(False)
    emulator.requires_grad_(False)
    trainable = _masters(emulator, plan)
    shell = _shell(emulator, plan) if processes.size > 1 and processes.is_main else None
    pair = Pair(full, emulator, plan, compressed.kept)
    bf16 = uses_bf16(loop.precision, processes.device)

    def fidelity() -> Fidelity:
        with torch.autocast(processes.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            return measure(pair, text.held_out, processes)

    measured: list[Fidelity] = []

    def evaluate() -> float:
        measured.append(fidelity())
        return measured[-1].kl

    outcome = train(
        pair,
        trainable,
        text.train,
        step_loss(weights),
        loop,
        work=work,
        resume=resume,
        label="distill",
        evaluate=evaluate,
        shard_blocks=[*block_list(full, plan.stack), *emulator.get_submodule(plan.stack.name).children()],
        binding={"public text": text.digest, "objective": repr(weights), **(binding or {})},
    )
    found = next((one for one in reversed(measured) if one.kl == outcome.best_loss), None) or fidelity()
    if processes.size == 1:
        return Distilled(outcome, found, emulator)
    return Distilled(outcome, found, _filled(shell, outcome.tensors) if shell is not None else None)


@torch.no_grad()
def _masters(emulator: PreTrainedModel, plan: Plan) -> dict[str, nn.Parameter]:
    """The middle's weights are float32 copies that require a gradient. Returns them by their names in `emulator`."""
    found = {}
    for name, parameter in emulator.named_parameters():
        if _number(name, plan) in _middle(emulator, plan):
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
            found[name] = parameter
    return found


def _middle(emulator: PreTrainedModel, plan: Plan) -> range:
    return range(plan.num_bottom, plan.num_bottom + len(middle_blocks(emulator, plan)))


def _number(name: str, plan: Plan) -> int:
    """Return the number of the block that a parameter of that name is in, -1 for none."""
    prefix = plan.stack.name + "."
    return int(name.removeprefix(prefix).split(".", 1)[0]) if name.startswith(prefix) else -1


def _shell(emulator: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Return `emulator` once more, sharing its frozen tensors, with nothing in the middle: it outlives the sharding."""
    tensors = {id(tensor): tensor for tensor in (*emulator.parameters(), *emulator.buffers())}
    shell = copy.deepcopy(emulator, dict(tensors))
    for block in middle_blocks(shell, plan):
        for part in block.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
    return shell


def _filled(shell: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    for name, tensor in tensors.items():
        place, _, key = name.rpartition(".")
        setattr(shell.get_submodule(place), key, nn.Parameter(tensor, requires_grad=False))
    return shell
