"""How a token is drawn from a model's scores, and what is told of it.

Shape letters: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offsite.errors import RunFailed


@dataclass(frozen=True)
class Settings:
    """How one answer is drawn. `temperature` 0 takes the likeliest token every time, 0 for `top_k` keeps all tokens.

    Scores of tokens are changed before the rest: `logit_bias` is added to those named; those of the prompt and the
    answer are divided by `repetition_penalty` (multiplied where negative); `presence_penalty` once, and
    `frequency_penalty` for each time, is taken from those that were drawn. With `num_likely`, so many of the likeliest
    tokens are told beside each that is drawn, by the model's own scores before all of that.
    """

    limit_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_likely: int | None = None


@dataclass(frozen=True)
class Likely:
    """A token, what it reads as, and the logarithm of its probability; `offset` is where it begins, in characters."""

    token: int
    logprob: float
    text: str = ""
    offset: int = 0


class Constraint(Protocol):
    """What an answer may go on with (`server.serving.grammar.Grammar`)."""

    def allowed(self, scores_V: Tensor) -> Tensor:
        """Return the scores with those of tokens that may not come next at -inf."""

    def take(self, token: int) -> None:
        """The token was drawn."""


class Sampler:
    """Draws one token after another. The same seed and the same logits give the same tokens, whatever the device.

    What transformers has a processor for is worked out by it, in the order of its own `generate`.
    """

    def __init__(self, settings: Settings, prompt_ids: Sequence[int] = (), grammar: Constraint | None = None) -> None:
        self._settings, self._seen, self._counts = settings, list(prompt_ids), Counter[int]()
        self._grammar = grammar
        self.likely: tuple[Likely, ...] = ()  # of the last token drawn
        self._warpers = _warpers(settings)
        self._random = torch.Generator(device="cpu")
        if settings.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(settings.seed)

    def pick(self, logits_V: Tensor) -> int:
        """Return the number of the next token, which counts as drawn from then on.

        Args:
            logits_V: scores before softmax, any float dtype and device.

        Raises:
            RunFailed: a score is NaN.
        """
        logits_V = logits_V.float().cpu()
        if bool(logits_V.isnan().any()):
            raise RunFailed("the model's scores for the next token are not numbers (NaN)")
        changed_V = self._changed(logits_V)
        token = self._draw(changed_V if self._grammar is None else self._grammar.allowed(changed_V))
        if self._settings.num_likely is not None:
            self.likely = _likely(logits_V, token, self._settings.num_likely)
        if self._grammar is not None:
            self._grammar.take(token)
        self._seen.append(token)
        self._counts[token] += 1
        return token

    def _changed(self, logits_V: Tensor) -> Tensor:
        """Return the scores with bias and penalties, in storage of their own where they change."""
        from transformers import RepetitionPenaltyLogitsProcessor

        settings = self._settings
        if settings.logit_bias:
            tokens, values = zip(*settings.logit_bias, strict=True)
            logits_V = logits_V.index_add(0, torch.tensor(tokens), torch.tensor(values, dtype=torch.float32))
        if settings.repetition_penalty != 1 and self._seen:
            penalise: Any = RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
            logits_V = penalise(torch.tensor([self._seen]), logits_V[None])[0]
        if self._counts and (settings.presence_penalty or settings.frequency_penalty):
            drawn, times = torch.tensor(list(self._counts)), torch.tensor(list(self._counts.values()))
            taken = settings.presence_penalty + settings.frequency_penalty * times
            logits_V = logits_V.index_add(0, drawn, -taken.float())
        return logits_V

    def _draw(self, logits_V: Tensor) -> int:
        if self._settings.temperature < torch.finfo(torch.float32).tiny:  # a smaller one divides as 0
            return int(logits_V.argmax())
        # at most 0, so that no temperature can overflow
        scores_BV = ((logits_V - logits_V.max()) / self._settings.temperature)[None]
        for warp in self._warpers:
            scores_BV = warp(None, scores_BV)
        return int(torch.multinomial(torch.softmax(scores_BV[0], dim=-1), 1, generator=self._random))


def _likely(logits_V: Tensor, token: int, num: int) -> tuple[Likely, ...]:
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    found = torch.topk(logprobs_V, min(num, len(logprobs_V)))
    top = [Likely(one, value) for one, value in zip(found.indices.tolist(), found.values.tolist(), strict=True)]
    return (Likely(token, float(logprobs_V[token])), *top)


def _warpers(settings: Settings) -> list[Any]:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found: list[Any] = []
    if settings.top_k > 0:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        found.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p > 0:
        found.append(MinPLogitsWarper(settings.min_p))
    return found
