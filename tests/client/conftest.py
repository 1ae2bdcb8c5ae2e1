"""Private text in small files, and the verb's settings for models of a few thousand parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client.config import TuneConfig

ILLS = ["fever", "cough", "ache", "rash", "chill"]


def _notes() -> list[str]:
    return [
        f"case {number}: the {ILLS[number % 5]} of ward {number % 7} went after {number % 9} days"
        for number in range(60)
    ]


@pytest.fixture(scope="session")
def notes() -> list[str]:
    """Sixty documents that are all different and much alike."""
    return _notes()


@pytest.fixture
def notes_file(tmp_path: Path) -> Path:
    """The sixty documents as plain text, in a folder that also takes the output."""
    path = tmp_path / "secret-ward-notes.txt"
    path.write_text("\n\n".join(_notes()) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def answers_file(tmp_path: Path) -> Path:
    """Prompts and completions of different lengths."""
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"ward {number}?", "completion": f" {text}"} for number, text in enumerate(_notes())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path: Path, notes_file: Path) -> Callable[..., TuneConfig]:
    """Make settings of the verb: six small steps on the CPU in float32; keywords change them."""

    def make(package: Path, **changes: object) -> TuneConfig:
        small = {"block_tokens": 32, "steps": 6, "precision": "fp32", "device": "cpu", "checkpoint_every": 2}
        given = {"data": notes_file, "output": tmp_path / "bundle", **small, **changes}
        return TuneConfig(package=package, **given)

    return make
