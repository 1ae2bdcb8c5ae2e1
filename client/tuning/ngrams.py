"""Runs of words that two texts share, found by hash: what was trained on is remembered, and any bytes compared with it.

Words are those of `offsite.text.fold`: letters and digits without case; whatever stands between them does not count. In
scripts that are written without spaces every character is a word. Bytes are read as UTF-8 and as UTF-16 in both orders,
at every position, where they spell characters that the remembered texts use. Hashes have 64 bits and a random key: with
ten million remembered runs and ten million compared, a false hit has a chance of about 5e-6.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offsite.text.fold import folded, words_of

NUM_WORDS = 8
"""Words of a run."""

LEAST_BYTES = 16
"""Letters and digits of a run, in UTF-8, that count among arbitrary bytes: eight digits may stand there by chance."""

_PRINTABLE = "\t\n\r" + "".join(map(chr, range(0x20, 0x7F)))
_BATCH_WORDS = 2**20
_LEAST_UNITS = {1: 2 * NUM_WORDS - 1, 2: NUM_WORDS}  # of one byte: eight letters and what parts them

Hashes = NDArray[np.uint64]


class Remembered:
    """The runs of `NUM_WORDS` words of some texts; runs do not go from one text into the next."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._factors = np.frombuffer(os.urandom(8 * NUM_WORDS), dtype=np.uint64) | np.uint64(1)
        letters = set(_PRINTABLE)
        found = [np.empty(0, dtype=np.uint64)]
        for batch in _batches(texts, letters):
            grams, _ = self._grams(batch)
            found.append(np.unique(grams))
        self._known: Hashes = np.unique(np.concatenate(found))
        self._bytes, self._units = _tables(letters)

    def __len__(self) -> int:
        """How many different runs are remembered."""
        return len(self._known)

    def compare(self, texts: Iterable[str], *, least_bytes: int = 0) -> tuple[int, int]:
        """Return how many runs the texts have, and how many of these are remembered.

        Args:
            least_bytes: letters and digits, in UTF-8, that a run must have to count as remembered.
        """
        grams, sizes = self._grams([words_of(text) for text in texts])
        if not len(grams) or not len(self._known):
            return len(grams), 0
        places = np.minimum(np.searchsorted(self._known, grams), len(self._known) - 1)
        hits = (self._known[places] == grams) & (sizes >= least_bytes)
        return len(grams), int(np.count_nonzero(hits))

    def spelled(self, raw: bytes) -> Iterator[str]:
        """Yield what `raw` spells, in characters of the remembered texts, wherever that is long enough for a run."""
        yield from _decoded(raw, self._bytes, np.dtype(np.uint8), 0, "utf-8")
        for first in (0, 1):
            yield from _decoded(raw, self._units, np.dtype("<u2"), first, "utf-16-le")
            yield from _decoded(raw, self._units, np.dtype(">u2"), first, "utf-16-be")

    def _grams(self, texts: list[list[str]]) -> tuple[Hashes, NDArray[np.int64]]:
        """Return the hash of every run, and how many bytes its words have."""
        lengths = [len(words) for words in texts]
        total = sum(lengths)
        num = total - NUM_WORDS + 1
        if num <= 0:
            return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
        words = np.fromiter(map(hash, chain.from_iterable(texts)), dtype=np.int64, count=total).view(np.uint64)
        sizes = np.fromiter(
            (len(word.encode("utf-8", "replace")) for word in chain.from_iterable(texts)), np.int64, total
        )
        owners = np.repeat(np.arange(len(texts)), lengths)
        grams = np.zeros(num, dtype=np.uint64)
        for place, factor in enumerate(self._factors):
            grams += words[place : place + num] * factor
        sums = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes)))
        within = owners[:num] == owners[NUM_WORDS - 1 :]
        return grams[within], (sums[NUM_WORDS:] - sums[:num])[within]


def _batches(texts: Iterable[str], letters: set[str]) -> Iterator[list[list[str]]]:
    """Yield the words of texts, about a million at a time; `letters` has every character of them afterwards."""
    batch: list[list[str]] = []
    total = 0
    for text in texts:
        letters.update(text)
        batch.append(words_of(text))
        total += len(batch[-1])
        if total >= _BATCH_WORDS:
            yield batch
            batch, total = [], 0
    yield batch


def _tables(letters: set[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which bytes of UTF-8, and which units of UTF-16, these characters are written with, in either case."""
    spelled = "".join(letters)
    plain = folded(spelled)
    forms = "".join((spelled, spelled.upper(), spelled.lower(), spelled.title(), plain, plain.upper()))
    octets, units = np.zeros(2**8, dtype=np.bool_), np.zeros(2**16, dtype=np.bool_)
    octets[np.frombuffer(forms.encode("utf-8", "replace"), dtype=np.uint8)] = True
    units[np.frombuffer(forms.encode("utf-16-le", "replace"), dtype="<u2")] = True
    return octets, units


def _decoded(raw: bytes, table: NDArray[np.bool_], unit: np.dtype[Any], first: int, encoding: str) -> Iterator[str]:
    size = unit.itemsize
    units = np.frombuffer(raw[first : first + (len(raw) - first) // size * size], dtype=unit)
    mask = np.zeros(len(units) + 2, dtype=np.int8)
    mask[1:-1] = table[units]
    if size == 1 and table[0x80:].any():  # of the bytes beyond ASCII, those that stand where UTF-8 puts them
        goes_on, begins = (units & 0xC0) == 0x80, units >= 0xC0
        mask[1:-2] &= ~begins[:-1] | goes_on[1:]
        mask[2:-1] &= ~goes_on[1:] | (begins | goes_on)[:-1]
    edges = np.flatnonzero(np.diff(mask))
    starts, ends = edges[::2], edges[1::2]
    long = ends - starts >= _LEAST_UNITS[size]
    for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
        yield raw[first + start * size : first + end * size].decode(encoding, "replace")
