"""Outputs appear whole or not at all: write beside the target, fsync, rename.

What is not whole yet is called ``.NAME.XXXXXXXX.partial``, with eight hexadecimal digits. It is held open while it is
written: if it has to go, it is emptied through that handle, wherever somebody may have moved it meanwhile.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from offsite.errors import ConfigError, RunFailed
from offsite.folders import kind_of, names_in

_CLOSED = ("a package", "a bundle", "a round", "an adapted folder", "a sealed")
"""What `kind_of` calls folders that hold what their manifest or signature binds, and nothing besides."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
    for each in (folder.absolute(), folder.absolute().parent):
        kind = kind_of(each)
        if kind is not None and (kind.startswith(_CLOSED) or _is_alone(each, kind)):
            raise ConfigError(
                f"output {out.name!r} would lie inside of {each.name!r}, {kind}, and nothing may be added to that",
                hint="choose another place with -o",
            )
    try:
        # at least as long as what is written beside it: a name that is too long is told before the work, not after it
        handle, probe = tempfile.mkstemp(prefix=f".{out.name}.log.jsonl.", suffix=".partial", dir=folder)
        os.close(handle)
        Path(probe).unlink()
    except OSError as error:
        raise ConfigError(
            f"output {out.name!r} cannot be written there: {_reason(error)}", hint="choose another place with -o"
        ) from None


def _is_alone(folder: Path, kind: str) -> bool:
    """Tell whether a job or a signed report is all that the folder holds; other files have those names, too."""
    alone = {"a job": {"job.json"}, "a report": {"report.json", "report.signatures.json"}}.get(kind)
    return alone is not None and alone <= names_in(folder) <= {*alone, "report.html"}


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` when the block ends well.

    Every file in it is flushed to disk before the rename. On any error the folder is emptied and removed, and
    nothing stands at `out`.

    Raises:
        ConfigError: when `out` exists.
        RunFailed: when the disk is full, the folder cannot be written, or somebody moved it meanwhile.
    """
    with staged_handle(out) as (stage, _):
        yield stage


@contextmanager
def staged_handle(out: Path) -> Iterator[tuple[Path, int]]:
    """Yield as `staged_folder`, and with it the folder's handle: what is written through it never goes elsewhere."""
    refuse_existing(out)
    stage = _beside(out)
    with _refusing(out):
        stage.parent.mkdir(parents=True, exist_ok=True)
        parent = os.open(stage.parent, _FOLDER & ~os.O_NOFOLLOW)
        try:
            os.mkdir(stage.name, dir_fd=parent)
            folder = os.open(stage.name, _FOLDER, dir_fd=parent)
            try:
                yield stage, folder
                for path in sorted(stage.rglob("*")):
                    if path.is_file():
                        fsync(path)
                os.fsync(folder)
                if not is_same(stage, folder):
                    raise RunFailed(
                        f"cannot write {out.name!r}: its folder was moved while it was written", hint="run it again"
                    )
                stage.rename(out)
                os.fsync(parent)
            except BaseException:
                empty(folder)
                with suppress(OSError):
                    os.rmdir(stage.name, dir_fd=parent)
                raise
            finally:
                os.close(folder)
        finally:
            os.close(parent)


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
    with _refusing(out):
        stage.parent.mkdir(parents=True, exist_ok=True)
        parent = os.open(stage.parent, _FOLDER & ~os.O_NOFOLLOW)
        try:
            yield stage
            fsync(stage)
            os.rename(stage.name, out.name, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(stage.name, dir_fd=parent)
            os.close(parent)


def leftovers(out: Path) -> list[Path]:
    """Return what runs that were killed left beside `out`: what this module names so, and nothing else."""
    form = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.partial")
    try:
        return sorted(path for path in out.absolute().parent.iterdir() if form.fullmatch(path.name))
    except FileNotFoundError:
        return []


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that nobody else may read; it is gone afterwards, as are those of killed runs.

    Raises:
        RunFailed: when it cannot be made.
    """
    for path in leftovers(out):
        remove(path)
    folder = _beside(out)
    with _refusing(out):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove(folder)


def remove(path: Path) -> None:
    """The file, link or folder at `path` is gone, as far as the disk allows; no link in it is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def empty(folder: int) -> None:
    """Nothing is left in the open folder, as far as the disk allows, wherever it may stand now."""
    with suppress(OSError):
        for name in os.listdir(folder):
            try:
                os.unlink(name, dir_fd=folder)
            except OSError:
                shutil.rmtree(name, ignore_errors=True, dir_fd=folder)


def is_same(path: Path, folder: int) -> bool:
    """Tell whether the open folder still stands at `path`."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(folder))


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


@contextmanager
def _refusing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(f"cannot write {out.name!r}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()


def _beside(out: Path) -> Path:
    return out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
