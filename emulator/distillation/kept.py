"""What the full model gives on public text, computed once and kept on disk: the target of every later pass.

A row of text hangs on nothing but its tokens, and the full model learns nothing. So what the loss asks of it is kept::

    PACKAGE.work/hidden/<digest>.safetensors     of one row: states (blocks, tokens, width) in bfloat16;
                                                 bottom and last (tokens, width), as they were computed

*states* are those that the emulator's are measured against, *bottom* what leaves the frozen bottom, *last* what goes
into the head, which makes scores of it again. The files are as private as the text, lie beside the checkpoints, and go
with them. A file's name is the digest of what it follows from: a run that was killed takes what is there, and no more.

What is used is what is kept, also when it is computed: figures do not depend on what is on disk already.

Shapes: B = rows, T = tokens of a row, D = width of the hidden state, K = blocks whose states are wanted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from emulator.compression.activations import Batch, real_tokens
from offsite.console import say
from offsite.errors import RunFailed
from offsite.staging import staged_file

FOLDER = "hidden"

_KEPT = torch.bfloat16

Row = tuple[int, ...]


@dataclass(frozen=True)
class Given:
    """What the full model gives on one batch, on its device.

    Attributes:
        states: after each block that is wanted, by its number, (B, T, D).
        bottom: what leaves the bottom, (B, T, D); None where there is no bottom.
        last: what goes into the head, (B, T, D), of no meaning where there is padding.
    """

    states: Mapping[int, Tensor]
    bottom: Tensor | None
    last: Tensor


class KeptStates:
    """What the full model gives on some rows, read where it was kept, and kept where it was not.

    Args:
        folder: for the files, created when there is one.
        rows: those that are kept; others are computed each time.
        binding: all that the states follow from but the rows.
    """

    def __init__(self, folder: Path, rows: Collection[Row], binding: Mapping[str, str]) -> None:
        self._folder, self._rows = folder, frozenset(rows)
        self._bound = json.dumps(dict(binding), sort_keys=True).encode()

    def read(self, batch: Batch) -> Given | None:
        """Return what is kept of the batch; None unless all of it is.

        Raises:
            RunFailed: when a file cannot be read.
        """
        rows = rows_of(batch)
        paths = [self._path(row) for row in rows] if rows is not None and self._rows.issuperset(rows) else []
        if not paths or not all(path.is_file() for path in paths):
            return None
        found = [_read(path) for path in paths]
        num_tokens, device = batch["input_ids"].shape[1], batch["input_ids"].device

        def whole(name: str) -> Tensor:
            parts = [functional.pad(one[name], (0, 0, 0, num_tokens - one[name].shape[-2])) for one in found]
            return torch.stack(parts, dim=-3).to(device)

        blocks = [int(number) for number in found[0]["blocks"]]
        states = dict(zip(blocks, whole("states"), strict=True))
        return Given(states, whole("bottom") if "bottom" in found[0] else None, whole("last"))

    def keep(self, batch: Batch, given: Given) -> Given:
        """What was computed of the batch is on disk, as far as its rows are kept. Returns it as `read` will.

        Raises:
            RunFailed: when the disk is full.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        rounded = {number: state.to(_KEPT) for number, state in given.states.items()}
        for number, row in enumerate(rows_of(batch) or ()):
            path = self._path(row)
            if row in self._rows and not path.is_file():
                own = [state[number, : len(row)] for state in rounded.values()]
                tensors = {"states": torch.stack(own), "last": given.last[number, : len(row)]}
                tensors["blocks"] = torch.tensor(list(rounded))
                if given.bottom is not None:
                    tensors["bottom"] = given.bottom[number, : len(row)]
                _write(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        return Given(rounded, given.bottom, given.last)

    def _path(self, row: Row) -> Path:
        digest = hashlib.blake2b(self._bound, digest_size=16)
        digest.update(np.asarray(row, dtype=np.int64).tobytes())
        return self._folder / f"{digest.hexdigest()}.safetensors"


def fitting(
    rows: Collection[Row], *, num_states: int, width: int, itemsize: int, has_bottom: bool, limit_bytes: int
) -> bool:
    """Tell whether what would be kept of these rows takes no more than `limit_bytes`; say so where it does not.

    Args:
        num_states: states of blocks that are wanted per token.
        itemsize: bytes of a number as the model computes.
    """
    per_token = width * (_KEPT.itemsize * num_states + itemsize * (2 if has_bottom else 1))
    num_bytes = per_token * sum(map(len, rows))
    if num_bytes > limit_bytes > 0:
        say(
            "distill: the full model is run at every step: its hidden states would take "
            f"{num_bytes:,} bytes, --cache-bytes allows {limit_bytes:,}"
        )
    return num_bytes <= limit_bytes


def rows_of(batch: Batch) -> list[Row] | None:
    """Return the tokens of each row without padding; None where padding stands elsewhere than at the end."""
    real_BT = real_tokens(batch)
    lengths = real_BT.sum(1).tolist()
    if not all(bool(row_T[:length].all()) for row_T, length in zip(real_BT, lengths, strict=True)):
        return None
    return [tuple(row[:length]) for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]


def seen_again(rows: Sequence[Row], num_passes: int) -> list[Row]:
    """Return the rows that are worth keeping of those that a run comes to, each once: all or none.

    Args:
        rows: in the order of the run.
        num_passes: how often the run comes to all of them.
    """
    distinct = list(dict.fromkeys(rows))
    return distinct if len(rows) * num_passes > len(distinct) else []


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{FOLDER}/{path.name} cannot be read: {type(error).__name__}", hint="remove it; --resume makes it anew"
        ) from None


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        with staged_file(path, replace=True) as stage:
            save_file(dict(tensors), stage)
    except (RunFailed, OSError, SafetensorError) as error:
        raise RunFailed(
            f"cannot write hidden states under {path.parent.parent.name!r}",
            hint="free space, then --resume; or run the full model at every step: --cache-bytes 0",
        ) from error
