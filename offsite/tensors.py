"""Tensors in safetensors files: declared by name, shape and dtype, and read by exactly those.

The header is read and checked here before any tensor library maps the file. Format: 8 bytes little-endian
header length, a JSON object ``name -> {dtype, shape, data_offsets}``, then the bytes, without holes
(https://github.com/huggingface/safetensors#format). Of JSON, only what a writer of tensors needs is understood:
plain names, short lists of whole numbers, nothing nested, no escapes. No JSON parser sees a stranger's header, and
reading it costs no more than its length and the number of tensors allowed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from offsite.errors import BadSchema, NotFinite, RunFailed, TooLarge, WrongNames, WrongShape
from offsite.mapped import let_go

if TYPE_CHECKING:
    import torch

HEADER_LIMIT_BYTES = 4 * 2**20
MAX_TENSORS = 2**13
ADAPTER_HEADER_LIMIT_BYTES = 2**20
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
_ORDER = ("int64", "float64", "float32", "int32", "bfloat16", "float16", "uint8", "bool")  # in which data is written
_METADATA = {"format": "pt"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,254}")
_MAX_SHOWN = 80

# The header's grammar. Repeats are possessive: matching costs time in proportion to the bytes, whatever they are.
_B = r"[ \t\r\n]*+"
_NOTE = rf'"__metadata__"{_B}:{_B}{{{_B}"format"{_B}:{_B}"pt"{_B}}}{_B}'
_FIELD = rf'"(dtype|shape|data_offsets)"{_B}:{_B}("[^"\\]{{0,32}}+"|\[[^][{{}}"\\]{{0,256}}+\]){_B}'
_WHOLE = r"(?:0|[1-9][0-9]{0,15}+)"
_OPENING = re.compile(rf'\{{{_B}({_NOTE}(?:,{_B}(?=")|(?=\}})))?+')
_ENTRY = re.compile(rf'"([^"\\]{{0,1024}}+)"{_B}:{_B}\{{{_B}{_FIELD},{_B}{_FIELD},{_B}{_FIELD}\}}{_B}')
_COMMA = re.compile(rf",{_B}")
_CLOSING = re.compile(rf"\}}{_B}")
_NUMBERS = re.compile(rf"\[{_B}(?:{_WHOLE}{_B}(?:,{_B}{_WHOLE}{_B})*+)?+\]")


Name = Annotated[str, Field(max_length=255, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]*$")]
"""Of a tensor or a module, as a manifest states it: the letters that a header may hold, and no others."""


class TensorSpec(BaseModel):
    """The declared form of one tensor: its shape, and its dtype in torch's spelling."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    shape: tuple[Annotated[int, Field(gt=-(2**53), lt=2**53)], ...] = Field(max_length=MAX_DIMENSIONS)
    dtype: str = Field(max_length=32, pattern=r"^[A-Za-z0-9_]*$")

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * _DTYPES[self.dtype]


def spec_of(tensor: torch.Tensor, *, dtype: str | None = None) -> TensorSpec:
    """Return the declaration of `tensor`, as it stands or as it would be in `dtype`."""
    found = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(shape=tuple(tensor.shape), dtype=found if dtype is None else dtype)


def read_header(
    path: Path, *, limit_bytes: int = HEADER_LIMIT_BYTES, max_tensors: int = MAX_TENSORS
) -> dict[str, TensorSpec]:
    """Return the declaration of every tensor in the file, without reading a tensor.

    Args:
        limit_bytes: largest header that is read; for an adapter `ADAPTER_HEADER_LIMIT_BYTES`.
        max_tensors: most tensors that are looked at.

    Raises:
        TooLarge: when the header is longer than `limit_bytes` or holds more than `max_tensors` entries.
        BadSchema: when the file is not a safetensors file, or not one in the form of `parse_header`.
    """
    with path.open("rb") as handle:
        return read_open_header(handle, what=f"file {path.name!r}", limit_bytes=limit_bytes, max_tensors=max_tensors)


def read_open_header(
    handle: BinaryIO, *, what: str, limit_bytes: int = HEADER_LIMIT_BYTES, max_tensors: int = MAX_TENSORS
) -> dict[str, TensorSpec]:
    """Return what an open file declares, as `read_header`; `what` names it in messages."""
    size = os.fstat(handle.fileno()).st_size
    handle.seek(0)
    prefix = handle.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise BadSchema(f"{what} is not a safetensors file: header of {length} bytes in a file of {size}")
    if length > limit_bytes:
        raise TooLarge(f"{what}: header of {length} bytes, limit {limit_bytes}")
    return parse_header(handle.read(length), size - 8 - length, what=what, max_tensors=max_tensors)


def parse_header(
    raw: bytes, num_data_bytes: int, *, what: str = "header", max_tensors: int = MAX_TENSORS
) -> dict[str, TensorSpec]:
    """Return the declarations that the header makes of exactly `num_data_bytes` bytes of tensors.

    Args:
        raw: the header alone, without the eight bytes of its length; the caller has limited its size.
        num_data_bytes: bytes of the file after the header.
        what: how messages name the file.

    Raises:
        TooLarge: when there are more than `max_tensors` entries; none has been looked at then.
        BadSchema: when it is not in the form that the module's docstring gives; holds a name twice, or one that is not
            made of letters, digits, '_' and '.'; an unknown dtype; a dimension that is zero, negative or larger than
            the file; notes beyond the format's name; or when the data has holes, overlaps or bytes too many or too few.
    """
    if not raw.isascii() or (opening := _OPENING.match(header := raw.decode("ascii"))) is None:
        raise BadSchema(f"{what}: header is not a JSON object in ASCII")
    num_entries = header.count("{") - (1 if opening[1] is None else 2)
    if num_entries > max_tensors:
        raise TooLarge(f"{what}: header of {num_entries} entries, limit {max_tensors}")
    if header.startswith('"__metadata__"', opening.end()):
        raise BadSchema(f"{what}: header holds notes, expected at most the format's name")
    found: dict[str, _Entry] = {}
    end = opening.end()
    for number in range(num_entries):
        comma = _COMMA.match(header, end) if number else opening
        entry = _ENTRY.match(header, comma.end()) if comma else None
        if entry is None:
            raise BadSchema(f"{what}: header entry {number + 1} does not hold exactly dtype, shape and data_offsets")
        read = _read_entry(what, entry, num_data_bytes)
        if read.name in found:
            raise BadSchema(f"{what}: header holds tensor {read.name!r} twice")
        found[read.name] = read
        end = entry.end()
    closing = _CLOSING.match(header, end)
    if closing is None or closing.end() != len(header):
        raise BadSchema(f"{what}: header does not end after its {num_entries} entries")
    _check_spans(what, ((read.start, read.end) for read in found.values()), num_data_bytes)
    return {name: TensorSpec(shape=read.shape, dtype=read.dtype) for name, read in found.items()}


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


def read_tensors(
    path: Path,
    expected: Mapping[str, TensorSpec],
    *,
    limit_bytes: int = HEADER_LIMIT_BYTES,
    max_tensors: int = MAX_TENSORS,
) -> dict[str, torch.Tensor]:
    """Return exactly the expected tensors of the file, on the CPU.

    Args:
        limit_bytes, max_tensors: as for `read_header`.

    Raises:
        WrongNames, WrongShape: when the header differs from `expected`.
        NotFinite: when a tensor holds NaN or infinity.
        BadSchema, TooLarge: as `read_header`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    what = f"file {path.name!r}"
    check_exact(what, read_header(path, limit_bytes=limit_bytes, max_tensors=max_tensors), expected)
    try:
        tensors = load_file(path)
    except SafetensorError:
        raise BadSchema(f"{what} is not one that safetensors reads") from None
    # the library has opened the file anew
    check_exact(what, {name: spec_of(tensor) for name, tensor in tensors.items()}, expected)
    check_finite(what, tensors)
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
        let_go([tensor])


def check_subnormal(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Return only if hardly any value of a floating tensor is subnormal: at most 1 percent of it, or 16 values.

    Training leaves no such values. They are finite and do no harm to a result, but arithmetic on them is many times
    slower on some processors, and a tensor full of them slows whoever serves it.

    Raises:
        BadSchema: naming the first tensor that is flooded.
    """
    import torch

    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        count = int(((tensor.abs() < torch.finfo(tensor.dtype).tiny) & (tensor != 0)).sum())
        if count > max(16, tensor.numel() // 100):
            raise BadSchema(f"{what}: {count} of {tensor.numel()} values of tensor {name!r} are subnormal numbers")


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    specs: Mapping[str, TensorSpec] | None = None,
    *,
    finite: str = "",
) -> None:
    """Write the tensors to `path`, contiguous, with no metadata beyond the format; memory holds one at a time.

    The bytes are those that the safetensors library writes: the header's entries and the data by dtype, then by name.

    Args:
        specs: write those named here alone, each in the dtype that is stated; default: all, as they stand.
        finite: names the whole in messages: a tensor that holds NaN or infinity is refused; empty does not look.

    Raises:
        BadSchema: a dtype that artefacts may not hold.
        NotFinite: naming the first tensor that does.
        RunFailed: when the file cannot be written, such as on a full disk.
    """
    declared = {name: spec_of(tensor) for name, tensor in tensors.items()} if specs is None else dict(specs)
    codes = {dtype: code for code, (dtype, _) in _CODES.items()}
    for name, spec in declared.items():
        check_dtype(name, spec)
    order = sorted(declared, key=lambda name: (_ORDER.index(declared[name].dtype), name))
    header: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for name in order:
        spec, start = declared[name], end
        end += spec.num_bytes
        header[name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode("ascii")
    head += b" " * (-len(head) % 8)
    try:
        with path.open("wb") as handle:
            handle.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                _write_tensor(handle, name, tensors[name], declared[name], finite)
    except OSError as error:
        raise RunFailed(f"cannot write {path.name!r}: {(error.strerror or 'i/o error').lower()}") from None


def _write_tensor(handle: BinaryIO, name: str, tensor: torch.Tensor, spec: TensorSpec, finite: str) -> None:
    import torch

    plain = tensor.detach().to("cpu").to(torch_dtype(spec.dtype)).contiguous()
    if finite:
        check_finite(finite, {name: plain})
    handle.write(plain.reshape(-1).view(torch.uint8).numpy().data)
    let_go([tensor, plain])


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


class _Entry(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _read_entry(what: str, entry: re.Match[str], num_data_bytes: int) -> _Entry:
    name, *pairs = entry.groups()
    if not _NAME.fullmatch(name) or name == "__metadata__":
        raise BadSchema(f"{what}: a tensor name of {len(name)} characters is not made of letters, digits, '_' and '.'")
    fields = {pairs[0]: pairs[1], pairs[2]: pairs[3], pairs[4]: pairs[5]}
    if len(fields) != 3:
        raise BadSchema(f"{what}: entry of tensor {name!r} does not hold exactly dtype, shape and data_offsets")
    shape, offsets = _whole_numbers(fields["shape"]), _whole_numbers(fields["data_offsets"])
    code = _CODES.get(fields["dtype"].strip('"'))
    if code is None:
        raise BadSchema(f"{what}: tensor {name!r} has a dtype that artefacts may not hold")
    if shape is None or len(shape) > MAX_DIMENSIONS:
        raise BadSchema(f"{what}: shape of tensor {name!r} is not a short list of whole numbers")
    if offsets is None or len(offsets) != 2:
        raise BadSchema(f"{what}: data_offsets of tensor {name!r} are not two whole numbers")
    dtype, num_bytes = code
    for dimension in shape:  # stops before the product grows beyond what the file could hold
        if not 0 < dimension <= num_data_bytes or (num_bytes := num_bytes * dimension) > num_data_bytes:
            raise BadSchema(f"{what}: shape of tensor {name!r} is empty or larger than the file")
    if offsets[1] - offsets[0] != num_bytes:
        raise BadSchema(f"{what}: tensor {name!r} has a span that does not fit its shape and dtype")
    return _Entry(name, dtype, shape, offsets[0], offsets[1])


def _whole_numbers(found: str) -> tuple[int, ...] | None:
    if not _NUMBERS.fullmatch(found):
        return None
    inner = found[1:-1].strip()
    return tuple(map(int, inner.split(","))) if inner else ()


def _check_spans(what: str, spans: Iterable[tuple[int, int]], num_bytes: int) -> None:
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise BadSchema(f"{what}: tensor data has a hole or an overlap at byte {position}")
        position = end
    if position != num_bytes:
        raise BadSchema(f"{what}: {num_bytes} bytes of tensor data, the header describes {position}")


def _some(label: str, names: Iterable[str]) -> str:
    found = sorted(names)  # names that are not expected are the sender's own: they may be long
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    shown = ", ".join(repr(name[:_MAX_SHOWN]) for name in found[:3])
    return f"{label} {shown}{more}; " if found else ""
