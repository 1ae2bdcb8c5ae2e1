"""``benchmarks/frontier/paper.py`` on a tiny model: the program that the numbers come from runs, and resumes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "benchmarks" / "frontier" / "paper.py"
SMALL = {"bottom": 1, "top": 1, "block_tokens": 32, "calibration_tokens": 128}


def write(path, rows):
    with gzip.open(path, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def command(tmp_path, llama_folder):
    """The program's command line with a plan of tiny packages and two sets, one of choices and one of answers."""
    plan = yaml.safe_load(PROGRAM.with_suffix(".yaml").read_text())
    plan |= {"num_questions": 6, "how": {"steps": 2, "batch_size": 2}}
    plan["packages"] = {
        "full": {"method": "keep-all", "bottom": 1, "top": 1},
        "drop": {"method": "drop", "blocks": 2, "steps": 1, "evaluation_tokens": 64, **SMALL},
        "width": {"method": "width", "width": 0.5, **SMALL},
    }
    plan["methods"]["paper"] |= {"packages": ["drop"], "rates": [1e-3]}
    plan["methods"]["paper"]["adapter"]["placement"] = "1+1"
    plan["methods"]["ours"] |= {"packages": ["width"], "rates": [1e-3, 2e-3]}
    plan["sets"] = {name: plan["sets"][name] for name in ("piqa", "webquestions")}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    write(tmp_path / plan["public"], [{"text": f"line {n} of many, and some more words to it"} for n in range(60)])
    rows = [{"prompt": f"Question: {n}\nAnswer:", "completion": f" {n % 3}", "document": str(n)} for n in range(400)]
    asked = [{"question": f"{n}", "choices": ["0", "1", "two"], "answer": n % 3} for n in range(8)]
    answered = [{"question": f"{n}", "answers": ["one", "the other"]} for n in range(8)]
    for name, questions in (("piqa", asked), ("webquestions", answered)):
        write(tmp_path / plan["sets"][name]["client"], rows)
        write(tmp_path / plan["sets"][name]["questions"], questions)
    words = ["--config", tmp_path / "plan.yaml", "--data", tmp_path, "--work", tmp_path / "work"]
    words += ["--out", tmp_path / "out.json", "--model", llama_folder]
    return [sys.executable, str(PROGRAM), *map(str, words)]


def run(command, *more):
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_both_methods_on_two_sets(tmp_path, command, llama_folder):
    one = run(command, "--only", "piqa")
    journal = tmp_path / "work" / "jobs.jsonl"
    num_before = len(journal.read_text().splitlines())
    assert list(json.loads((tmp_path / "out.json").read_text())["sets"]) == ["piqa"]
    assert "| piqa | ours |" in one.stdout

    run(command)
    result = json.loads((tmp_path / "out.json").read_text())
    jobs = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(jobs) > num_before
    assert len({job["bound"] for job in jobs}) == len(jobs)  # nothing was done twice
    assert list(result["sets"]) == ["piqa", "webquestions"]
    assert result["finished"]
    assert str(tmp_path) not in json.dumps(result)
    for own in result["sets"].values():
        for figures in (own["zero_shot"], own["ours"]["plugged_in"]["0.5"], own["paper"]["emulator_tuned"]):
            assert len(figures["right"]) == 6
            assert figures["accuracy"] == figures["right"].count("1") / 6

    again = run(command)
    assert journal.read_text().splitlines() == [json.dumps(job) for job in jobs]
    assert again.stderr == ""


@pytest.mark.slow
def test_the_scorer_agrees_with_the_harness(command):
    assert run(command, "--check").stdout.count(": the same") == 2
