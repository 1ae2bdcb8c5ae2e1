"""Stages played without processes: verbs that make up what they would measure by a law, and a world to explore."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from dial_law import BASE, LORA_FULL, ZERO_SHOT, bytes_of, kl_of, plugged_of, tuned_of

from emulator.dial.config import DialConfig
from emulator.dial.sizes import Shape
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.owner import OwnerRecord, owner_record_path, read_owner_record, write_owner_record
from offsite.artefacts.package import Package
from offsite.config import build
from offsite.digests import sha256_bytes
from offsite.evaluation.figures import withheld
from offsite.evaluation.rehearsal import Rehearsal, Trial
from offsite.evaluation.results import Data


class Ended:
    """What stands in place of a process that has ended."""

    returncode = 0

    def poll(self) -> int:
        return 0

    def terminate(self) -> None:
        """There is nothing to end."""

    def wait(self, timeout: float | None = None) -> int:
        return 0


@dataclass
class World:
    """The stages that ran, in order; `breaks` is the name of one that is interrupted; `bends` recoveries by size."""

    ran: list[str] = field(default_factory=list)
    words: dict[str, list[str]] = field(default_factory=dict)
    breaks: str = ""
    bends: dict[float, float] = field(default_factory=dict)
    record: OwnerRecord | None = None
    most_at_once: int = 0

    def start(self, stage: Any, notes: Path, num_running: int) -> Ended:
        if stage.name == self.breaks:
            raise KeyboardInterrupt
        self.ran.append(stage.name)
        self.words[stage.name] = list(stage.words)
        self.most_at_once = max(self.most_at_once, num_running)
        play = self._distill if stage.words[0] == "distill" else self._rehearse
        outcome = play(stage.party, list(stage.words))
        (notes / f"{stage.name}.out").write_text(json.dumps(outcome))
        return Ended()

    def _distill(self, party: Path, words: list[str]) -> dict[str, Any]:
        name = words[words.index("-o") + 1]
        if (party / name).exists():
            raise AssertionError(f"{name} stands already")
        (party / name).mkdir()
        record = self.record.model_copy(update={"package_digest": sha256_bytes(name.encode())})
        write_owner_record(party / name, record)
        size = float(words[words.index("--width") + 1]) if "--width" in words else 1.0
        outcome = {"package": name, "package_digest": sha256_bytes(name.encode()), "package_bytes": bytes_of(size)}
        return outcome | ({"field_kl": kl_of(size)} if "--field-text" in words else {})

    def _rehearse(self, party: Path, words: list[str]) -> dict[str, Any]:
        package, out = words[words.index("--package") + 1], words[words.index("-o") + 1]
        if package == "keep-all":
            tuned = plugged = LORA_FULL
            scale, zero_shot = 1.0, ZERO_SHOT
        else:
            size = float(package.rpartition("-")[2])
            tuned, plugged = tuned_of(size), plugged_of(size, self.bends.get(size, 0.0))
            scale, zero_shot = 0.5, ZERO_SHOT * math.exp(3 * kl_of(size))
        trials = [Trial(learning_rate=0.004, scale=scale, plugged_in=plugged, emulator_tuned=tuned)]
        found = Rehearsal(
            model="m",
            base_digest=BASE,
            package_digest=sha256_bytes(package.encode()),
            adapter=AdapterSpec(kind="lora", placement="all"),
            data_sha256=BASE,
            heldout=Data(name="x", sha256=BASE, num_records=1, num_examples=1, num_tokens=1, num_truncated=0),
            zero_shot=ZERO_SHOT,
            emulator_zero_shot=zero_shot,
            withheld_zero_shot=withheld(zero_shot, ZERO_SHOT),
            trials=tuple(trials),
            config={},
            command="offsite rehearse",
            versions={},
            seconds=1.0,
        )
        (party / out).write_text(json.dumps(found.model_dump(mode="json")))
        return {"rehearsal": out, "learning_rate": 0.004, "scale": scale}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, narrow_package: Package) -> World:
    """Stages make up what they would have measured; the model, which no stage reads, has 100 channels of 8.

    Packages are empty folders with a record that opens, and pass for packages.
    """
    made = World(record=read_owner_record(owner_record_path(narrow_package.path)))

    class Opened:
        def __init__(self, path: Path) -> None:
            self.digest = read_owner_record(owner_record_path(path)).package_digest

    monkeypatch.setattr("offsite.stages._start", made.start)
    monkeypatch.setattr("emulator.dial.verb._look", lambda config: (BASE, Shape(26, 800, 8)))
    monkeypatch.setattr("emulator.dial.verb.open_package", Opened)
    monkeypatch.setattr("emulator.dial.verb.refuse_encoder", lambda name: None)
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., DialConfig]:
    """Settings of an exploration of forty documents each, in a folder of their own."""
    for name in ("public", "field"):
        rows = [{"text": f"{name} document {number} says {number * number}"} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: object) -> DialConfig:
        flags = {
            "model": "m",
            "output": str(tmp_path / "package"),
            "public": str(tmp_path / "public.jsonl"),
            "field_text": str(tmp_path / "field.jsonl"),
            **changes,
        }
        return build(DialConfig, flags={key: value for key, value in flags.items() if value is not None})

    return make
