"""The map of the code names files, functions and folders that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = "adapters|client|emulator|offsite|server"
NAMED = sorted(set(re.findall(rf"`((?:{PACKAGES})/[\w./]*)(?::(\w+))?`", PAGE)))
DRAWINGS = re.findall(r"^```mermaid\n(.*?)^```$", PAGE, re.M | re.S)


def defined(path: Path) -> set[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_map_names_files_and_functions() -> None:
    assert sum(bool(function) for _, function in NAMED) > 20
    assert len(DRAWINGS) == 2


@pytest.mark.parametrize(("path", "function"), NAMED, ids=str)
def test_what_the_map_names_is_there(path: str, function: str) -> None:
    assert (ROOT / path).exists()
    if function:
        assert function in defined(ROOT / path)


def test_folders_in_the_drawings_are_there() -> None:
    found = re.findall(rf"\b(?:{PACKAGES})/\w*/?", "".join(DRAWINGS))
    assert len(found) > 10
    assert [folder for folder in found if not (ROOT / folder).is_dir()] == []


@pytest.mark.parametrize("file", ["client/tuning/scan.py", "offsite/sealed/release.py", "server/registry/verify.py"])
def test_the_map_answers_where_checks_are(file: str) -> None:
    assert file in PAGE.partition("## The folders")[0]


def test_those_who_work_on_the_code_find_the_map() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "docs/architecture.md" in text, name
    for name in ("README.md", "CONTRIBUTING.md"):
        assert "(AGENTS.md)" in (ROOT / name).read_text(encoding="utf-8"), name
    assert len((ROOT / "AGENTS.md").read_text(encoding="utf-8").splitlines()) <= 60
