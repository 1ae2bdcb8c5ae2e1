"""What a run minimises, and on which batches: put together from the settings of `client.objectives.config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from client.objectives.anchor import Anchor, public_batches
from client.objectives.channels import ChannelDropout
from client.objectives.heads import HeadBatches, HeadLoss, HeadValidation, Units, begin_at
from client.objectives.pairs import make_pairs, require_prompts
from client.objectives.preferences import PairBatches, Precision, Rule, Validation, measured_pairs, pair_loss
from client.objectives.rewardmodel import RewardModel
from client.objectives.rollouts import HeldOut, Recipe, Rollouts, policy_loss
from client.objectives.tokens import dft_loss
from offsite.digests import sha256_file
from offsite.errors import ConfigError
from offsite.modelling.context import context_of
from offsite.tasks.rules import require_answers
from offsite.text.batches import IGNORED
from offsite.text.records import require_files
from offsite.training.precision import uses_bf16
from offsite.training.step import StepLoss
from offsite.vision.reader import Reader, tokenizer_in

if TYPE_CHECKING:
    from pathlib import Path

    from adapters.kinds import Attached
    from client.objectives.rewardmodel import RewardBundle
    from client.tuning.config import TuneConfig
    from client.tuning.data import TrainingText
    from offsite.artefacts.package import Package
    from offsite.tasks.rules import Rules
    from offsite.training.loop import Batches


@dataclass(frozen=True)
class Learning:
    """What is minimised, and on what: `batches` are the text's own, or hold more than those.

    `validation` is of held-out rows, where the loss is one of preferences, of rewards or of a head; None for the next
    token's loss. `figures` gives what else is told of a step; `units` what values are learnt in.
    """

    loss: StepLoss
    batches: Batches
    validation: Validation | HeldOut | HeadValidation | None = None
    figures: Callable[[], Mapping[str, float]] | None = None
    units: Units = field(default_factory=Units)


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


def bound_objective(
    config: TuneConfig, anchor_sha256: str | None, rules: Rules | None, reward_digest: str | None = None
) -> dict[str, str]:
    """Return what a resumed run must share of these settings, one entry per setting; none of the usual ones."""
    stated = config.stated(anchor_sha256, reward_digest)
    found = {} if stated is None else stated.model_dump(mode="json")
    rewarded = found.pop("rloo", {})
    bound = {f"objective.{name}": str(value) for name, value in found.items()}
    bound |= {f"rloo.{name}": str(value) for name, value in rewarded.items()}
    return bound if rules is None else bound | rules.binding()


def require_objective(config: TuneConfig, text: TrainingText, *, steps: int, rules: Rules | None = None) -> None:
    """Return only if the text has what the objective asks of it; that of preferences was read so.

    Raises:
        DataError: when a row has no prompt to answer, or no answer that a rule compares with.
    """
    if rules is not None:
        require_answers([*text.rows, *text.validation], rules)
    if config.objective == "spin":
        require_prompts(text, steps=steps)


def validation_for(config: TuneConfig, attached: Attached, text: TrainingText) -> Validation | None:
    """Return what measures an adapter on held-out pairs, of the untuned one as it is now; None for other objectives.

    Raises:
        RunFailed: when the model's output is not finite.
    """
    if config.objective != "dpo":
        return None
    precision = _precision(config, attached)
    pairs = measured_pairs(attached.model, text.validation, pad_id=text.pad_id, precision=precision)
    return Validation(list(pairs.values()), rule_of(config), pad_id=text.pad_id, precision=precision)


def rule_of(config: TuneConfig) -> Rule:
    """Return the loss of pairs that these settings name."""
    if config.objective == "spin":
        return Rule(config.spin_beta)
    return Rule(config.dpo_beta, config.dpo_loss, config.dpo_label_smoothing)


def learning_for(
    config: TuneConfig,
    attached: Attached,
    package: Package,
    text: TrainingText,
    reader: Reader,
    plain: StepLoss,
    *,
    steps: int,
    work: Path,
    binding: Mapping[str, str],
    rules: Rules | None = None,
    reward: RewardBundle | None = None,
) -> Learning:
    """Return what these settings minimise. Of the usual ones that is `plain` on the text's own batches.

    Args:
        attached: the adapter as it begins, untuned, on its device, where it will be tuned.
        plain: the next token's loss.
        steps: how many the run takes.
        work: folder for what is drawn beforehand.
        binding: what a resumed run must share.
        rules: what answers are rewarded for, of an objective that samples some.
        reward: the bundle that rewards them besides.

    Raises:
        ConfigError: when the package's middle has no channels to leave out, or its model does not know the anchor.
        DataError: when the anchor cannot be read, or a row has no prompt.
        RunFailed: when the untuned emulator's output is not finite, or the disk is full.
    """
    if config.is_usual() or config.dp is not None:  # a private run's clipping weighs tokens by itself
        return Learning(plain, text.batches)
    if rules is not None:
        precision, tokenizer = _precision(config, attached), tokenizer_in(reader)
        judge = None
        if reward is not None:
            context = min(config.block_tokens, context_of(attached.model) or config.block_tokens)
            judge = RewardModel(reward, package, attached, tokenizer, context=context, precision=precision)
        rollouts = Rollouts(attached, text, tokenizer, rules, _recipe(config), precision=precision, judge=judge)
        rewarded = partial(policy_loss, temperature=config.temperature)
        return Learning(rewarded, rollouts, HeldOut(rollouts, text.validation), rollouts.figures)
    if config.has_head:
        units, precision = Units(), _precision(config, attached)
        if config.objective == "regress":
            has_bias = "head.bias" in attached.trainable
            units = Units.of(text.rows, has_bias=has_bias)
            weight: Any = attached.trainable["head.weight"]
            if not has_bias:
                begin_at(attached.model, weight, units, text.rows, pad_id=text.pad_id, precision=precision)
        held_out = HeadValidation(
            text.validation, pad_id=text.pad_id, precision=precision, labels=config.labels, units=units
        )
        return Learning(HeadLoss(text.pad_id), HeadBatches(text, units), held_out, units=units)
    loss: StepLoss = plain
    batches: Batches = text.batches
    validation: Validation | None = None
    if config.objective == "dft":
        loss = dft_loss
    if config.compares_answers:
        loss = partial(pair_loss, rule=rule_of(config))
    if config.objective == "spin":
        pairs = make_pairs(
            package.load_model(dtype="float32").to(_device(attached)),  # type: ignore[arg-type]
            text,
            steps=steps,
            eos=int(tokenizer_in(reader).eos_token_id),  # type: ignore[arg-type]
            context=config.block_tokens,
            seed=config.seed,
            work=work,
            binding=binding,
            precision=_precision(config, attached),
        )
        batches = PairBatches(text, pairs)
    if config.objective == "dpo":
        batches, validation = _preferences(config, attached, text, steps=steps, work=work, binding=binding)
    public, anchor, channels = None, None, None
    if config.anchor is not None:
        anchor = Anchor(attached)
        public = public_batches(
            config.anchor,
            tokenizer_in(reader),
            block_tokens=config.block_tokens,
            batch_size=config.batch_size,
            num_known=_num_known(attached),
            seed=config.seed,
        )
    if config.channel_dropout:
        channels = ChannelDropout(attached, package, probability=config.channel_dropout, seed=config.seed)
    return Learning(
        _Loss(loss, channels, anchor, config.anchor_weight),
        _Numbered(batches, public, config.compares_answers),
        validation,
    )


def _recipe(config: TuneConfig) -> Recipe:
    return Recipe(
        beta=config.rloo_beta,
        num_samples=config.rloo_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        kl_limit=config.kl_limit,
        entropy_floor=config.entropy_floor,
        seed=config.seed,
        weight=config.reward_weight,
    )


def _preferences(
    config: TuneConfig, attached: Attached, text: TrainingText, *, steps: int, work: Path, binding: Mapping[str, str]
) -> tuple[PairBatches, Validation]:
    """Return the pairs of every step, and the held-out ones, measured under the model as it is now: untuned."""
    precision = _precision(config, attached)
    rows = {id(one): one for step in range(steps) for one in text.batches.chosen(step)}
    measured = partial(
        measured_pairs, attached.model, pad_id=text.pad_id, precision=precision, work=work, binding=binding
    )
    pairs = measured(list(rows.values()))
    held_out = list(measured(text.validation, label="held-out pairs before tuning").values())
    return PairBatches(text, pairs), Validation(held_out, rule_of(config), pad_id=text.pad_id, precision=precision)


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


def _device(attached: Attached) -> torch.device:
    return next(iter(attached.trainable.values())).device


def _precision(config: TuneConfig, attached: Attached) -> Precision:
    return "bf16" if uses_bf16(config.precision, _device(attached)) else "fp32"


def _num_known(attached: Attached) -> int:
    model: Any = attached.model
    return int(model.get_input_embeddings().weight.shape[0])
