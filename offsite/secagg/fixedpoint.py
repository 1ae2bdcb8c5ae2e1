"""Fixed point: tensors as whole numbers modulo a power of two, so that sums are exact and cannot wrap.

A value x becomes the whole number nearest to ``x * 2**exponent``, modulo ``2**bits``. The exponent is the largest for
which `num_summands` values at the limit still add up to less than half the modulus, and to at most 2**53, so that a sum
becomes a float64 without rounding. Scaling by a power of two is exact too: what is lost is the one rounding to a whole
number, at most half a step a value. Nothing is clipped: a value beyond the limit is an error, because whoever clips
without saying so changes the sum. Beyond 53 bits a larger modulus buys no finer step.

Tensors are joined into one vector in the order of their declared names and shapes, which both sides agreed upon before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from offsite.errors import ConfigError, NormTooLarge, PolicyError, RunFailed, WrongNames, WrongShape
from offsite.strictjson import Strict
from offsite.tensors import MAX_DIMENSIONS

BITS: Final = (32, 48, 64)
SMALLEST_LIMIT, LARGEST_LIMIT = 2.0**-40, 2.0**40
MAX_SUMMANDS = 2**16

_EXACT = 2**53  # whole numbers up to here are float64 numbers

Numbers = NDArray[np.uint64]


class TensorShape(Strict):
    """Name and shape of one tensor; its place in the vector follows from its place among the others."""

    name: str = Field(min_length=1, max_length=512)
    shape: tuple[int, ...] = Field(max_length=MAX_DIMENSIONS)

    @property
    def num_numbers(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Encoding:
    """How values become whole numbers; equal on all sides.

    Attributes:
        limit: largest absolute value that may be encoded, in the unit of the values.
        bits: 32, 48 or 64; the modulus is ``2**bits``, and a number takes ``bits / 8`` bytes on its way.
        num_summands: how many encoded values are added at most.

    Raises:
        ConfigError: when one of them is out of its range.
    """

    limit: float
    bits: int
    num_summands: int

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in BITS:
            problems.append(f"bits is {self.bits}, expected one of {', '.join(map(str, BITS))}")
        if not SMALLEST_LIMIT <= self.limit <= LARGEST_LIMIT:  # NaN too
            problems.append(f"limit is {self.limit}, expected {SMALLEST_LIMIT:.1g} to {LARGEST_LIMIT:.1g}")
        if not 1 <= self.num_summands <= MAX_SUMMANDS:
            problems.append(f"num_summands is {self.num_summands}, expected 1 to {MAX_SUMMANDS}")
        if problems:
            raise ConfigError("fixed point: " + "; ".join(problems))

    @cached_property
    def exponent(self) -> int:
        """Binary places after the point; may be negative."""
        most = min(2 ** (self.bits - 1) - 1, _EXACT)
        found = math.frexp(most / (self.num_summands * self.limit))[1]
        while self.num_summands * round(math.ldexp(self.limit, found)) > most:
            found -= 1
        return found

    @property
    def step(self) -> float:
        """Distance of neighbouring encoded values. A sum of n decoded values is off by at most ``n * step / 2``."""
        return math.ldexp(1.0, -self.exponent)

    @property
    def largest(self) -> int:
        """The whole number that the limit becomes."""
        return round(math.ldexp(self.limit, self.exponent))

    @property
    def num_bytes(self) -> int:
        """Bytes of one number on its way."""
        return self.bits // 8

    def encode(self, values: NDArray[np.floating], what: str = "the vector") -> Numbers:
        """Return the numbers of `values`, each below the modulus, in storage of their own.

        Args:
            what: named in an error; the values never are.

        Raises:
            RunFailed: when a value is NaN or infinite.
            PolicyError: when one is beyond the limit.
        """
        wide = np.asarray(values, dtype=np.float64)
        if not np.isfinite(wide).all():
            raise RunFailed(f"{what} holds NaN or infinity and is not sent")
        if wide.size and np.abs(wide).max() > self.limit:
            raise PolicyError(
                f"{what} holds a value beyond the agreed limit of {self.limit:g} and is not sent",
                hint="clip the update before it is encoded, or agree on a larger limit",
            )
        return self.reduce(np.rint(np.ldexp(wide, self.exponent)).astype(np.int64).view(np.uint64))

    def decode(self, total: Numbers, num_summands: int) -> NDArray[np.float64]:
        """Return the sum of `num_summands` values that `total` holds, modulo the modulus.

        Raises:
            NormTooLarge: when it is beyond what so many values within the limit add up to.
            ConfigError: when there are more summands than the encoding is made for.
        """
        if not 1 <= num_summands <= self.num_summands:
            raise ConfigError(f"a sum of {num_summands} values, the encoding is for 1 to {self.num_summands}")
        spare = np.uint64(64 - self.bits)
        signed = (total << spare).view(np.int64) >> np.int64(spare)  # the shift back copies the sign
        most = num_summands * self.largest
        if signed.size and (signed.max() > most or signed.min() < -most):
            raise NormTooLarge(f"the sum is beyond what {num_summands} values within {self.limit:g} add up to")
        return np.ldexp(signed.astype(np.float64), -self.exponent)

    def reduce(self, numbers: Numbers) -> Numbers:
        """Take `numbers` modulo the modulus, in place, and return them."""
        if self.bits < 64:
            numbers &= np.uint64(2**self.bits - 1)
        return numbers

    def to_bytes(self, numbers: Numbers) -> bytes:
        """Return each number in `num_bytes` bytes, little end first."""
        whole = numbers.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
        return whole[:, : self.num_bytes].tobytes()

    def from_bytes(self, raw: bytes | memoryview) -> Numbers:
        """Return the numbers that `raw` holds, as `to_bytes` wrote them, in storage of their own."""
        if self.bits != 48:
            return np.frombuffer(raw, dtype=f"<u{self.num_bytes}").astype(np.uint64)
        parts = np.frombuffer(raw, dtype=np.uint8).reshape(-1, self.num_bytes)
        whole = np.zeros((len(parts), 8), dtype=np.uint8)
        whole[:, : self.num_bytes] = parts
        return whole.reshape(-1).view("<u8").astype(np.uint64, copy=False)


def count_numbers(shapes: Sequence[TensorShape]) -> int:
    """Return the length of the vector that tensors of these shapes are joined to."""
    return sum(shape.num_numbers for shape in shapes)


def encode_tensors(tensors: Mapping[str, torch.Tensor], shapes: Sequence[TensorShape], encoding: Encoding) -> Numbers:
    """Return all tensors as one encoded vector, in the order of `shapes`.

    Raises:
        WrongNames: when the names are not exactly those of `shapes`.
        WrongShape: when a tensor has another shape, or is not of floating point.
        RunFailed, PolicyError: as `Encoding.encode`, naming the tensor.
    """
    _check_names(tensors, shapes)
    vector = np.empty(count_numbers(shapes), dtype=np.uint64)
    start = 0
    for shape in shapes:
        tensor = tensors[shape.name]
        if tuple(tensor.shape) != shape.shape or not tensor.is_floating_point():
            found = f"shape {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
            raise WrongShape(f"tensor {shape.name!r}: {found}, agreed was {shape.shape} of floating point")
        values = tensor.detach().to("cpu", torch.float64).reshape(-1).numpy()
        vector[start : start + shape.num_numbers] = encoding.encode(values, f"tensor {shape.name!r}")
        start += shape.num_numbers
    return vector


def decode_tensors(
    total: Numbers, shapes: Sequence[TensorShape], encoding: Encoding, num_summands: int
) -> dict[str, torch.Tensor]:
    """Return the sum as float64 tensors by name; none shares storage with `total`.

    Raises:
        WrongShape: when the vector is not as long as `shapes` say.
        NormTooLarge, ConfigError: as `Encoding.decode`.
    """
    if len(total) != count_numbers(shapes):
        raise WrongShape(f"a vector of {len(total)} numbers, the agreed shapes have {count_numbers(shapes)}")
    values = torch.from_numpy(encoding.decode(total, num_summands))
    parts = values.split([shape.num_numbers for shape in shapes])
    return {shape.name: part.reshape(shape.shape) for shape, part in zip(shapes, parts, strict=True)}


def _check_names(tensors: Mapping[str, torch.Tensor], shapes: Sequence[TensorShape]) -> None:
    agreed = {shape.name for shape in shapes}
    missing, extra = sorted(agreed - tensors.keys()), sorted(tensors.keys() - agreed)
    if missing or extra:
        what = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} was not agreed upon"
        raise WrongNames(f"tensors of the update: {what}")
