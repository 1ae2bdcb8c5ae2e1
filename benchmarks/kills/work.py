"""One job from upload to serving, broken off by force at any point, and what must hold afterwards.

The work is the owner's whole side: make the registry and the job known, take an upload in parts, verify and register,
accept, plug in, publish, mark as served. `work` completes it from whatever state it finds. It runs in forks of a
process that has imported everything, so that a kill costs a second and not ten.

What is broken: ``kill`` (SIGKILL at a fault point of ``offsite/faults.py``, by position in the order of reaching them),
``clock`` (SIGKILL at a random moment), ``enospc`` and ``eio`` (a call that changes the disk fails, a write after half
of its bytes), ``short`` (every write is cut short), ``limit`` (no file may grow beyond a size, which the kernel
enforces, also against SQLite and safetensors).

After each break, `inspect` opens everything as a restart does: the log's chain is whole, the state is one of those
between which the work goes, nothing that a finished step had promised is gone, nothing half is visible.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.kinds import declared
from offsite import cli, faults
from offsite.artefacts.bundle import AdapterSpec, write_bundle
from offsite.artefacts.job import Job
from offsite.artefacts.package import Package, open_package
from offsite.digests import sha256_file
from offsite.errors import OffsiteError
from offsite.keys.identity import Identity, generate, save_identity
from offsite.keys.trust import TrustStore
from offsite.sealed.encryption import seal_files
from offsite.sealed.folder import PAYLOAD, read_sealed
from offsite.sealed.manifest import SealedManifest
from offsite.strictjson import parse_strict
from server.exchange.uploads import Quotas, UploadStore
from server.plugging import plug
from server.plugging.adapted import open_adapted
from server.plugging.config import PlugConfig
from server.registry.intake import take_in
from server.registry.registry import Registry

PART_BYTES = 2048
STATES = ("nothing", "verified", "accepted", "plugged-in", "served")
CALLS = ("write", "pwrite", "fsync", "rename", "replace", "mkdir", "ftruncate")
_QUOTAS = Quotas(upload_bytes=2**24, disk_bytes=2**26, num_client_uploads=4, free_bytes=0)
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}


@dataclass
class World:
    """What all cycles share: the full model, its package, the client's bundle, and both parties' keys."""

    folder: Path
    model: Path
    package: Package
    bundle: Path
    owner: Identity
    client: Identity


@dataclass
class Cycle:
    """One job in a folder of its own."""

    folder: Path
    job: Job
    sealed: Path
    digest: str

    @property
    def id(self) -> str:
        return self.digest.removeprefix("sha256:")[:16]


@dataclass(frozen=True)
class Break:
    """How and where a run is broken: the position of a fault point or call, a moment in seconds, or a size in bytes."""

    mode: str
    at: float = 0


def prepare(folder: Path) -> World:
    """Make a tiny model, its package, a bundle and two parties' keys."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = folder / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    _tokenizer().save_pretrained(model)
    if cli.run(["distill", str(model), "--method", "keep-all", "--steps", "0", "-o", str(folder / "package")]):
        raise RuntimeError("the package was not made")
    package = open_package(folder / "package")
    spec = AdapterSpec(kind="lora", placement="1+1", rank=2, dtype="float32")
    expected = declared(spec, package.layout, package.block_tensors())
    tensors = {name: 0.01 * torch.randn(one.shape) for name, one in expected.items()}
    bundle = write_bundle(folder / "bundle", package=package, spec=spec, tensors=tensors, expected=expected)
    owner, client = generate("owner", days=30), generate("client", days=30)
    save_identity(folder / "keys", owner, b"passphrase")
    TrustStore(folder / "keys").add(client.public.card, client.public.fingerprint)
    return World(folder, model, package, bundle.path, owner, client)


def begin(world: World, folder: Path, number: int) -> Cycle:
    """Return a job of its own for each number, with the client's sealed bundle."""
    now = int(time.time())
    folder.mkdir(parents=True)
    shutil.copytree(world.folder / "keys", folder / "keys")
    (folder / "keys").chmod(0o700)
    spec = AdapterSpec(kind="lora", placement="1+1", rank=2, dtype="float32")
    parties = {"owner": world.owner.public.fingerprint, "client": world.client.public.fingerprint}
    bound = {"package_digest": world.package.digest, "base_digest": world.package.manifest.base_digest}
    job = Job(job_id=f"{number:032x}", adapter=spec, created=now, expires=now + 86400, **parties, **bound)
    digest = seal_files(
        {path.name: path for path in world.bundle.iterdir()}, folder / "sealed", kind="bundle", job_id=job.job_id,
        created=now, expires=now + 86400, sequence=1, round=1, previous=None, identity=world.client,
        recipients=[world.owner.public], **bound,
    )  # fmt: skip
    return Cycle(folder, job, folder / "sealed", digest)


def work(world: World, cycle: Cycle) -> None:
    """Do whatever of the job is not done yet, and note each step that is."""
    keys, where = cycle.folder / "keys", cycle.folder / "registry"
    with Registry.open(where, keys, create=True) as registry:
        registry.add_job(cycle.job, package=world.package.path, client_name="client")
        _promise(cycle, "job")
        uploads = UploadStore(cycle.folder / "uploads", _QUOTAS)
        verdict = registry.verdict(cycle.digest)
        if verdict is None or not verdict.is_final:
            raw = read_sealed(cycle.sealed)
            manifest = parse_strict(raw.manifest_raw, SealedManifest, "manifest.json", {})
            name = cycle.digest.removeprefix("sha256:")
            upload = uploads.declare(name, manifest, (raw.manifest_raw, raw.signatures_raw, raw.keys_raw))
            for file, offset in upload.offsets().items():
                data = (cycle.sealed / PAYLOAD / file).read_bytes()
                while offset < len(data):
                    offset = uploads.append(upload, file, offset, data[offset : offset + PART_BYTES])
                    _promise(cycle, "part", file, offset)
            verdict = take_in(registry, upload.folder, world.owner, TrustStore(keys))
            if verdict.state == "refused":
                raise RuntimeError(f"a sound bundle was refused: {verdict}")
            _promise(cycle, "verified")
        for left in list(uploads._uploads.values()):
            uploads.discard(left)
        registry.advance(cycle.id, "accepted")
        _promise(cycle, "accepted")
        state = registry.entry(cycle.id).state
    if state == "accepted":
        out = cycle.folder / "adapted"
        plug.run(PlugConfig(model=str(world.model), id=cycle.id, registry=where, keys=keys, output=out))
        _promise(cycle, "plugged-in")
    with Registry.open(where, keys) as registry:
        registry.advance(cycle.id, "served")
        _promise(cycle, "served")


def inspect(world: World, cycle: Cycle, *, is_over: bool = False) -> str:
    """Return the state after a restart; AssertionError when something is half, torn or lost."""
    promises = _promises(cycle)
    if not (cycle.folder / "registry" / "registry.id").exists():
        _require(not promises, "the registry is gone")
        return STATES[0]
    with Registry.open(cycle.folder / "registry", cycle.folder / "keys") as registry:
        head = registry.verify_log()
        entries = registry.entries()
        kept = sorted(path.name for path in (cycle.folder / "registry" / "bundles").iterdir())
        _require([entry.id for entry in entries] == kept, f"rows {len(entries)}, folders {len(kept)}")
        _require(not list((cycle.folder / "registry" / "incoming").iterdir()), "incoming holds something")
        _require(all(entry.state in STATES[1:] for entry in entries), "a bundle is half taken in")
        _require(bool(registry.jobs_of(cycle.job.client)) or not promises, "the job is gone")
        for entry in entries:
            for name, digest in (("offsite.json", entry.bundle_digest), ("adapter.safetensors", entry.tensors_sha256)):
                stored = cycle.folder / "registry" / "bundles" / entry.id / name
                _require(sha256_file(stored) == digest, f"{name} is not what was verified")
    state = entries[0].state if entries else STATES[0]
    done = [words[0] for words in promises if words[0] in STATES]
    _require(not done or STATES.index(state) >= STATES.index(done[-1]), f"{done[-1:]} was done, {state} is left")
    if state == STATES[0]:
        _check_parts(cycle, promises)
    adapted = cycle.folder / "adapted"
    if adapted.exists():
        _require(open_adapted(adapted).intake == cycle.id, "another bundle was published")
    _require(adapted.exists() or STATES.index(state) < 3, "plugged in, and nothing is published")
    if is_over:
        events = [json.loads(line)["event"] for line in (cycle.folder / "registry" / "registry.log").open("rb")]
        _require(len(events) == head.number, "the log is longer than its head")
        for event in ("job", *STATES[1:]):
            _require(events.count(event) == 1, f"{event} is in the log {events.count(event)} times")
        _require(state == "served", f"the job ended as {state}")
        orphans = [path for path in cycle.folder.rglob("*") if ".partial" in path.name]
        _require(not orphans, f"{len(orphans)} orphaned files")
        _require(not list((cycle.folder / "uploads").iterdir()), "an upload is left")
    return state


def broken_run(world: World, cycle: Cycle, how: Break) -> bool:
    """Do the work in a fork and break it; return whether it was broken, or ended before that."""

    def run() -> None:
        _arm(how)
        try:
            work(world, cycle)
        except OffsiteError:
            os._exit(5)  # the clean end of a run that the disk broke

    child = _fork(run)
    if how.mode == "clock":
        time.sleep(how.at)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, 5, -signal.SIGKILL):
        raise AssertionError(f"{how}: ended with {status}")
    return status != 0 or how.mode == "short"  # short writes are to be gone on with


def in_fork(function: Callable[[], object]) -> None:
    """Call the function in a fork; AssertionError when it fails there."""
    status = os.waitstatus_to_exitcode(os.waitpid(_fork(lambda: function()), 0)[1])
    _require(status == 0, f"ended with {status}; its traceback is on stderr")


def trace(world: World, cycle: Cycle) -> dict[str, Any]:
    """Do the work unbroken in a fork; return its fault points in order, how many calls change the disk, and seconds."""

    def run() -> None:
        points: list[str] = []
        faults.set_hook(points.append)
        counter = _count_calls()
        began = time.monotonic()
        work(world, cycle)
        found = {"points": points, "calls": counter[0], "seconds": time.monotonic() - began}
        (cycle.folder / "trace.json").write_text(json.dumps(found))

    in_fork(run)
    return json.loads((cycle.folder / "trace.json").read_text())  # type: ignore[no-any-return]


def _fork(function: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if not os.environ.get("OFFSITE_KILLS_LOUD"):
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
        function()
        code = 0
    except BaseException:  # the fork ends here, whatever it was
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _arm(how: Break) -> None:
    """Let this process break as `how` says."""
    if how.mode == "kill":
        reached = iter(range(2**31))

        def kill(point: str) -> None:
            if next(reached) == how.at:
                os.kill(os.getpid(), signal.SIGKILL)

        faults.set_hook(kill)
    elif how.mode in _ERRORS:
        _count_calls(fail_at=int(how.at), number=_ERRORS[how.mode])
    elif how.mode == "short":
        real = os.write
        os.write = lambda handle, data: real(handle, bytes(data[:61]))  # type: ignore[assignment]
    elif how.mode == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(how.at), resource.RLIM_INFINITY))


def _count_calls(*, fail_at: int | None = None, number: int = 0) -> list[int]:
    """Count the calls that change the disk, and let one of them fail, a write after half of its bytes."""
    count = [0]

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] != fail_at:
                return real(*arguments, **named)
            if name in ("write", "pwrite") and len(arguments[1]) > 1:
                real(arguments[0], bytes(arguments[1][: len(arguments[1]) // 2]), *arguments[2:])
            raise OSError(number, os.strerror(number))

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    return count


def _promise(cycle: Cycle, *words: object) -> None:
    """Note, so that no kill undoes it, that a step has returned."""
    handle = os.open(cycle.folder / "promises", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.writev(handle, [(json.dumps(words) + "\n").encode()])
    finally:
        os.close(handle)


def _promises(cycle: Cycle) -> list[list[Any]]:
    path = cycle.folder / "promises"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _check_parts(cycle: Cycle, promises: list[list[Any]]) -> None:
    """The parts that were answered are on disk, and what is on disk is the beginning of what was sent."""
    payload = cycle.folder / "uploads" / cycle.digest.removeprefix("sha256:") / PAYLOAD
    for words in promises:
        if words[0] == "part":
            found = (payload / words[1]).read_bytes()
            sent = (cycle.sealed / PAYLOAD / words[1]).read_bytes()
            _require(len(found) >= words[2], f"{words[2]} bytes were answered, {len(found)} are left")
            _require(sent.startswith(found), "a part holds other bytes than were sent")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def breaks_of(traced: dict[str, Any], mode: str, draw: random.Random) -> Break:
    """Return a break of that mode somewhere in the traced work."""
    if mode == "kill":
        return Break(mode, draw.randrange(len(traced["points"])))
    if mode == "clock":
        return Break(mode, draw.uniform(0, traced["seconds"]))
    if mode in _ERRORS:
        return Break(mode, draw.randint(1, traced["calls"]))
    return Break(mode, draw.choice((3_000, 9_000, 20_000, 45_000, 70_000)) if mode == "limit" else 0)


def play(world: World, folder: Path, number: int, breaks: list[Break]) -> list[Break]:
    """Play one job through the breaks, inspecting after each, then to its end; return the breaks that hit.

    Raises:
        AssertionError: when something was half, torn or lost, or the job did not complete.
    """
    cycle = begin(world, folder, number)
    hit = []
    for how in breaks:
        if broken_run(world, cycle, how):
            hit.append(how)
        in_fork(lambda: inspect(world, cycle))
    in_fork(lambda: work(world, cycle))
    in_fork(lambda: inspect(world, cycle, is_over=True))
    shutil.rmtree(folder)
    return hit
