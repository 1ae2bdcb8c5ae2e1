"""Blocks whose channels are chosen and refitted, kept on disk as each is finished, so that a broken run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from offsite.console import say
from offsite.errors import RunFailed
from offsite.staging import staged_file

_BINDING, _CHANNELS = "binding", "channels"

Kept = tuple[tuple[int, ...], ...]
"""Numbers of the channels that an MLP keeps, ascending; of a mixture, those of each expert."""


class FinishedBlocks:
    """Finished blocks of one run in a folder; without a folder nothing is kept.

    Args:
        folder: made when the first block is kept; None keeps nothing.
        binding: names all that the result depends on; a block that was kept under another one is done again.
        writes: whether this process keeps what it finishes; of several that do the same work, one does.
    """

    def __init__(self, folder: Path | None, binding: str, *, writes: bool = True) -> None:
        self._folder, self._binding, self._writes = folder, binding, writes

    @property
    def binding(self) -> str:
        """What a block that is found must have been kept under."""
        return self._binding

    def within(self, name: str) -> FinishedBlocks:
        """Return those of another stack, in a folder of that name inside of this one."""
        return FinishedBlocks(self.place(name), self._binding, writes=self._writes)

    def place(self, name: str) -> Path | None:
        """Return where something called `name` may stand meanwhile, beside the blocks; None without a folder."""
        return None if self._folder is None else self._folder / name

    def channels(self, number: int) -> dict[str, Kept] | None:
        """Return the channels that each narrowed MLP of block `number` keeps, by its place in the block.

        None unless the block was finished; its tensors are then in the same file.
        """
        path = self._path(number)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                stated = file.metadata() or {}
            if stated.get(_BINDING) == self._binding:
                found = json.loads(stated[_CHANNELS])
                return {place: tuple(map(tuple, lists)) for place, lists in found.items()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            say(f"{path.name} cannot be read; that block is done again")
        return None

    def tensors(self, number: int) -> dict[str, torch.Tensor] | None:
        """Return the tensors that `keep_tensors` kept of block `number`, on the CPU; None unless it was finished."""
        path = self._path(number)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get(_BINDING) == self._binding:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError):
            say(f"{path.name} cannot be read; that block is done again")
        return None

    def keep_tensors(self, number: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """These tensors are on disk, as all that block `number` came to.

        Returns:
            the same tensors, as the file's where they were written to one: they take no memory.

        Raises:
            RunFailed: when the disk is full.
        """
        path = self._path(number)
        if path is None or not self._writes:
            return dict(tensors)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with staged_file(path, replace=True) as stage:
            _save(stage, whole, {_BINDING: self._binding})
        found = self.tensors(number)
        return whole if found is None else found

    def restore(self, number: int, block: nn.Module) -> None:
        """`block`, narrowed already, holds the tensors that were kept of block `number`."""
        path = self._path(number)
        if path is None:
            return
        own = block.state_dict()
        with torch.no_grad(), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                module, _, leaf = name.rpartition(".")
                held = getattr(block.get_submodule(module), leaf)
                held.data = tensor.to(own[name].device)  # of the dtype that it was fitted in

    def keep(self, number: int, channels: Mapping[str, Kept], block: nn.Module, full_block: nn.Module) -> None:
        """Block `number` is on disk: its channels, and those of its tensors that are not the full block's own.

        `block` holds them as the file's from now on, where it is on the CPU: they take no memory.

        Raises:
            RunFailed: when the disk is full.
        """
        path = self._path(number)
        if path is None or not self._writes:
            return
        changed = {name: one.detach().cpu().contiguous() for name, one in of_its_own(block, full_block).items()}
        stated = {_BINDING: self._binding, _CHANNELS: json.dumps(dict(channels))}
        with staged_file(path, replace=True) as stage:
            _save(stage, changed, stated)
        self.restore(number, block)

    def _path(self, number: int) -> Path | None:
        return None if self._folder is None else self._folder / f"block-{number:04d}.safetensors"


def _save(path: Path, tensors: Mapping[str, torch.Tensor], stated: Mapping[str, str]) -> None:
    try:
        save_file(dict(tensors), path, metadata=dict(stated))
    except SafetensorError as error:
        raise RunFailed(f"cannot write {path.name!r}: {str(error).strip()[:160]}") from None


def of_its_own(block: nn.Module, full_block: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and saved buffers of `block` that share no memory with the full block's of their name."""
    before = full_block.state_dict()
    return {
        name: tensor
        for name, tensor in block.state_dict(keep_vars=True).items()
        if name not in before or tensor.data_ptr() != before[name].data_ptr()
    }
