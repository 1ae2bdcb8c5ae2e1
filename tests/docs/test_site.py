"""The documentation's site: links lead somewhere, every verb has a page, and no other host is asked for anything."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from offsite.commands.verbs import VERBS

ROOT = Path(__file__).parents[2]


def builder():
    """Return ``docs/site/build.py`` as a module."""
    spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "site" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["build.py", str(out)])
        assert builder().main() == 0
    return out


def test_every_verb_has_a_page_that_names_its_settings(built):
    for name in VERBS:
        assert (built / "reference" / name.replace(" ", "-") / "index.html").is_file()
    tune = (built / "reference" / "tune" / "index.html").read_text()
    assert "--learning-rate X" in tune
    assert "../../glossary/#adapter" in tune


def test_no_other_host_is_asked_for_anything(built):
    asked = re.compile(
        r"""<(?:script|img|link|iframe|source)\b[^>]*(?:src|href)=["']?(?:https?:)?//|url\(["']?https?:|@import"""
    )
    for path in [*built.rglob("*.html"), *built.rglob("*.css")]:
        assert not asked.search(path.read_text(encoding="utf-8")), path.relative_to(built)


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ("docs/client.md", "(owner.md)", "docs/client.md: the link to nowhere.md leads nowhere"),
        ("docs/client.md", "(#1-install)", "anchor does not exist"),
    ],
)
def test_a_link_that_leads_nowhere_fails(source, target, told, tmp_path, monkeypatch, capsys):
    module, read = builder(), Path.read_text

    def broken(path, *args, **given):
        text = read(path, *args, **given)
        other = "(nowhere.md)" if "owner" in target else "(owner.md#nowhere)"
        return text + f"\nSee [it]{other}.\n" if path == ROOT / source else text

    monkeypatch.setattr(Path, "read_text", broken)
    monkeypatch.setattr(sys, "argv", ["build.py", str(tmp_path / "site")])
    assert module.main() == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_a_folder_that_is_no_site_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["build.py", str(tmp_path)])
    assert builder().main() == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
