"""``offsite mark``: a copy of a package whose middle says, to its owner alone, whom it was made for.

Of every weight matrix of the middle, one entry in eight moves by one step of bfloat16, up or down. Which entries, and
how likely each is to move up, follows from the owner's key and the package; which way it moves, also from the
recipient's fingerprint. The likelihoods are those of Tardos' fingerprinting code: whatever several recipients do with
the entries in which their copies differ, those in which they agree still tell on them. `emulator.marking.leak` finds a
mark.

The ends stay as they are. Clients train and return them, and the owner plugs them in: a mark there would end up in the
owner's model, and is lost first.

The key lies in the keys folder (``mark.key``), beside the list of whom what was marked for (``marks.json``).

Sources: Cox et al., "Secure spread spectrum watermarking for multimedia", 1997; Tardos, "Optimal probabilistic
fingerprint codes", 2008; Škorić et al., "Symmetric Tardos fingerprinting codes", 2008; RFC 8439 (ChaCha20).
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from pydantic import Field
from torch import Tensor

from emulator.marking.config import MarkConfig
from offsite.artefacts.layout import shard_headers
from offsite.artefacts.manifest import entries, write_manifest
from offsite.artefacts.owner import owner_record_path, read_owner_record, write_owner_record
from offsite.artefacts.package import Package, open_package
from offsite.console import say
from offsite.digests import DIGEST_PATTERN
from offsite.errors import BadKey, ConfigError, RunFailed, UnsupportedModel, Untrusted, WrongBinding
from offsite.keys.files import check_folder, parse_keys, read_private, write_private
from offsite.keys.identity import FINGERPRINT_PATTERN
from offsite.keys.trust import TrustStore
from offsite.mapped import let_go
from offsite.staging import fsync, refuse_existing, staged_file, staged_folder
from offsite.strictjson import Strict
from offsite.tensors import read_tensors, torch_dtype, write_tensors

KEY_NAME, MARKS_NAME = "mark.key", "marks.json"
MARKS_FORMAT = "offsite/marks/1"
_MARKS_LIMIT_BYTES = 32 * 2**20
_KEY_BYTES = 32
_LABEL = b"offsite/v1/mark"

MIN_PLACES = 1000
"""Fewer marked entries would not tell a mark that was tuned over from chance."""
_NUM_MARKED = 32
"""Of 256 entries, so many are marked."""
_LEVELS = torch.tensor([round(256 * math.sin(math.pi * (2 * i + 1) / 32) ** 2) for i in range(8)])
"""Out of 256, how often an entry of each level moves up: the arcsine law, in eight equally likely parts."""
_TENDENCY = float((_LEVELS.double() / 128 - 1).square().mean().sqrt())


class MarkKey:
    """The owner's secret from which every pattern follows."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def __repr__(self) -> str:
        return "MarkKey()"

    def stream(self, num_bytes: int, *words: str) -> Tensor:
        """Return so many pseudo-random bytes (uint8) for these words. Source: RFC 8439, keyed by HMAC-SHA256."""
        secret = hmac.new(self._secret, b"\0".join([_LABEL, *map(str.encode, words)]), hashlib.sha256).digest()
        drawn = Cipher(ChaCha20(secret, bytes(16)), mode=None).encryptor().update(bytes(num_bytes))
        return torch.frombuffer(bytearray(drawn), dtype=torch.uint8) if drawn else torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Places:
    """Where one tensor can carry marks, whoever the recipient.

    Attributes:
        index: positions in the flat tensor, ascending, int64.
        level: the likelihood of each to move up, as an index of `_LEVELS`.
        step: how far each moves in either direction, float32: one step of bfloat16 at the weight's size.
    """

    index: Tensor = field(repr=False)
    level: Tensor = field(repr=False)
    step: Tensor = field(repr=False)
    _words: tuple[str, str]
    _key: MarkKey

    def up(self, recipient: str) -> Tensor:
        """Return which of the places move up for that recipient; the others move down."""
        drawn = self._key.stream(len(self.index), "sign", *self._words, recipient)
        return drawn < _LEVELS[self.level]

    @property
    def tendency(self) -> Tensor:
        """How much more often each place moves up than down over all recipients: mean 0 and variance 1, float64."""
        return (2 * self.share - 1) / _TENDENCY

    @property
    def share(self) -> Tensor:
        """The likelihood of each place to move up, float64."""
        return _LEVELS[self.level].double() / 256

    @property
    def worth_up(self) -> Tensor:
        """What a move up of each place is worth, a move down minus `worth_down`: mean 0 and variance 1, float64."""
        return ((1 - self.share) / self.share).sqrt()

    @property
    def worth_down(self) -> Tensor:
        """See `worth_up`."""
        return (self.share / (1 - self.share)).sqrt()


def places(key: MarkKey, package_digest: str, name: str, weight: Tensor) -> Places:
    """Return where the tensor `name` of the unmarked package carries marks; `weight` is its value there."""
    drawn = key.stream(weight.numel(), "place", package_digest, name)
    index = (drawn < _NUM_MARKED).nonzero().flatten()
    value = weight.reshape(-1)[index].float()
    exponent = torch.frexp(value).exponent - 1  # 2**exponent <= |value| < 2**(exponent + 1); bfloat16 keeps 7 bits
    step = torch.where(value == 0, 0.0, torch.ldexp(torch.ones_like(value), exponent - 7))
    return Places(index, (drawn[index] % 8).long(), step, (package_digest, name), key)


def nudged(weight: Tensor, where: Places, recipient: str) -> Tensor:
    """Return `weight` with the recipient's mark, in its own dtype and with its own storage.

    An entry that its dtype can only move further than a step stays: the smallest of float16 lie wider than that.
    """
    marked = weight.clone()
    flat = marked.view(-1)
    value = flat[where.index].float()
    moved = (value + torch.where(where.up(recipient), where.step, -where.step)).to(weight.dtype)
    within = moved.isfinite() & ((moved.float() - value).abs() <= where.step)
    flat[where.index] = torch.where(within, moved, flat[where.index])
    return marked


class _Nudged(Mapping[str, Tensor]):
    """Tensors of a package that is mapped from its files, marked; each is made when it is asked for."""

    def __init__(
        self, tensors: Mapping[str, Tensor], marked: Collection[str], digest: str, key: MarkKey, recipient: str
    ) -> None:
        self._tensors, self._marked = tensors, marked
        self._digest, self._key, self._recipient = digest, key, recipient

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name not in self._marked:
            return tensor
        found = nudged(tensor, places(self._key, self._digest, name, tensor), self._recipient)
        let_go([tensor])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def carriers(package: Package) -> tuple[str, ...]:
    """Return the tensors that carry a mark: the weight matrices of the middle's blocks, sorted.

    Raises:
        UnsupportedModel: when the package stores matrices as factors or packed: what would move there is no single
            entry of a weight, but a direction or a step far above bfloat16's, and no mark of those is known to last.
    """
    layout = package.layout
    if package.manifest.encodings:
        raise UnsupportedModel(
            f"package {package.path.name!r} stores {len(package.manifest.encodings)} matrices as factors or packed: a "
            "mark moves single entries of plain ones",
            hint="distil with --method width or drop and without --pack for a package that can be marked",
        )
    found = []
    for canonical, module in layout.blocks.items():
        for name, spec in package.manifest.tensors.items():
            inner = f"{canonical}{name[len(module) :]}"
            inside = canonical.startswith("middle.") and name.startswith(f"{module}.") and inner not in layout.buffers
            if inside and len(spec.shape) > 1 and torch_dtype(spec.dtype).is_floating_point:
                found.append(name)
    return tuple(sorted(found))


def mark(package: Package, out: Path, *, recipient: str, keys: Path) -> Package:
    """Write the package at `out`, marked for `recipient`, and the owner's record beside it.

    The list in the keys folder names it before it has its name: nothing marked is ever forgotten.

    Args:
        keys: the owner's keys folder; the mark's key is made in it at the first use.

    Raises:
        ConfigError: when `out` or its record exists, or `package` is one that was marked already.
        UnsupportedModel: when its middle is too small to carry a mark.
        ArtefactError: when the package or its owner's record is not sound, or the keys folder is open to others.
        RunFailed: when the disk is full.
    """
    refuse_existing(out)
    refuse_existing(owner_record_path(out))
    check_folder(keys)
    record = read_owner_record(owner_record_path(package.path))
    if record.package_digest != package.digest:
        raise WrongBinding(f"{owner_record_path(package.path).name!r} is the record of another package")
    refuse_marked(keys, package)
    _require_room(package)
    try:
        with staged_folder(out) as stage:
            digest = _write(stage, package, open_key(keys, create=True), recipient)
            _remember(keys, Mark(package=package.digest, recipient=recipient, marked=digest))
            write_owner_record(out, record.model_copy(update={"package_digest": digest}))
    except BaseException:
        owner_record_path(out).unlink(missing_ok=True)
        raise
    return open_package(out)


def _require_room(package: Package) -> None:
    size = sum(math.prod(package.manifest.tensors[name].shape) for name in carriers(package))
    needed = 2 * MIN_PLACES * 256 // _NUM_MARKED
    if size < needed:
        raise UnsupportedModel(
            f"the matrices of the package's middle hold {size} entries, a mark needs {needed}",
            hint="keep more of the middle when distilling",
        )


def _write(stage: Path, package: Package, key: MarkKey, recipient: str) -> str:
    """Write the marked package's files into `stage` and return its digest."""
    marked = set(carriers(package))
    for shard, specs in shard_headers(package.path, package.manifest).items():
        tensors = read_tensors(package.path / shard, specs)
        write_tensors(stage / shard, _Nudged(tensors, marked, package.digest, key, recipient), specs)
    for name in package.manifest.files:
        if not name.endswith(".safetensors"):
            shutil.copyfile(package.path / name, stage / name)
    files = entries(stage, package.manifest.files)
    return write_manifest(stage, package.manifest.model_copy(update={"files": files}))


class Mark(Strict):
    """One package that was marked: the digests of the unmarked and the marked one, and for whom."""

    package: str = Field(pattern=DIGEST_PATTERN)
    recipient: str = Field(pattern=FINGERPRINT_PATTERN)
    marked: str = Field(pattern=DIGEST_PATTERN)


class _Marks(Strict):
    format: str = MARKS_FORMAT
    marks: tuple[Mark, ...] = ()


def read_marks(keys: Path) -> tuple[Mark, ...]:
    """Return what was marked with the keys folder's key, oldest first.

    Raises:
        BadKey, WrongBinding: when the list is damaged, open to others or of another version.
    """
    path = keys / MARKS_NAME
    if not os.path.lexists(path):
        return ()
    raw = read_private(path, _MARKS_LIMIT_BYTES, what="list of marks")
    hint = "put a copy of it back, or delete it and name recipients with --recipient"
    return parse_keys(raw, _Marks, what=f"list of marks {MARKS_NAME!r}", format_name=MARKS_FORMAT, hint=hint).marks


def refuse_marked(keys: Path, package: Package) -> None:
    """Return only if the package is not known to be marked.

    Raises:
        ConfigError: when the keys folder's list has it as marked.
    """
    if any(mark.marked == package.digest for mark in read_marks(keys)):
        raise ConfigError(
            f"package {package.path.name!r} is marked already", hint="name the package that it was made from"
        )


def open_key(keys: Path, *, create: bool) -> MarkKey:
    """Return the key of all marks made with this keys folder.

    Args:
        create: make it if there is none; it appears whole, and never takes the place of another.

    Raises:
        ConfigError: when there is none and none is to be made.
        BadKey: when it is open to others or not a key.
    """
    path = keys / KEY_NAME
    if not os.path.lexists(path):
        if not create:
            raise ConfigError(
                f"keys folder {keys.name!r} holds no {KEY_NAME}: nothing was marked with these keys",
                hint="name the keys that 'offsite mark' was run with",
            )
        _make_key(path)
    secret = read_private(path, _KEY_BYTES, what="key of marks")
    if len(secret) != _KEY_BYTES:
        raise BadKey(f"key of marks {KEY_NAME!r} has {len(secret)} bytes, expected {_KEY_BYTES}")
    return MarkKey(secret)


def _make_key(path: Path) -> None:
    stage = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write_private(stage, os.urandom(_KEY_BYTES))
        fsync(stage)
        with suppress(FileExistsError):
            os.link(stage, path)
        fsync(path.parent)
    except OSError as error:
        raise RunFailed(f"cannot write {path.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    finally:
        stage.unlink(missing_ok=True)


def _remember(keys: Path, one: Mark) -> None:
    with _locked(keys):
        marks = read_marks(keys)
        if one in marks:
            return
        content = _Marks(marks=(*marks, one)).model_dump(mode="json")
        with staged_file(keys / MARKS_NAME, replace=True) as stage:
            write_private(stage, json.dumps(content, sort_keys=True, indent=1).encode() + b"\n")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other process changes the list meanwhile."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def run(config: MarkConfig) -> dict[str, object]:
    """Carry out ``offsite mark``."""
    refuse_existing(config.output)
    check_folder(config.keys)
    package = open_package(config.package)
    recipient = TrustStore(config.keys).named(config.recipient, now=int(time.time()))
    marked = mark(package, config.output, recipient=recipient, keys=config.keys)
    say(f"mark: {config.output.name} is marked for {recipient}{_doubt(config, recipient)}")
    say(f"mark: keep {package.path.name} and {KEY_NAME} in {config.keys.name}: without both no copy can be traced")
    return {
        "package": marked.path.name,
        "package_digest": marked.digest,
        "unmarked_digest": package.digest,
        "recipient": recipient,
        "tensors": len(carriers(package)),
    }


def _doubt(config: MarkConfig, recipient: str) -> str:
    """Return the name of whose fingerprint it is; a note when nobody's who is trusted here: it may be mistyped."""
    try:
        return f" ({TrustStore(config.keys).require(recipient, now=int(time.time())).name})"
    except Untrusted:
        return " (whom these keys do not trust: see 'offsite trust list')"
