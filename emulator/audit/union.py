"""What clients who put their packages together would hold of one model's middle, from the owner's records alone.

A record says from which of the full model's blocks and channels each part of a package *stems*. Where a package was
distilled its weights have moved since: the parts count all the same, though they are no longer the owner's bit for bit.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offsite.artefacts.owner import OwnerRecord
from offsite.audits.record import Union
from offsite.errors import ConfigError
from offsite.modelling.mlps import MLP_NAMES
from offsite.tensors import TensorSpec

_OUTPUT = re.compile(r"(^|\.)(" + "|".join(re.escape(output) for _, output, _ in MLP_NAMES) + ")$")


@dataclass(frozen=True)
class Held:
    """What one package holds of one of the full model's blocks.

    Attributes:
        num_parameters: of the package's block; of a matrix of lower rank, the numbers of its factors.
        channels: channels kept of each MLP that was narrowed, by its name in the block and the expert's number; of an
            MLP that was not, all were.
        per_channel: parameters of one channel of each of those: its rows, its column, its biases.
        is_factored: its matrices are of lower rank. Packages of other text keep other directions: those of several add
            up, which is as much as they could hold.
    """

    num_parameters: int
    channels: Mapping[tuple[str, int], frozenset[int]] = field(default_factory=dict, repr=False)
    per_channel: Mapping[tuple[str, int], int] = field(default_factory=dict, repr=False)
    is_factored: bool = False

    @property
    def is_whole(self) -> bool:
        """Nothing of the block was left out."""
        return not self.channels and not self.is_factored

    @property
    def num_apart(self) -> int:
        """Parameters that belong to no channel of a narrowed MLP."""
        return self.num_parameters - sum(len(kept) * self.per_channel[mlp] for mlp, kept in self.channels.items())


def held(record: OwnerRecord) -> dict[int, Held]:
    """Return what a package holds, by the full model's block numbers, the ends included."""
    return {
        number: _held(record, canonical) for canonical, number in zip(record.layout.blocks, record.kept, strict=True)
    }


def union_share(records: Sequence[OwnerRecord], *, sizes: Mapping[int, int] | None = None) -> Union:
    """Return the shares of the middle's parameters that the first package holds and that all hold together.

    The middle is the first package's; an end of another package may reach into it.

    Args:
        records: the owner's, of two packages or more.
        sizes: parameters of the full model's blocks by number. Without them, a block that no package holds whole is
            taken to be as large as the blocks of the ends.

    Raises:
        ConfigError: fewer than two records, or records of different models.
    """
    if len(records) < 2:
        raise ConfigError(f"{len(records)} package(s), expected at least two to unite")
    first = records[0]
    if any((one.base_digest, one.num_blocks) != (first.base_digest, first.num_blocks) for one in records):
        raise ConfigError("packages of different models have nothing to unite")
    distinct = {record.package_digest: record for record in records}
    every = [held(record) for record in distinct.values()]
    whole = {number: one.num_parameters for found in every for number, one in found.items() if one.is_whole}
    usual = whole[first.kept[-1]]  # the top end is whole, always
    known = {**whole, **(sizes or {})}
    ends = {*first.kept[: first.layout.num_bottom], *first.kept[len(first.kept) - first.layout.num_top :]}
    middle = [number for number in range(first.num_blocks) if number not in ends]
    total = sum(known.get(number, usual) for number in middle)
    singles = sum(_together([every[0]], number, known.get(number, usual)) for number in middle)
    united = sum(_together(every, number, known.get(number, usual)) for number in middle)
    return Union(
        num_packages=len(records), share_single=min(1.0, singles / total), share_union=min(1.0, united / total)
    )


def _together(every: Sequence[Mapping[int, Held]], number: int, size_of_all: int) -> int:
    """Return how many parameters of that block stand in at least one of the packages."""
    parts = [found[number] for found in every if number in found]
    if not parts:
        return 0
    whole = [one.num_parameters for one in parts if one.is_whole]
    if whole:
        return max(whole)
    if any(one.is_factored for one in parts):
        return min(size_of_all, sum(one.num_parameters for one in parts))
    united: defaultdict[tuple[str, int], frozenset[int]] = defaultdict(frozenset)
    size: dict[tuple[str, int], int] = {}
    for one in parts:
        for mlp, kept in one.channels.items():
            united[mlp] |= kept
            size[mlp] = one.per_channel[mlp]
    return max(one.num_apart for one in parts) + sum(size[mlp] * len(kept) for mlp, kept in united.items())


def _held(record: OwnerRecord, canonical: str) -> Held:
    tensors = {
        name: spec
        for name, spec in record.block_tensors.items()
        if name.startswith(f"{canonical}.") and name not in record.layout.buffers
    }
    num_parameters = sum(map(record.num_stored, tensors))
    is_factored = any(name in record.encodings and record.encodings[name].kind == "low-rank" for name in tensors)
    channels, per_channel = {}, {}
    if canonical in record.channels:
        kept = record.channels[canonical]
        linears = [name for name in record.layout.mlp_linears if name.startswith(f"{canonical}.")]
        channels["", 0] = frozenset(kept)
        per_channel["", 0] = sum(_along(name, tensors) for name in linears) // len(kept)
    for place, lists in record.experts.items():
        if place.startswith(f"{canonical}."):
            inside = {name for name in tensors if name.startswith(f"{place}.")}
            size = sum(_along(name, tensors) for name in {_linear_of(name) for name in inside})
            for number, kept in enumerate(lists):
                channels[place, number] = frozenset(kept)
                per_channel[place, number] = size // (len(lists) * len(kept))
    return Held(num_parameters, channels, per_channel, is_factored)


def _linear_of(tensor: str) -> str:
    """Return what a weight and its bias have in common in their names."""
    return re.sub(r"(\.weight|[._]bias)$", "", tensor)


def _along(linear: str, tensors: Mapping[str, TensorSpec]) -> int:
    """Return how many parameters of a linear, or of one for all experts, belong to single channels."""
    weight = tensors.get(f"{linear}.weight", tensors.get(linear))
    biases = [tensors[name] for name in (f"{linear}.bias", f"{linear}_bias") if name in tensors]
    alongside = 0 if _OUTPUT.search(linear) else sum(math.prod(bias.shape) for bias in biases)
    return alongside + (0 if weight is None else math.prod(weight.shape))
