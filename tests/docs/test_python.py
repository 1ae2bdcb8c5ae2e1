"""The Python blocks of ``docs/python.md``, run as one program on a tiny model, and the names in its table."""

from __future__ import annotations

import importlib
import json
import random
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "python.md"
PACKAGES = ("adapters", "client", "emulator", "offsite", "server")
NAMES = sorted(set(re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)`", PAGE.read_text())))
SHORTER = {
    "steps=300": "steps=3",
    "steps=200": "steps=3",
    "block_tokens=256": "block_tokens=32",
    "context=256": "context=32",
    "evaluation_tokens=8192": "evaluation_tokens=64",
    "calibration_tokens=8192": "calibration_tokens=128",
}


def is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_the_story_runs(tmp_path, monkeypatch, full_llama, letters_tokenizer, capsys):
    monkeypatch.chdir(tmp_path)
    full_llama.save_pretrained(tmp_path / "model")
    letters_tokenizer.save_pretrained(tmp_path / "model")
    draw = random.Random(0)
    for name in ("public", "private", "heldout"):
        rows = [{"text": " ".join(draw.choices("the quick brown fox jumps".split(), k=40))} for _ in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    for long, short in SHORTER.items():
        assert long in program
        program = program.replace(long, short)
    exec(compile(program, PAGE.name, "exec"), {"__name__": "story"})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    before, after = map(float, printed[-1].split())
    assert before != after
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "bundle",
        "bundle.work",
        "model",
        "package",
        "package.work",
        "second.work",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_on_the_page_is_where_it_says(name: str) -> None:
    parts = name.split(".")
    where = max(count for count in range(1, len(parts) + 1) if is_module(parts[:count]))
    found: object = importlib.import_module(".".join(parts[:where]))
    for part in parts[where:]:
        found = getattr(found, part)
    home = getattr(found, "__module__", None)
    if home is not None and home.partition(".")[0] in PACKAGES:  # not one that the module itself imports
        assert home == ".".join(parts[:where])


def test_the_changelog_says_where_modules_went() -> None:
    unreleased = (ROOT / "CHANGELOG.md").read_text().split("\n## [")[1]
    rows = re.findall(r"^  \| (`[a-z].*`) \| (.*) \|$", unreleased, re.M)
    assert len(rows) > 20
    for was, now in rows:
        package = was[1:].partition(".")[0]
        found = re.findall(rf"`({package}(?:\.\w+)+)`", now)
        if now.startswith("the same in"):
            names = [name.removeprefix(f"{package}.") for name in re.findall(r"`([\w.]+)`", was)]
            found += [f"{found[0]}.{name}" for name in names]
        assert found
        assert [name for name in found if not is_module(name.split("."))] == []
