"""The scan of a bundle before it gets its name: nothing of the client's text, machine or run may be in it.

A bundle is built from an allow-list, so nothing should ever be found; this reads every byte that would leave and checks
that. It knows literal text, in UTF-8 and UTF-16. It does not know text that was encoded, encrypted or spread over
weights, and says nothing of what the weights themselves remember.

Of tensors only the bytes are judged. There, what is looked for is long enough not to stand by chance: a name of six
bytes stands at some place of 100 MB of random bytes with 1e8 / 256^6 = 3.6e-7, which the shape of real weights (letters
are exponents of 1e20 and above) lowers further.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from client.tuning.ngrams import LEAST_BYTES, Remembered
from offsite.artefacts.bundle import BUNDLE_FORMAT, DISCLOSABLE, TENSOR_FILE, AdapterSpec, BundleManifest, Head
from offsite.artefacts.manifest import MANIFEST_NAME, FileEntry
from offsite.digests import DIGEST_PATTERN
from offsite.errors import PolicyError
from offsite.strictjson import Strict
from offsite.tensors import HEADER_LIMIT_BYTES, TensorSpec
from offsite.text.records import Record

MayHold = Callable[[tuple[str, ...], str], bool]  # whether a number, as it is written, may stand at a place
Category = Literal["training text", "path", "name", "timestamp", "loss", "number", "file"]

LEAST_NAME = 4
LEAST_NAME_IN_TENSORS = 6
LEAST_DIGITS = 4

_CHUNK_BYTES = 8 * 2**20
_OVERLAP_BYTES = 16 * 2**10
_EPOCH = (10**9, 25 * 10**8)  # seconds, 2001 to 2049

_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_TIMESTAMP = re.compile(
    r"(?<!\d)(?:19|20)\d\d([-/.])[01]\d\1[0-3]\d(?!\d)"  # ISO 8601, with or without a time behind
    r"|(?<!\d)20\d\d[01]\d[0-3]\dT?[0-2]\d[0-5]\d"
    r"|(?<!\d)[0-2]\d:[0-5]\d:[0-5]\d(?!\d)"
    rf"|(?<![A-Za-z]){_MONTH}\s+[0-3]?\d(?!\d)|(?<!\d)[0-3]?\d[\s-]+{_MONTH}[\s-]+\d\d"
    r"|(?<![\w.])1\d{9}(?:\d{3}|\d{6}|\d{9})?(?![\w])"
)
_PATH = re.compile(
    r"(?<![\w.:/\\~-])(?:file:/*)?/[\w.~@+-]+"  # POSIX; the format's own name has a word before its slash
    r"|file:/|~[\w.-]*/|(?<![A-Za-z])[A-Za-z]:[\\/]+\w|\\\\[\w.-]+\\+\w"
)
_ROOTS = (b"/home/", b"/Users/", b"/root/", b"/mnt/", b"/var/", b"/data/", b"/scratch/", b":\\Users\\", b"file:///")
_BEGINNINGS: tuple[tuple[Category, tuple[bytes, ...], re.Pattern[bytes]], ...] = (
    ("timestamp", (b"20",), re.compile(rb"20\d\d-[01]\d-[0-3]\d[T ][0-2]\d:[0-5]\d")),
    ("path", _ROOTS, re.compile(rb"[ -~]{5,9}[\w.~@+-]{3}[ -~]{3}")),
)
_DECIMAL = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.])")
_DIGEST = re.compile(DIGEST_PATTERN)

_FIXED = " ".join(
    [
        *(name for cls in (BundleManifest, AdapterSpec, Head, TensorSpec, FileEntry) for name in cls.model_fields),
        *(BUNDLE_FORMAT, TENSOR_FILE, MANIFEST_NAME, *DISCLOSABLE),
        "reward classify regress tag",
        "sha256 data_offsets __metadata__ pt BF16 F32 bfloat16 float32 all-linear attention mlp all",
    ]
)


class Scan(Strict):
    """What was read and what was found in it: counts by category, never what it was."""

    num_files: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    num_ngrams_compared: int = Field(ge=0)
    found: dict[Category, int] = {}

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.found


def require_clean(scan: Scan) -> None:
    """Return only if nothing was found.

    Raises:
        PolicyError: with the categories and counts.
    """
    if not scan.clean:
        found = ", ".join(f"{name} ({count})" for name, count in sorted(scan.found.items()))
        raise PolicyError(
            f"the bundle would give away what may not leave: {found}; it is not released",
            hint="a bundle holds weights and shapes alone: find out what wrote this, and report it",
        )


def scan_bundle(
    folder: Path,
    *,
    texts: Iterable[str],
    figures: Iterable[float],
    spec: AdapterSpec,
    disclosed: Mapping[str, float] | None = None,
    paths: Iterable[Path] = (),
    names: Iterable[str] | None = None,
    known: Iterable[str] = (),
) -> Scan:
    """Return what is found in the bundle at `folder`, read whole, every file of it.

    Args:
        texts: what was read to train: the n-grams of eight words of each are looked for.
        figures: losses of the run; found when written with four or more significant digits.
        spec: the adapter, whose settings the manifest may state.
        disclosed: figures by name that the client chose to state, and may stand there with this value.
        paths: of the data and the output, looked for beside home and current folder, and their names.
        names: of user and host; by default this machine's.
        known: names that the owner knows anyway, such as the package's tensors: none of these is a finding.
    """
    labels = () if spec.head is None else spec.head.labels  # the job's, or chosen to be told
    public = " ".join((_FIXED, *known, *labels, spec.kind, spec.targets))
    stated = own_names() if names is None else names
    search = _Search(
        remembered=Remembered(texts),
        figures=_Figures(figures),
        names=tuple(sorted({name for name in stated if len(name) >= LEAST_NAME and not _named(name).search(public)})),
        paths=tuple(path for path in _private_paths(paths) if path not in public),
        settings={"rank": spec.rank, "alpha": spec.alpha, "dropout": spec.dropout},
        read_size=None if spec.head is None else spec.head.hidden,
        disclosed=dict(disclosed or {}),
    )
    return search.over(folder)


def texts_of(records: Iterable[Record]) -> Iterator[str]:
    """Yield the text of every record, whole: a prompt and its completion are one, so are messages."""
    for record in records:
        yield record.whole_text


def losses_in(log: Path) -> list[float]:
    """Return every loss that the run's log holds; none when there is no log."""
    if not log.is_file():
        return []
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    found = [line.get(name) for line in lines for name in ("loss", "evaluation_loss")]
    return [value for value in found if isinstance(value, float)]


def own_names() -> set[str]:
    """Return the names of this machine and of whoever uses it, as far as it has some. No network is asked."""
    host = socket.gethostname()
    found = {host, host.partition(".")[0]}
    with suppress(KeyError, OSError, ImportError):  # no such variable, and no entry in the system's list
        found.add(getpass.getuser())
    with suppress(KeyError, ImportError):
        import pwd

        entry = pwd.getpwuid(os.getuid())
        found |= {entry.pw_name, entry.pw_gecos.partition(",")[0]}
    return {name for name in found if name and name != "localhost"}


def _private_paths(paths: Iterable[Path]) -> tuple[str, ...]:
    """Return what must not be in a bundle of the folders that the run knows: whole paths, and names of files."""
    found: set[str] = set()
    given = list(paths)
    for path in (Path.home(), Path.cwd(), *given):
        found |= {str(path.absolute()), str(path.resolve()), str(path.absolute().parent)}
    found |= {path.name for path in given if path.suffix and len(path.name) >= LEAST_NAME_IN_TENSORS}
    return tuple(sorted(path for path in found if len(path.strip("/\\")) >= LEAST_NAME))


def _named(name: str) -> re.Pattern[str]:
    """Return the name as a word of its own, in any case."""
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", re.IGNORECASE)


class _Figures:
    """Numbers that are recognised by their first digits, four or more, however many are written."""

    def __init__(self, values: Iterable[float]) -> None:
        self._values = {abs(float(value)) for value in values if math.isfinite(value) and value != 0}
        self._forms: dict[int, set[str]] = {}

    def hold(self, literal: str) -> bool:
        """Return whether a decimal literal is one of the numbers, rounded to as many digits as it has."""
        digits = re.sub(r"[eE].*|[^0-9]", "", literal).lstrip("0")
        num = min(len(digits), 17)
        if num < LEAST_DIGITS:
            return False
        if num not in self._forms:
            self._forms[num] = {f"{value:.{num - 1}e}" for value in self._values}
        return f"{abs(float(literal)):.{num - 1}e}" in self._forms[num]


class _Literal(str):
    """A JSON number as it is written."""


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with every one of its names, also those that come twice."""


@dataclass(frozen=True)
class _Search:
    remembered: Remembered
    figures: _Figures
    names: tuple[str, ...]
    paths: tuple[str, ...]
    settings: Mapping[str, float]
    read_size: int | None
    disclosed: Mapping[str, float]

    def over(self, folder: Path) -> Scan:
        found: Counter[Category] = Counter()
        num_files = num_bytes = num_compared = 0
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or not path.is_file():
                found["file"] += 1
                continue
            num_files, num_bytes = num_files + 1, num_bytes + path.stat().st_size
            if name == MANIFEST_NAME:
                num_compared += self._text(path.read_bytes(), found, self._is_manifest_number)
            elif name == TENSOR_FILE:
                header, start = _header(path)
                num_compared += self._text(header, found, _is_header_number)
                num_compared += self._tensors(path, start, found)
            else:
                found["file"] += 1
                num_compared += self._tensors(path, 0, found)
        return Scan(
            num_files=num_files,
            num_bytes=num_bytes,
            num_ngrams_compared=num_compared,
            found={name: found[name] for name in sorted(found) if found[name]},
        )

    def _text(self, raw: bytes, found: Counter[Category], may_hold: MayHold) -> int:
        """Judge JSON, or what should be: as it is written, and as it is meant. Returns how many runs were compared."""
        plain = raw.decode("utf-8", "replace")
        try:
            value = json.loads(plain, object_pairs_hook=_Pairs, parse_int=_Literal, parse_float=_Literal)
            leaves = list(_leaves(value, ()))
        except (ValueError, RecursionError):
            leaves = [((), plain)]
        strings = [leaf for _, leaf in leaves if not isinstance(leaf, _Literal)]
        for place, leaf in leaves:
            if isinstance(leaf, _Literal):
                self._number(place, leaf, found, may_hold)
            elif not _DIGEST.fullmatch(leaf):
                self._string(leaf, found)
        readings = [[plain], [" ".join(strings)], list(self.remembered.spelled(raw)) if b"\0" in raw else []]
        compared = [self.remembered.compare(reading) for reading in readings]
        found["training text"] += max(hits for _, hits in compared)
        return sum(num for num, _ in compared)

    def _string(self, text: str, found: Counter[Category]) -> None:
        found["path"] += bool(_PATH.search(text)) or any(path in text for path in self.paths)
        found["name"] += any(_named(name).search(text) for name in self.names)
        found["timestamp"] += bool(_TIMESTAMP.search(text))
        found["loss"] += any(self.figures.hold(literal) for literal in _DECIMAL.findall(text))

    def _number(self, place: tuple[str, ...], literal: str, found: Counter[Category], may_hold: MayHold) -> None:
        if may_hold(place, literal):
            return
        found["number"] += 1
        found["loss"] += self.figures.hold(literal)
        value = float(literal)
        found["timestamp"] += any(_EPOCH[0] <= value / scale < _EPOCH[1] for scale in (1, 10**3, 10**6, 10**9))

    def _is_manifest_number(self, place: tuple[str, ...], literal: str) -> bool:
        match place:
            case ("tensors", _, "shape", _) | ("files", _, "bytes"):
                return literal.isdecimal()
            case ("adapter", name):
                return name in self.settings and float(literal) == self.settings[name]
            case ("adapter", "head", "hidden"):
                return literal == str(self.read_size)
            case ("disclosed", name):
                return name in self.disclosed and float(literal) == self.disclosed[name]
        return False

    def _tensors(self, path: Path, start: int, found: Counter[Category]) -> int:
        """Judge bytes that may be anything. Returns how many runs were compared."""
        anything = re.compile(b"")
        wanted = [*_BEGINNINGS]
        wanted += [("name", _needles(self.names), anything), ("path", _needles(self.paths), anything)]
        num_compared = 0
        for chunk, num_own in _chunks(path, start):
            for category, beginnings, pattern in wanted:
                places = {place for one in beginnings for place in _places(chunk, one, num_own)}
                found[category] += sum(pattern.match(chunk, place) is not None for place in places)
            num, hits = self.remembered.compare(self.remembered.spelled(chunk), least_bytes=LEAST_BYTES)
            found["training text"] += hits
            num_compared += num
        return num_compared


def _needles(words: Sequence[str]) -> tuple[bytes, ...]:
    """Return how the words may be written that are long enough to be looked for among arbitrary bytes."""
    codes = ("utf-8", "utf-16-le", "utf-16-be")
    long = [word for word in words if len(word) >= LEAST_NAME_IN_TENSORS]
    return tuple(sorted({word.encode(code, "replace") for word in long for code in codes}))


def _places(chunk: bytes, needle: bytes, num_own: int) -> Iterator[int]:
    place = chunk.find(needle)
    while 0 <= place < num_own:
        yield place
        place = chunk.find(needle, place + 1)


def _is_header_number(place: tuple[str, ...], literal: str) -> bool:
    return len(place) == 3 and place[1] in ("shape", "data_offsets") and literal.isdecimal()


def _leaves(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every string, name and number of a JSON value, with where it stands."""
    if isinstance(value, _Pairs):
        for name, inner in value:
            yield place, name
            yield from _leaves(inner, (*place, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*place, str(number)))
    elif isinstance(value, str):
        yield place, value


def _header(path: Path) -> tuple[bytes, int]:
    """Return the header of a tensor file, and where its tensors begin; nothing, and 0, when it has none."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(HEADER_LIMIT_BYTES, path.stat().st_size - 8):
            return b"", 0
        return handle.read(length), 8 + length


def _chunks(path: Path, start: int) -> Iterator[tuple[bytes, int]]:
    """Yield the file from `start` on in parts that overlap, each with how many bytes of it are not in the next."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        for first in range(start, size, _CHUNK_BYTES):
            handle.seek(first)
            chunk = handle.read(_CHUNK_BYTES + _OVERLAP_BYTES)
            yield chunk, len(chunk) if first + _CHUNK_BYTES >= size else _CHUNK_BYTES
