"""Rows of a Parquet file, read a few at a time by pyarrow (the extra ``parquet``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offsite.errors import DataError

_ROWS_AT_ONCE = 256


def parquet_rows(path: Path, *, with_bytes: bool = False) -> Iterator[dict[str, Any]]:
    """Yield every row as its columns by name; lists and structs as lists and dicts, missing values as None.

    Columns with anything else than text, numbers and truth values in them, however deep, are left out: nothing reads
    times and bytes, and some cannot be turned into Python's.

    Args:
        with_bytes: columns with bytes in them are not left out.

    Raises:
        DataError: when pyarrow is missing, or the file is missing, broken, names a column twice, or holds text that is
            not UTF-8 or has NUL in it.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path.name}: Parquet is read by pyarrow, which is not installed",
            hint="pip install pyarrow, or write the rows as .jsonl",
        ) from None
    if not path.is_file():
        raise DataError(f"{path.name}: {'a folder, expected a file' if path.is_dir() else 'no such file'}")
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if len(set(schema.names)) != len(schema.names):
                raise DataError(f"{path.name}: two columns have the same name")
            read = [one.name for one in schema if _is_read(one.type, arrow.types, with_bytes)]
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=read, use_threads=False):
                for one in range(batch.num_rows):
                    number += 1
                    yield _row(batch.slice(one, 1), f"{path.name}: row {number}")
    except (arrow.ArrowException, OSError):
        raise DataError(f"{path.name}: not a Parquet file, or a broken one", hint="copy the file again") from None


def _is_read(kind: Any, types: Any, with_bytes: bool) -> bool:
    """Tell whether a column of that type may hold what is read: text, numbers, and lists or structs of such."""
    if types.is_struct(kind):
        return all(_is_read(field.type, types, with_bytes) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_read(kind.value_type, types, with_bytes)
    if types.is_dictionary(kind):
        return _is_read(kind.value_type, types, with_bytes)
    if with_bytes and (types.is_binary(kind) or types.is_large_binary(kind)):
        return True
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind) or types.is_floating(kind)
        or types.is_boolean(kind) or types.is_null(kind)
    )  # fmt: skip


def _row(batch: Any, place: str) -> dict[str, Any]:
    """Return the one row of a batch.

    Raises:
        DataError: when a text of it is none.
    """
    try:
        (values,) = batch.to_pylist()
    except UnicodeDecodeError:
        raise DataError(f"{place}: a text in it is not UTF-8", hint="write the file anew, with text as UTF-8") from None
    if _has_nul(values):
        raise DataError(f"{place}: holds NUL, which no text does", hint="is it the right file?")
    return dict(values)


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(map(_has_nul, value.values()))
    return isinstance(value, list) and any(map(_has_nul, value))
