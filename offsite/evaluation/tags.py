"""How right a head is about the tags of words: every word, and whole entities where tags say where one begins.

Tags are of *entities* where each is ``O``, or begins with ``B-`` or ``I-`` and goes on with a type (IOB2). An entity
is then counted as right only with both of its ends and its type: micro-averaged F1 as seqeval defines it by default,
where an ``I-`` behind another type or behind nothing begins an entity as ``B-`` does. Other label sets have the mean of
the labels' F1 instead.

Words are the tokens that carry a tag: the first of each word, within the length at which rows are cut.

Shapes: W words of a row, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from offsite.evaluation.heads import accuracy, each_scored, label_losses, macro_f1, shares
from offsite.text.batches import IGNORED, Example

OUTSIDE = "O"

Span = tuple[str, int, int]
"""An entity: its type, its first word and its last."""


def tag_scores(
    model: nn.Module,
    rows: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Return the head's scores of every row's words, (W, L) float64 each on the CPU. The model is not changed.

    Raises:
        RunFailed: when one is not finite.
    """
    found = [torch.empty(0)] * len(rows)
    scored = each_scored(model, rows, batch_size=batch_size, pad_id=pad_id, precision=precision, progress=progress)
    for row, scores_TL in scored:
        found[row] = scores_TL[torch.tensor(rows[row].labels) != IGNORED]
    return found


def targets_of(row: Example) -> list[int]:
    """Return the places of the tags of the row's words."""
    return [label for label in row.labels if label != IGNORED]


def tag_losses(scores_WL: Tensor, targets: Sequence[int]) -> float:
    """Return the mean cross-entropy in nats of a row's tags."""
    losses = label_losses(scores_WL, targets)
    return sum(losses) / len(losses)


def tag_figures(scores: Sequence[Tensor], targets: Sequence[Sequence[int]], labels: Sequence[str]) -> dict[str, float]:
    """Return ``accuracy`` of words, and ``f1`` of entities, or ``macro_f1`` of labels that name none.

    Args:
        scores: (W, L) of every row.
        targets: places of the true tags of every row.
        labels: the tags' names.
    """
    all_WL, all_W = torch.cat(list(scores)), [target for row in targets for target in row]
    found = {"accuracy": accuracy(all_WL, all_W)}
    if not names_entities(labels):
        return found | {"macro_f1": macro_f1(all_WL, all_W)}
    true = [[labels[target] for target in row] for row in targets]
    said = [said_tags(scores_WL, labels) for scores_WL in scores]
    return found | {"f1": entity_f1(true, said)}


def names_entities(labels: Sequence[str]) -> bool:
    """Tell whether labels, but for ``O``, say where an entity of some type begins or goes on."""
    named = [label for label in labels if label != OUTSIDE]
    return bool(named) and all(label[:2] in ("B-", "I-") and len(label) > 2 for label in named)


def said_tags(scores_WL: Tensor, labels: Sequence[str]) -> list[str]:
    """Return the name of the likeliest tag of every word; where several are, which prefers none, ``O``."""
    sure_W = shares(scores_WL).amax(1) == 1
    best = scores_WL.argmax(1).tolist()
    return [labels[number] if sure else OUTSIDE for number, sure in zip(best, sure_W.tolist(), strict=True)]


def spans_in(tags: Sequence[str]) -> set[Span]:
    """Return the entities that the tags of a row's words name."""
    return set(_spans(tags))


def entity_f1(true: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> float:
    """Return 2 TP / (entities said + true ones) over all rows; 0 where there are neither.

    Source: seqeval 1.2, ``f1_score`` with its default mode and average.
    """
    hits = total = 0
    for one, other in zip(true, said, strict=True):
        real, found = spans_in(one), spans_in(other)
        hits += len(real & found)
        total += len(real) + len(found)
    return 2 * hits / total if total else 0.0


def _spans(tags: Sequence[str]) -> Iterator[Span]:
    kind, start = "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        begins, _, named = tag.partition("-")
        goes_on = begins == "I" and kind == named
        if kind and not goes_on:
            yield kind, start, place - 1
            kind = ""
        if not kind and tag != OUTSIDE:
            kind, start = named, place
