"""The page that maps promises to tests names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = {*range(1, 40)}


def table() -> dict[int, list[str]]:
    found = {}
    for line in PAGE.splitlines():
        if match := re.match(r"\| (\d\d) \|", line):
            found[int(match[1])] = re.findall(r"`(tests/[\w/]+\.py)`", line)
    return found


def test_every_row_is_on_the_page_with_the_files_that_hold_its_tests() -> None:
    holding: dict[int, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for number in re.findall(r"^(?:async )?def test_row_(\d+)_", path.read_text(encoding="utf-8"), re.M):
            holding.setdefault(int(number), set()).add(path.relative_to(ROOT).as_posix())
    listed = table()
    assert set(listed) == ROWS
    assert {row: set(files) for row, files in listed.items()} == {row: holding.get(row, set()) for row in ROWS}
