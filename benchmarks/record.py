"""What every result says of where it came from: commit, versions, device, and digests of what it read."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from offsite.digests import sha256_file

ROOT = Path(__file__).resolve().parents[1]


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
