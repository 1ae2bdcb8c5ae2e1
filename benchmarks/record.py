"""What every result says of where it came from: commit, versions, device, and digests of what it read."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from offsite.digests import sha256_file

ROOT = Path(__file__).resolve().parents[1]


def arguments(
    description: str | None, *, only: str, more: Callable[[argparse.ArgumentParser], None] | None = None
) -> tuple[argparse.Namespace, dict[str, Any], set[str]]:
    """Return what the command line says, the configuration it names, and what to work on (empty: all of it).

    Args:
        only: what ``--only`` takes.
        more: adds a benchmark's own options.
    """
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", type=Path, required=True)
    options.add_argument("--data", type=Path, required=True, help="folder that benchmarks/data/prepare.py --full wrote")
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--model", default=None, help="instead of the configuration's")
    options.add_argument("--only", default="", help=only)
    if more is not None:
        more(options)
    given = options.parse_args()
    plan = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    plan["model"] = given.model or plan["model"]
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    return given, plan, set(filter(None, given.only.split(",")))


def write(out: Path, result: dict[str, Any]) -> None:
    """The result stands."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Return commit, whether the tree was dirty, versions and the device."""
    import torch

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        },
    }


def files(**paths: Path) -> dict[str, dict[str, str]]:
    """Return name and digest of each file read, by its role."""
    return {role: {"name": path.name, "sha256": sha256_file(path)} for role, path in paths.items()}
