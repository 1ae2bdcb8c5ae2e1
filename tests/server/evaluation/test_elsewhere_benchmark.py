"""``benchmarks/quality/elsewhere.py`` on a tiny model: the program that the numbers come from runs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "benchmarks" / "quality" / "elsewhere.py"


def write(path, rows):
    with gzip.open(path, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.slow
def test_text_and_questions(tmp_path, llama_folder):
    plan = yaml.safe_load(PROGRAM.with_suffix(".yaml").read_text())
    plan["distill"] = ["--method", "width", "--width", "0.5", "--steps", "0", "--calibration-tokens", "256"]
    plan["distill"] += ["--block-tokens", "32", "--bottom", "1", "--top", "1"]
    plan["tune"] = ["--adapter", "lora", "--rank", "2", "--placement", "all", "--steps", "4", "--block-tokens", "32"]
    plan["evaluate"] = ["--block-tokens", "32", "--limit-tokens", "256"]
    plan["task_rows"] = 5
    plan["sets"] = {name: plan["sets"][name] for name in ("wikitext2", "piqa")}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    text = [{"text": f"line {n} of many, and some more words to it"} for n in range(60)]
    for name in (plan["public"], plan["sets"]["wikitext2"]["client"], plan["sets"]["wikitext2"]["heldout"]):
        write(tmp_path / name, text)
    rows = [{"prompt": f"Question: {n}\nAnswer:", "completion": f" {n % 3}", "document": str(n)} for n in range(60)]
    write(tmp_path / plan["sets"]["piqa"]["client"], rows)
    asked = [{"question": f"{n}", "choices": ["0", "1", "2"], "answer": n % 3} for n in range(8)]
    write(tmp_path / plan["sets"]["piqa"]["questions"], asked)
    words = ["--config", tmp_path / "plan.yaml", "--data", tmp_path, "--work", tmp_path / "work"]
    words += ["--out", tmp_path / "out.json", "--model", llama_folder]
    command = [sys.executable, str(PROGRAM), *map(str, words)]

    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "out.json").read_text())["sets"]
    assert found["piqa"]["task_rows"] == {"piqa": 5}
    assert found["piqa"]["rows"]["lora_full"]["tasks"]["piqa"]
    assert found["wikitext2"]["num_tokens"] <= 256
    assert found["wikitext2"]["task_rows"] == {}
    assert found["wikitext2"]["rows"].keys() == found["piqa"]["rows"].keys()
    assert "| piqa | " in first.stdout

    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == 2 * 5  # two packages, two bundles and an evaluation, of each set
    assert again.stdout == first.stdout
