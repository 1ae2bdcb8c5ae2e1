"""Distillation: an emulator's middle is trained on public text to imitate the full model's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch, real_tokens
from emulator.compression.compress import Compressed, middle_blocks
from emulator.distillation.kept import FOLDER, KeptStates, Row, fitting, rows_of, seen_again
from emulator.distillation.objective import Fidelity, Pair, Weights, measure, step_loss
from emulator.distillation.public import PublicText
from offsite.encoders.trunk import is_encoder
from offsite.errors import ConfigError
from offsite.modelling.blocks import block_list
from offsite.modelling.head import before_head
from offsite.modelling.split import Plan
from offsite.seq2seq.inputs import SOURCE
from offsite.training.config import LoopConfig
from offsite.training.loop import Outcome, train
from offsite.training.precision import uses_bf16
from offsite.training.processes import Processes, world
from offsite.vision.models import PIXELS


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
    cache_bytes: int = 0,
) -> Distilled:
    """The middle of ``compressed.model`` has learnt on public text to stand in for that of `full`.

    Only that middle trains, as float32 copies; ends, embeddings and head are frozen and stay the full model's own
    storage. Of the measured weights those with the least KL on held-out text are kept, of an encoder whose text is not
    masked those whose hidden states are nearest. With several processes the blocks of both models are sharded, and
    neither can be used afterwards.

    Args:
        full: where the work is to be done (several processes: on the CPU); no parameter of it requires a gradient
            afterwards.
        compressed: from `compress`, of the same `full` and `plan`.
        work: folder for checkpoints and log; removed by the caller when no longer needed.
        resume: go on from the newest checkpoint in `work`.
        binding: what a resumed run must share with the run it goes on from, besides settings and text.
        cache_bytes: most that what the full model gives on text may take in `work`, to be computed once, in one
            process; see `emulator.distillation.kept`. Of images and of encoder-decoders nothing is kept.

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

    def autocast() -> torch.autocast:
        return torch.autocast(processes.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)

    def fidelity() -> Fidelity:
        with autocast():
            return measure(pair, text.held_out, processes)

    arithmetic: dict[str, str] = {}
    if processes.size == 1:
        with autocast():
            row = {name: tensor[:1].to(processes.device) for name, tensor in text.train.batch(0).items()}
            if plan.encoder is None:  # otherwise what enters the decoder's bottom hangs on the encoder's middle
                pair.share_bottom(plan, row)
            if _keeps(pair, row, text, loop, work / FOLDER, {**(binding or {}), "bf16": str(bf16)}, cache_bytes):
                arithmetic = {"the full model's hidden states": "bfloat16"}
    measured: list[Fidelity] = []

    def loss_of(one: Fidelity) -> float:
        """What the best weights have least of; of an encoder without masked tokens there is no KL."""
        return one.hidden if is_encoder(full) and not text.is_masked else one.kl

    def evaluate() -> float:
        measured.append(fidelity())
        return loss_of(measured[-1])

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
        binding={"public text": text.digest, "objective": repr(weights), **arithmetic, **(binding or {})},
    )
    found = next((one for one in reversed(measured) if loss_of(one) == outcome.best_loss), None) or fidelity()
    if processes.size == 1:
        return Distilled(outcome, found, emulator)
    return Distilled(outcome, found, _filled(shell, outcome.tensors) if shell is not None else None)


@torch.no_grad()
def _keeps(
    pair: Pair,
    row: Batch,
    text: PublicText,
    loop: LoopConfig,
    folder: Path,
    binding: Mapping[str, str],
    limit_bytes: int,
) -> bool:
    """What the full model gives on text that the run comes to again is kept from now on. Returns whether any is."""
    # states are found again by a row's tokens: of images those are zeros, of encoder-decoders not all that is read
    keeps = limit_bytes and PIXELS not in row and SOURCE[0] not in row
    head = before_head(pair.full, row, real_tokens(row)) if keeps else None
    if head is None or isinstance(head, Tensor):
        return False
    per_epoch = text.train.num_steps_per_epoch
    steps = range(min(loop.steps, 2 * (per_epoch + 1)))  # all of an epoch, wherever in one the run begins
    trained = [tuple(one.input_ids) for step in steps for one in text.train.chosen(step)]
    if loop.steps <= per_epoch or text.is_masked:
        trained = []  # some rows of a last batch come twice: of no use; masked, none does
    held_out = [one for batch in text.held_out for one in rows_of(batch) or ()]
    num_passes = -(-loop.steps // loop.evaluate_every) if loop.evaluate_every else 1
    wanted: list[Row] = []
    for rows in (seen_again(held_out, num_passes), seen_again(trained, 1)):
        fits = rows and fitting(
            [*wanted, *rows],
            num_states=len(set(pair.aligned.values())),
            width=head.hidden.shape[-1],
            itemsize=head.hidden.element_size(),
            has_bottom=pair.has_bottom,
            limit_bytes=limit_bytes,
        )
        wanted += rows if fits else []
    if wanted:
        bound = {**binding, "blocks": str(sorted(set(pair.aligned.values()))), "width": str(head.hidden.shape[-1])}
        pair.keep(KeptStates(folder, wanted, bound), head)
    return bool(wanted)


@torch.no_grad()
def _masters(emulator: PreTrainedModel, plan: Plan) -> dict[str, nn.Parameter]:
    """The middle's weights are float32 copies that require a gradient. Returns them by their names in `emulator`."""
    found = {}
    for name, parameter in emulator.named_parameters():
        if any(_number(name, side) in _middle(emulator, side) for side in plan.sides):
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
            found[name] = parameter
    return found


def _middle(emulator: PreTrainedModel, side: Plan) -> range:
    return range(side.num_bottom, side.num_bottom + len(middle_blocks(emulator, side)))


def _number(name: str, plan: Plan) -> int:
    """Return the number of the block of this stack that a parameter of that name is in, -1 for none."""
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
