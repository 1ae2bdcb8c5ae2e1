"""Keys and values of many answers under way, each in a row of its own that it keeps from joining to leaving.

A row's tokens stand at the row's own positions from 0 on, so that nothing moves when another joins or leaves; the
rows of answers that go on token by token are the first ones, so that a step reads them where they lie. What is past
a row's end is masked out, and zero or an earlier token, never uninitialised: a masked NaN is still a NaN.

Shape letters: B rows of a forward pass, H heads, T new tokens, U tokens up to the longest row's end, D head's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_STEP = 64  # rows grow by so many tokens at a time


@dataclass
class _Place:
    """Which rows a forward pass is of, where its new tokens go, and where the longest row ends after it."""

    rows: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    upto: int = 0
    rows_index: Tensor | None = None
    starts_index: Tensor | None = None

    @property
    def is_run(self) -> bool:
        return self.rows == tuple(range(self.rows[0], self.rows[0] + len(self.rows)))


class _Layer(CacheLayerMixin):
    """One layer's keys and values, (rows, H, tokens, D) each; none before its first forward pass."""

    is_sliding = False

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self._place, self.size = place, (0, 0)
        self.held: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, tokens = self.size
        self.held = [one.new_zeros(rows, one.shape[1], tokens, one.shape[3]) for one in (key_states, value_states)]
        self.is_initialized = True

    def resize(self, rows: int, tokens: int) -> None:
        self.size = (rows, tokens)
        for number, one in enumerate(self.held):
            kept = min(rows, one.shape[0]), min(tokens, one.shape[2])
            new = one.new_zeros(rows, one.shape[1], tokens, one.shape[3])
            new[: kept[0], :, : kept[1]] = one[: kept[0], :, : kept[1]]
            self.held[number] = new

    def clear(self) -> None:
        self.held, self.size, self.is_initialized = [], (0, 0), False

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.held:
            self.lazy_initialization(key_states, value_states)
        keys, values = (self._written(*pair) for pair in zip(self.held, (key_states, value_states), strict=True))
        return keys, values

    def _written(self, held: Tensor, new_BHTD: Tensor) -> Tensor:
        place, num_new = self._place, new_BHTD.shape[2]
        if num_new == 1:
            held[place.rows_index, :, place.starts_index] = new_BHTD[:, :, 0]
        else:
            for at, (row, start) in enumerate(zip(place.rows, place.starts, strict=True)):
                end = min(start + num_new, place.upto)
                held[row, :, start:end] = new_BHTD[at, :, : end - start]
        first = place.rows[0]
        rows = held[first : first + len(place.rows)] if place.is_run else held[place.rows_index]
        return rows[:, :, : place.upto]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._place.upto, 0

    def get_seq_length(self) -> int:
        return max(self._place.starts, default=0)

    def get_max_length(self) -> int:
        return -1


class RowCache:
    """The cache of one batch; `past` is what the model is given.

    Args:
        num_layers: of the model's cache.
        device: where the model is.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._place, self._device = _Place(), device
        self._layers = [_Layer(self._place) for _ in range(num_layers)]
        self.past = Cache(layers=list(self._layers))
        self._size = (0, 0)

    @property
    def num_bytes(self) -> int:
        """What is held in memory."""
        return sum(one.numel() * one.element_size() for layer in self._layers for one in layer.held)

    def reserve(self, num_rows: int, num_tokens: int) -> None:
        """There is room for so many rows of so many tokens, and for not many more; what these hold stays."""
        rows, tokens = num_rows, padded(num_tokens)
        is_roomy = rows <= self._size[0] and tokens <= self._size[1]
        if not is_roomy or 2 * rows * tokens < self._size[0] * self._size[1]:
            self._size = (rows, tokens)
            for layer in self._layers:
                layer.resize(rows, tokens)

    def clear(self) -> None:
        """Nothing is held."""
        self._size = (0, 0)
        for layer in self._layers:
            layer.clear()

    def wipe(self, row: int) -> None:
        """The row is as new."""
        for layer in self._layers:
            for one in layer.held:
                one[row] = 0

    def swap(self, row: int, other: int) -> None:
        """The two rows have changed places."""
        if row != other:
            for layer in self._layers:
                for one in layer.held:
                    one[[row, other]] = one[[other, row]]

    def at(self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The next forward pass is of these rows, with so many new tokens each from these positions on.

        Returns:
            Positions of the new tokens, (B, T) int64 with T the greatest length, and what they may look at,
            (B, 1, T, U) bool: each at what stands up to itself in its row.
        """
        place = self._place
        place.rows, place.starts = tuple(rows), tuple(starts)
        place.upto = max(start + length for start, length in zip(starts, lengths, strict=True))
        place.rows_index = torch.tensor(place.rows, device=self._device)
        place.starts_index = torch.tensor(place.starts, device=self._device)
        ends_B1 = place.starts_index[:, None] + torch.tensor(lengths, device=self._device)[:, None] - 1
        positions_BT = place.starts_index[:, None] + torch.arange(max(lengths), device=self._device)
        positions_BT = torch.minimum(positions_BT, ends_B1)  # what fills a row up has no position past its end
        upto_U = torch.arange(place.upto, device=self._device)
        return positions_BT, (upto_U <= positions_BT[:, :, None])[:, None]


class OffsetCache:
    """The caches of rows that two models read: one row each of the full model's, two of the emulator's, side by side.

    Row r has the rows 2 r (without the adapter) and 2 r + 1 (with it) of the emulator's. It is used as a `RowCache`.

    Args:
        full: of the full model.
        emulator: of the emulator.
    """

    def __init__(self, full: RowCache, emulator: RowCache) -> None:
        self.full, self.emulator = full, emulator
        self.doubled: tuple[Tensor, Tensor] | None = None
        """What `at` says of the emulator's rows."""

    @property
    def num_bytes(self) -> int:
        """What is held in memory."""
        return self.full.num_bytes + self.emulator.num_bytes

    def reserve(self, num_rows: int, num_tokens: int) -> None:
        """There is room for so many rows of so many tokens; what these hold stays."""
        self.full.reserve(num_rows, num_tokens)
        self.emulator.reserve(2 * num_rows, num_tokens)

    def clear(self) -> None:
        """Nothing is held."""
        self.full.clear()
        self.emulator.clear()

    def wipe(self, row: int) -> None:
        """The row is as new."""
        self.full.wipe(row)
        for one in _twice([row]):
            self.emulator.wipe(one)

    def swap(self, row: int, other: int) -> None:
        """The two rows have changed places."""
        self.full.swap(row, other)
        for pair in zip(_twice([row]), _twice([other]), strict=True):
            self.emulator.swap(*pair)

    def at(self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The next forward pass of each model is of these rows; see `RowCache.at`, of the full model's."""
        both = [[one for one in numbers for _ in range(2)] for numbers in (starts, lengths)]
        self.doubled = self.emulator.at(_twice(rows), *both)
        return self.full.at(rows, starts, lengths)


def _twice(rows: Sequence[int]) -> list[int]:
    return [2 * row + part for row in rows for part in range(2)]


def padded(num_tokens: int) -> int:
    """Return for how many tokens a row has room that needs so many."""
    return -(-num_tokens // _STEP) * _STEP
