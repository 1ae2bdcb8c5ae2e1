"""What a model with a head says of texts, and how right it is: rewards of pairs, classes of rows.

A model *with a head* is a causal language model with a module ``score``, or one of transformers' classes for sequence
or token classification. Values are measured in `offsite.evaluation.regression`, tags in `offsite.evaluation.tags`.
The state that is read is that of the last token which is no padding token, as those classes have it.

Shapes: B rows, T tokens, D width, L labels, N texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from offsite.encoders.outputs import outputs, outputs_of
from offsite.encoders.trunk import is_encoder, is_encoder_config
from offsite.errors import RunFailed
from offsite.evaluation.measure import evaluating
from offsite.evaluation.preferences import preferred
from offsite.modelling.head import causal_lm, states_at
from offsite.text.batches import Example, collate
from offsite.vision.models import PIXELS

SCORE = "score"
"""Name of the module that is the head."""


def head_scores(model: nn.Module, batch: Mapping[str, Tensor], *, pad_id: int) -> Tensor:
    """Return the head's scores of every row, (B, L) float32, of tags those of every token, (B, T, L); differentiable.

    Args:
        model: with a head; the vocabulary's own head is not computed.
        batch: ``input_ids`` and ``attention_mask``, each (B, T) int64, or ``pixel_values``, on the model's device.
        pad_id: the tokenizer's padding token. A row's text that ends with it is read before it.

    Source: transformers, ``GenericForSequenceClassification``.
    """
    if PIXELS in batch:
        return _image_scores(causal_lm(model), batch)
    if is_encoder_config(causal_lm(model).config):
        return _encoder_scores(causal_lm(model), batch)
    states_BD = read_states(model, batch, pad_id=pad_id)
    weight_LD: Tensor = getattr(causal_lm(model), SCORE).weight
    with torch.autocast(states_BD.device.type, enabled=False):
        return states_BD.float() @ weight_LD.float().T


def _encoder_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of an encoder that carries a head, or of transformers' classifier of one, as `head_scores`."""
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    if not is_encoder(model):
        logits: Tensor = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return logits.float()
    states_BTD = outputs(model, ids_BT, mask_BT)
    with torch.autocast(states_BTD.device.type, enabled=False):
        scores: Tensor = getattr(model, SCORE)(states_BTD.float(), mask_BT)
    return scores.float()


def _image_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the scores (B, L) of a vision encoder that carries a head, or of transformers' classifier of one."""
    if not is_encoder(model):
        logits: Tensor = model(pixel_values=batch[PIXELS].to(next(model.parameters()).dtype)).logits
        return logits.float()
    states_BTD = outputs_of(model, batch)
    with torch.autocast(states_BTD.device.type, enabled=False):
        scores: Tensor = getattr(model, SCORE)(states_BTD.float())
    return scores.float()


def read_states(model: nn.Module, batch: Mapping[str, Tensor], *, pad_id: int) -> Tensor:
    """Return the state that a head reads of every row, (B, D) in the dtype of the pass."""
    ids_BT = batch["input_ids"]
    places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    last_B = (places_T * (ids_BT != pad_id)).argmax(-1)
    return states_at(model, batch, places_T == last_B[:, None])


def scores_of(
    model: nn.Module,
    rows: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the head's scores of every row, (N, L) float64 on the CPU. The model is neither moved nor changed.

    Args:
        precision: "bf16" runs the model under autocast; "fp32" runs it in the dtype it has.
        progress: called after each batch with rows done and rows in all.

    Raises:
        RunFailed: when one is not finite.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for row, scores_L in each_scored(
        model, rows, batch_size=batch_size, pad_id=pad_id, precision=precision, progress=progress
    ):
        found[row] = scores_L
    return torch.stack(found)


def each_scored(
    model: nn.Module,
    rows: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield every row's place and the head's scores of it, (L,) float64 on the CPU, of tags (T, L).

    Args:
        precision, progress: as of `scores_of`.

    Raises:
        RunFailed: when one is not finite.
    """
    place = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].input_ids), reverse=True)  # least padding
    with torch.no_grad(), evaluating(model), torch.autocast(place.type, torch.bfloat16, precision == "bf16"):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = collate([rows[row] for row in places], pad_id)
            scores = head_scores(model, {name: one.to(place) for name, one in batch.items()}, pad_id=pad_id)
            for row, one in zip(places, scores.cpu().double(), strict=True):
                said = one[: len(rows[row].input_ids)] if one.dim() > 1 else one
                if not bool(torch.isfinite(said).all()):
                    raise RunFailed("a head's score is not finite", hint="check the model: a weight may be NaN")
                yield row, said
            if progress is not None:
                progress(start + len(places), len(order))


def shares(scores_NL: Tensor) -> Tensor:
    """Return how a row's answer falls to the labels, (N, L) float64: to the highest, in equal parts where several are.

    So a head of zeros, which prefers nothing, is right by chance alone.
    """
    best_NL = scores_NL == scores_NL.amax(1, keepdim=True)
    return best_NL.double() / best_NL.sum(1, keepdim=True)


def accuracy(scores_NL: Tensor, targets: Sequence[int]) -> float:
    """Return the share of rows whose label has the highest score."""
    return float(shares(scores_NL)[torch.arange(len(targets)), torch.tensor(targets)].mean())


def macro_f1(scores_NL: Tensor, targets: Sequence[int]) -> float:
    """Return the mean of the labels' F1, each 2 TP / (2 TP + FP + FN); of labels that neither is nor is said, none."""
    said_NL = shares(scores_NL)
    true_NL = torch.zeros_like(said_NL)
    true_NL[torch.arange(len(targets)), torch.tensor(targets)] = 1
    hits_L, sizes_L = (said_NL * true_NL).sum(0), said_NL.sum(0) + true_NL.sum(0)
    return float((2 * hits_L[sizes_L > 0] / sizes_L[sizes_L > 0]).mean())


def margins(scores_N1: Tensor) -> list[float]:
    """Return of each pair by how much its chosen answer is rewarded above the other; the rows are the pairs' sides."""
    return (scores_N1[::2, 0] - scores_N1[1::2, 0]).tolist()


def head_figures(scores_NL: Tensor, targets: Sequence[int]) -> dict[str, float]:
    """Return the accuracy, of pairs where there are no targets, and of labels the macro-F1."""
    if not targets:
        return {"accuracy": preferred(margins(scores_NL))}
    return {"accuracy": accuracy(scores_NL, targets), "macro_f1": macro_f1(scores_NL, targets)}


def label_losses(scores_NL: Tensor, targets: Sequence[int]) -> list[float]:
    """Return the cross-entropy in nats of each row's label."""
    return (-scores_NL.log_softmax(1)[torch.arange(len(targets)), torch.tensor(targets)]).tolist()


def pair_losses(scores_N1: Tensor) -> list[float]:
    """Return -log sigmoid(reward of the chosen answer - reward of the rejected one) of each pair, in nats."""
    return [math.log1p(math.exp(-abs(one))) + max(-one, 0.0) for one in margins(scores_N1)]
