"""Continuations sampled from a causal language model, for many prompts at once.

Prompts of one length go together, so that no padding stands before a token: what comes out does not depend on which
prompts were given beside it, but for rounding.

Shapes: B = prompts in a batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offsite.errors import ConfigError, RunFailed
from offsite.evaluation.measure import evaluating
from offsite.modelling.steps import Steps, cache_is_right

Precision = Literal["fp32", "bf16"]


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    without: Sequence[int] = (),
    precision: Precision = "fp32",
    progress: Callable[[int, int], None] | None = None,
    end: int | None = None,
    cached: bool | None = None,
) -> list[list[int]]:
    """Return the `num_tokens` tokens that follow each prompt, in the prompts' order.

    Without `end` an end-of-sequence token ends nothing: every answer has the same length. The model is neither moved
    nor changed; a cache of its that goes wrong is not used.

    Args:
        temperature: 0 takes the likeliest token every time; otherwise what logits are divided by.
        top_k: draw among so many likeliest tokens only; 0 for all of them.
        top_p: draw among the fewest likeliest tokens that together are at least so likely; 1 for all of them.
        seed: of the draws; the same prompts and batches then give the same answers on one device.
        without: tokens that are never chosen.
        progress: called after each batch with prompts done and prompts in all.
        end: token that ends an answer, and is its last.
        cached: whether the model's cache is used, where the caller has tried it (`cache_is_right`); tried by default.

    Raises:
        ConfigError: when a number is out of range, or a prompt is empty.
        RunFailed: when a logit is NaN.
    """
    if num_tokens < 1 or batch_size < 1 or temperature < 0 or top_k < 0 or not all(prompts):
        raise ConfigError("prompts, tokens and batches of at least one, temperature and top-k not below zero expected")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top-p {top_p}, expected above 0 and at most 1")
    place = next(model.parameters()).device
    generator = torch.Generator(device=place).manual_seed(seed)
    found: list[list[int]] = [[] for _ in prompts]
    done = 0
    if cached is None:
        with evaluating(model):
            cached = num_tokens > 1 and bool(prompts) and cache_is_right(model, batch_size=batch_size)
    for rows in _alike(prompts, batch_size):
        prompts_BT = torch.tensor([list(prompts[row]) for row in rows], device=place)
        with torch.no_grad(), evaluating(model), torch.autocast(place.type, torch.bfloat16, precision == "bf16"):
            steps, chosen = Steps(model, prompts_BT, cached=cached), list[Tensor]()
            ended_B = torch.zeros(len(rows), dtype=torch.bool, device=place)
            for _ in range(num_tokens):
                logits_BV = steps.logits()
                if bool(logits_BV.isnan().any()):
                    raise RunFailed("the model's output is not finite", hint="check the model: a weight may be NaN")
                logits_BV[:, list(without)] = -torch.inf
                chosen.append(_choose(logits_BV, temperature, top_k, top_p, generator))
                steps.add(chosen[-1])
                ended_B |= chosen[-1] == (-1 if end is None else end)
                if bool(ended_B.all()):
                    break
        for row, ids in zip(rows, torch.stack(chosen, 1).tolist(), strict=True):
            found[row] = ids[: ids.index(end) + 1] if end in ids else ids
        done += len(rows)
        if progress is not None:
            progress(done, len(prompts))
    return found


def _alike(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield places of prompts that are equally long, at most `batch_size` at a time."""
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(row)
    for rows in by_length.values():
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def _choose(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    if 0 < top_k < logits_BV.shape[1]:
        least_B1 = logits_BV.topk(top_k, -1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    shares_BV = (logits_BV / temperature).softmax(-1).double()
    if top_p < 1:
        sorted_BV = shares_BV.sort(-1, descending=True).values
        num_B1 = ((sorted_BV.cumsum(-1) - sorted_BV) < top_p).sum(-1, keepdim=True)
        shares_BV = shares_BV.masked_fill(shares_BV < sorted_BV.gather(-1, num_B1 - 1), 0.0)
    upto_BV = shares_BV.cumsum(-1)  # one draw a row; multinomial makes V of them
    drawn_B1 = torch.rand((len(upto_BV), 1), generator=generator, dtype=torch.float64, device=upto_BV.device)
    found_B1 = torch.searchsorted(upto_BV, drawn_B1 * upto_BV[:, -1:], right=True)
    return found_B1[:, 0].clamp_max(upto_BV.shape[1] - 1)
