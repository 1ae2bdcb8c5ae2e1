"""Weights that are mapped from a file: memory holds of them what was read last, and lets go of it when it is told to.

A checkpoint is never read as a whole: its tensors are the file's own pages, and a page takes memory once somebody has
looked at it. Whoever has done with a block lets go of its pages; the next look reads them from the file again. So a
model of any size is worked on in the memory of a few of its blocks.

Only pages that the kernel calls the file's own are let go. One that was written to since, and memory that no file
stands behind, stay: no number is ever lost. Where the kernel does not say (it is not Linux, or not allowed), nothing is
let go, and all that changes is how much memory is taken.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LEAST_BYTES = 2**18
"""Tensors of fewer bytes stay: asking the kernel would cost more than they take."""

_PAGES = Path("/proc/self/pagemap")
_DO_NOT_NEED = 4  # MADV_DONTNEED
_SWAPPED, _OF_FILE = 1 << 62, 1 << 61


def let_go(tensors: Iterable[torch.Tensor]) -> int:
    """The memory of those tensors that a file stands behind is free again; their values are as before.

    Returns:
        how many bytes of pages the kernel was told to let go, present or not.
    """
    total = 0
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.nbytes >= LEAST_BYTES and tensor.is_contiguous():
            total += _let_go(tensor.data_ptr(), tensor.nbytes)
    return total


def _let_go(address: int, num_bytes: int) -> int:
    """Free the whole pages inside of those bytes, if each of them is a file's and as it is there."""
    size = mmap.PAGESIZE
    first, end = -(-address // size), (address + num_bytes) // size
    advise = _advise()
    if end <= first or advise is None or not _all_of_file(first, end - first):
        return 0
    if advise(ctypes.c_void_p(first * size), ctypes.c_size_t((end - first) * size), _DO_NOT_NEED):
        return 0
    return (end - first) * size


def _all_of_file(first: int, num: int) -> bool:
    """Say whether every page of these that takes memory or swap is a file's own, by the kernel's word."""
    try:
        with _PAGES.open("rb", buffering=0) as handle:
            handle.seek(8 * first)
            told = handle.read(8 * num)
    except (OSError, OverflowError):
        return False
    if len(told) != 8 * num:
        return False
    import torch

    words = torch.frombuffer(bytearray(told), dtype=torch.int64)
    is_swapped = (words & _SWAPPED) != 0
    is_present = words < 0  # the highest bit
    return not bool((is_swapped | (is_present & ((words & _OF_FILE) == 0))).any())


@cache
def _advise() -> Any:
    """Return the C library's ``madvise``, or None where there is none."""
    with suppress(OSError, AttributeError, TypeError):
        found = ctypes.CDLL(None, use_errno=True).madvise
        found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
        return found
    return None
