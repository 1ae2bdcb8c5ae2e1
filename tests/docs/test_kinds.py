"""`docs/kinds.md`, what can be tuned, is written from the tests that prove it: ``python tests/docs/test_kinds.py``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kinds.md"
_MARK = "@pytest.mark." + "proves("
HEAD = """# What can be tuned

Written from the tests that prove it (`python tests/docs/test_kinds.py`); one of them holds the page to the others.
Models are tiny and random there; what was measured on real ones is in [results.md](results.md).

## Models

Tests cut each of these, by transformers' names, and compare what is kept with the full model:

"""
ROWS = """
## What a client learns from

| rows | `--objective` | proved by |
| --- | --- | --- |
"""


def marked() -> Iterator[tuple[str, pytest.Mark, list[pytest.Mark]]]:
    """Yield every test with the mark: its place, the mark, and all of its marks."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if _MARK in path.read_text(encoding="utf-8"):
            place = path.relative_to(ROOT)
            for name, value in vars(_imported(path)).items():
                marks = getattr(value, "pytestmark", [])
                for mark in marks if isinstance(marks, list) and name.startswith("test_") else []:
                    if mark.name == "proves":
                        yield f"{place}::{name}", mark, marks


def page() -> str:
    """Return what the page says."""
    models: dict[str, set[str]] = {}
    rows = []
    for place, mark, marks in marked():
        table, what, *more = mark.args
        if table == "models":
            given = next(one for one in marks if one.name == "parametrize").args[1]
            models.setdefault(what, set()).update(_name(one) for one in given)
        else:
            objective = ", ".join(f"`{one}`" for one in more[0].split(", "))
            rows.append(f"| {what} | {objective} | `{place}` |")
    told = "".join(f"- *{what}* ({len(names)}): {', '.join(sorted(names))}\n" for what, names in sorted(models.items()))
    return HEAD + told + ROWS + "".join(f"{row}\n" for row in sorted(rows))


def _name(given: object) -> str:
    return str(getattr(given, "values", (given,))[0])


def _imported(path: Path) -> ModuleType:
    name = f"kinds_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_the_page_is_what_the_tests_prove() -> None:
    found = page()
    assert PAGE.read_text(encoding="utf-8") == found
    number = found.partition("*causal language models* (")[2].partition(")")[0]
    assert f"names the {number} architectures" in (ROOT / "README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests" / "labs"), str(ROOT)]
    PAGE.write_text(page(), encoding="utf-8")
