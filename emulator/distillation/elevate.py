"""Loss elevation: a distilled emulator is trained to be worse than the full model by a margin, and no more.

Source: the last of three steps of LLEOT (ACL Findings 2026), which minimises ``|L_E(x) - L_M(x) - H|`` with L_E and L_M
the losses of emulator and full model on public text and H the margin in nats. The paper prepends random soft prompts,
for its adapters are soft prompts; ours are weights, and the text stands alone here. What a margin is worth shows only
after tuning: an emulator that was made worse may be healed in a few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch, on_device, real_tokens
from emulator.compression.compress import Compressed
from emulator.distillation.imitation import Distilled
from emulator.distillation.objective import Pair, measure
from emulator.distillation.public import PublicText
from offsite.errors import ConfigError
from offsite.modelling.head import CrossEntropy, values_at
from offsite.modelling.split import Plan
from offsite.training.config import LoopConfig
from offsite.training.loop import train
from offsite.training.precision import uses_bf16
from offsite.training.processes import Processes


class Losses(NamedTuple):
    """Sums over the text's next tokens, float32 scalars in nats, and how many tokens there are."""

    emulator: Tensor
    full: Tensor
    num_tokens: Tensor


class Both(nn.Module):
    """The full model and its emulator; a pass gives the losses of both on the same text."""

    def __init__(self, full: PreTrainedModel, emulator: PreTrainedModel) -> None:
        """Both stay in evaluation mode."""
        super().__init__()
        self.full, self.emulator = full, emulator
        self.eval()

    def train(self, _mode: bool = True) -> Both:
        """Both stay in evaluation mode."""
        return super().train(False)

    def forward(self, batch: Batch) -> Losses:
        """Return the losses; only the emulator's can be differentiated, and padding does not count."""
        with torch.no_grad():
            full, _ = _next_token_loss(self.full, batch)
        emulator, num = _next_token_loss(self.emulator, batch)
        return Losses(emulator, full, num)


def margin_loss(margin_nats: float) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    """Return the function of `Both` and a batch that gives ``|L_E - L_M - H|`` times its tokens, and their number."""

    def loss(both: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        found: Losses = both(batch)
        return (found.emulator - found.full - margin_nats * found.num_tokens).abs(), found.num_tokens

    return loss


@torch.no_grad()
def measured_margin(both: Both, batches: Sequence[Batch], device: torch.device) -> float:
    """Return by how many nats per token the emulator's loss is above the full model's on `batches`."""
    total = num = 0.0
    for batch in batches:
        found = both(on_device(batch, device))
        total += float(found.emulator - found.full)
        num += float(found.num_tokens)
    return total / num


def elevate(
    full: PreTrainedModel,
    compressed: Compressed,
    plan: Plan,
    text: PublicText,
    distilled: Distilled,
    loop: LoopConfig,
    *,
    margin_nats: float,
    work: Path,
    binding: dict[str, str],
    processes: Processes,
) -> tuple[Distilled, float]:
    """The distilled middle of ``compressed.model`` is worse than that of `full` by the margin, as near as it came.

    Of the measured weights those whose margin on held-out text is nearest are kept.

    Args:
        distilled: as `emulator.distillation.imitation.distill` returned it, in one process.
        work: folder for checkpoints and log; gone on from when it holds the same run.

    Returns:
        `distilled` with its fidelity measured anew, and the margin on held-out text.

    Raises:
        ConfigError: with several processes, which leave sharded models behind.
        RunFailed: NaN, or the disk is full; checkpoints stay.
    """
    if processes.size > 1 or distilled.model is None:
        raise ConfigError("--elevate works in one process, found several", hint="leave out --launch")
    both = Both(full, distilled.model)
    trainable = {name: one for name, one in distilled.model.named_parameters() if one.requires_grad}
    bf16 = uses_bf16(loop.precision, processes.device)

    def margin() -> float:
        with torch.autocast(processes.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            return measured_margin(both, text.held_out, processes.device)

    train(
        both,
        trainable,
        text.train,
        margin_loss(margin_nats),
        loop,
        work=work,
        resume=True,
        label="elevate",
        evaluate=lambda: abs(margin() - margin_nats),
        binding={"public text": text.digest, "margin": repr(margin_nats), **binding},
    )
    pair = Pair(full, distilled.model, plan, compressed.kept)
    with torch.autocast(processes.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
        fidelity = measure(pair, text.held_out, processes)
    return replace(distilled, fidelity=fidelity), margin()


def _next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    real_BT = real_tokens(batch)
    counts_BT = torch.zeros_like(real_BT)
    counts_BT[:, :-1] = real_BT[:, 1:] & real_BT[:, :-1]
    wanted_N = batch["input_ids"].roll(-1, 1)[counts_BT]
    return values_at(model, batch, counts_BT, CrossEntropy(wanted_N)).sum(), counts_BT.sum()
