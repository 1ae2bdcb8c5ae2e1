"""Which blocks of the middle an emulator by layer-drop keeps.

The numbers here count within the middle, from 0. Spaced evenly or by influence, the first and the last block of the
middle are always kept: they meet the trainable ends, and whoever loses the last one leaves the top end without its
input (rounding with ``int`` did so in an earlier system for many pairs of sizes). Clusters are kept by their centres.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch, real_tokens, seen_by
from emulator.compression.passage import Passage
from offsite.console import progress
from offsite.errors import ConfigError
from offsite.modelling.blocks import hidden_of


def uniform(num_middle: int, num_kept: int) -> tuple[int, ...]:
    """Return `num_kept` evenly spaced block numbers, ascending, with the first and the last of the middle.

    The spacing is ``(num_middle - 1) / (num_kept - 1)``, each multiple rounded half to even, in exact
    arithmetic. Source: arXiv:2302.04870, whose code rounds the same way.

    Raises:
        ConfigError: when `num_kept` cannot hold both the first and the last, or exceeds the middle.
    """
    check_num_kept(num_middle, num_kept)
    if num_kept == 1:
        return (0,)
    return tuple(round(Fraction(i * (num_middle - 1), num_kept - 1)) for i in range(num_kept))


def by_influence(influences: Sequence[float], num_kept: int) -> tuple[int, ...]:
    """Return the blocks of the middle with the largest `influences`, ascending, and the first and last.

    Of equal influences the earlier block is kept, so that the choice is a function of its input.

    Args:
        influences: one number per block of the middle, as `measure_influences` returns them.

    Raises:
        ConfigError: as `uniform`.
    """
    num_middle = len(influences)
    check_num_kept(num_middle, num_kept)
    if num_kept == 1:
        return (0,)
    inner = sorted(range(1, num_middle - 1), key=lambda i: (-influences[i], i))
    return tuple(sorted({0, num_middle - 1, *inner[: num_kept - 2]}))


def by_clusters(similarities: Sequence[float], num_kept: int) -> tuple[int, ...]:
    """Return the centres of `num_kept` clusters of neighbouring blocks, ascending.

    Every block starts as a cluster of its own; again and again the two neighbours merge whose blocks that touch are
    the most alike, of equals the earlier two. The centre of a cluster of n blocks is its block n // 2.

    Args:
        similarities: how alike blocks i and i + 1 are, one number fewer than the middle has blocks, as
            `measure_similarities` returns them.

    Raises:
        ConfigError: as `uniform`.

    Source: "clustering" and "removing" of CRaSh, arXiv:2310.15477. Its third part, "sharing", repeats kept
    blocks to the full depth: what is sent then holds them several times over, and no adapter lifts from a repetition.
    """
    num_middle = len(similarities) + 1
    check_num_kept(num_middle, num_kept)
    merged = set(sorted(range(num_middle - 1), key=lambda i: (-similarities[i], i))[: num_middle - num_kept])
    clusters = [[0]]
    for block in range(1, num_middle):
        if block - 1 in merged:
            clusters[-1].append(block)
        else:
            clusters.append([block])
    return tuple(cluster[len(cluster) // 2] for cluster in clusters)


def check_num_kept(num_middle: int, num_kept: int) -> None:
    """Return only if `num_kept` blocks, the first and the last among them, can be kept.

    Raises:
        ConfigError: saying what was asked and what the middle holds.
    """
    if num_kept > num_middle:
        raise ConfigError(f"asked to keep {num_kept} blocks of the middle, which has {num_middle}")
    if num_kept < min(2, num_middle):
        raise ConfigError(
            f"asked to keep {num_kept} of {num_middle} blocks of the middle, expected at least 2: "
            "its first and its last are always kept"
        )


@torch.no_grad()
def measure_influences(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    passage: Passage | None = None,
) -> list[float]:
    """Return, for each block, how much it turns the hidden state: the mean over tokens of 1 - cosine(in, out).

    Padding does not count. Between 0 (the block could be left out) and 2.

    Args:
        blocks: blocks of `model`, in any number.
        batches: public text as ``input_ids`` and ``attention_mask``, (batch, tokens) int64.
        passage: of these batches through `model`; default: one in memory.

    Source: "block influence" of ShortGPT, arXiv:2403.03853, equation 1.
    """
    count = sum(int(real_tokens(batch).sum()) for batch in batches)
    if count == 0:
        raise ConfigError("measuring the blocks' influence needs public text, found none")
    sums = [0.0] * len(blocks)

    @contextmanager
    def watching(number: int, batch: Batch) -> Iterator[None]:
        real_BT = real_tokens(batch)

        def see(_which: int, before_BTD: Tensor, output: Any) -> None:
            after_BTD = hidden_of(output)
            cosine_BT = nn.functional.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
            sums[number] += float((1 - cosine_BT)[real_BT].double().sum())

        with seen_by([blocks[number]], see):
            yield

    _read(passage or Passage(model, batches), blocks, watching)
    return [total / count for total in sums]


def _read(
    passage: Passage, blocks: Sequence[nn.Module], watching: Callable[[int, Batch], AbstractContextManager[None]]
) -> None:
    with progress(len(blocks), "reading calibration text, blocks") as bar:
        for number, block in enumerate(blocks):
            passage.run(block, lambda batch, number=number: watching(number, batch))  # type: ignore[misc]
            bar.update(number + 1)
    passage.close()


@torch.no_grad()
def measure_similarities(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    passage: Passage | None = None,
) -> list[float]:
    """Return how alike what each block and the next one give is, between 0 and 1: linear CKA over rows of text.

    A row stands as the mean of its hidden states, each weighing as its position counted from 1; padding does not
    count. Rows are centred. A block whose rows are all alike is like no other: 0.

    Args:
        blocks: neighbouring blocks of `model`, in their order.
        batches: public text as ``input_ids`` and ``attention_mask``, (batch, tokens) int64.
        passage: of these batches through `model`; default: one in memory.

    Raises:
        ConfigError: with fewer than two rows of text.

    Source: the similarity by which CRaSh, arXiv:2310.15477, clusters; linear CKA: arXiv:1905.00414.
    """
    if sum(len(batch["input_ids"]) for batch in batches) < 2:
        raise ConfigError("measuring how alike blocks are needs public text of at least two rows")
    rows: list[list[Tensor]] = [[] for _ in blocks]

    @contextmanager
    def watching(number: int, batch: Batch) -> Iterator[None]:
        real_BT = real_tokens(batch)
        place_BT = real_BT.cumsum(1) * real_BT
        weight_BT = place_BT / place_BT.sum(1, keepdim=True).clamp(min=1)

        def see(_which: int, _before: Tensor, output: Any) -> None:
            rows[number].append(torch.einsum("bt,btd->bd", weight_BT.double(), hidden_of(output).double()).cpu())

        with seen_by([blocks[number]], see):
            yield

    _read(passage or Passage(model, batches), blocks, watching)
    grams = []
    for found in rows:
        rows_RD = torch.cat(found)
        centred_RD = rows_RD - rows_RD.mean(0)
        gram_RR = centred_RD @ centred_RD.T
        size = gram_RR.norm()
        grams.append(gram_RR / size if size > 0 else gram_RR)
    return [float((one * other).sum()) for one, other in pairwise(grams)]
