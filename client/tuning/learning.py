"""What a run minimises, and on which batches: put together from the settings of `client.objectives.config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from client.objectives.anchor import Anchor, public_batches
from client.objectives.channels import ChannelDropout
from client.objectives.pairs import PairBatches, make_pairs, spin_loss
from client.objectives.tokens import dft_loss
from offsite.digests import sha256_file
from offsite.errors import ConfigError
from offsite.text.batches import IGNORED
from offsite.text.records import require_files
from offsite.training.step import StepLoss, uses_bf16

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from adapters.kinds import Attached
    from client.tuning.config import TuneConfig
    from client.tuning.data import TrainingText
    from offsite.artefacts.package import Package
    from offsite.training.loop import Batches


@dataclass(frozen=True)
class Learning:
    """What is minimised, and on what: `batches` are the text's own, or hold more than those."""

    loss: StepLoss
    batches: Batches


def anchor_digest(config: TuneConfig, data: Sequence[str]) -> str | None:
    """Return the digest of the anchor's file; None without one.

    Args:
        data: digests of the private files.

    Raises:
        DataError: when there is no such file.
        ConfigError: when it is one of the private files.
    """
    if config.anchor is None:
        return None
    require_files([config.anchor])
    found = sha256_file(config.anchor)
    if found in data:
        raise ConfigError("--anchor: this file is among --data", hint="an anchor is public text that is not tuned on")
    return found


def bound_objective(config: TuneConfig, anchor_sha256: str | None) -> dict[str, str]:
    """Return what a resumed run must share of these settings, one entry per setting; none of the usual ones."""
    stated = config.stated(anchor_sha256)
    found = {} if stated is None else stated.model_dump(mode="json")
    return {f"objective.{name}": str(value) for name, value in found.items()}


def learning_for(
    config: TuneConfig,
    attached: Attached,
    package: Package,
    text: TrainingText,
    tokenizer: PreTrainedTokenizerBase,
    plain: StepLoss,
    *,
    steps: int,
    work: Path,
    binding: Mapping[str, str],
) -> Learning:
    """Return what these settings minimise. Of the usual ones that is `plain` on the text's own batches.

    Args:
        attached: the adapter as it begins, on its device.
        plain: the next token's loss.
        steps: how many the run takes.
        work: folder for what is drawn beforehand.
        binding: what a resumed run must share.

    Raises:
        ConfigError: when the package's middle has no channels to leave out, or its model does not know the anchor.
        DataError: when the anchor cannot be read, or a row has no prompt.
        RunFailed: when the untuned emulator's output is not finite, or the disk is full.
    """
    if config.is_usual() or config.dp is not None:  # a private run's clipping weighs tokens by itself
        return Learning(plain, text.batches)
    loss: StepLoss = plain
    batches: Batches = text.batches
    if config.objective == "dft":
        loss = dft_loss
    if config.objective == "spin":
        loss = partial(spin_loss, beta=config.spin_beta)
        device = next(iter(attached.trainable.values())).device
        pairs = make_pairs(
            package.load_model(dtype="float32").to(device),  # type: ignore[arg-type]
            text,
            steps=steps,
            eos=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
            context=config.block_tokens,
            seed=config.seed,
            work=work,
            binding=binding,
            precision="bf16" if uses_bf16(config.precision, device) else "fp32",
        )
        batches = PairBatches(text, pairs)
    public, anchor, channels = None, None, None
    if config.anchor is not None:
        anchor = Anchor(attached)
        public = public_batches(
            config.anchor,
            tokenizer,
            block_tokens=config.block_tokens,
            batch_size=config.batch_size,
            num_known=_num_known(attached),
            seed=config.seed,
        )
    if config.channel_dropout:
        channels = ChannelDropout(attached, package, probability=config.channel_dropout, seed=config.seed)
    return Learning(
        _Loss(loss, channels, anchor, config.anchor_weight), _Numbered(batches, public, config.objective == "spin")
    )


class _Numbered:
    """Batches whose rows say at which step they are, with as many rows of public text beside them.

    The public rows are cut into parts with the others. ``anchor_scale`` is by how much their divergence counts beside a
    loss that is a sum: the positions that count in the whole batch, over the public ones.
    """

    def __init__(self, own: Batches, public: Batches | None, counts_rows: bool) -> None:
        self._own, self._public, self._counts_rows = own, public, counts_rows

    def batch(self, step: int) -> dict[str, Tensor]:
        found = dict(self._own.batch(step))
        num_rows = len(found["input_ids"])
        if self._public is not None:
            public = self._public.batch(step)
            found["anchor_ids"], found["anchor_mask"] = public["input_ids"], public["attention_mask"]
            count = num_rows if self._counts_rows else int((found["labels"][:, 1:] != IGNORED).sum())
            found["anchor_scale"] = torch.full((num_rows,), count / int(public["attention_mask"].sum()))
        found["step"] = torch.full((num_rows,), step)
        return found


class _Loss:
    """The loss of a step, with the channels of that step, and the anchor's divergence added to it."""

    def __init__(self, own: StepLoss, channels: ChannelDropout | None, anchor: Anchor | None, weight: float) -> None:
        self._own, self._channels, self._anchor, self._weight = own, channels, anchor, weight

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self._channels is not None:
            self._channels.begin(int(batch["step"][0]))
        total, count = self._own(model, batch)
        if self._anchor is not None:
            found = self._anchor.divergence(model, batch["anchor_ids"], batch["anchor_mask"])
            total = total + self._weight * batch["anchor_scale"][0] * found
        return total, count


def _num_known(attached: Attached) -> int:
    model: Any = attached.model
    return int(model.get_input_embeddings().weight.shape[0])
