"""SHA-256 digests of files and models, written ``sha256:<64 hex digits>``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.mapped import let_go

if TYPE_CHECKING:
    import torch

DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"


def sha256_bytes(data: bytes) -> str:
    """Return the digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the digest of the file's bytes, read in pieces."""
    with path.open("rb") as handle:
        return "sha256:" + hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_files(paths: Sequence[Path]) -> str:
    """Return one digest over the files in their order; of a single one, its own."""
    return joined_digest([sha256_file(path) for path in paths])


def joined_digest(digests: Sequence[str]) -> str:
    """Return one digest over those of files, in their order; of a single one, the same."""
    if len(digests) == 1:
        return digests[0]
    return sha256_bytes(b"offsite/v1/files\0" + "\n".join(digests).encode("ascii"))


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return one digest over names, dtypes, shapes and bytes, independent of file layout and order.

    Tensors that share storage under several names (tied heads) count once, under their first name. A model that
    was saved with or without the tied copy has one digest once it is loaded, because loading ties it again.
    """
    import torch

    whole = hashlib.sha256(b"offsite/v1/tensors\0")
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if key in seen and tensor.numel():
            continue
        seen.add(key)
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode()
        whole.update(head + hashlib.sha256(raw.data).digest())
        let_go([tensor])
    return "sha256:" + whole.hexdigest()


def model_digest(model: torch.nn.Module) -> str:
    """Return the digest of the model's parameters and persistent buffers as they stand in memory."""
    return tensors_digest(model.state_dict())
