"""Answers under way on one model, token by token together: they join and leave between tokens.

A step is one forward pass over prompts that are still being read, a piece of each, and one over all answers that are
being written, one token each. Prompts are read in turn and in pieces, so that a long one holds nobody up for longer
than one piece. Nothing here knows of HTTP or asyncio; everything but `submit` and `Row.leave` runs in one thread.

Rows whose adapters may be computed together are one lane with one cache; an adapter that does not mix has a lane of its
own. What all lanes' caches hold together is bounded: a row joins only when there is room for its prompt and the longest
answer that it may get.

Shape letters: B rows, T tokens, U positions looked at, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offsite.errors import OffsiteError, RunFailed
from offsite.generation.generate import Answer, Piece
from offsite.generation.sampling import Constraint, Sampler, Settings
from server.batching.cache import OffsetCache, RowCache, padded
from server.batching.rows import RowAdapter, Rows
from server.plugging.offset import moved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Told = Piece | Exception

_FAILURES = (OffsiteError, RuntimeError, ArithmeticError, LookupError, MemoryError, TypeError, ValueError)
"""What a forward pass or a draw can end with; torch says RuntimeError of a device's memory, too."""


@dataclass(eq=False)
class Row:
    """One answer: what is read, how it is drawn, and who hears of it.

    Attributes:
        tell: is called with every piece, or once with what ended it early; from the thread that steps.
        tenant: whose it is; tenants join in turn.
        grammar: what the answer is held to, for it alone.
    """

    prompt: tuple[int, ...]
    settings: Settings
    answer: Answer
    tell: Callable[[Told], None]
    adapter: RowAdapter | None = None
    tenant: str = ""
    grammar: Constraint | None = None
    sampler: Sampler = field(init=False)
    num_read: int = field(default=0, init=False)
    token: int = field(default=-1, init=False)
    is_left: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.settings, self.prompt, self.grammar)

    @property
    def num_tokens(self) -> int:
        """Positions that it may come to hold: the last token drawn is never read."""
        return len(self.prompt) + self.settings.limit_tokens - 1

    def leave(self) -> None:
        """Nobody waits for the rest; its place is free before the next token. May be called from any thread."""
        self.is_left = True


class Queue:
    """Rows that wait to join. Next is the tenant with the fewest inside; of several, whose last turn is longest ago."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Row]] = {}

    def __len__(self) -> int:
        return sum(map(len, list(self._waiting.values())))

    def add(self, row: Row) -> None:
        """The row waits."""
        self._waiting.setdefault(row.tenant, deque()).append(row)

    def next(self, inside: Sequence[Row]) -> Row | None:
        """Return the row whose turn it is, which stays; None where nobody waits."""
        for tenant in list(self._waiting):
            rows = self._waiting[tenant]
            while rows and rows[0].is_left:
                rows.popleft()
            if not rows:
                del self._waiting[tenant]
        if not self._waiting:
            return None
        names = [row.tenant for row in inside]
        tenant = min(self._waiting, key=names.count)  # the first of equals
        return self._waiting[tenant][0]

    def take(self, row: Row) -> None:
        """The row, which `next` returned, waits no more, and its tenant is the last in turn."""
        rows = self._waiting.pop(row.tenant)
        rows.popleft()
        if rows:
            self._waiting[row.tenant] = rows

    def empty(self) -> list[Row]:
        """Return all that wait; nobody does any more."""
        found = [row for rows in self._waiting.values() for row in rows]
        self._waiting.clear()
        return found


class Lane:
    """Rows that are computed together: the first `num_writing` are being answered, the others still read."""

    def __init__(self, cache: RowCache | OffsetCache) -> None:
        self.cache, self.rows, self.num_writing = cache, list[Row](), 0

    @property
    def longest(self) -> int:
        """Positions that the longest row may come to hold."""
        return max((row.num_tokens for row in self.rows), default=0)

    def join(self, row: Row) -> None:
        """The row has a place, and nothing is read of it."""
        self.rows.append(row)
        self.cache.reserve(len(self.rows), self.longest)
        self.cache.wipe(len(self.rows) - 1)

    def leave(self, row: Row) -> None:
        """The row's place is free."""
        at = self.rows.index(row)
        if at < self.num_writing:
            self.num_writing -= 1
            self._swap(at, self.num_writing)
            at = self.num_writing
        self._swap(at, len(self.rows) - 1)
        self.rows.pop()
        if self.rows:
            self.cache.reserve(len(self.rows), self.longest)
        else:
            self.cache.clear()

    def begin_writing(self, row: Row) -> None:
        """The row, which was being read, is one of those that are answered."""
        self._swap(self.rows.index(row), self.num_writing)
        self.num_writing += 1

    def _swap(self, one: int, other: int) -> None:
        self.cache.swap(one, other)
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]


@dataclass(frozen=True)
class Beside:
    """An emulator that every row is read by, too: without its adapter and with it, in one forward pass.

    Attributes:
        model: in evaluation mode; its rows do not disturb each other (`batches.cost_of`).
        rows: that model's adapters, `adapter` among them, which mixes.
        beta: how much of the difference of its scores is added to the full model's.
        num_layers: of its cache.
        bytes_per_token: of its cache, for each of a row's two.
    """

    model: PreTrainedModel
    rows: Rows
    adapter: RowAdapter
    beta: float
    num_layers: int
    bytes_per_token: int

    def moved(self, cache: OffsetCache, ids: list[list[int]], logits_BV: Tensor) -> Tensor:
        """Return the full model's scores, moved by what the adapter does to the emulator's: (B, V) float32."""
        doubled = [one for one in ids for _ in range(2)]
        if cache.doubled is None:
            raise ValueError("the emulator's rows have no place yet")
        with self.rows.of([None, self.adapter] * len(ids)):
            found_CV = next_logits(self.model, cache.emulator, doubled, *cache.doubled, keeps=keeps_logits(self.model))
        return moved(logits_BV, found_CV[1::2], found_CV[::2], self.beta)


class Batch:
    """The rows on one model.

    Args:
        model: a causal language model in evaluation mode whose rows do not disturb each other (`batches.cost_of`).
        rows: that model's adapters.
        num_layers: of its cache.
        bytes_per_token: of a row's caches, of the emulator beside it, too.
        limit_rows: answers under way at once.
        limit_bytes: of all caches together.
        prefill_tokens: of prompts in one forward pass.
        beside: an emulator that moves every row's scores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Rows,
        *,
        num_layers: int,
        bytes_per_token: int,
        limit_rows: int = 16,
        limit_bytes: int = 2**30,
        prefill_tokens: int = 128,
        beside: Beside | None = None,
    ) -> None:
        self._model: Any = model
        self._beside = beside
        self._rows, self._num_layers, self._bytes_per_token = rows, num_layers, bytes_per_token
        self._limit_rows, self._limit_bytes, self._prefill_tokens = limit_rows, limit_bytes, prefill_tokens
        self._keeps = keeps_logits(self._model)
        self._device = next(model.parameters()).device
        self._lanes: dict[RowAdapter | None, Lane] = {}
        self._reading: deque[Row] = deque()  # in turn
        self._submitted: deque[Row] = deque()
        self.queue = Queue()

    @property
    def inside(self) -> list[Row]:
        """Rows that have joined."""
        return [row for lane in list(self._lanes.values()) for row in list(lane.rows)]

    @property
    def num_cache_bytes(self) -> int:
        """What the caches hold in memory."""
        return sum(lane.cache.num_bytes for lane in list(self._lanes.values()))

    @property
    def is_idle(self) -> bool:
        """Whether nobody is inside or waits."""
        return not (self._submitted or len(self.queue) or self._lanes)

    def fits(self, num_tokens: int) -> bool:
        """Tell whether a row of so many tokens has room in an empty cache."""
        return padded(num_tokens) * self._bytes_per_token <= self._limit_bytes

    def submit(self, row: Row) -> None:
        """The row waits to join; may be called from any thread."""
        self._submitted.append(row)

    @torch.no_grad()
    def step(self) -> None:
        """Every row that is being answered has one token more, and a piece of one or more prompts is read."""
        while self._submitted:
            self.queue.add(self._submitted.popleft())
        for row in self.inside:
            if row.is_left:
                self._remove(row)
        self._admit()
        self._read()
        for adapter, lane in list(self._lanes.items()):
            if lane.num_writing:
                rows = lane.rows[: lane.num_writing]
                self._advance(adapter, rows, [[row.token] for row in rows])

    def end(self, error: Exception) -> None:
        """Everybody inside and waiting hears of the error and is gone."""
        while self._submitted:
            self.queue.add(self._submitted.popleft())
        for row in [*self.inside, *self.queue.empty()]:
            row.tell(error)
        self._lanes.clear()
        self._reading.clear()

    def _admit(self) -> None:
        while len(inside := self.inside) < self._limit_rows:
            row = self.queue.next(inside)
            if row is None or not self._has_room(row):
                return
            self.queue.take(row)
            lane = self._lanes.get(self._key(row))
            if lane is None:
                lane = self._lanes[self._key(row)] = Lane(self._cache())
            lane.join(row)
            self._reading.append(row)

    def _cache(self) -> RowCache | OffsetCache:
        found = RowCache(self._num_layers, self._device)
        return found if self._beside is None else OffsetCache(found, RowCache(self._beside.num_layers, self._device))

    def _key(self, row: Row) -> RowAdapter | None:
        return row.adapter if row.adapter is not None and not row.adapter.mixes else None

    def _has_room(self, row: Row) -> bool:
        held = 0
        for key, lane in {self._key(row): None, **self._lanes}.items():
            joins = key is self._key(row)
            longest = max(lane.longest if lane else 0, row.num_tokens if joins else 0)
            promised = ((len(lane.rows) if lane else 0) + joins) * padded(longest) * self._bytes_per_token
            held += max(promised, lane.cache.num_bytes if lane else 0)
        return held <= self._limit_bytes

    def _read(self) -> None:
        if not self._reading:
            return
        chosen: list[Row] = []
        lengths: list[int] = []
        key = self._key(self._reading[0])
        for row in self._reading:
            length = min(len(row.prompt) - row.num_read, self._prefill_tokens)
            if self._key(row) is not key:
                continue
            if chosen and (len(chosen) + 1) * max(*lengths, length) > self._prefill_tokens:
                break
            chosen.append(row)
            lengths.append(length)
        for row in chosen:  # who has more to read waits for the others
            self._reading.remove(row)
            self._reading.append(row)
        ids = [list(row.prompt[row.num_read : row.num_read + n]) for row, n in zip(chosen, lengths, strict=True)]
        self._advance(key, chosen, ids)

    def _advance(self, key: RowAdapter | None, rows: list[Row], ids: list[list[int]]) -> None:
        """The rows have read these tokens; who has read all there is draws the next one."""
        lane, lengths = self._lanes[key], list(map(len, ids))
        at = [lane.rows.index(row) for row in rows]
        positions_BT, seen_B1TU = lane.cache.at(at, [row.num_read for row in rows], lengths)
        try:
            logits_BV = self._forward(lane.cache, rows, ids, positions_BT, seen_B1TU)
        except _FAILURES as error:
            self._fail(rows, error if isinstance(error, OffsiteError) else RunFailed(_first_line(error)))
            return
        for row, length, logits_V in zip(rows, lengths, logits_BV, strict=True):
            row.num_read += length
            if row.num_read >= len(row.prompt):
                if row in self._reading:
                    self._reading.remove(row)
                    lane.begin_writing(row)
                self._draw(row, logits_V)

    def _draw(self, row: Row, logits_V: Tensor) -> None:
        try:
            row.token = row.sampler.pick(logits_V)
            piece = row.answer.push(row.token, row.sampler.likely)
        except _FAILURES as error:  # whatever it is, it is this row's alone
            self._fail([row], error if isinstance(error, OffsiteError) else RunFailed(_first_line(error)))
            return
        if piece.finish is not None:
            self._remove(row)
        row.tell(piece)

    def _forward(
        self,
        cache: RowCache | OffsetCache,
        rows: list[Row],
        ids: list[list[int]],
        positions_BT: Tensor,
        seen_B1TU: Tensor,
    ) -> Tensor:
        adapters = [row.adapter for row in rows]
        full = cache.full if isinstance(cache, OffsetCache) else cache
        with self._rows.of(adapters):
            found_BV = next_logits(self._model, full, ids, positions_BT, seen_B1TU, keeps=self._keeps)
        if self._beside is None or not isinstance(cache, OffsetCache):
            return found_BV
        return self._beside.moved(cache, ids, found_BV)

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            self._remove(row)
            row.tell(error)

    def _remove(self, row: Row) -> None:
        key = self._key(row)
        lane = self._lanes[key]
        lane.leave(row)
        if row in self._reading:
            self._reading.remove(row)
        if not lane.rows:
            del self._lanes[key]


def keeps_logits(model: Any) -> bool:
    """Tell whether the model takes ``logits_to_keep``."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def next_logits(
    model: Any, cache: RowCache, ids: list[list[int]], positions_BT: Tensor, seen_B1TU: Tensor, *, keeps: bool
) -> Tensor:
    """Return the scores after each row's last new token, (B, V) in the model's dtype; the cache holds them all then.

    Args:
        ids: each row's new tokens, one or more; shorter ones are filled up behind, where nothing reads them.
        positions_BT, seen_B1TU: as `RowCache.at` returned them for these rows.
        keeps: whether the model takes ``logits_to_keep``.
    """
    longest = max(map(len, ids))
    ids_BT = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in ids], device=positions_BT.device)
    given: dict[str, Any] = {"position_ids": positions_BT, "past_key_values": cache.past, "use_cache": True}
    dtype = model.dtype
    hidden = torch.zeros(seen_B1TU.shape, dtype=dtype, device=seen_B1TU.device)
    given["attention_mask"] = hidden.masked_fill_(~seen_B1TU, torch.finfo(dtype).min)
    ends = [len(row) - 1 for row in ids]
    kept = sorted(set(ends))
    if keeps:
        given["logits_to_keep"] = torch.tensor(kept, device=ids_BT.device)
        ends = [kept.index(end) for end in ends]
    logits_BTV: Tensor = model(input_ids=ids_BT, return_dict=True, **given).logits
    return logits_BTV[torch.arange(len(ids), device=ids_BT.device), torch.tensor(ends, device=ids_BT.device)]


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"the model failed at this batch: {lines[0][:160]}"
