"""Outputs appear whole or not at all: write beside the target, fsync, rename."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offsite.errors import ConfigError, RunFailed


def refuse_existing(out: Path) -> None:
    """Return only if nothing stands at `out` and its parent folder can take it.

    Raises:
        ConfigError: when `out` exists or its parent is not a folder.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"output {out.name!r} already exists", hint="choose another name with -o, or delete it first")
    if out.parent.exists() and not out.parent.is_dir():
        raise ConfigError(f"the parent of output {out.name!r} is not a folder")


def require_place(out: Path) -> None:
    """Return only if something new can be written at `out`; asked before any work, and nothing is left behind.

    Raises:
        ConfigError: naming the folder that does not take it, and why.
    """
    folder = out.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"the parent of output {out.name!r} is not a folder")
    try:
        handle, probe = tempfile.mkstemp(prefix=".offsite-", dir=folder)
        os.close(handle)
        Path(probe).unlink()
    except OSError as error:
        raise ConfigError(
            f"output {out.name!r} cannot be written there: {_reason(error)}", hint="choose another place with -o"
        ) from None


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` when the block ends well.

    Every file in it is flushed to disk before the rename. On any error the folder is removed and
    nothing stands at `out`.

    Raises:
        ConfigError: when `out` exists.
        RunFailed: when the disk is full or the folder cannot be written.
    """
    refuse_existing(out)
    stage = _beside(out)
    try:
        stage.mkdir(parents=True)
        yield stage
        for path in sorted(stage.rglob("*")):
            if path.is_file():
                fsync(path)
        fsync(stage)
        stage.rename(out)
        fsync(out.parent)
    except OSError as error:
        raise RunFailed(f"cannot write {out.name!r}: {_reason(error)}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def staged_file(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a path beside `out` whose file becomes `out` when the block ends well.

    Raises:
        ConfigError: when `out` exists and `replace` is false.
        RunFailed: when the disk is full or the file cannot be written.
    """
    if not replace:
        refuse_existing(out)
    stage = _beside(out)
    try:
        stage.parent.mkdir(parents=True, exist_ok=True)
        yield stage
        fsync(stage)
        stage.replace(out)
        fsync(out.parent)
    except OSError as error:
        raise RunFailed(f"cannot write {out.name!r}: {_reason(error)}") from error
    finally:
        stage.unlink(missing_ok=True)


def make_readable(folder: Path) -> None:
    """Whoever may read the folder may read the files in it; some libraries write files for their owner alone."""
    mode = folder.stat().st_mode & 0o644
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def fsync(path: Path) -> None:
    """The file's or folder's content is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()


def _beside(out: Path) -> Path:
    return out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
