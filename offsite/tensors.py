"""Tensors in safetensors files: declared by name, shape and dtype, and read by exactly those.

The header is parsed and checked here before any tensor library maps the file. Format: 8 bytes little-endian
header length, a JSON object ``name -> {dtype, shape, data_offsets}``, then the bytes, without holes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from offsite.errors import BadSchema, NotFinite, RunFailed, TooLarge, WrongNames, WrongShape

if TYPE_CHECKING:
    import torch

HEADER_LIMIT_BYTES = 32 * 2**20
MAX_DIMENSIONS = 8

_CODES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
}
_DTYPES = dict(_CODES.values())
_METADATA = {"format": "pt"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,254}")


class TensorSpec(BaseModel):
    """The declared form of one tensor: its shape, and its dtype in torch's spelling."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    shape: tuple[int, ...] = Field(max_length=MAX_DIMENSIONS)
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * _DTYPES[self.dtype]


def spec_of(tensor: torch.Tensor, *, dtype: str | None = None) -> TensorSpec:
    """Return the declaration of `tensor`, as it stands or as it would be in `dtype`."""
    found = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(shape=tuple(tensor.shape), dtype=found if dtype is None else dtype)


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Return the declaration of every tensor in the file, without reading a tensor.

    Raises:
        TooLarge: when the header is longer than `HEADER_LIMIT_BYTES`.
        BadSchema: when the file is not a safetensors file: broken header, a duplicate or path-like name, an
            unknown dtype, a negative dimension, notes beyond the format's name, or data with holes, overlaps or
            trailing bytes.
    """
    what = f"file {path.name!r}"
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise BadSchema(f"{what} is not a safetensors file: header of {length} bytes in a file of {size}")
        if length > HEADER_LIMIT_BYTES:
            raise TooLarge(f"{what}: header of {length} bytes, limit {HEADER_LIMIT_BYTES}")
        raw = handle.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError):
        raise BadSchema(f"{what}: header is not JSON with distinct names") from None
    if not isinstance(entries, dict) or not raw.startswith(b"{"):
        raise BadSchema(f"{what}: header is not a JSON object")
    if entries.pop("__metadata__", _METADATA) != _METADATA:
        raise BadSchema(f"{what}: header holds notes, expected at most the format's name")
    specs, spans = {}, []
    for name, entry in entries.items():
        specs[name], span = _entry(what, name, entry)
        spans.append(span)
    _check_spans(what, spans, size - 8 - length)
    return specs


def check_exact(what: str, found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Return only if both mappings hold the same names with the same shapes and dtypes.

    Raises:
        WrongNames: naming up to three tensors that are missing or not expected.
        WrongShape: naming the first tensor that differs.
    """
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or extra:
        raise WrongNames(f"{what}: {_some('missing', missing)}{_some('not expected', extra)}".rstrip("; "))
    for name, spec in expected.items():
        if found[name] != spec:
            raise WrongShape(
                f"{what}: tensor {name!r} is {found[name].dtype} {found[name].shape}, "
                f"expected {spec.dtype} {spec.shape}"
            )


def read_tensors(path: Path, expected: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Return exactly the expected tensors of the file, on the CPU.

    Raises:
        WrongNames, WrongShape: when the header differs from `expected`.
        NotFinite: when a tensor holds NaN or infinity.
        BadSchema, TooLarge: as `read_header`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_exact(f"file {path.name!r}", read_header(path), expected)
    try:
        tensors = load_file(path)
    except SafetensorError:
        raise BadSchema(f"file {path.name!r} is not one that safetensors reads") from None
    check_finite(f"file {path.name!r}", tensors)
    return tensors


def check_finite(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Return only if no floating tensor holds NaN or infinity.

    Raises:
        NotFinite: naming the first tensor that does.
    """
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"{what}: tensor {name!r} holds NaN or infinity")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors to `path`, contiguous, each with storage of its own, with no metadata beyond the format.

    Raises:
        RunFailed: when the file cannot be written, such as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        own[name] = plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain
    try:
        save_file(own, path, metadata=_METADATA)
    except SafetensorError as error:
        raise RunFailed(f"cannot write {path.name!r}: {str(error).strip()[:160]}") from None


def check_dtype(name: str, spec: TensorSpec) -> None:
    """Return only if the declared dtype is one an artefact may hold.

    Raises:
        BadSchema: naming the tensor.
    """
    if spec.dtype not in _DTYPES:
        raise BadSchema(f"tensor {name!r} declares a dtype that artefacts may not hold")


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of that name.

    Raises:
        BadSchema: when the name is not one of the dtypes an artefact may hold.
    """
    import torch

    if name not in _DTYPES:
        raise BadSchema(f"dtype {name!r} is not one an artefact may hold")
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise BadSchema(f"{name!r} is not a dtype")
    return found


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dictionary; ValueError when a name comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate name")
    return found


def _entry(what: str, name: str, entry: Any) -> tuple[TensorSpec, tuple[int, int]]:
    if not _NAME.fullmatch(name):
        raise BadSchema(f"{what}: a tensor name of {len(name)} characters is not made of letters, digits, '_' and '.'")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadSchema(f"{what}: entry of tensor {name!r} does not hold exactly dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _CODES:
        raise BadSchema(f"{what}: tensor {name!r} has a dtype that artefacts may not hold")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise BadSchema(f"{what}: shape of tensor {name!r} is not a short list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise BadSchema(f"{what}: data_offsets of tensor {name!r} are not two whole numbers")
    dtype, item_bytes = _CODES[entry["dtype"]]
    if offsets[1] - offsets[0] != math.prod(shape) * item_bytes:
        raise BadSchema(f"{what}: tensor {name!r} has a span that does not fit its shape and dtype")
    return TensorSpec(shape=tuple(shape), dtype=dtype), (offsets[0], offsets[1])


def _whole_numbers(found: Any) -> bool:
    return isinstance(found, list) and all(type(item) is int and 0 <= item < 2**53 for item in found)


def _check_spans(what: str, spans: list[tuple[int, int]], num_bytes: int) -> None:
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise BadSchema(f"{what}: tensor data has a hole or an overlap at byte {position}")
        position = end
    if position != num_bytes:
        raise BadSchema(f"{what}: {num_bytes} bytes of tensor data, the header describes {position}")


def _some(label: str, names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{label} {', '.join(map(repr, found[:3]))}{more}; " if found else ""
