"""Hidden states that nothing trained changes: computed once, kept on disk, read instead of computed again.

With an adapter on the top end alone everything below its lowest block is constant. What enters that block is computed
once for every row that the run comes to, trained on or validated on, and kept in bfloat16::

    OUTPUT.work/hidden/<digest>.safetensors      states (tokens, width) of some rows, one after another

The files are as private as the data, lie beside the checkpoints and go with them; no bundle, log or report holds any of
it. A file's name is the digest of what it follows from - package, round, block, arithmetic, and its rows' tokens - so a
run that was killed takes what is there, and nothing else. The blocks below are then passed over, in training and in
every validation. A row that is not kept is computed and rounded as those are: the figures do not depend on which rows
were kept, nor on when.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from adapters.kinds import Attached
from offsite.console import progress, say
from offsite.encoders.outputs import outputs
from offsite.errors import RunFailed, UnsupportedModel
from offsite.evaluation.measure import evaluating
from offsite.modelling.head import causal_lm
from offsite.staging import staged_file
from offsite.text.batches import Example, collate

FOLDER = "hidden"

_KEPT = torch.bfloat16
_NAME = "states"
_TOKENS_AT_ONCE = 2048
_FILE_BYTES = 1 << 26


class _Place(NamedTuple):
    """Where a row's states are."""

    path: Path
    start: int
    stop: int


def lowest_trained(attached: Attached) -> int:
    """Return the number of the lowest block with a parameter that is trained."""
    return next(
        number
        for number, block in enumerate(attached.blocks)
        if any(parameter.requires_grad for parameter in block.parameters())
    )


@contextmanager
def kept_states(
    attached: Attached,
    rows: Sequence[Example],
    *,
    pad_id: int,
    folder: Path,
    limit_bytes: int,
    binding: Mapping[str, str],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[str | None]:
    """While inside, the model's passes over `rows` begin at the lowest trained block. Yield what was done, in words.

    None is yielded, and the model is as it was, where nothing lies below that block, where what enters it is not a
    function of the row alone (dropout, blocks that hand on more than a hidden state), or where the states would take
    more than `limit_bytes`; the last two are said.

    Args:
        rows: every row that the run comes to; others are computed.
        folder: for the files, created; the caller removes it.
        binding: what the states follow from, beside the block and the rows.
        autocast: the arithmetic of the run's passes.

    Raises:
        RunFailed: when the disk is full.
    """
    lowest = lowest_trained(attached)
    if not lowest or not rows or not limit_bytes:
        yield None
        return
    wanted = _distinct(rows)
    states = _States(attached, lowest, pad_id=pad_id, folder=folder, autocast=autocast)
    with states.on_the_model():
        width = states.probe(rows[0])
        num_bytes = _KEPT.itemsize * width * sum(map(len, wanted))
        if width and num_bytes <= limit_bytes:
            states.fill(wanted, width, {**binding, "block": str(lowest)})
            yield f"bfloat16 before block {lowest}"
            return
    if width:
        why = f"they would take {num_bytes:,} bytes, --cache-bytes allows {limit_bytes:,}"
    else:
        why = "they hang on more than the row"
    say(f"hidden states below the adapter are computed every time: {why}")
    yield None


class _Reached(Exception):
    """The pass came to the lowest trained block; no more of it is wanted."""


class _States:
    """The blocks below an adapter, and what stands in for them."""

    def __init__(
        self,
        attached: Attached,
        lowest: int,
        *,
        pad_id: int,
        folder: Path,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model: Any = attached.model
        self._lm: Any = causal_lm(attached.model)
        self._blocks = attached.blocks[:lowest]
        self._pad_id, self._folder, self._autocast = pad_id, folder, autocast
        self._device = next(iter(attached.trainable.values())).device
        self._dtype = torch.float32  # in which the model hands states on
        self._places: dict[bytes, _Place] = {}
        self._others: dict[int, int] = {}  # how much a block returns besides, where that is a tuple
        self._given: Tensor | None = None  # what enters the lowest trained block in the pass that is under way
        self._reached: Tensor | None = None
        self._handed: Tensor | None = None  # the same, by hand
        self._stops = False

    @contextmanager
    def on_the_model(self) -> Iterator[None]:
        """Passes are intercepted inside; afterwards the model is as it was."""
        own = [block.__dict__.get("forward") for block in self._blocks]
        for number, block in enumerate(self._blocks):
            block.forward = self._forward(number, block.forward)
        handles = [
            self._lm.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._lm.register_forward_hook(self._end, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block, before in zip(self._blocks, own, strict=True):
                del block.forward
                if before is not None:
                    block.forward = before

    def probe(self, row: Example) -> int:
        """Return the width of the states; 0 where they are not a function of the row alone, or cannot be handed in."""
        batch = self._batch([row])
        modes = [(module, module.training) for module in self._model.modules()]
        with torch.no_grad(), self._autocast(), torch.random.fork_rng(_cuda(self._device)):
            self._model.train()
            states_BTD = self._states(batch)
            again_BTD = self._states(batch)
            self._model.eval()
            expected, self._dtype = self._said(batch), states_BTD.dtype
            still_BTD = self._states(batch)
            self._places = {}
            self._handed = states_BTD
            found = self._said(batch)
            self._handed = None
        for module, mode in modes:
            module.training = mode
        same = torch.equal(states_BTD, again_BTD) and torch.equal(states_BTD, still_BTD)
        fits = states_BTD.shape[:2] == batch["input_ids"].shape
        return states_BTD.shape[-1] if same and fits and torch.equal(found, expected) else 0

    def _said(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the model says of every position."""
        return outputs(self._lm, batch["input_ids"], batch["attention_mask"])

    def fill(self, rows: Sequence[tuple[int, ...]], width: int, binding: Mapping[str, str]) -> None:
        """The states of these rows are on disk, those that an earlier run left as they are.

        Raises:
            RunFailed: when the disk is full.
        """
        bound = json.dumps({**binding, "dtype": str(self._dtype), "width": width}, sort_keys=True).encode()
        self._folder.mkdir(parents=True, exist_ok=True)
        done = 0
        with progress(len(rows), "hidden states") as bar:
            for part in _parts(rows, _FILE_BYTES // (_KEPT.itemsize * width)):
                digest = hashlib.blake2b(bound, digest_size=16)
                for row in part:
                    digest.update(_key(row))
                path = self._folder / f"{digest.hexdigest()}.safetensors"
                num_tokens = sum(map(len, part))
                if not _is_whole(path, (num_tokens, width)):
                    _write(path, self._computed(part))
                start = 0
                for row in part:
                    self._places[_key(row)] = _Place(path, start, start + len(row))
                    start += len(row)
                done += len(part)
                bar.update(done)

    @torch.no_grad()
    def _computed(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the states of these rows, one after another, (tokens, D)."""
        found = []
        with evaluating(self._model), self._autocast():
            for part in _parts(rows, _TOKENS_AT_ONCE):
                states_BTD = self._states(self._batch([Example(list(row), list(row)) for row in part]))
                found += [one_TD[: len(row)].to("cpu", _KEPT) for one_TD, row in zip(states_BTD, part, strict=True)]
        return torch.cat(found)

    def _states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what enters the lowest trained block, computed now and rounded, (B, T, D)."""
        self._stops = True
        try:
            self._said(batch)
        except _Reached:
            pass
        finally:
            self._stops = False
        found, self._reached = self._reached, None
        if found is None:
            raise UnsupportedModel(f"{type(self._lm).__name__} does not run its blocks in order")
        return found

    def _batch(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        batch = collate(rows, self._pad_id)
        return {name: batch[name].to(self._device) for name in ("input_ids", "attention_mask")}

    def _begin(self, _module: nn.Module, _args: object, given: dict[str, Any]) -> None:
        self._given = None if self._stops else self._handed
        ids_BT, mask_BT = given.get("input_ids"), given.get("attention_mask")
        if self._stops or not self._places or ids_BT is None or mask_BT is None:
            return
        lengths = mask_BT.sum(1).tolist()
        rows = [tuple(row[:length]) for row, length in zip(ids_BT.tolist(), lengths, strict=True)]
        places = [self._places.get(_key(row)) for row in rows]
        starts_first = all(bool(mask_B.all()) for mask_B in (row[:n] for row, n in zip(mask_BT, lengths, strict=True)))
        if starts_first and all(places):
            self._given = self._read([place for place in places if place is not None], ids_BT.shape[1])

    def _end(self, *_: object) -> None:
        self._given = None

    def _read(self, places: Sequence[_Place], num_tokens: int) -> Tensor:
        """Return the kept states of some rows, zero behind their ends, (B, T, D)."""
        rows = []
        for place in places:
            try:
                with safe_open(place.path, framework="pt") as file:
                    states_TD: Tensor = file.get_slice(_NAME)[place.start : place.stop]
            except (OSError, SafetensorError) as error:
                raise RunFailed(
                    f"{FOLDER}/{place.path.name} cannot be read: {type(error).__name__}",
                    hint="run it again, tune with --resume: it is made anew",
                ) from None
            rows.append(functional.pad(states_TD, (0, 0, 0, num_tokens - len(states_TD))))
        return torch.stack(rows).to(self._device, self._dtype)

    def _forward(self, number: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        is_last = number == len(self._blocks) - 1

        def forward(*args: Any, **given: Any) -> Any:
            if self._given is not None:
                states_BTD = self._given if is_last else (args[0] if args else given["hidden_states"])
                others = self._others.get(number)
                return states_BTD if others is None else (states_BTD, *[None] * others)
            found = plain(*args, **given)
            if isinstance(found, tuple):
                self._others[number] = len(found) - 1
            if not is_last:
                return found
            states_BTD = found[0] if isinstance(found, tuple) else found
            states_BTD = states_BTD.to(_KEPT).to(states_BTD.dtype)
            if self._stops:
                self._reached = states_BTD
                raise _Reached
            return (states_BTD, *found[1:]) if isinstance(found, tuple) else states_BTD

        return forward


def _distinct(rows: Sequence[Example]) -> list[tuple[int, ...]]:
    """Return the rows' tokens, each once, in an order that is theirs alone: by length, so that little is padding."""
    return sorted({tuple(row.input_ids) for row in rows}, key=lambda row: (len(row), row))


def _key(row: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(row, dtype=np.int64).tobytes(), digest_size=16).digest()


def _parts(rows: Sequence[tuple[int, ...]], limit_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the rows in parts of at most so many tokens; a longer row is a part of its own."""
    part: list[tuple[int, ...]] = []
    for row in rows:
        if part and sum(map(len, part)) + len(row) > limit_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _is_whole(path: Path, shape: tuple[int, int]) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_slice(_NAME)
            return tuple(found.get_shape()) == shape and found.get_dtype() == "BF16"
    except (OSError, SafetensorError):
        return False


def _write(path: Path, states: Tensor) -> None:
    try:
        with staged_file(path, replace=True) as stage:
            save_file({_NAME: states}, stage)
    except (RunFailed, OSError, SafetensorError) as error:
        raise RunFailed(
            f"cannot write hidden states under {path.parent.parent.name!r}",
            hint="free space, then run it again, tune with --resume; or compute them every time: --cache-bytes 0",
        ) from error


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
