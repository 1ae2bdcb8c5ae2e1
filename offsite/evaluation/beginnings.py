"""Several answers to one prompt scored with the prompt read once: its keys and values are kept and shared by them.

That is exact, but for rounding, where a model keeps of its past the keys and values of every token and nothing else. A
model that keeps a state, or a window of its past, is asked in the plain way: every answer behind the whole prompt. So
is one whose cache is tried and found to change its scores, and one of several passes (``--mix``, ``--offset``).

Shapes: N answers, T tokens, S tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offsite.errors import RunFailed
from offsite.evaluation.measure import evaluating
from offsite.evaluation.preferences import log_probabilities
from offsite.modelling.head import causal_lm
from offsite.modelling.precision import in_float32
from offsite.modelling.steps import TOLERANCE, empty_cache
from offsite.text.batches import IGNORED, Example

LEAST_TOKENS = 8
"""A shorter beginning is read again for every answer: that takes fewer passes."""

_TOKENS_AT_ONCE = 2048
"""Tokens, the beginning's counted for every answer, that are kept for several answers in one pass, where they fit."""

_PROBE = ((5, 2, 9, 1, 7, 3, 8, 4, 6, 2, 1, 9), ((3, 5), (8, 1, 4, 2), (6,)))
"""A beginning, and answers of several lengths: their ends are padded, and the longest does not stand last."""


def log_probabilities_behind(
    model: nn.Module,
    rows: Sequence[Sequence[Example]],
    *,
    batch_size: int,
    pad_id: int,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> list[list[float]]:
    """Return how probable what counts in each row is to the model, in nats, as `log_probabilities` does.

    Args:
        rows: those of one prompt together, each that prompt with an answer, of which the answer counts.
        batch_size: rows in one forward pass; of short answers behind a shared prompt, more.

    Raises:
        RunFailed: when one is not finite.
    """
    shared: list[Sequence[Example]] = []
    if any(_shared_tokens(several) for several in rows) and shares_beginnings(model):
        shared = [several for several in rows if _shared_tokens(several)]
    chosen = {id(several) for several in shared}
    plain = [row for several in rows if id(several) not in chosen for row in several]
    how: dict[str, Any] = {"batch_size": batch_size, "pad_id": pad_id, "precision": precision}
    logs = iter(log_probabilities(model, plain, **how) if plain else [])
    place = next(model.parameters()).device
    found = []
    for several in rows:
        if id(several) not in chosen:
            found.append([next(logs) for _ in several])
            continue
        with torch.no_grad(), evaluating(model), torch.autocast(place.type, torch.bfloat16, precision == "bf16"):
            found.append(_behind(model, several, batch_size=batch_size, pad_id=pad_id))
    return found


def shares_beginnings(model: nn.Module) -> bool:
    """Tell whether answers behind one beginning may share its keys and values: of which kind they are, and by trial.

    A model is tried once: an adapter that is put on changes what it says, not what it keeps. Those of lower precision
    are tried again in float32 before they are doubted.
    """
    lm = causal_lm(model)
    if "before_head" in vars(lm) or "forward" in vars(lm) or not hasattr(lm, "_supports_default_dynamic_cache"):
        return False
    if "past_key_values" not in inspect.signature(lm.forward).parameters or not _keeps_every_token(lm):
        return False
    if lm not in _TRIED:
        _TRIED[lm] = _is_right(lm)
    return _TRIED[lm]


_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What came of the trial of models that are in memory."""


def _is_right(lm: Any) -> bool:
    deviation = _deviation(lm)
    if not deviation <= TOLERANCE and any(parameter.dtype != torch.float32 for parameter in lm.parameters()):
        with in_float32(lm):
            deviation = _deviation(lm)
    return deviation <= TOLERANCE


@dataclass(frozen=True)
class Beginning:
    """A beginning that a model has read, all but its last token, and what it keeps of that."""

    lm: Any
    last: int
    num_tokens: int
    kept: Any

    @classmethod
    def read(cls, lm: Any, ids: Sequence[int]) -> Beginning:
        """Return the beginning `ids`, two tokens at least, read by a model that `shares_beginnings`."""
        ids_1T = torch.tensor([list(ids[:-1])], device=next(lm.parameters()).device)
        cache = empty_cache(lm)
        least = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
        with torch.no_grad():
            lm(input_ids=ids_1T, use_cache=True, **cache, **least)
        return cls(lm, ids[-1], len(ids) - 1, cache["past_key_values"])

    def scores(self, answers: Sequence[Sequence[int]], *, batch_size: int, pad_id: int) -> Iterator[Tensor]:
        """Yield the scores of every token of every answer, (tokens, V) in the model's dtype, each shared with others.

        Args:
            answers: tokens behind the beginning, one at least of each.
            batch_size: answers in one pass at least; more where what is kept of them is little.
        """
        from transformers import DynamicCache

        at_once = max(batch_size, _TOKENS_AT_ONCE // (self.num_tokens + max(map(len, answers))))
        for start in range(0, len(answers), at_once):
            part = answers[start : start + at_once]
            read = [[self.last, *one[:-1]] for one in part]
            longest = max(map(len, read))
            device = next(self.lm.parameters()).device
            ids_NS = torch.tensor([one + [pad_id] * (longest - len(one)) for one in read], device=device)
            mask_NT = torch.ones((len(part), self.num_tokens + longest), dtype=torch.int64, device=device)
            for row, one in enumerate(read):
                mask_NT[row, self.num_tokens + len(one) :] = 0
            past = [(layer.keys, layer.values) for layer in self.kept.layers]
            spread = [tuple(one.expand(len(part), *one.shape[1:]) for one in pair) for pair in past]
            given: dict[str, Any] = {"past_key_values": DynamicCache(spread), "attention_mask": mask_NT}
            if "position_ids" in inspect.signature(self.lm.forward).parameters:
                places_S = torch.arange(self.num_tokens, self.num_tokens + longest, device=device)
                given["position_ids"] = places_S.expand_as(ids_NS)
            with torch.no_grad():
                scores_NSV = self.lm(input_ids=ids_NS, use_cache=True, **given).logits
            for one, scores_SV in zip(read, scores_NSV, strict=True):
                yield scores_SV[: len(one)]


def _behind(model: nn.Module, rows: Sequence[Example], *, batch_size: int, pad_id: int) -> list[float]:
    """Return the log-probability of what counts in rows that begin alike."""
    num = _shared_tokens(rows)
    beginning = Beginning.read(causal_lm(model), rows[0].input_ids[:num])
    answers = [row.input_ids[num:] for row in rows]
    found = []
    scored = beginning.scores(answers, batch_size=batch_size, pad_id=pad_id)
    for row, answer, scores_SV in zip(rows, answers, scored, strict=True):
        with torch.autocast(scores_SV.device.type, enabled=False):
            logs_SV = scores_SV.float().log_softmax(-1)
        targets_S = torch.tensor(answer, device=logs_SV.device)
        counted_S = torch.tensor([label != IGNORED for label in row.labels[num:]], device=logs_SV.device)
        found.append(float(logs_SV.gather(1, targets_S[:, None])[:, 0][counted_S].double().sum()))
    if not all(map(math.isfinite, found)):
        raise RunFailed("an answer's log-probability is not finite", hint="check the model: a weight may be NaN")
    return found


def _shared_tokens(rows: Sequence[Example]) -> int:
    """Return how many tokens rows begin with alike, before anything counts; 0 where to share them is not worth it."""
    if len(rows) < 2 or any(row.source for row in rows):
        return 0
    firsts = [next((place for place, one in enumerate(row.labels) if one != IGNORED), 0) for row in rows]
    num = min(*firsts, *(len(row.input_ids) - 1 for row in rows))
    first = rows[0].input_ids
    while num and any(row.input_ids[:num] != first[:num] for row in rows):
        num -= 1
    return num if num >= LEAST_TOKENS else 0


def _keeps_every_token(lm: Any) -> bool:
    """Tell whether the cache that the model is given keeps keys and values of every token, and nothing else."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = empty_cache(lm).get("past_key_values")
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def _deviation(lm: Any) -> float:
    """Return how far the scores of answers that share a beginning are from those behind it, relative to their size.

    It is infinite where the cache cannot be used.
    """
    device, num_known = next(lm.parameters()).device, int(lm.get_input_embeddings().weight.shape[0])
    start = [one % num_known for one in _PROBE[0]]
    answers = [[one % num_known for one in several] for several in _PROBE[1]]
    difference = scale = 0.0
    with torch.no_grad(), evaluating(lm):
        try:
            found = list(Beginning.read(lm, start).scores(answers, batch_size=len(answers), pad_id=0))
        except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return math.inf  # transformers names no error for a cache that an architecture does not bear
        for answer, scores_SV in zip(answers, found, strict=True):
            ids_1T = torch.tensor([[*start, *answer[:-1]]], device=device)
            plain_SV = lm(input_ids=ids_1T, use_cache=False).logits[0, len(start) - 1 :].double()
            difference += float((scores_SV.double() - plain_SV).square().sum())
            scale += float((plain_SV - plain_SV.mean(-1, keepdim=True)).square().sum())
    if not math.isfinite(scale):
        return 0.0  # whoever asks for scores hears of it
    return math.sqrt(difference / scale) if scale else math.sqrt(difference)
