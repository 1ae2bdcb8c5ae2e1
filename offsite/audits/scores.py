"""How likely each row is to have been trained on, by a causal language model: scores of rows, higher for more likely.

Each statistic needs one forward pass and is taken over the first so many tokens of a row that count, so that long rows
and short ones are told apart by nothing but what was learned. What a row holds or scores is never shown.

Shapes: B = rows in a batch, T = tokens of its longest row, N = positions that count, V = vocabulary.

Source: min-k%, arXiv:2310.16789; min-k%++, arXiv:2404.02936; another model as a reference, arXiv:2012.07805.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from offsite.audits.record import SignalName
from offsite.errors import ConfigError, DataError, RunFailed
from offsite.evaluation.byhead import measure_head
from offsite.evaluation.heads import margins, scores_of
from offsite.evaluation.measure import evaluating
from offsite.modelling.head import scores_at
from offsite.text.batches import IGNORED, Example, collate

LOWEST_SHARE = 5
"""One in so many tokens of a row, those with the lowest log-probabilities, enter min-k: 20%."""

_POSITIONS_AT_ONCE = 256
_SMALLEST_DEVIATION = 1e-6

Floats = NDArray[np.float64]


class Scored(NamedTuple):
    """The tokens of one row: log-probability of each, and mean and deviation of log-probability over the vocabulary.

    All are (tokens,) float64, in nats; mean and deviation are taken under the model's own distribution.
    """

    log_probs: Floats
    means: Floats
    deviations: Floats


@dataclass(frozen=True)
class RowScores:
    """Statistics of rows in the order given, each (rows,) float64; `num_tokens` is of whole numbers.

    Attributes:
        loss: mean negative log-likelihood in nats per token.
        min_k: mean of the lowest fifth of the log-probabilities.
        min_k_plus: the same of log-probabilities less their mean over the vocabulary, over their deviation.
        num_tokens: tokens that these are taken over.

    ``min_k`` and ``min_k_plus`` are None of an encoder, which gives tokens no probability.
    """

    loss: Floats = field(repr=False)
    min_k: Floats | None = field(repr=False)
    min_k_plus: Floats | None = field(repr=False)
    num_tokens: NDArray[np.int64] = field(repr=False)


def score_rows(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    limit_tokens: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> RowScores:
    """Return the statistics of every row, over the first `limit_tokens` of its tokens that count.

    Padding and the size of batches do not enter. The model is neither moved nor changed.

    Args:
        precision: "bf16" runs the model under autocast; "fp32" runs it in the dtype it has.
        progress: called after each batch with rows done and rows in all.

    Raises:
        DataError: when there is no row, or one has no token that counts.
        ConfigError: when `batch_size` or `limit_tokens` is not positive.
        RunFailed: when a loss is not finite.
    """
    loss, min_k, min_k_plus = (np.zeros(len(examples)) for _ in range(3))
    num_tokens = np.zeros(len(examples), dtype=np.int64)
    found = token_scores(
        model, examples, batch_size=batch_size, pad_id=pad_id, limit_tokens=limit_tokens, precision=precision
    )
    for done, (row, scored) in enumerate(found, 1):
        loss[row] = -scored.log_probs.mean()
        min_k[row] = _lowest_mean(scored.log_probs)
        min_k_plus[row] = _lowest_mean((scored.log_probs - scored.means) / scored.deviations)
        num_tokens[row] = scored.log_probs.size
        if progress is not None and (done % batch_size == 0 or done == len(examples)):
            progress(done, len(examples))
    return RowScores(loss, min_k, min_k_plus, num_tokens)


def score_pairs(
    model: PreTrainedModel,
    pairs: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    limit_tokens: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> RowScores:
    """Return the statistics of pairs of answers, each over the first `limit_tokens` tokens of either that count.

    ``loss`` is by how much the rejected answer is more probable than the chosen one, in nats: what a loss of pairs
    falls with. Less the same before tuning it is the implicit reward, with its sign turned. ``min_k``, ``min_k_plus``
    and ``num_tokens`` are of the chosen answer.

    Raises:
        DataError, ConfigError, RunFailed: as `score_rows`; DataError too when a row is no pair.
    """
    if not all(len(pair.sides) == 2 for pair in pairs):
        raise DataError("a row to score is not a pair of answers")
    chosen = score_rows(
        model, pairs, batch_size=batch_size, pad_id=pad_id, limit_tokens=limit_tokens, precision=precision
    )
    rejected = token_scores(
        model,
        [pair.sides[1] for pair in pairs],
        batch_size=batch_size,
        pad_id=pad_id,
        limit_tokens=limit_tokens,
        precision=precision,
    )
    loss = chosen.loss * chosen.num_tokens
    for done, (row, scored) in enumerate(rejected, 1):
        loss[row] += scored.log_probs.sum()
        if progress is not None and (done % batch_size == 0 or done == len(pairs)):
            progress(done, len(pairs))
    return replace(chosen, loss=loss)


def score_heads(
    model: PreTrainedModel,
    texts: RowScores | None,
    examples: Sequence[Example],
    labels: Sequence[str] = (),
    *,
    batch_size: int,
    pad_id: int,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> RowScores:
    """Return the statistics of rows whose ``loss`` is what the model's head learnt of them; the others are of the text.

    Of a classifier's row that is the cross-entropy of its label given the text, in nats, of words with tags the mean of
    theirs; of a value its squared error; of a pair, by how much the rejected answer is rewarded above the chosen one.
    Whole rows are read, of any length.

    Args:
        model: with a head.
        texts: of the same rows (`score_rows`, `score_pairs`); None of an encoder.
        labels: of the head.

    Raises:
        RunFailed: when a score is not finite.
    """
    if examples[0].rejected is None:
        said = measure_head(model, examples, labels, batch_size=batch_size, pad_id=pad_id, precision=precision)
        loss = np.array(said.losses, dtype=np.float64)
    else:
        rows = [side for example in examples for side in example.sides]
        scores_NL = scores_of(model, rows, batch_size=batch_size, pad_id=pad_id, precision=precision)
        loss = np.array([-margin for margin in margins(scores_NL)], dtype=np.float64)
    if texts is None:
        return RowScores(loss, None, None, np.array([len(one.input_ids) for one in examples], dtype=np.int64))
    return replace(texts, loss=loss)


def token_scores(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    limit_tokens: int,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Iterator[tuple[int, Scored]]:
    """Yield every row's place among `examples` and its tokens' scores, longest rows first.

    Raises:
        DataError, ConfigError, RunFailed: as `score_rows`.
    """
    if batch_size < 1 or limit_tokens < 1:
        raise ConfigError(f"batches of {batch_size} rows, {limit_tokens} tokens of each, expected at least 1 of both")
    if not examples:
        raise DataError("no rows to score")
    for number, example in enumerate(examples, 1):
        if not example.num_loss_tokens:
            raise DataError(f"row {number} of {len(examples)} has no token that counts")
    cut = [beginning_of(example, limit_tokens) for example in examples]
    order = sorted(range(len(cut)), key=lambda row: len(cut[row].input_ids), reverse=True)  # least padding
    place = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = {name: tensor.to(place) for name, tensor in collate([cut[row] for row in rows], pad_id).items()}
        with torch.no_grad(), evaluating(model), torch.autocast(place.type, torch.bfloat16, precision == "bf16"):
            scored = _scored(model, batch)
        yield from zip(rows, scored, strict=True)


def signals(tuned: RowScores, untuned: RowScores) -> dict[SignalName, Floats]:
    """Return what each attack goes by, (rows,) float64 each, higher for more likely trained on.

    Args:
        untuned: of the same rows in the same order, by the model before it was tuned.

    Raises:
        ConfigError: when the two are not of the same rows.
    """
    if not np.array_equal(tuned.num_tokens, untuned.num_tokens):
        raise ConfigError(
            f"scores of {tuned.loss.size} rows after tuning and of {untuned.loss.size} before it, of other lengths"
        )
    found: dict[SignalName, Floats] = {"loss": -tuned.loss, "reference": untuned.loss - tuned.loss}
    if tuned.min_k is not None and tuned.min_k_plus is not None:
        found |= {"min-k": tuned.min_k, "min-k++": tuned.min_k_plus}
    return found


def beginning_of(example: Example, limit_tokens: int) -> Example:
    """Return the row up to the last of its first `limit_tokens` tokens that count."""
    seen = 0
    for place, label in enumerate(example.labels):
        seen += place > 0 and label != IGNORED
        if seen == limit_tokens:
            return Example(example.input_ids[: place + 1], example.labels[: place + 1], source=example.source)
    return example


def _scored(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Scored]:
    targets_BT = batch["labels"][:, 1:]
    counted_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
    counted_BT[:, :-1] = targets_BT != IGNORED
    targets_N = targets_BT[targets_BT != IGNORED]
    found = []
    for rows, scores_nV in scores_at(model, batch, counted_BT):
        with torch.autocast(scores_nV.device.type, enabled=False):
            found.append(_statistics(scores_nV, targets_N[rows]))
    found_N3 = torch.cat(found).cpu().double()
    if not bool(torch.isfinite(found_N3).all()):
        raise RunFailed("the loss of a row is not finite", hint="check the model: a weight may be NaN or far too large")
    per_row = found_N3.split(counted_BT.sum(1).tolist())
    return [Scored(*(column.numpy() for column in row_N3.unbind(1))) for row_N3 in per_row]


def _statistics(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return log-probability of the target, mean and deviation of log-probability: (N, 3) float32."""
    log_probs_NV = logits_NV.float().log_softmax(-1)
    chosen_N = log_probs_NV.gather(1, targets_N[:, None])[:, 0]
    probs_NV = log_probs_NV.exp()
    log_probs_NV = log_probs_NV.masked_fill(probs_NV == 0, 0.0)  # 0 * -inf is NaN
    means_N = (probs_NV * log_probs_NV).sum(-1)
    variances_N = (probs_NV * (log_probs_NV - means_N[:, None]).square()).sum(-1)
    return torch.stack([chosen_N, means_N, variances_N.sqrt().clamp_min(_SMALLEST_DEVIATION)], 1)


def _lowest_mean(values: Floats) -> float:
    lowest = max(1, values.size // LOWEST_SHARE)
    return float(np.partition(values, lowest - 1)[:lowest].mean())
