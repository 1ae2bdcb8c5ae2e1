"""Private text in small files, and the verb's settings for models of a few thousand parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.tuning.config import TuneConfig
from offsite.artefacts.round import ROUND_FORMAT, RoundManifest, write_round
from offsite.exchange.verbs import seal_run
from offsite.sealed.config import SealConfig
from offsite.sealed.ledger import Ledger

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
def pairs_file(tmp_path: Path) -> Path:
    """Prompts, each with an answer that is chosen and one of another length that is rejected."""
    path = tmp_path / "preferences.jsonl"
    rows = [
        {"prompt": f"ward {number}?", "chosen": f" {text.split(': ')[1]}", "rejected": f" nothing {number % 4}"}
        for number, text in enumerate(_notes())
    ]
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


@pytest.fixture
def asked(federated: Any) -> dict[str, Path]:
    """The first round, sealed for each client, by name."""
    with federated.opened() as federation:
        found = federation.ask(1)
    return {name: found[federated.key(name)] for name in federated.NAMES}


@pytest.fixture
def seal_round(federated: Any, tmp_path: Path) -> Callable[..., Path]:
    """Seal a round for anna as the owner can, whatever it asks."""
    numbers = iter(range(1, 1000))

    def make(number: int = 1, **changes: Any) -> Path:
        member = federated.member("anna")
        job, place = member.job, tmp_path / f"made-{next(numbers)}"
        stated = {
            "format": ROUND_FORMAT,
            "federation_id": "5" * 32,
            "round": number,
            "num_rounds": 3,
            "package_digest": job.package_digest,
            "base_digest": job.base_digest,
            "adapter": job.adapter,
            "steps": 2,
            "learning_rate": 5e-3,
        }
        plain = write_round(place, RoundManifest(**{**stated, **changes}))
        owner = federated.config
        (place.with_name(f"{place.name}-job")).mkdir()
        with Ledger(owner.keys) as ledger:
            (place.with_name(f"{place.name}-job") / "job.json").write_bytes(ledger.job(job.job_id).raw)
        sealed = place.with_name(f"{place.name}.sealed")
        seal_run(
            SealConfig(
                input=plain.path,
                output=sealed,
                job=place.with_name(f"{place.name}-job"),
                keys=owner.keys,
                passphrase_file=owner.passphrase_file,
            )
        )
        return sealed

    return make
