"""Answers that the model samples itself, what they are rewarded with, and the gradient that follows: RLOO.

At each step K answers are sampled to every prompt of the batch. The reward of answer s is r(s) - beta log(p(s) /
p0(s)); r by rules (`offsite.tasks.rules`), by a reward model (`client.objectives.rewardmodel`), or by both, added
up; p the policy as it is, p0 the same model before its first step, both at the temperature of sampling. An answer's
advantage is its reward less the mean of the other K - 1 of its prompt, and the loss's gradient is that of -advantage
log p(s), the mean over answers. Each sample is learnt from once, so there is no ratio to clip. What the loss is said to
be is the negative mean reward, leash included.

p and p0 are taken in one arithmetic, over the same batches, in the modes of evaluation: before the first step their
    difference is 0 to the last digit. Kept hidden states do not go with this: nobody knows the rows before they are
    sampled.

The samples of a step follow from the seed, the step and the weights. So a run that was killed and resumed samples the
same. The seed is no secret; it protects nothing.

A run ends before its last step when it has collapsed: log(p/p0), the mean over a step's answers, is above a limit, or
    the mean entropy of a token below a floor. Weights are looked at so before they are validated; what is kept was
    within both.

Source: REINFORCE leave-one-out, arXiv:2402.14740; the leash, InstructGPT, arXiv:2203.02155.

Shapes: B answers, K of each prompt, T tokens, N tokens of answers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from client.objectives.anchor import Untuned
from client.objectives.preferences import BATCH, Precision, Rows
from client.objectives.rewardmodel import RewardModel, text_behind
from client.objectives.tokens import by_row, token_losses
from offsite.console import say
from offsite.evaluation.measure import evaluating
from offsite.evaluation.sampling import continuations
from offsite.modelling.head import scores_at, wide
from offsite.modelling.steps import cache_is_right
from offsite.text.batches import IGNORED, Example, collate
from offsite.training.loop import EndOfRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adapters.kinds import Attached
    from offsite.tasks.rules import Rules

AT_ONCE = 32
"""Answers that are sampled together, if their prompts are equally long."""


@dataclass(frozen=True)
class Recipe:
    """How answers are sampled, what leash and a reward model's number count, and when a run has collapsed."""

    beta: float
    num_samples: int
    max_new_tokens: int
    temperature: float
    kl_limit: float
    entropy_floor: float
    seed: int
    weight: float = 1.0


@dataclass(frozen=True)
class _Rolled:
    """The answers of a step, as a batch, and what is told of them."""

    step: int
    batch: dict[str, Tensor] = field(repr=False)
    figures: dict[str, float]


def leave_one_out(rewards_PK: Tensor) -> Tensor:
    """Return each reward less the mean of the others of its prompt, (P, K), K at least 2.

    Source: arXiv:2402.14740, equation 8.
    """
    num = rewards_PK.shape[1]
    return rewards_PK - (rewards_PK.sum(1, keepdim=True) - rewards_PK) / (num - 1)


def policy_loss(model: nn.Module, batch: Mapping[str, Tensor], *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the negative sum of the answers' rewards, with the policy's gradient, and their number; both scalars.

    Args:
        batch: as `Rollouts` gives it, or rows of it, on the model's device: ``input_ids``, ``labels`` and
            ``attention_mask``, each (B, T) int64; ``advantages`` and ``rewards``, each (B,) float32.
    """
    logs_B = -by_row(*token_losses(model, batch, temperature=temperature))
    surrogate = -(batch["advantages"] * logs_B).sum()
    return surrogate - surrogate.detach() - batch["rewards"].sum(), torch.tensor(len(logs_B))


def answer_figures(
    model: nn.Module, rows: Sequence[Example], *, pad_id: int, temperature: float, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Return each row's log-probability where labels count, and the entropy there, summed, (B,) float64, in nats."""
    place, found = next(model.parameters()).device, torch.zeros(2, len(rows), dtype=torch.float64)
    with torch.no_grad(), evaluating(model), torch.autocast(place.type, torch.bfloat16, precision == "bf16"):
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            batch = {name: one.to(place) for name, one in collate(part, pad_id).items()}
            targets_BT = batch["labels"][:, 1:]
            counted_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
            counted_BT[:, :-1] = targets_BT != IGNORED
            targets_N, values = targets_BT[targets_BT != IGNORED], list[Tensor]()
            for chosen, scores_nV in scores_at(model, batch, counted_BT):
                logs_nV = (wide(scores_nV) / temperature).log_softmax(-1)
                logs_n = logs_nV.gather(1, targets_N[chosen][:, None])[:, 0]
                values.append(torch.stack((logs_n, -(logs_nV.exp() * logs_nV).sum(-1))))
            per_row = torch.cat(values, 1).cpu().double().split(counted_BT.sum(1).tolist(), 1)
            found[:, start : start + len(part)] = torch.stack([one.sum(1) for one in per_row], 1)
    return found[0], found[1]


class Rollouts:
    """Batches of the model's own answers: what the loop reads, and what validation is of."""

    def __init__(
        self,
        attached: Attached,
        text: Rows,
        tokenizer: PreTrainedTokenizerBase,
        rules: Rules,
        recipe: Recipe,
        *,
        precision: Precision,
        judge: RewardModel | None = None,
    ) -> None:
        """Take the model as it is now for the one that answers are held to: untuned.

        Args:
            text: prompts; every example has one.
            judge: rewards answers beside the rules, its number times ``recipe.weight``.
        """
        self._model: Any = attached.model
        self._untuned = Untuned(attached)
        self._text, self._tokenizer, self._rules, self._recipe = text, tokenizer, rules, recipe
        self._judge = judge
        self._precision: Precision = precision
        self._eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        with evaluating(self._model):
            self._cached = recipe.max_new_tokens > 1 and cache_is_right(attached.model, batch_size=AT_ONCE)  # type: ignore[arg-type]
        self._rolled: _Rolled | None = None
        self._next = 0

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the answers of `step`, sampled from the model as it is: what `policy_loss` takes.

        Raises:
            EndOfRun: when the policy has collapsed.
            RunFailed: when the model's output is not finite.
        """
        self._next = step
        found = self._ahead()
        self._next = step + 1
        return found.batch

    def figures(self) -> dict[str, float]:
        """Return what is told of the answers that were sampled last: means over them, the entropy's over tokens."""
        return {} if self._rolled is None else self._rolled.figures

    def require_sound(self) -> None:
        """Return only if the model as it is has not collapsed; its answers to the prompts to come are sampled for it.

        Raises:
            EndOfRun: when it has.
            RunFailed: when the model's output is not finite.
        """
        self._ahead()

    def rewards(self, prompts: Sequence[Example], answers: Sequence[Sequence[int]]) -> list[float]:
        """Return what rules and reward model give each answer, tokens up to the one that ends it.

        Raises:
            DataError: when the tokenizer or the chat template fails on an answer that a reward model is to read.
            RunFailed: when its number is not finite.
        """
        said = [list(ids[:-1] if ids[-1:] == [self._eos] else ids) for ids in answers]
        found = []
        for example, ids in zip(prompts, said, strict=True):
            text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
            found.append(self._rules.reward(text, num_tokens=len(ids), answer=example.answer))
        if self._judge is None:
            return found
        texts = [text_behind(self._tokenizer, one.prompt, ids) for one, ids in zip(prompts, said, strict=True)]
        given = self._judge.rewards([one.question for one in prompts if one.question is not None], texts)
        return [one + self._recipe.weight * other for one, other in zip(found, given, strict=True)]

    def answers(self, prompts: Sequence[Example], *, temperature: float, seed: int = 0) -> list[list[int]]:
        """Return an answer to each prompt, up to the token that ends it.

        Args:
            temperature: 0 takes the likeliest token every time.
        """
        return continuations(
            self._model,
            [example.prompt for example in prompts],
            num_tokens=self._recipe.max_new_tokens,
            batch_size=AT_ONCE,
            temperature=temperature,
            seed=seed,
            precision=self._precision,
            end=self._eos,
            cached=self._cached,
        )

    def _ahead(self) -> _Rolled:
        """Return the answers of the step to come. They are sampled once: no weight moves between two calls."""
        if self._rolled is None or self._rolled.step != self._next:
            self._rolled = self._roll(self._next)
        self._require_policy(self._rolled.figures)
        return self._rolled

    def _roll(self, step: int) -> _Rolled:
        recipe = self._recipe
        prompts = [one for one in self._text.batches.chosen(step) for _ in range(recipe.num_samples)]
        drawn = self.answers(prompts, temperature=recipe.temperature, seed=_seed(recipe.seed, step))
        rows = [
            Example([*one.prompt, *ids], [IGNORED] * len(one.prompt) + ids)
            for one, ids in zip(prompts, drawn, strict=True)
        ]
        logs_B, entropies_B = self._measured(rows)
        with self._untuned.inside():
            before_B, _ = self._measured(rows)
        kl_B = logs_B - before_B
        given_B = torch.tensor(self.rewards(prompts, drawn), dtype=torch.float64)
        rewards_B = given_B - recipe.beta * kl_B
        advantages_PK = leave_one_out(rewards_B.view(-1, recipe.num_samples))
        num_tokens = sum(map(len, drawn))
        batch = collate(rows, self._text.pad_id)
        batch |= {"advantages": advantages_PK.flatten().float(), "rewards": rewards_B.float()}
        figures = {
            "reward": float(given_B.mean()),
            "kl": float(kl_B.mean()),
            "entropy": float(entropies_B.sum()) / num_tokens,
            "length": num_tokens / len(drawn),
        }
        return _Rolled(step, batch, figures)

    def _measured(self, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
        return answer_figures(
            self._model,
            rows,
            pad_id=self._text.pad_id,
            temperature=self._recipe.temperature,
            precision=self._precision,
        )

    def _require_policy(self, figures: Mapping[str, float]) -> None:
        kl, entropy = figures["kl"], figures["entropy"]
        if kl > self._recipe.kl_limit:
            raise EndOfRun(
                "kl",
                f"answers are {kl:.1f} nats from the untuned emulator's, the limit is {self._recipe.kl_limit:g}",
                hint="lower --learning-rate, raise --rloo-beta, or raise --kl-limit",
            )
        if entropy < self._recipe.entropy_floor:
            raise EndOfRun(
                "entropy",
                f"a token's entropy is {entropy:.2g} nats, the floor is {self._recipe.entropy_floor:g}",
                hint="lower --learning-rate, raise --rloo-beta or --temperature, or lower --entropy-floor",
            )


class HeldOut:
    """The mean reward of the likeliest answers to held-out prompts."""

    def __init__(self, rollouts: Rollouts, examples: Sequence[Example]) -> None:
        self._rollouts, self._examples = rollouts, examples

    def measure(self) -> float:
        """Return it. Raises RunFailed when the model's output is not finite."""
        answers = self._rollouts.answers(self._examples, temperature=0.0)
        rewards = self._rollouts.rewards(self._examples, answers)
        return math.fsum(rewards) / len(rewards)

    def told(self, _model: nn.Module) -> float:
        """Return it negated, a loss, and say it.

        Raises:
            EndOfRun: when the policy has collapsed, whose weights are not to be kept.
        """
        self._rollouts.require_sound()
        reward = self.measure()
        say(f"held-out prompts: mean reward {reward:.4f} of greedy answers")
        return 0.0 - reward

    def figures(self, _model: nn.Module) -> dict[str, object]:
        """Return what the run's result says of the weights that are kept."""
        return {"reward": self.measure()}


def _seed(seed: int, step: int) -> int:
    digest = hashlib.blake2b(f"offsite/v1/rollouts/{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
