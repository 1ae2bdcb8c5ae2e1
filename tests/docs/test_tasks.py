"""The commands of ``docs/tasks.md``, run as they stand by an owner and a client, and its file; the worked tasks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from two_parties import TwoParties

from offsite.baselines.table import read_baselines
from offsite.tasks.read import parse_task, read_task

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^<!-- (owner|client) -->\n```sh\n(.*?)^```$", PAGE, re.M | re.S)
SHORTER = {
    "--rows 6": "--rows 3 --method zero-shot --method in-context",
    "--steps 200": "--steps 2 --batch-size 2 --block-tokens 64",
    "model --data rows.jsonl -o baselines": "model --data rows.jsonl --method zero-shot -o baselines",
    "--baselines baselines.json": "--baselines baselines.json --block-tokens 64",
}


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch, capsys) -> None:
    parties = TwoParties(tmp_path, monkeypatch, capsys)
    (file,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    task = parse_task(file.encode(), "the page's task")
    rows = "".join(
        json.dumps({"thing": f"ball {number}", "answer": ("red", "green", "blue")[number % 3]}) + "\n"
        for number in range(24)
    )
    for folder in (parties.owner, parties.client):
        (folder / "task.yaml").write_text(file)
        (folder / "rows.jsonl").write_text(rows)
    client = json.loads((parties.owner / "job" / "job.json").read_text())["client"]
    told, name = {}, ""
    assert [party for party, _ in BLOCKS] == ["owner", "client", "owner"]
    for party, block in BLOCKS:
        for line in block.splitlines():
            for long, short in SHORTER.items():
                line = line.replace(long, short)
            words = line.removeprefix("offsite ").replace("FINGERPRINT", client).replace("ID", name)
            told[words.partition(" -")[0]] = found = parties.run(party, words)
            name = found.get("id", name)
            for sealed, other in (("task-job.sealed", parties.client), ("task-bundle.sealed", parties.owner)):
                here = tmp_path / party / sealed
                if here.is_dir() and here.parent != other and not (other / sealed).exists():
                    shutil.copytree(here, other / sealed)
    assert told["inspect task-job"]["task"] == task.model_dump(mode="json")
    evaluated = told["evaluate model"]["task"]
    assert evaluated["digest"] == task.digest
    assert evaluated["rows"]["zero_shot"]["accuracy"]["value"] == pytest.approx(
        evaluated["baselines"][0]["figures"]["accuracy"]["value"]
    )
    bundle = json.loads((parties.client / "task-bundle" / "offsite.json").read_text())
    assert bundle["task_digest"] == task.digest


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/tasks/*/task.yaml")), ids=lambda path: path.parent.name)
def test_a_worked_task_is_sound_and_says_whose_its_samples_are(path: Path) -> None:
    task = read_task(path)
    assert task.name == path.parent.name
    assert "CC BY" in task.attribution
    assert task.samples
    assert task.tests
    measured = ROOT / "benchmarks" / "tasks" / "results" / f"{task.name}.json"
    assert not measured.exists() or read_baselines(measured).task_digest == task.digest
