"""``offsite serve``: an adapted model, or one full model with many adapters, behind the OpenAI interface."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
import uvicorn
from fastapi import FastAPI

from offsite.artefacts.bundle import Head
from offsite.artefacts.job import task_at
from offsite.console import say
from offsite.digests import model_digest
from offsite.errors import ConfigError
from offsite.modelling.context import context_of
from offsite.modelling.load import is_encoder_name, is_vision_name
from offsite.tasks.task import Task
from offsite.vision.reader import Reader, tokenizer_in
from server.http.serve import is_loopback, listen, signals_end, url_of
from server.plugging.adapted import open_adapted, read_adapter
from server.plugging.fit import Fitted
from server.plugging.offset import Offset, load_offset, open_offset
from server.plugging.plug import accepted
from server.plugging.ways import OFFSET
from server.registry.registry import Registry
from server.serving.app import build_app
from server.serving.catalogue import STANDING, Bundles
from server.serving.classify import build_head_app
from server.serving.config import ServeConfig
from server.serving.engine import Engine
from server.tenants.store import Tenants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY_VARIABLE = "OFFSITE_API_KEY"

_GRACE_SECONDS = 10


class Process(uvicorn.Server):
    """A uvicorn server whose answers under way break off when it is told to stop."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                ws="none",
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        self._engine: Engine = app.state.engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking connections, and break off what is under way."""
        self._engine.stop()
        super().handle_exit(sig, frame)


def read_key(key_file: Path | None) -> tuple[str, bool]:
    """Return the bearer key and whether it is fresh: from `key_file`, else OFFSITE_API_KEY, else random.

    Raises:
        ConfigError: the file cannot be read, or the key is empty or not one printable ASCII word.
    """
    if key_file is not None:
        origin = f"key file {key_file.name!r}"
        try:
            key = key_file.read_text(encoding="ascii").strip()
        except OSError as error:
            raise ConfigError(f"cannot read {origin}: {(error.strerror or 'unknown').lower()}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{origin} is not ASCII text") from None
    elif KEY_VARIABLE in os.environ:
        origin, key = KEY_VARIABLE, os.environ[KEY_VARIABLE].strip()
    else:
        return secrets.token_urlsafe(32), True
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{origin} does not hold one word of printable ASCII", hint="openssl rand -hex 32 makes one")
    return key, False


def load_served(config: ServeConfig) -> tuple[PreTrainedModel, Reader, str]:
    """Return the model on its device in eval mode, what reads for it, and the name it is served under.

    Raises:
        ConfigError: the device does not exist; told before anything is loaded.
        ArtefactError: `adapted` was rejected.
        ConfigError: `adapted` is merged, and is to be mixed; or is a full model, and is to be.
    """
    _refuse_images(config)
    device = _device(config.device)
    name = config.model_id or config.adapted.resolve().name
    if is_trunk(config) or config.offset is not None or is_plain_encoder(config):
        from offsite.modelling.load import load_model, load_tokenizer

        if config.mix != 1:
            raise ConfigError("--mix goes with one adapted folder", hint="leave it out, or serve that folder alone")
        if name in config.adapter:
            raise ConfigError(f"--adapter {name}: the model itself has that name", hint="give it another: --model-id")
        source = str(config.adapted)
        reader: Reader = load_tokenizer(source)
        model = load_model(source, encoders=is_plain_encoder(config))
        model.requires_grad_(False)
    else:
        from server.plugging.adapted import load_adapted

        model, reader = load_adapted(config.adapted, base=config.base, mix=config.mix, seq2seq=True)
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return model, reader, name


def is_trunk(config: ServeConfig) -> bool:
    """Tell whether a full model is served, with adapters on it, and not one adapted folder.

    Raises:
        ConfigError: when adapters are named for a folder that holds one already, or packages for no registry.
    """
    is_adapted = (config.adapted / "offsite.json").is_file()
    if is_adapted and config.adapter:
        raise ConfigError(
            f"{config.adapted.name!r} is an adapted folder: --adapter goes with the full model",
            hint=f"offsite serve MODEL --adapter {config.adapted.name}={config.adapted}",
        )
    if is_adapted and config.offset is not None:
        raise ConfigError(
            f"{config.adapted.name!r} is an adapted folder: --offset goes with the full model",
            hint="an adapter that could be plugged in needs no offset",
        )
    if config.offset is not None:
        return False
    trunk = bool(config.adapter) or (config.registry is not None and not is_adapted)
    if config.package and (not trunk or config.registry is None):
        raise ConfigError("--package goes with a full model and --registry", hint="leave it out")
    return trunk


def is_plain_encoder(config: ServeConfig) -> bool:
    """Tell whether the checkpoint of an encoder is served by itself, for its embeddings.

    Raises:
        ConfigError: when tasks are to be answered, too.
    """
    folder = config.adapted
    alone = not config.adapter and config.registry is None and config.offset is None
    if not alone or (folder / "offsite.json").is_file() or not (folder / "config.json").is_file():
        return False
    if found := is_encoder_name(str(folder)):
        _refuse_tasks(config, "an encoder")
    return found


def _refuse_images(config: ServeConfig) -> None:
    """Return only if what is served reads text, or tells images apart.

    Raises:
        ConfigError: when it is a vision encoder without a head.
    """
    folder = config.adapted
    if (folder / "offsite.json").is_file() or not (folder / "config.json").is_file():
        return
    if is_vision_name(str(folder)):
        raise ConfigError(
            f"{folder.name!r} reads images and has no head to tell them apart by",
            hint="serve the folder that plug-in wrote of a classifier on it",
        )


def _refuse_tasks(config: ServeConfig, what: str) -> None:
    if config.task:
        raise ConfigError(
            f"--task: {config.adapted.name!r} is {what} and writes no text",
            hint="leave --task out; POST /v1/embeddings or /v1/classify answers",
        )


def _device(name: str) -> str:
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is no torch device", hint="--device cpu works anywhere") from None
    if kind == "cuda" and not has_gpu:
        raise ConfigError(f"--device {name!r}: there is no GPU here", hint="--device cpu works anywhere")
    return name


def serve(config: ServeConfig) -> dict[str, object]:
    """Serve until Ctrl-C or SIGTERM, then return what was done.

    Raises:
        ConfigError, DataError: the host, the key or a task is unusable; told before anything is loaded.
        RunFailed: the port cannot be had.
        ArtefactError: `adapted` was rejected.
        PolicyError: the registry that was named does not know it as plugged in.
    """
    began = time.monotonic()
    key, is_fresh = read_key(config.key_file)
    tasks = tasks_of(config.task)
    with ExitStack() as stack:
        tenants = stack.enter_context(Tenants.open(config.tenants)) if config.tenants is not None else None
        sock = stack.enter_context(listen(config.host, config.port))
        registry = None
        trunk = is_trunk(config)
        beside = config.offset_parts
        if config.registry is not None:
            registry = stack.enter_context(Registry.open(config.registry, config.keys))
        checked = open_offset(str(config.adapted), *beside, registry) if beside and registry is not None else None
        embeds = is_plain_encoder(config)
        head, bundle_id = (None, None) if trunk or beside is not None or embeds else _held(config)
        if beside is not None and registry is not None:
            bundle_id = registry.named(beside[1]).id
        stands = partial(_stands, registry, bundle_id) if registry is not None and bundle_id is not None else None
        model, reader, model_id = load_served(config)
        offset = load_offset(*checked, model, config.beta) if checked is not None else None
        each_stands = _each_stands(config, registry) if trunk and registry is not None else {}
        adapters, bundles = _on_trunk(config, model, registry) if trunk else ({}, None)
        if head is not None or embeds:
            app = build_head_app(
                model,
                reader,
                head,
                model_id=model_id,
                key=key,
                context=config.context,
                limit_waiting=config.limit_waiting,
                limit_bytes=config.limit_bytes,
                tenants=tenants,
                stands=stands,
            )
        else:
            app = build_app(
                model,
                tokenizer_in(reader),
                model_id=model_id,
                key=key,
                context=config.context if offset is None else _context(config.context, model, offset),
                limit_tokens=config.limit_tokens,
                limit_waiting=config.limit_waiting,
                limit_bytes=config.limit_bytes,
                limit_rows=config.limit_rows,
                limit_cache_bytes=config.limit_cache_bytes,
                prefill_tokens=config.prefill_tokens,
                adapters=adapters,
                bundles=bundles,
                tenants=tenants,
                offset=offset,
                stands=stands,
                each_stands=each_stands,
                tasks=tasks,
            )
        if beside is not None and registry is not None:
            registry.note_way(beside[1], "served", f"{OFFSET}{config.beta!r}")
        elif not trunk and config.registry is not None:
            mark_served(config.adapted, config.registry, config.keys, mix=config.mix)
        sock.listen()  # from here connections wait in the kernel's queue
        url = url_of(sock)
        _announce(config, url, [model_id, *adapters], key if is_fresh else None)
        process = Process(app)
        with signals_end(process):
            process.run(sockets=[sock])
    engine: Engine = app.state.engine
    counts = engine.counts.as_dict()
    return {"model": model_id, "url": url, "seconds": round(time.monotonic() - began, 1), **counts}


run = serve  # the name that every verb's module gives its function


def tasks_of(paths: Sequence[Path]) -> list[Task]:
    """Return the tasks that are served.

    Raises:
        ConfigError, DataError: when one is not as needed, or two have one name.
    """
    tasks = [task_at(path) for path in paths]
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--task: two tasks are called {twice!r}, each is served under its own name")
    return tasks


def _held(config: ServeConfig) -> tuple[Head | None, str | None]:
    """Return the head of the adapted folder, None of one that writes text, and the id of the bundle it holds.

    Raises:
        ConfigError: when it has one, and tasks are to be answered in text.
        ArtefactError: when it is no adapted folder.
    """
    manifest = open_adapted(config.adapted)
    head = manifest.adapter.head
    if head is not None:
        _refuse_tasks(config, f"for {head.task}")
    return head, manifest.intake


def _on_trunk(
    config: ServeConfig, model: PreTrainedModel, registry: Registry | None
) -> tuple[dict[str, Fitted], Bundles | None]:
    """Return the adapters that were named, by name, and the registry's bundles, all for the full model."""
    base_digest = model_digest(model)
    adapters = {name: read_adapter(folder, model, base_digest) for name, folder in config.adapter.items()}
    return adapters, Bundles(registry, model, base_digest, config.package) if registry is not None else None


def _stands(registry: Registry, bundle_id: str) -> bool:
    return registry.entry(bundle_id).state in STANDING


def _each_stands(config: ServeConfig, registry: Registry) -> dict[str, Callable[[], bool]]:
    """Return for every named adapter of a bundle that the registry knows what tells whether it stands.

    Raises:
        PolicyError, ArtefactError: when one was withdrawn, or refused.
    """
    known = {entry.id for entry in registry.entries()}
    found: dict[str, Callable[[], bool]] = {}
    for name, folder in config.adapter.items():
        bundle_id = open_adapted(folder).intake
        if bundle_id is not None and bundle_id in known:
            accepted(registry, bundle_id)
            found[name] = partial(_stands, registry, bundle_id)
    return found


def _context(asked: int, model: PreTrainedModel, offset: Offset) -> int:
    """Return how many tokens prompt and answer may have together, 0 for what the full model was made for.

    Raises:
        ConfigError: when more are asked for than the emulator can read.
    """
    full, most = context_of(model), context_of(offset.emulator)
    if most is None:
        return asked
    if asked > most:
        raise ConfigError(f"--context {asked}: the emulator reads at most {most} tokens")
    return asked or (most if full is None or most < full else 0)


def mark_served(adapted: Path, registry: Path, keys: Path, *, mix: float = 1.0) -> None:
    """The registry knows that the bundle in `adapted` is served, and in which way; again changes nothing.

    Raises:
        ConfigError: there is no registry, or it does not know the bundle.
        PolicyError: the bundle is not plugged in, as far as the registry knows.
    """
    manifest = open_adapted(adapted)
    intake = manifest.intake
    if intake is None:
        raise ConfigError(f"{adapted.name!r} does not name the bundle it holds", hint="leave --registry out")
    with Registry.open(registry, keys) as opened:
        opened.advance(intake, "served")
        opened.note_way(intake, "served", str(replace(manifest.plugged, mix=mix)), manifest.spare_text)


def _announce(config: ServeConfig, url: str, names: Sequence[str], fresh_key: str | None) -> None:
    if not is_loopback(config.host):
        say(f"warning: {config.host} can be reached from other machines, without encryption; put TLS in front")
    say(f"serving {', '.join(map(repr, names))} at {url}/v1; Ctrl-C ends it")
    for path in config.task:
        say(f"task {path.name!r} is answered below {url}/v1/tasks, which lists them")
    if config.mix != 1:
        say(f"{config.mix:g} of the probabilities are the adapter's; every token takes two passes")
    if config.offset is not None:
        say(
            f"the scores are moved by {config.beta:g} of what the client's adapter does to the emulator, which serves "
            "it: two more forward passes for every token; a fallback for what cannot be plugged in, not the default"
        )
    if fresh_key is not None:
        say(f"key (shown once): {fresh_key}")
