"""What canaries show of one training: membership of the synthetic ones, a bound on epsilon, exposure of the secrets.

Two models are scored, the tuned one and the one it was before. They need not be in memory together: `score_canaries`
takes one, `audit_canaries` puts the two scores together and needs no model.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from offsite.audits.canaries import CanarySet, synthetic_records
from offsite.audits.extraction import Extracted, exposures, extracted
from offsite.audits.lowerbound import one_run_epsilon
from offsite.audits.membership import membership_of
from offsite.audits.record import (
    DECLARED_SIGNAL,
    CanaryAudit,
    EpsilonBound,
    Exposure,
)
from offsite.audits.scores import Floats, RowScores, score_rows, signals
from offsite.console import progress
from offsite.errors import DataError
from offsite.evaluation.sampling import Precision
from offsite.modelling.context import context_of
from offsite.text.batches import Example, encode, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_SAMPLES = 50


@dataclass(frozen=True)
class CanaryScores:
    """What one model says of the canaries.

    Attributes:
        rows: of every synthetic canary, in the set's order.
        bits: exposure of every secret that was trained on.
        extracted: None where nothing was tried to be read back out.
    """

    rows: RowScores
    bits: Floats = field(repr=False)
    extracted: Extracted | None


def score_canaries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    canaries: CanarySet,
    *,
    label: str,
    extract: bool,
    batch_size: int = 32,
    precision: Precision = "fp32",
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> CanaryScores:
    """Return what the model says of the canaries; progress is shown under `label`. The model is not changed.

    Args:
        extract: try to read the secrets back out too, as of the tuned model.
        num_samples: draws for each secret.

    Raises:
        DataError: when a canary has no token to score, or a secret is longer than the model's context.
        RunFailed: when a loss is not finite.
    """
    examples = canary_examples(model, tokenizer, canaries)
    with progress(len(examples), f"{label}: canaries") as bar:
        rows = score_rows(
            model,
            examples,
            batch_size=batch_size,
            pad_id=pad_id(tokenizer),
            limit_tokens=canaries.tokens,
            precision=precision,
            progress=lambda done, _: bar.update(done),
        )
    planted = canaries.planted
    if not planted:
        return CanaryScores(rows, np.zeros(0), None)
    with progress(len(planted) * canaries.num_candidates, f"{label}: candidates of secrets") as bar:
        bits = exposures(
            model,
            tokenizer,
            canaries,
            batch_size=batch_size,
            precision=precision,
            progress=lambda done, _: bar.update(done),
        )
    if not extract:
        return CanaryScores(rows, bits, None)
    found = read_out(
        model,
        tokenizer,
        canaries,
        label=label,
        batch_size=batch_size,
        precision=precision,
        num_samples=num_samples,
        seed=seed,
    )
    return CanaryScores(rows, bits, found)


def read_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    canaries: CanarySet,
    *,
    label: str,
    batch_size: int = 32,
    precision: Precision = "fp32",
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> Extracted | None:
    """Return which secrets that were trained on the model says; None where there are none.

    Raises:
        DataError, RunFailed: as `score_canaries`.
    """
    planted = canaries.planted
    if not planted:
        return None
    with progress(len(planted) * (1 + num_samples), f"{label}: secrets asked for") as bar:
        return extracted(
            model,
            tokenizer,
            planted,
            num_samples=num_samples,
            seed=seed,
            batch_size=batch_size,
            precision=precision,
            progress=lambda done, _: bar.update(done),
        )


def canary_examples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, canaries: CanarySet) -> list[Example]:
    """Return every synthetic canary as tokens, cut where the model's context ends.

    Raises:
        DataError: when one has no token to score.
    """
    context = context_of(model)
    longest = canaries.tokens + 2  # what a tokenizer may put before and behind
    encoded = encode(
        synthetic_records(canaries), tokenizer, context=longest if context is None else min(longest, context)
    )
    if len(encoded.examples) != len(canaries.synthetic):
        raise DataError(f"{encoded.num_dropped} of {len(canaries.synthetic)} canaries have no token to score")
    return encoded.examples


def audit_canaries(
    canaries: CanarySet,
    commitment: str,
    *,
    tuned: CanaryScores,
    untuned: CanaryScores,
    delta: float,
    confidence: float = 0.95,
    drawn_share: float = 1.0,
) -> CanaryAudit:
    """Return the audit of one training by its canaries.

    The bound goes by `DECLARED_SIGNAL` alone: nothing is chosen by looking at the result. There is neither membership
    nor a bound when all coins fell on one side.

    Args:
        canaries: of a run too short to draw all of them, those of `offsite.audits.canaries.drawn_only`.
        commitment: the digest committed to.
        drawn_share: how much of what was to be trained on was drawn. For the bound, as large a share of those left out
            is drawn by the commitment's digest: of the rest a coin still says whether they are in.
        tuned: with secrets tried to be read back out, where any was trained on.
        delta: of the claim that the bound may refute.

    Raises:
        ConfigError: when the scores are not of these canaries, the coins cannot have been fair, or SciPy is missing.
        RunFailed: when a score is NaN.
    """
    coins = np.array([canary.included for canary in canaries.synthetic])
    by_signal = signals(tuned.rows, untuned.rows)
    both = bool(coins.any() and not coins.all())
    bound = None
    counted = coins | _kept(len(coins), commitment, drawn_share)
    if both and not coins[counted].all():
        declared = by_signal[DECLARED_SIGNAL]
        bound = _bound(declared[coins], declared[counted & ~coins], delta, confidence)
    return CanaryAudit(
        commitment=commitment,
        num=len(coins),
        num_included=int(coins.sum()),
        membership=tuple(
            membership_of(name, scores[coins], scores[~coins], confidence) for name, scores in by_signal.items() if both
        ),
        bound=bound,
        exposure=_exposure(canaries, tuned, untuned),
    )


def _kept(num: int, commitment: str, share: float) -> NDArray[np.bool_]:
    """Return of so many canaries about this share, whatever their coins and scores: (num,) bool."""
    draw = random.Random(f"offsite/v1/canaries-kept/{commitment}")  # noqa: S311 - not a secret
    return np.array([draw.random() < share for _ in range(num)], dtype=np.bool_)


def _bound(inside: Floats, outside: Floats, delta: float, confidence: float) -> EpsilonBound:
    found = one_run_epsilon(inside, outside, delta, confidence)
    declared = ", ".join(str(number) for number in found.declared)
    return EpsilonBound(
        signal=DECLARED_SIGNAL,
        epsilon=found.epsilon,
        delta=found.delta,
        confidence=found.confidence,
        num_canaries=found.num_canaries,
        num_guesses=found.num_guesses,
        num_correct=found.num_correct,
        declared=found.declared,
        rule=f"{found.rule}: {declared} guesses, in and out" if found.sides == "both" else f"{found.rule}: {declared}",
        ceiling=found.ceiling,
    )


def _exposure(canaries: CanarySet, tuned: CanaryScores, untuned: CanaryScores) -> Exposure | None:
    if not canaries.planted or tuned.extracted is None:
        return None
    return Exposure(
        num_secrets=len(canaries.planted),
        num_candidates=canaries.num_candidates,
        repeats=canaries.repeats,
        bits=tuple(tuned.bits.tolist()),
        bits_before=tuple(untuned.bits.tolist()),
        most_bits=math.log2(canaries.num_candidates),
        num_extracted_greedy=tuned.extracted.num_greedy,
        num_extracted_top_k=tuned.extracted.num_top_k,
        num_samples=tuned.extracted.num_samples,
    )
