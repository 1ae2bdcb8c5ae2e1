"""Names told in ASCII, kinds guessed for hints, and plain files that are opened once and never waited for."""

from __future__ import annotations

import json
import os

import pytest

from offsite.errors import TooLarge, WrongNames
from offsite.folders import is_dropping, kind_of, listed, names_in, opened_plain, read_plain


@pytest.mark.parametrize("name", [".DS_Store", "thumbs.db", "Desktop.INI", "._x", "__MACOSX", "@eaDir", ".directory"])
def test_what_file_managers_leave(name, tmp_path):
    (tmp_path / name).write_text("x")
    (tmp_path / "own").write_text("x")
    assert is_dropping(name)
    assert names_in(tmp_path) == {"own"}


@pytest.mark.parametrize("name", ["", ".", "_x", "DS_Store", ".DS_Store.txt", "desktop.ini.bak", "offsite.json", ".x"])
def test_what_they_do_not(name):
    assert not is_dropping(name)


def test_names_are_told_in_order_in_ascii_and_not_without_end():
    assert listed({"b", "a"}) == "'a', 'b'"
    assert listed(["é\n"]) == r"'\xe9\n'"
    assert listed(map(str, range(9))) == "'0', '1', '2' and 6 more"


KINDS = {
    "a sealed package": {"manifest.json": '{"kind": "package"}', "signatures.json": "{}", "keys.json": "{}"},
    "a sealed folder": {"manifest.json": '{"kind": ["x"]}', "signatures.json": "{}", "keys.json": "{}"},
    "a package": {"offsite.json": json.dumps({"format": "offsite/package/1"}, indent=1)},
    "a bundle": {"offsite.json": '{"format":"offsite/bundle/1"}'},
    "an adapted folder": {"offsite.json": '{"format":"offsite/adapted/12"}'},
    "a job": {"job.json": "{}", ".DS_Store": ""},
    "a keys folder": {"card.json": "{}"},
    "a registry": {"registry.id": "x"},
    "a report": {"report.json": "{}"},
    "a model": {"config.json": "{}"},
    None: {"offsite.json": '{"format": "evil"}'},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_guessed(kind, tmp_path):
    for name, content in KINDS[kind].items():
        (tmp_path / name).write_text(content)
    assert kind_of(tmp_path) == kind


def test_a_guess_raises_nothing_and_waits_for_nothing(tmp_path):
    assert kind_of(tmp_path / "nowhere") is None
    assert kind_of(tmp_path) is None
    os.mkfifo(tmp_path / "offsite.json")
    assert kind_of(tmp_path) is None
    for name in ("manifest.json", "signatures.json", "keys.json"):
        os.mkfifo(tmp_path / name)
    assert kind_of(tmp_path) == "a sealed folder"
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)
    assert kind_of(tmp_path) == "a sealed folder"


def test_only_plain_files_are_read_and_only_up_to_the_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_plain(tmp_path / "file", 5, "it") == b"12345"
    with pytest.raises(TooLarge, match=r"^it: over 4 bytes$"):
        read_plain(tmp_path / "file", 4, "it")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe", "nothing"):
        with pytest.raises(WrongNames, match=f"'{name}' is not a plain file"):
            read_plain(tmp_path / name, 5, "it")
    (tmp_path / "second").hardlink_to(tmp_path / "file")
    assert read_plain(tmp_path / "file", 5, "it") == b"12345"
    with pytest.raises(WrongNames, match="of its own"), opened_plain(tmp_path / "file", alone=True):
        pass
