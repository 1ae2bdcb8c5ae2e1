"""What tests of both sides share: a small tokenizer, a tiny full model, packages of it, and a way to tamper."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import secrets
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from adapters.kinds import declared
from offsite.artefacts.bundle import AdapterSpec, Bundle, write_bundle
from offsite.artefacts.job import Job
from offsite.artefacts.layout import Method, describe_layout
from offsite.artefacts.owner import OwnerRecord, write_owner_record
from offsite.artefacts.package import Package, write_package
from offsite.digests import model_digest
from offsite.keys.identity import Identity, generate, save_identity
from offsite.keys.trust import TrustStore
from offsite.modelling.blocks import block_list, decoder_stack
from offsite.modelling.mlps import find_mlp, slice_mlp
from offsite.modelling.split import extract
from offsite.tensors import read_header

# A test that reaches for a hub fails at once, here and in what it spawns.
huggingface_hub.constants.HF_HUB_OFFLINE = True
os.environ["HF_HUB_OFFLINE"] = "1"

# Whoever starts a suite in the background of a script has Ctrl-C ignored, and what is spawned inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()  # until everything is imported


def pytest_collection_finish() -> None:
    """What was imported is not looked through again at every collection: a tenth of the tests' time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _disk_is_not_waited_for() -> Iterator[None]:
    """Nothing waits until what was written is on the disk: no test pulls a plug, and a kill loses nothing of it."""

    def quick(handle: int) -> None:
        os.fstat(handle)  # one that is not open is still an error

    class Quick(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            waits = statement.startswith("PRAGMA synchronous") and "=" in statement
            return super().execute("PRAGMA synchronous=OFF" if waits else statement, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", quick)
        patch.setattr(sqlite3, "connect", functools.partial(sqlite3.dbapi2.connect, factory=Quick))
        yield


@pytest.fixture(scope="session", autouse=True)
def _peft_is_asked_once() -> Iterator[None]:
    """What peft reaches in a model without memory is tried once for each configuration and way of naming."""
    from adapters import targets

    tried, known = targets._reached, {}

    def reached(shell: PreTrainedModel, settings: Any) -> set[str]:
        asked = type(shell), shell.config.to_json_string(use_diff=False), repr(sorted(settings.items()))
        if asked not in known:
            known[asked] = tried(shell, settings)
        return set(known[asked])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "_reached", reached)
        yield


@pytest.fixture(scope="session")
def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer of single bytes, 259 tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory, letters_tokenizer):
    """A checkpoint folder of a tiny random llama with room for the demo's blocks of text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    special |= {"initializer_range": 0.1}  # at 0.02 a few steps are an update as large as the weights: refused
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=256, **sizes, **special))
    folder = tmp_path_factory.mktemp("demo") / "tiny-llama"
    model.to(torch.bfloat16).save_pretrained(folder)
    letters_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def full_llama() -> LlamaForCausalLM:
    """A random llama of eight blocks whose every block matters; tied head; read only."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model.eval()


PackageMaker = Callable[..., Package]


@pytest.fixture(scope="session")
def make_package(full_llama: LlamaForCausalLM, letters_tokenizer: PreTrainedTokenizerFast) -> PackageMaker:
    """Write a package of a model, and its owner's record: whole blocks by `kept`, MLP channels by `channels`."""

    def make(
        out: Path,
        *,
        model: PreTrainedModel | None = None,
        kept: tuple[int, ...] = (0, 1, 2, 4, 5, 6, 7),
        channels: dict[str, tuple[int, ...]] | None = None,
        ends: tuple[int, int] = (2, 2),
        dtype: str = "float32",
        adaptable: bool = False,
        **changes: Any,
    ) -> Package:
        full = full_llama if model is None else model
        stack = decoder_stack(full)
        emulator = extract(full, {stack.name: kept})
        blocks = block_list(emulator, decoder_stack(emulator))
        for name, numbers in (channels or {}).items():
            block = blocks[ends[0] + int(name.split(".")[1])]
            slice_mlp(block, find_mlp(block), torch.tensor(numbers))
        whole = not channels and len(kept) == stack.num_blocks
        inner = _linears(blocks[ends[0]]) if channels or whole or adaptable else ()
        layout = describe_layout(
            emulator, num_bottom=ends[0], num_top=ends[1], adaptable_middle=inner, middle_whole=whole
        )
        settings: dict[str, Any] = {
            "base_digest": model_digest(full),
            "method": Method(name="width" if channels else "drop"),
            "figures": {"kl": 0.5},
            "licence": "Apache-2.0",
        }
        package = write_package(
            out, model=emulator, tokenizer=letters_tokenizer, layout=layout, dtype=dtype, **{**settings, **changes}
        )
        record = OwnerRecord(
            package_digest=package.digest,
            base_digest=package.manifest.base_digest,
            layout=package.layout,
            block_tensors=package.block_tensors(),
            num_blocks=stack.num_blocks,
            kept=kept,
            channels=channels or {},
        )
        write_owner_record(out, record)
        return package

    return make


def _linears(block: torch.nn.Module) -> tuple[str, ...]:
    from offsite.modelling.blocks import linear_names

    return linear_names(block)


@pytest.fixture(scope="session")
def dropped_package(tmp_path_factory: pytest.TempPathFactory, make_package: PackageMaker) -> Package:
    """A package without the full model's block 3; read only."""
    return make_package(tmp_path_factory.mktemp("dropped") / "package")


@pytest.fixture(scope="session")
def kept_package(tmp_path_factory: pytest.TempPathFactory, make_package: PackageMaker) -> Package:
    """A package without the full model's blocks 3 and 4, whose kept blocks all take an adapter; read only."""
    out = tmp_path_factory.mktemp("kept") / "package"
    return make_package(out, kept=(0, 1, 2, 5, 6, 7), adaptable=True)


@pytest.fixture(scope="session")
def narrow_channels() -> dict[str, tuple[int, ...]]:
    """The channels that `narrow_package` keeps, another set and number in each block."""
    return {f"middle.{number}": tuple(range(number, 48, 3 + number % 2)) for number in range(4)}


@pytest.fixture(scope="session")
def narrow_package(
    tmp_path_factory: pytest.TempPathFactory, make_package: PackageMaker, narrow_channels: dict[str, tuple[int, ...]]
) -> Package:
    """A package with every block and some of the middle's MLP channels; read only."""
    out = tmp_path_factory.mktemp("narrow") / "package"
    return make_package(out, kept=tuple(range(8)), channels=narrow_channels)


@pytest.fixture(scope="session")
def whole_package(tmp_path_factory: pytest.TempPathFactory, make_package: PackageMaker) -> Package:
    """A package that keeps everything; read only."""
    return make_package(tmp_path_factory.mktemp("whole") / "package", kept=tuple(range(8)))


@pytest.fixture
def tamper(tmp_path: Path) -> Callable[..., Path]:
    """Copy an artefact, let `change` edit the copy, then bind every file anew and let `edit` change the manifest.

    With `redeclare` the manifest declares whatever tensors the copy's files now hold.
    """

    def tampered(
        artefact: Path,
        *,
        change: Callable[[Path], None] | None = None,
        edit: Callable[[dict[str, Any]], None] | None = None,
        redeclare: bool = False,
    ) -> Path:
        copy = tmp_path / "tampered"
        shutil.copytree(artefact, copy)
        if change is not None:
            change(copy)
        manifest = json.loads((copy / "offsite.json").read_text())
        for name in manifest["files"]:
            path = copy / name
            if path.is_file() and not path.is_symlink():
                digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
                manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": digest}
        if redeclare:
            found = [read_header(path) for path in copy.glob("*.safetensors")]
            manifest["tensors"] = {name: spec.model_dump() for specs in found for name, spec in specs.items()}
        if edit is not None:
            edit(manifest)
        (copy / "offsite.json").write_text(json.dumps(manifest))
        return copy

    return tampered


@dataclass(frozen=True)
class Party:
    """One side of a sealed exchange: its keys folder, the passphrase's file, and the keys themselves."""

    keys: Path
    passphrase: Path
    identity: Identity

    @property
    def fingerprint(self) -> str:
        return self.identity.public.fingerprint

    @property
    def flags(self) -> list[str]:
        """How a verb is told whose keys to use."""
        return ["--keys", str(self.keys), "--passphrase-file", str(self.passphrase)]


@pytest.fixture(scope="session")
def key_ring(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Identity]]:
    """Make one identity a name and session, saved; its folder is copied, never used in place."""
    folder = tmp_path_factory.mktemp("keys")
    made: dict[str, Identity] = {}

    def keys_of(name: str) -> tuple[Path, Identity]:
        if name not in made:
            made[name] = generate(name, days=30)
            with pytest.MonkeyPatch.context() as patch:  # the files state their cost; tests open them many times
                patch.setattr("offsite.keys.files.SCRYPT_COST", 2**4)
                save_identity(folder / name, made[name], b"correct horse")
        return folder / name, made[name]

    return keys_of


@pytest.fixture
def make_party(tmp_path: Path, key_ring: Callable[[str], tuple[Path, Identity]]) -> Callable[[str], Party]:
    """Give a test its own copy of a named party's keys folder, which trusts nobody yet."""

    def make(name: str) -> Party:
        folder, identity = key_ring(name)
        home = tmp_path / f"{name}-home"
        shutil.copytree(folder, home / "keys")
        (home / "keys").chmod(0o700)
        passphrase = home / "passphrase"
        passphrase.write_bytes(b"correct horse")
        passphrase.chmod(0o600)
        return Party(home / "keys", passphrase, identity)

    return make


@pytest.fixture(scope="session")
def acquainted(tmp_path_factory: pytest.TempPathFactory, key_ring: Callable[[str], tuple[Path, Identity]]) -> Path:
    """The keys folders of an owner and a client who trust each other; copied, never used in place."""
    home = tmp_path_factory.mktemp("acquainted")
    for name, other in (("owner", "client"), ("client", "owner")):
        shutil.copytree(key_ring(name)[0], home / name)
        (home / name).chmod(0o700)
        known = key_ring(other)[1].public
        TrustStore(home / name).add(known.card, known.fingerprint)
    return home


@pytest.fixture
def parties(make_party: Callable[[str], Party], acquainted: Path) -> tuple[Party, Party]:
    """An owner and a client who trust each other and have exchanged nothing yet."""
    owner, client = make_party("owner"), make_party("client")
    for name, party in (("owner", owner), ("client", client)):
        shutil.copytree(acquainted / name, party.keys, dirs_exist_ok=True)
    return owner, client


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, dropped_package: Package) -> Bundle:
    """A bundle of `dropped_package` in a few kilobytes; read only."""
    spec = AdapterSpec(kind="lora", placement="1+0", targets="attention", rank=1, dtype="float32")
    expected = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(one.shape, generator=generator) for name, one in expected.items()}
    out = tmp_path_factory.mktemp("tiny") / "bundle"
    return write_bundle(out, package=dropped_package, spec=spec, tensors=tensors, expected=expected)


@pytest.fixture
def make_job(parties: tuple[Party, Party], dropped_package: Package, tiny_bundle: Bundle) -> Callable[..., Job]:
    """The owner's terms for the client: `dropped_package`, the adapter of `tiny_bundle`, two rounds, a day."""

    def make(**changes: Any) -> Job:
        owner, client = parties
        now = int(time.time())
        settings: dict[str, Any] = {
            "job_id": secrets.token_hex(16),
            "owner": owner.fingerprint,
            "client": client.fingerprint,
            "package_digest": dropped_package.digest,
            "base_digest": dropped_package.manifest.base_digest,
            "adapter": tiny_bundle.manifest.adapter,
            "rounds": 2,
            "created": now,
            "expires": now + 86400,
        }
        return Job(**{**settings, **changes})

    return make


class LiveExchange:
    """The owner's exchange on a loopback port of this process, and what a client needs to use it."""

    def __init__(self, folder: Path, owner: Party, client: Party, package: Package, bundle: Bundle) -> None:
        self.folder, self.owner, self.client, self.package, self.bundle = folder, owner, client, package, bundle
        self.registry_folder, self.outbox = folder / "registry", folder / "outbox"
        self.outbox.mkdir(parents=True)
        self._ends: list[Callable[[], None]] = []
        with self.registry(create=True):
            pass

    def registry(self, **arguments: Any) -> Any:
        from server.registry.registry import Registry

        return Registry.open(self.registry_folder, self.owner.keys, **arguments)

    def add(self, job: Job) -> Job:
        with self.registry() as registry:
            registry.add_job(job, package=self.package.path, client_name="client")
        return job

    def start(self, **settings: Any) -> Any:
        """Serve, with settings of ``offsite exchange serve``; return the exchange. `url` says where."""
        from contextlib import ExitStack
        from threading import Thread

        from server.exchange.config import ServeExchangeConfig
        from server.exchange.serve import opened_exchange, server_process
        from server.http.serve import listen, url_of

        tls = settings.pop("tls", None)
        stated = {"registry": self.registry_folder, "outbox": self.outbox, "keys": self.owner.keys}
        config = ServeExchangeConfig(**{**stated, "limit_free_bytes": 0, "limit_rate": 10_000.0, **settings})
        held = ExitStack()
        exchange = held.enter_context(opened_exchange(config, self.owner.identity))
        sock = held.enter_context(listen("127.0.0.1", 0))
        sock.listen(256)
        process = server_process(exchange, config, tls)
        thread = Thread(target=process.run, kwargs={"sockets": [sock]})
        thread.start()
        self.url = url_of(sock)

        def end() -> None:
            process.should_exit = True
            thread.join()
            held.close()

        self._ends.append(end)
        return exchange

    def stop(self) -> None:
        while self._ends:
            self._ends.pop()()

    def seal(
        self, out: Path, job: Job, *, issuer: Party | None = None, bundle: Path | None = None, **changes: Any
    ) -> Path:
        """Write what a client hands in: the sound bundle, sealed, or as changed as nobody should."""
        from offsite.sealed.encryption import seal_files

        issuer, source = issuer or self.client, bundle or self.bundle.path
        stated: dict[str, Any] = {
            "kind": "bundle",
            "job_id": job.job_id,
            "created": int(time.time()),
            "expires": job.expires,
            "sequence": 1,
            "round": 1,
            "previous": None if changes.get("sequence", 1) == 1 else "sha256:" + "0" * 64,
            "base_digest": job.base_digest,
            "package_digest": job.package_digest,
            "identity": issuer.identity,
            "recipients": [self.owner.identity.public],
        }
        seal_files({path.name: path for path in source.iterdir()}, out, **{**stated, **changes})
        return out

    def offer(self, name: str, job: Job, *, source: Path | None = None, **changes: Any) -> Path:
        """Put what the owner sealed for the client into the outbox: the package, unless it is said what."""
        stated = {
            "kind": "package",
            "round": 0,
            "identity": self.owner.identity,
            "recipients": [self.client.identity.public],
        }
        return self.seal(self.outbox / name, job, bundle=source or self.package.path, **{**stated, **changes})

    def flags(self) -> list[str]:
        """How the client's verbs are told whose keys to use, with little patience."""
        return [*self.client.flags, "--patience-seconds", "5"]


@pytest.fixture(scope="session")
def quiet_bundle(tmp_path_factory: pytest.TempPathFactory, dropped_package: Package, tiny_bundle: Bundle) -> Bundle:
    """`tiny_bundle`, so small an update that every job takes it; read only."""
    expected = declared(tiny_bundle.manifest.adapter, dropped_package.layout, dropped_package.block_tensors())
    tensors = {name: 0.02 * tensor for name, tensor in tiny_bundle.load_tensors(expected).items()}
    out = tmp_path_factory.mktemp("quiet") / "bundle"
    return write_bundle(
        out, package=dropped_package, spec=tiny_bundle.manifest.adapter, tensors=tensors, expected=expected
    )


@pytest.fixture
def live_exchange(
    tmp_path: Path, parties: tuple[Party, Party], dropped_package: Package, quiet_bundle: Bundle
) -> Iterator[LiveExchange]:
    """An owner's side that can be started and stopped as often as a test likes."""
    made = LiveExchange(tmp_path / "owner-side", *parties, dropped_package, quiet_bundle)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def make_bundle():
    """Write a bundle of an adapter that no training made: its start, shaken so that every tensor matters."""
    from adapters.kinds import attach, declared
    from offsite.artefacts.bundle import AdapterSpec, write_bundle

    def make(out, package, *, seed=0, shake=0.05, tensors=None, **spec):
        spec = AdapterSpec(**{"dtype": "float32", **spec})
        names = declared(spec, package.layout, package.block_tensors())
        if tensors is None:
            attached = attach(package.load_model(), spec, package.layout.blocks, names)
            generator = torch.Generator().manual_seed(seed)
            tensors = {
                name: tensor + shake * torch.randn(tensor.shape, generator=generator)
                for name, tensor in attached.tensors().items()
            }
        return write_bundle(out, package=package, spec=spec, tensors=tensors, expected=names)

    return make


@pytest.fixture(scope="session")
def save_model(letters_tokenizer):
    """Write a model and the letters' tokenizer as a checkpoint folder."""

    def save(model, out):
        model.save_pretrained(out)
        letters_tokenizer.save_pretrained(out)
        return out

    return save


@pytest.fixture(scope="session")
def llama_folder(full_llama, save_model, tmp_path_factory):
    """The checkpoint folder of `full_llama`; read only."""
    return save_model(full_llama, tmp_path_factory.mktemp("base") / "llama")


# --- two parties, a job and a registry


class Exchange:
    """An owner with a registry and a job, and the client of that job; both in folders of their own."""

    def __init__(self, folder, package, owner, client, now):
        folder.mkdir()
        from offsite.artefacts.job import Job
        from offsite.keys.trust import TrustStore
        from server.registry.registry import Registry

        self.folder, self.package, self.owner, self.client, self.now = folder, package, owner, client, now
        self.keys, self.registry_folder = folder / "keys", folder / "registry"
        self.keys.mkdir(mode=0o700)
        self.trust = TrustStore(self.keys)
        self.trust.add(client.public.card, client.public.fingerprint, now=now)
        self._job, self._registry_class, self._opened = Job, Registry, []
        self.registry = self.opened(create=True)

    def opened(self, *, create=False):
        """Return the registry, opened anew, as after a restart."""
        self._opened.append(self._registry_class.open(self.registry_folder, self.keys, create=create))
        return self._opened[-1]

    def close(self):
        for registry in self._opened:
            registry.close()

    def job(self, *, register=True, **changes):
        from offsite.artefacts.bundle import AdapterSpec

        stated = {
            "job_id": secrets.token_hex(16),
            "owner": self.owner.public.fingerprint,
            "client": self.client.public.fingerprint,
            "package_digest": self.package.digest,
            "base_digest": self.package.manifest.base_digest,
            "adapter": AdapterSpec(kind="lora", dtype="float32", rank=2, placement="1+1"),
            "rounds": 3,
            "created": self.now,
            "expires": self.now + 86400,
        }
        job = self._job(**{**stated, **changes})
        if register:
            self.registry.add_job(job, package=self.package.path, client_name="client", now=self.now)
        return job

    def seal(self, bundle, job, out, *, identity=None, recipients=None, **changes):
        """Seal a bundle folder as the client does, or with changes as nobody should."""
        from offsite.sealed.encryption import seal_files

        stated = {
            "kind": "bundle",
            "job_id": job.job_id,
            "created": self.now,
            "expires": self.now + 3600,
            "sequence": 1,
            "round": 1,
            "previous": None if changes.get("sequence", 1) == 1 else "sha256:" + "5" * 64,
            "base_digest": job.base_digest,
            "package_digest": job.package_digest,
            "identity": identity or self.client,
            "recipients": recipients or [self.owner.public],
        }
        files = changes.pop("files", None) or {path.name: path for path in bundle.iterdir()}
        seal_files(files, out, **{**stated, **changes})
        return out

    def take_in(self, sealed, *, registry=None, now=None):
        from server.registry.intake import take_in

        return take_in(registry or self.registry, sealed, self.owner, self.trust, now=now or self.now)


@pytest.fixture(scope="session")
def identities():
    """Owner, client and a stranger; their keys live in memory alone.

    An hour old, so that no test depends on which second of its own it began in.
    """
    from offsite.keys.identity import generate

    return {name: generate(name, days=30, now=int(time.time()) - 3600) for name in ("owner", "client", "stranger")}


@pytest.fixture
def exchange(tmp_path, dropped_package, identities):
    """A registry without jobs, and who takes part."""
    made = Exchange(
        tmp_path / "owner-side", dropped_package, identities["owner"], identities["client"], int(time.time())
    )
    yield made
    made.close()


@pytest.fixture(scope="session")
def small_bundle(make_bundle, dropped_package, tmp_path_factory):
    """A sound bundle of the adapter that the exchange's jobs ask for; read only."""
    out = tmp_path_factory.mktemp("small") / "bundle"
    return make_bundle(out, dropped_package, kind="lora", rank=2, placement="1+1", shake=0.02)


@pytest.fixture(scope="session")
def shelve():
    """Put a bundle into a registry of its own as accepted, without sealing it; return the settings that name it."""
    import shutil

    from offsite.artefacts.bundle import open_bundle
    from offsite.artefacts.job import Job
    from server.registry.registry import Registry
    from server.registry.rows import short_id

    def put(bundle, package, folder, *, state="accepted"):
        keys = folder / "keys"
        keys.mkdir(parents=True, mode=0o700)
        parties = {name: "-".join([letter * 4] * 13) for name, letter in (("owner", "a"), ("client", "b"))}
        digest = "sha256:" + secrets.token_hex(32)
        manifest = open_bundle(bundle).manifest
        bound = {"package_digest": manifest.package_digest, "base_digest": manifest.base_digest}
        job = Job(job_id=secrets.token_hex(16), adapter=manifest.adapter, created=1, expires=2**39, **parties, **bound)
        envelope = SimpleNamespace(job_id=job.job_id, issuer=job.client, round=1, sequence=1)
        with Registry.open(folder / "registry", keys, create=True) as registry:
            registry.add_job(job, package=package, client_name="client")
            registry.receive(envelope, digest)
            shutil.copytree(bundle, registry.bundle_folder(short_id(digest)))
            registry.verified(
                digest,
                bundle_digest=open_bundle(bundle).digest,
                tensors_sha256=manifest.files["adapter.safetensors"].sha256,
                figures={},
            )
            if state == "accepted":
                registry.advance(short_id(digest), "accepted")
        return {"id": short_id(digest), "registry": folder / "registry", "keys": keys}

    return put


# --- a federation, taken apart


class Federated:
    """A federation of three parties' clients on one disk whose rounds a test asks, answers and closes by hand.

    Answers are sealed by the client's own code; what they hold is drawn, not trained, unless a test trains it.
    """

    NAMES = ("anna", "bert", "cora")

    def __init__(self, folder: Path, package: Package, model: Path, **changes: Any) -> None:
        from offsite.config import build
        from server.federation.simulation import prepared
        from server.federation.simulationconfig import SimulateConfig

        self.folder, self.package = folder, package
        folder.mkdir(exist_ok=True)  # or it is a copy of another's, with all that `prepared` makes in it
        texts = {}
        for name in self.NAMES:
            texts[name] = str(folder / f"{name}.jsonl")
            rows = [{"text": f"{name} {number % 7} {name}"} for number in range(40)]
            Path(texts[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        stated = {
            "package": str(package.path), "model": str(model), "output": str(folder / "result"), "clients": texts,
            "work": str(folder / "work"), "rounds": 3, "steps": 2, "learning_rate": 5e-3, "placement": "1+1",
            "targets": "attention", "lora_rank": 2, "adapter_dtype": "float32", "max_relative_frobenius": 10.0,
            "max_relative_spectral": 10.0, "tune": {"batch_size": 8, "block_tokens": 32, "precision": "fp32"},
        }  # fmt: skip
        self.config, self.settings = prepared(build(SimulateConfig, flags={**stated, **changes}))
        self.outbox = folder / "work" / "outbox"
        self.outbox.mkdir(exist_ok=True)
        self._members: dict[str, Any] = {}

    def opened(self, **changes: Any) -> Any:
        """The federation, opened as its owner does, with changed settings."""
        from offsite.keys.identity import open_identity
        from server.federation.federation import opened_federation

        config = type(self.config)(
            **{**{n: getattr(self.config, n) for n in type(self.config).model_fields}, **changes}
        )
        return opened_federation(config, open_identity(config), outbox=self.outbox)

    def member(self, name: str, **changes: Any) -> Any:
        """A client, with keys open; the same one again unless settings change."""
        from client.federation.config import MemberConfig
        from client.federation.member import Member
        from offsite.config import build

        if changes or name not in self._members:
            stated = {**json.loads(self.settings[name].read_text()), **changes}
            made = Member(build(MemberConfig, flags=stated))
            if changes:
                return made
            self._members[name] = made
        return self._members[name]

    def key(self, name: str) -> str:
        return str(self.member(name).job.client)

    def bundle(self, out: Path, round_: Any, *, seed: int = 0, size: float = 0.02, **changes: Any) -> Bundle:
        """Write a bundle that answers the round with drawn tensors, on the A that it shares; or one changed."""
        spec = round_.manifest.adapter
        expected = declared(spec, self.package.layout, self.package.block_tensors())
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: size * torch.randn(one.shape, generator=generator) for name, one in expected.items()}
        if spec.kind in ("blocks", "bitfit"):
            from adapters.norms import base_tensors
            from adapters.rounds import grown

            base = grown(base_tensors(self.package, list(expected)), round_)
            tensors = {name: base[name] + tensor for name, tensor in tensors.items()}
        change = changes.pop("change", None)
        tensors |= round_.load_start()
        if change is not None:
            change(tensors)
        stated = {"round_digest": round_.digest, **changes}
        return write_bundle(out, package=self.package, spec=spec, tensors=tensors, expected=expected, **stated)

    def answer(self, name: str, sealed_round: Path, *, seed: int | None = None, **changes: Any) -> Path:
        """Answer the sealed round as that client: taken and sealed by its own code. Returns the sealed bundle."""
        member = self.member(name)
        round_ = member.take(sealed_round)
        out = round_.path.parent / "bundle"
        if not out.exists():
            self.bundle(out, round_, seed=self.NAMES.index(name) if seed is None else seed, **changes)
        return member.answer(round_)

    def round(self, federation: Any, number: int, *, names: tuple[str, ...] = NAMES, **changes: Any) -> Any:
        """Ask, answer and close one round."""
        from offsite.exchange.packing import pack

        asked = federation.ask(number)
        for name in names:
            verdict = federation.take_in(pack(self.answer(name, asked[self.key(name)], **changes)))
            assert verdict.state == "verified", verdict
        return federation.close_round(number, {})


@pytest.fixture(scope="session")
def federation_begun(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path
) -> Callable[[Path, Package, dict[str, Any]], None]:
    """Copy into a folder what a federation of such settings begins with; its keys and jobs are made once a session."""
    made: dict[str, Path] = {}

    def begin(folder: Path, package: Package, changes: dict[str, Any]) -> None:
        key = repr((package.digest, sorted(changes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("begun") / "federated"
            Federated(made[key], package, llama_folder, **changes)
        shutil.copytree(made[key], folder)
        for settings in folder.glob("work/clients/*/member.json"):  # they name their own folders in full
            settings.write_text(settings.read_text().replace(str(made[key].resolve()), str(folder.resolve())))

    return begin


@pytest.fixture
def make_federated(
    tmp_path: Path,
    whole_package: Package,
    llama_folder: Path,
    federation_begun: Callable[[Path, Package, dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Federated]:
    """Prepare a federation of three clients on the whole tiny model."""
    monkeypatch.setattr("offsite.keys.files.SCRYPT_COST", 2**4)

    def make(name: str = "federated", *, package: Package = whole_package, **changes: Any) -> Federated:
        federation_begun(tmp_path / name, package, changes)
        return Federated(tmp_path / name, package, llama_folder, **changes)

    return make


@pytest.fixture
def federated(make_federated: Callable[..., Federated]) -> Federated:
    """A federation of three clients, with nothing asked yet."""
    return make_federated()
