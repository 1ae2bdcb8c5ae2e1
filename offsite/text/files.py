"""Files to lines of text: UTF-8, or another Unicode form that a byte-order mark announces; compressed or not.

What is neither is refused with the encoding that it looks like and the very command that converts it, where that is
clear. It is not guessed at and read: a wrong guess trains on garbled text and nobody sees it. Errors name file and
line and repeat nothing of what stands there.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offsite.errors import ConfigError, DataError

_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)
_SAMPLE_BYTES = 2**20
_SPELLED = re.compile(rb"(?:[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})+")  # UTF-8
_HIGH = re.compile(rb"[\x80-\xff]+")
_UNUSED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")  # bytes that Windows-1252 does not use
_ASK = "ask whoever wrote it for its encoding, then: iconv -f ENCODING -t UTF-8"


def pieces(path: Path, separator: str | None) -> Iterator[tuple[int, str]]:
    """Documents of a plain text file, each with the number of the line on which it begins.

    Args:
        separator: what stands between them; None for blank lines.

    Raises:
        ConfigError: when the separator is empty.
    """
    if separator == "":
        raise ConfigError("the separator between documents is empty")
    if separator is None:
        start, kept = 0, list[str]()
        for number, line in lines(path):
            if line.strip():
                start = start if kept else number
                kept.append(line)
            elif kept:
                yield start, "".join(kept).rstrip()
                kept = []
        if kept:
            yield start, "".join(kept).rstrip()
        return
    number = 1
    for piece in "".join(line for _, line in lines(path)).split(separator):
        if piece.strip():
            lead = len(piece) - len(piece.lstrip())
            yield number + piece.count("\n", 0, lead), piece.strip()
        number += piece.count("\n") + separator.count("\n")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, each with its end; a byte-order mark at the start is skipped.

    Raises:
        DataError: when the file cannot be read, or is not Unicode text.
    """
    with _readable(path), _opened(path) as file:
        start = file.peek(4)[:4]
        found = next(((mark, codec, name) for mark, codec, name in _MARKS if start.startswith(mark)), None)
        if found is not None:
            mark, codec, name = found
            yield from _wide_lines(path, file.read().removeprefix(mark), codec, name)
            return
        has_mark = start.startswith(codecs.BOM_UTF8)
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            yield number, _decoded(path, number, line, has_mark=has_mark)


def _decoded(path: Path, number: int, raw: bytes, *, has_mark: bool) -> str:
    """Return the line's text, which is UTF-8 without NUL."""
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{path.name}: line {number}: byte {error.start + 1} is not UTF-8"
        raise _unreadable(path, place, has_mark=has_mark) from None
    if "\0" in line:
        raise _unreadable(path, f"{path.name}: line {number}: byte {raw.index(0) + 1} is NUL", has_mark=has_mark)
    return line


def _wide_lines(path: Path, raw: bytes, codec: str, name: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that is not read byte by byte, and therefore whole."""
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError as error:
        number = raw[: error.start].decode(codec, "replace").count("\n") + 1
        raise DataError(
            f"{path.name}: line {number}: begins as {name} and is not", hint="the file may break off: copy it again"
        ) from None
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if "\0" in line:
            raise DataError(f"{path.name}: line {number}: holds NUL, which no text does", hint="is it the right file?")
        yield number, line


# --- what it looks like


def _unreadable(path: Path, place: str, *, has_mark: bool) -> DataError:
    """Return the error for a file that is not UTF-8, with the command that makes it UTF-8 if that is clear."""
    with _opened(path) as file:
        sample = file.read(_SAMPLE_BYTES)
    encoding = None if has_mark else _wide(sample)
    if encoding is not None:
        return DataError(f"{path.name}: looks like UTF-16 without a byte-order mark", hint=_command(path, encoding))
    if b"\0" in sample:
        return DataError(f"{place}: the file is no text, or broken", hint="is it the right file?")
    runs = _HIGH.findall(sample)
    if has_mark or 2 * sum(_SPELLED.fullmatch(run) is not None for run in runs) > len(runs):
        return DataError(f"{place}, the rest of the file is", hint="mend that line; converting would garble the rest")
    if _is_windows(sample):
        return DataError(f"{place}, it looks like Windows-1252", hint=_command(path, "CP1252"))
    return DataError(place, hint=f"{_ASK} {shlex.quote(path.name)} > {shlex.quote(_new_name(path))}")


def _wide(sample: bytes) -> str | None:
    """Return the form of UTF-16 that a sample is in, if in any: line ends and spaces have a NUL on one side alone."""
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    least = max(2, len(sample) // 100)
    if odd >= least and even * 20 < odd:
        return "UTF-16LE"
    if even >= least and odd * 20 < even:
        return "UTF-16BE"
    return None


def _is_windows(sample: bytes) -> bool:
    """Tell whether the bytes beyond ASCII are such as Windows-1252 has them: in use, and mostly alone among letters.

    In other scripts' encodings they stand in runs.
    """
    runs = _HIGH.findall(sample)
    num_alone = sum(len(run) <= 2 for run in runs)
    return bool(runs) and num_alone * 10 >= len(runs) * 9 and not _UNUSED.search(sample)


def _command(path: Path, encoding: str) -> str:
    """Return the command that writes the file as UTF-8 beside it."""
    old, new = shlex.quote(path.name), shlex.quote(_new_name(path))
    if path.suffix.lower() == ".gz":
        return f"gzip -dc {old} | iconv -f {encoding} -t UTF-8 | gzip > {new}"
    return f"iconv -f {encoding} -t UTF-8 {old} > {new}"


def _new_name(path: Path) -> str:
    """Return a name for the converted file, of the same kind."""
    name, ending = path.name, "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:])
    return f"{name.removesuffix(ending)}-utf8{ending}"


# --- what the system says


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the operating system and gzip raise into one line."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path.name}: no such file", hint="check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path.name}: a folder, expected a file") from None
    except (gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path.name}: not a gzip file", hint="drop the .gz ending if it is not compressed") from None
    except EOFError:
        raise DataError(f"{path.name}: the gzip file breaks off", hint="copy the file again") from None
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read: {(error.strerror or 'i/o error').lower()}") from None
