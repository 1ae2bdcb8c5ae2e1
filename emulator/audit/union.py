"""What clients who put their packages together would hold of one model's middle, from the owner's records alone.

A record says from which of the full model's blocks and channels each part of a package *stems*. Where a package was
distilled its weights have moved since: the parts count all the same, though they are no longer the owner's bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offsite.artefacts.owner import OwnerRecord
from offsite.audits.record import Union
from offsite.errors import ConfigError
from offsite.modelling.blocks import MLP_NAMES

_OUTPUT = re.compile(r"(^|\.)(" + "|".join(re.escape(output) for _, output, _ in MLP_NAMES) + ")$")


@dataclass(frozen=True)
class Held:
    """What one package holds of one of the full model's blocks.

    Attributes:
        num_parameters: of the package's block.
        channels: numbers of the MLP channels kept; None when all were.
        per_channel: parameters of one channel: its rows, its column, its biases.
    """

    num_parameters: int
    channels: frozenset[int] | None = field(default=None, repr=False)
    per_channel: int = 0


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
    every = [held(record) for record in records]
    whole = {number: one.num_parameters for found in every for number, one in found.items() if one.channels is None}
    usual = whole[first.kept[-1]]  # the top end is whole, always
    known = {**whole, **(sizes or {})}
    ends = {*first.kept[: first.layout.num_bottom], *first.kept[len(first.kept) - first.layout.num_top :]}
    middle = [number for number in range(first.num_blocks) if number not in ends]
    total = sum(known.get(number, usual) for number in middle)
    singles = sum(_together([every[0]], number) for number in middle)
    united = sum(_together(every, number) for number in middle)
    return Union(
        num_packages=len(records), share_single=min(1.0, singles / total), share_union=min(1.0, united / total)
    )


def _together(every: Sequence[Mapping[int, Held]], number: int) -> int:
    """Return how many parameters of that block stand in at least one of the packages."""
    parts = [found[number] for found in every if number in found]
    if not parts:
        return 0
    whole = [one.num_parameters for one in parts if one.channels is None]
    if whole:
        return max(whole)
    apart = max(one.num_parameters - one.per_channel * len(one.channels or ()) for one in parts)
    channels = frozenset[int]().union(*(one.channels or () for one in parts))
    return apart + parts[0].per_channel * len(channels)


def _held(record: OwnerRecord, canonical: str) -> Held:
    tensors = {
        name: spec
        for name, spec in record.block_tensors.items()
        if name.startswith(f"{canonical}.") and name not in record.layout.buffers
    }
    num_parameters = sum(math.prod(spec.shape) for spec in tensors.values())
    channels = record.channels.get(canonical)
    if channels is None:
        return Held(num_parameters)
    per_channel = 0
    for name in record.layout.mlp_linears:
        if name.startswith(f"{canonical}."):
            bias = tensors.get(f"{name}.bias")
            alongside = 0 if bias is None or _OUTPUT.search(name) else math.prod(bias.shape)
            per_channel += (math.prod(tensors[f"{name}.weight"].shape) + alongside) // len(channels)
    return Held(num_parameters, frozenset(channels), per_channel)
