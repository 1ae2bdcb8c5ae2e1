"""Rewards of a reward model: a bundle that this client tuned before with ``--objective reward`` on the same package.

It reads a prompt with an answer behind it, as it read pairs when it was tuned: the tokens of their text together, cut
at the end, without an end-of-sequence token; of messages what the chat template writes of the whole conversation. What
it gives is the head's number, which knows no scale: only differences were learnt.

Its weights never move. Those that neither it nor the policy trains are one tensor in memory for both.

The bundle is checked as one that arrives: files and digests, the package it is bound to, its tensors by name, shape and
dtype, finite values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.kinds import Attached, attach, declared
from client.objectives.preferences import BATCH, Precision
from offsite.artefacts.bundle import AdapterSpec, open_bundle
from offsite.errors import ConfigError, WrongBinding
from offsite.evaluation.heads import scores_of
from offsite.text.batches import IGNORED, Example, answered_ids, cut, pad_id
from offsite.text.prompts import frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from offsite.artefacts.package import Package
    from offsite.text.records import Record

_WRAPPED, _LAYER = "base_model.model.", ".base_layer."
"""What peft puts into the names of what it wraps."""


@dataclass(frozen=True)
class RewardBundle:
    """A reward bundle that was found to be one of this package: its adapter, tensors and digest."""

    spec: AdapterSpec
    tensors: Mapping[str, Tensor] = field(repr=False)
    digest: str


def read_reward(path: Path, package: Package) -> RewardBundle:
    """Return the reward bundle at `path`, tuned on this package.

    Raises:
        ArtefactError: with the subclass of the check that failed; WrongBinding where it is another package's.
        ConfigError: when it has no reward head, or answers a federation's round.
    """
    bundle = open_bundle(path)
    bundle.bind(package_digest=package.digest, base_digest=package.manifest.base_digest)
    spec = bundle.manifest.adapter
    if spec.task != "reward":
        raise ConfigError(
            f"--reward: bundle {path.name!r} is for {spec.task}, not for reward",
            hint="give a bundle of offsite tune --objective reward",
        )
    if bundle.manifest.round_digest is not None:
        raise WrongBinding(
            f"--reward: bundle {path.name!r} was tuned on a federation's round, not on the package alone"
        )
    expected = declared(spec, package.layout, package.block_tensors())
    return RewardBundle(spec, bundle.load_tensors(expected), bundle.digest)


class RewardModel:
    """The package's model with a reward bundle on it."""

    def __init__(
        self,
        bundle: RewardBundle,
        package: Package,
        policy: Attached,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        precision: Precision,
    ) -> None:
        """Build it beside the policy, on its device, with which it shares what it can.

        Args:
            policy: the package's model with the adapter that is tuned.
            context: most tokens of a row.

        Raises:
            UnsupportedModel, WrongShape: when the package's model cannot carry the bundle's adapter or head.
            ArtefactError: when the package's tensors are not the declared, finite ones.
        """
        names = declared(bundle.spec, package.layout, package.block_tensors())
        attached = attach(package.load_model(dtype="float32"), bundle.spec, package.layout.blocks, names)
        attached.load(bundle.tensors)
        model: Any = attached.model
        model.to(next(policy.model.parameters()).device)
        model.requires_grad_(False).eval()
        share_frozen(model, attached.trainable, policy.model)
        self.model = model
        self._tokenizer, self._context, self._precision = tokenizer, context, precision
        self._pad_id, self._num_closing = pad_id(tokenizer), len(frame(tokenizer)[1])

    def rewards(self, questions: Sequence[Record], answers: Sequence[str]) -> list[float]:
        """Return the number that each answer to its question is given.

        Args:
            questions: prompts, each with or without an answer of its own, which is not read.
            answers: texts, one for each.

        Raises:
            DataError: when the tokenizer or the chat template fails on an answer.
            RunFailed: when a number is not finite.
        """
        rows = []
        for question, answer in zip(questions, answers, strict=True):
            ids = answered_ids(question, answer, self._tokenizer)
            closing = 0 if question.messages else self._num_closing
            rows.append(cut(Example(ids, [IGNORED] * len(ids), closing=closing), self._context))
        scores_N1 = scores_of(self.model, rows, batch_size=BATCH, pad_id=self._pad_id, precision=self._precision)
        found: list[float] = scores_N1[:, 0].tolist()
        return found


def text_behind(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """Return an answer's text as it stands behind its prompt: alone, it may lose the space before its first word.

    Args:
        prompt, answer: tokens; special ones among them are left out.
    """
    before, whole, alone = (
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in ([*prompt], [*prompt, *answer], [*answer])
    )
    return whole[len(before) :] if whole.startswith(before) else alone


def share_frozen(model: nn.Module, own: Mapping[str, nn.Parameter], other: nn.Module) -> int:
    """Let a frozen model hold the tensors of another instead of its own, where both are the same. Returns how many.

    Only what is alike to the last digit, and trained in neither, is held once.

    Args:
        own: parameters of `model` that are its adapter's.
        other: the model that stays as it is; what it trains is not shared.
    """
    theirs = {_plain(name): one for name, one in other.named_parameters() if not one.requires_grad}
    adapter, num = {id(one) for one in own.values()}, 0
    for name, one in model.named_parameters():
        found = theirs.get(_plain(name))
        if found is None or id(one) in adapter or (one.shape, one.dtype) != (found.shape, found.dtype):
            continue
        if torch.equal(one, found):
            one.data = found.data
            num += 1
    return num


def _plain(name: str) -> str:
    """Return a parameter's name as it is without an adapter."""
    return name.removeprefix(_WRAPPED).replace(_LAYER, ".")
