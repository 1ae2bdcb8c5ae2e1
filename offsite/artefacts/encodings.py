"""Tensors that a package holds otherwise than as they stand in the model: as two factors, or packed into few bits.

The manifest's ``encodings`` says of such a tensor which of the kinds here it is. Its *parts* are then in the file in
its place, under its name and a suffix, in exactly the shapes and dtypes that follow from the kind and the declared
tensor:

- ``low-rank``: ``left`` (rows, rank) and ``right`` (rank, columns), bfloat16; the tensor is their product.
- ``int8``, ``int4``, ``nf4``, ``nf3``: ``codes``, uint8, one code of 8, 4, 4 or 3 bits for each entry, and ``scales``
  (rows, groups), bfloat16, one for every so many entries of a row. An entry is its code's level times its scale.
- ``low-rank`` with ``factors``: either factor packed so: ``left.codes``, ``left.scales``, ``right.codes``,
  ``right.scales``.

All arithmetic is float32 in plain torch; what comes out has the declared dtype. A tensor of three dimensions is a stack
of matrices, each treated alike. Nothing here is code from the wire: a kind is one of these words or is refused.

Source of the normal levels: QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from offsite.errors import BadSchema, WrongShape
from offsite.strictjson import Sparse
from offsite.tensors import TensorSpec, check_dtype, check_finite, check_subnormal, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

Packing = Literal["int8", "int4", "nf4", "nf3"]
BITS: Mapping[str, int] = {"int8": 8, "int4": 4, "nf4": 4, "nf3": 3}
GROUPS = (32, 64, 128)
EXPANSION_LIMIT = 32
"""The declared tensors of a package come to at most so many times the bytes of its files: no small file asks a reader
for all its memory."""

_PART_DTYPE = "bfloat16"


class Encoding(Sparse):
    """How one tensor is stored.

    ``rank`` belongs to ``low-rank``. ``group`` is the number of entries of a row that share a scale, where anything is
    packed; ``factors`` how the factors are. ``turned`` says that the parts make up the transpose of the tensor, as
    where a linear's weight is (inputs, outputs).
    """

    optional: ClassVar[frozenset[str]] = frozenset({"rank", "group", "factors", "turned"})

    kind: Literal["low-rank", "int8", "int4", "nf4", "nf3"]
    rank: int = Field(0, ge=0, le=2**24)
    group: int = Field(0, ge=0, le=max(GROUPS))
    factors: Literal["", "int8", "int4", "nf4", "nf3"] = ""
    turned: bool = False

    @model_validator(mode="after")
    def _agree(self) -> Self:
        is_low_rank = self.kind == "low-rank"
        if is_low_rank != (self.rank > 0) or (self.factors and not is_low_rank):
            raise ValueError("rank and factors belong to low-rank, and to no other kind")
        if self.group not in (GROUPS if self.packing else (0,)):
            raise ValueError(
                f"group is {self.group}, expected {' or '.join(map(str, GROUPS))} where anything is packed"
            )
        return self

    @property
    def packing(self) -> str:
        """How the numbers are packed: a key of `BITS`, or nothing."""
        return self.factors if self.kind == "low-rank" else self.kind

    def num_stored(self, shape: tuple[int, ...]) -> int:
        """Return how many numbers stand for a tensor of that shape; what they are packed into does not count."""
        if self.kind != "low-rank":
            return math.prod(shape)
        return math.prod(shape[:-2]) * self.rank * (shape[-2] + shape[-1])

    def parts(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Return the declarations of the parts that stand in the file for tensor `name`, by suffix.

        Raises:
            BadSchema: when the tensor's dtype is none that artefacts hold, or not a floating one.
            WrongShape: when such a tensor cannot be stored so.
        """
        check_dtype(name, spec)
        if not torch_dtype(spec.dtype).is_floating_point:
            raise BadSchema(f"tensor {name!r} of dtype {spec.dtype} cannot be encoded")
        if len(spec.shape) not in (2, 3) or min(spec.shape) < 1:
            raise WrongShape(f"tensor {name!r} of shape {spec.shape} is no matrix, and cannot be encoded")
        *lead, rows, columns = spec.shape
        rows, columns = (columns, rows) if self.turned else (rows, columns)
        if self.kind != "low-rank":
            return self._packed("", (*lead, rows, columns))
        if self.rank > min(rows, columns):
            raise WrongShape(f"tensor {name!r} of shape {spec.shape} states rank {self.rank}, above what fits")
        sides = {"left": (*lead, rows, self.rank), "right": (*lead, self.rank, columns)}
        if not self.factors:
            return {side: TensorSpec(shape=shape, dtype=_PART_DTYPE) for side, shape in sides.items()}
        return {key: one for side, shape in sides.items() for key, one in self._packed(f"{side}.", shape).items()}

    def _packed(self, prefix: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        num_bytes = _num_bytes(math.prod(shape), self.packing)
        groups = (*shape[:-1], -(-shape[-1] // self.group))
        return {
            f"{prefix}codes": TensorSpec(shape=(num_bytes,), dtype="uint8"),
            f"{prefix}scales": TensorSpec(shape=groups, dtype=_PART_DTYPE),
        }


@dataclass(frozen=True)
class Encoded:
    """A tensor as its parts, by suffix (``left``, ``right.codes``)."""

    encoding: Encoding
    parts: Mapping[str, Tensor] = field(repr=False)


def decode(name: str, spec: TensorSpec, encoding: Encoding, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor of the declared shape and dtype that its parts stand for.

    Args:
        parts: by suffix, of exactly the shapes and dtypes of ``encoding.parts``.

    Raises:
        BadSchema: when a code is none of the kind's, bits beyond the last code are set, a scale is negative, or parts
            or the tensor are flooded with subnormal numbers.
        NotFinite: when the parts or the tensor hold NaN or infinity.
    """
    what = f"encoded tensor {name!r}"
    floating = {f"{name}.{suffix}": part for suffix, part in parts.items() if part.is_floating_point()}
    check_finite(what, floating)
    check_subnormal(what, floating)
    *lead, rows, columns = spec.shape
    rows, columns = (columns, rows) if encoding.turned else (rows, columns)
    if encoding.kind != "low-rank":
        whole = _unpacked(what, parts, "", (*lead, rows, columns), encoding)
    else:
        sides = {"left": (*lead, rows, encoding.rank), "right": (*lead, encoding.rank, columns)}
        left, right = (
            _unpacked(what, parts, f"{side}.", shape, encoding) if encoding.factors else parts[side].float()
            for side, shape in sides.items()
        )
        whole = left @ right
    check_subnormal(what, {name: whole})
    found = (whole.mT if encoding.turned else whole).to(torch_dtype(spec.dtype)).contiguous()
    check_finite(what, {name: found})
    return found


@functools.cache
def levels(packing: str) -> tuple[float, ...]:
    """Return the levels of a packing by code, ascending, each as a float32 holds it; NaN for a code that is none.

    The integers from -127 to 127 (-7 to 7), each the code less 128 (8). The normal ones, of n = 2^k codes: n/2
    quantiles of the standard normal, evenly spaced in probability from 1 - d down to a half, which is left out; 0; and
    the negatives of n/2 - 1 such quantiles; all over the largest. d = (1/(2n) + 1/(2n - 2)) / 2.

    Source: NormalFloat, QLoRA, arXiv:2305.14314.
    """
    import torch

    num = 2 ** BITS[packing]
    if packing.startswith("int"):
        return (math.nan, *(float(code - num // 2) for code in range(1, num)))
    above, below = num // 2, num // 2 - 1
    first = 1 - (1 / (2 * num) + 1 / (2 * num - 2)) / 2
    quantile = NormalDist().inv_cdf
    upper = [quantile(first + (0.5 - first) * i / above) for i in range(above)]
    lower = [-quantile(first + (0.5 - first) * i / below) for i in range(below)]
    found = torch.tensor([*lower, 0.0, *upper[::-1]], dtype=torch.float64) / upper[0]
    return tuple(found.float().tolist())


def pack_codes(codes: Tensor, packing: str) -> Tensor:
    """Return the codes, any shape of uint8, as bytes (uint8, one dimension): from the lowest bit of the first byte on.

    Bits after the last code are 0.
    """
    import torch

    bits = BITS[packing]
    if bits == 8:
        return codes.reshape(-1)
    per, num_bytes = (8, 3) if bits == 3 else (2, 1)
    flat = codes.reshape(-1).to(torch.int32)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % per)]).view(-1, per)
    word = (padded << bits * torch.arange(per, device=flat.device)).sum(1, keepdim=True)
    stacked = (word >> 8 * torch.arange(num_bytes, device=flat.device)) & 255
    return stacked.to(torch.uint8).reshape(-1)[: _num_bytes(len(flat), packing)]


def unpack_codes(packed: Tensor, num: int, packing: str) -> Tensor:
    """Return the `num` codes that `pack_codes` packed, uint8 of one dimension.

    Raises:
        BadSchema: when bits after the last code are set.
    """
    import torch

    bits = BITS[packing]
    if bits == 8:
        return packed
    per, num_bytes = (8, 3) if bits == 3 else (2, 1)
    padded = torch.cat([packed, packed.new_zeros(-len(packed) % num_bytes)]).view(-1, num_bytes).to(torch.int32)
    word = (padded << 8 * torch.arange(num_bytes, device=packed.device)).sum(1, keepdim=True)
    codes = (word >> bits * torch.arange(per, device=packed.device)) & (2**bits - 1)
    flat = codes.to(torch.uint8).reshape(-1)
    if bool(flat[num:].any()):
        raise BadSchema("bits after the last code are set")
    found: Tensor = flat[:num]
    return found


def _num_bytes(num: int, packing: str) -> int:
    return -(-num * BITS[packing] // 8)


def _unpacked(
    what: str, parts: Mapping[str, Tensor], prefix: str, shape: tuple[int, ...], encoding: Encoding
) -> Tensor:
    """Return what codes and scales stand for, float32 of that shape."""
    import torch

    scales, packing = parts[f"{prefix}scales"].float(), encoding.packing
    if bool((scales < 0).any()):
        raise BadSchema(f"{what}: {prefix}scales hold a negative number")
    try:
        codes = unpack_codes(parts[f"{prefix}codes"], math.prod(shape), packing)
    except BadSchema as error:
        raise BadSchema(f"{what}: {prefix}codes: {error}") from None
    table = torch.tensor(levels(packing), device=codes.device)
    if bool(table.isnan().any()) and bool((codes == 0).any()):
        raise BadSchema(f"{what}: {prefix}codes hold one that {packing} does not have")
    found = table[codes.int()].view(shape)
    found *= scales.repeat_interleave(encoding.group, dim=-1)[..., : shape[-1]]
    return found
