"""How far an emulator is from the middle it stands for, as a loss to train on and as a measure.

Shapes: B = rows, T = tokens of a row, D = width of the hidden state, N = drawn token positions, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch, hidden_after, on_device, real_tokens
from emulator.distillation.bottom import Bottom, shared_bottom
from emulator.distillation.kept import Given, KeptStates
from emulator.distillation.masked import MASKED
from offsite.encoders.trunk import is_encoder
from offsite.errors import RunFailed
from offsite.modelling.head import Before, Divergence, before_head, values_at
from offsite.modelling.split import Plan
from offsite.seq2seq.inputs import SOURCE
from offsite.training.processes import Processes

_TINY = 1e-12  # keeps a hidden state of zeros from dividing by zero; any other is larger by far


class Terms(NamedTuple):
    """Sums over the text's tokens, float32 scalars: `hidden` as relative squared error, `kl` in nats."""

    hidden: Tensor
    kl: Tensor
    num_tokens: Tensor


class Weights(NamedTuple):
    """What the loss is made of: weight of `hidden`, weight of `kl` per nat, share of positions at which KL is taken."""

    hidden: float = 1.0
    kl: float = 1.0
    kl_share: float = 0.25


class Fidelity(NamedTuple):
    """Means per token on held-out text: relative squared error of the hidden states, KL in nats."""

    hidden: float
    kl: float


class Pair(nn.Module):
    """The full model and an emulator of it in one module, so that both can be sharded and run as one.

    Both stay in evaluation mode: the full model's dropout would be noise to copy.
    """

    def __init__(self, full: PreTrainedModel, emulator: PreTrainedModel, plan: Plan, kept: Sequence[int]) -> None:
        """Align `emulator`, whose i-th block is or stands from block ``kept[i]`` of `full` on."""
        super().__init__()
        self.full, self.emulator = full, emulator
        kept_of = plan.by_stack(emulator, kept)
        self.aligned = align(kept_of[plan.stack], plan)
        self._lowest = plan.num_bottom - 1  # the last block of the bottom, if there is one
        wanted = {*self.aligned.values(), *([self._lowest] if plan.num_bottom else [])}
        self._full_blocks = _numbered(full, plan, sorted(wanted))
        self._emulator_blocks = _numbered(emulator, plan, self.aligned)
        self._beside: dict[int, int] = {}  # as `aligned`, of an encoder-decoder's encoder
        self._full_beside: dict[int, nn.Module] = {}
        self._emulator_beside: dict[int, nn.Module] = {}
        if plan.encoder is not None:
            self._beside = align(kept_of[plan.encoder.stack], plan.encoder)
            self._full_beside = _numbered(full, plan.encoder, self._beside.values())
            self._emulator_beside = _numbered(emulator, plan.encoder, self._beside)
        self._bottom: Bottom | None = None
        self._kept: KeptStates | None = None
        self._head: Before | None = None
        self._is_encoder = is_encoder(full)
        self.eval()

    def share_bottom(self, plan: Plan, batch: Batch) -> bool:
        """From now on the emulator's bottom is passed over, if it may be: the full model's states are handed in behind.

        Args:
            batch: text to try it on, on the models' device.

        Returns:
            whether they can be: see `emulator.distillation.bottom.shared_bottom`.
        """
        self._bottom = shared_bottom(self.full, self.emulator, plan, batch)
        return self._bottom is not None

    @property
    def has_bottom(self) -> bool:
        """Whether there is a bottom end at all."""
        return self._lowest >= 0

    def keep(self, kept: KeptStates, head: Before) -> None:
        """From now on the full model runs on what is not kept alone, and its states are rounded as those that are.

        Args:
            head: what `before_head` gave of the full model, on any text.
        """
        self._kept, self._head = kept, head

    @torch.no_grad()
    def _given(self, batch: Batch, drawn_BT: Tensor) -> tuple[Mapping[int, Tensor], Before | Tensor]:
        """Return the full model's states after its blocks, and what goes into its head at the drawn positions."""
        if self._kept is None or self._head is None:
            with hidden_after(self._full_blocks) as states:
                return states, before_head(self.full, batch, drawn_BT)
        given = self._kept.read(batch)
        if given is None:
            given = self._kept.keep(batch, self._computed(batch))
        states = dict(given.states)
        if given.bottom is not None:
            states[self._lowest] = given.bottom
        return states, replace(self._head, hidden=given.last[drawn_BT])

    def _computed(self, batch: Batch) -> Given:
        real_BT = real_tokens(batch)
        with hidden_after(self._full_blocks) as found:
            before = before_head(self.full, batch, real_BT)
        if isinstance(before, Tensor):
            raise RunFailed("the head of the full model cannot be run by itself", hint="--cache-bytes 0")
        last_BTD = before.hidden.new_zeros(*real_BT.shape, before.hidden.shape[-1])
        last_BTD[real_BT] = before.hidden
        states = {number: found[number] for number in sorted(set(self.aligned.values()))}
        return Given(states, found.get(self._lowest), last_BTD)

    def train(self, _mode: bool = True) -> Pair:
        """Both models stay in evaluation mode."""
        return super().train(False)

    def forward(self, batch: Batch, kl_share: float) -> Terms:
        """Compare both models on one batch; only the emulator's pass can be differentiated.

        *hidden*: for every block of the emulator's middle, ``|e - f|^2 / |f|^2`` per token, where f is the hidden
        state that the full model has just before the block that the emulator's next one stands for; the mean over
        blocks. Each token is measured against its own size: over one size for the whole batch, a few tokens of
        massive activation would be all that counts. An encoder-decoder's blocks are those of both middles, the
        encoder's measured at the tokens of the prompt. *kl*: KL(full || emulator) of the next token through the top
        end and the head, on the share `kl_share` of positions, drawn from torch's generator and scaled up to all
        tokens; 0 leaves it out. Padding does not count in either. Of encoders KL is of the masked tokens, all of them
        (`emulator.distillation.masked`).

        Source: arXiv:2302.04870 (hidden states after the middle), with the normalisation and the depths our own.
        """
        real_BT = real_tokens(batch)
        drawn_BT = self._drawn(batch, real_BT, kl_share)
        with hidden_after(self._full_beside) as full_beside:
            full_states, before = self._given(batch, drawn_BT)
        over = nullcontext() if self._bottom is None else self._bottom.passed_over(full_states[self._lowest])
        inside = hidden_after(self._emulator_blocks), hidden_after(self._emulator_beside)
        with over, inside[0] as emulator_states, inside[1] as emulator_beside:
            kl_N = values_at(self.emulator, batch, drawn_BT, Divergence(before))
        errors = [
            relative_error(emulator_states[mine], full_states[theirs])[real_BT].sum()
            for mine, theirs in self.aligned.items()
        ]
        num_tokens = real_BT.sum()
        if self._beside:
            source_BS = batch[SOURCE[1]].bool()
            each = num_tokens / source_BS.sum()  # of the mean over its prompts' tokens as often as there are others
            errors += [
                relative_error(emulator_beside[mine], full_beside[theirs])[source_BS].sum() * each
                for mine, theirs in self._beside.items()
            ]
        kl = torch.zeros((), device=real_BT.device)
        if len(kl_N):
            kl = kl_N.sum() * (num_tokens / len(kl_N))
        return Terms(torch.stack(errors).mean(), kl, num_tokens)

    def _drawn(self, batch: Batch, real_BT: Tensor, kl_share: float) -> Tensor:
        """Return where KL is taken, (B, T) bool: of an encoder at the masked tokens alone, if any are."""
        drawn_BT = torch.zeros_like(real_BT)
        if kl_share > 0 and self._is_encoder:
            return batch.get(MASKED, drawn_BT)
        if kl_share > 0:
            positions_N = draw_positions(real_BT, kl_share)
            drawn_BT[:, positions_N] = real_BT[:, positions_N]
        return drawn_BT


def align(kept: Sequence[int], plan: Plan) -> dict[int, int]:
    """Return, for each block of the emulator's middle, the full-model block after which the same state is wanted.

    That is the last block before the one that the emulator's next block stands for: an emulator that keeps
    blocks 2 and 5 learns to do in its block 2 what the full model does in 2, 3 and 4.
    """
    middle = range(plan.num_bottom, len(kept) - plan.num_top)
    after = [*kept[1:], plan.stack.num_blocks]
    return {block: after[block] - 1 for block in middle}


def relative_error(found_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    """Return (B, T) float32: squared distance over the wanted state's squared size, token by token."""
    wanted = wanted_BTD.float()
    distance_BT = (found_BTD.float() - wanted).square().sum(-1)
    return distance_BT / (wanted.square().sum(-1) + _TINY)


def draw_positions(real_BT: Tensor, share: float) -> Tensor:
    """Return (N,) int64, ascending: that share of the positions at which any row has text, at least one.

    Drawn from torch's CPU generator, by number alone: added padding and other rows do not change the draw.
    """
    columns = real_BT.any(0).nonzero().squeeze(-1)
    if share >= 1:
        return columns
    num = max(1, round(share * len(columns)))
    drawn = torch.randperm(len(columns))[:num].sort().values
    return columns[drawn.to(columns.device)]


def step_loss(weights: Weights) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    """Return the function of a `Pair` and a batch that gives the weighted loss summed over tokens, and how many."""
    kl_share = weights.kl_share if weights.kl > 0 else 0.0

    def loss(pair: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        terms: Terms = pair(batch, kl_share)
        return weights.hidden * terms.hidden + weights.kl * terms.kl, terms.num_tokens

    return loss


@torch.no_grad()
def measure(pair: Pair, batches: Sequence[Batch], processes: Processes) -> Fidelity:
    """Return how far the emulator is from the full model on `batches`, at every position.

    Several processes take turns; each runs as many passes as the others, since sharded weights need all of them.
    """
    sums = [0.0, 0.0, 0.0]
    for start in range(0, len(batches), processes.size):
        mine = start + processes.rank
        terms = pair(on_device(batches[min(mine, len(batches) - 1)], processes.device), 1.0)
        if mine < len(batches):
            sums = [total + float(term) for total, term in zip(sums, terms, strict=True)]
    hidden, kl, num_tokens = processes.total(sums)
    return Fidelity(hidden / num_tokens, kl / num_tokens)


def _numbered(model: PreTrainedModel, plan: Plan, numbers: Iterable[int]) -> dict[int, nn.Module]:
    blocks = list(model.get_submodule(plan.stack.name).children())
    return {number: blocks[number] for number in numbers}
