"""A disk was full, so a folder of ours became a link to a bigger disk, on which other things lay.

What was met: everything foreign in that place was removed, as if a killed run had left it. Now nothing is removed that
does not have a name of our own exact form, a folder that only we fill is refused when it is a link, and a folder
``OUTPUT.work`` of another verb is never cleared away.
"""

from __future__ import annotations

import pytest

from client.exchange.verbs import _prepare
from offsite.errors import ConfigError
from offsite.sealed.folder import read_sealed
from offsite.sealed.manifest import SealedManifest
from offsite.staging import leftovers
from offsite.strictjson import parse_strict
from offsite.training.checkpoints import collect_stale, require_work
from server.plugging.plug import collect_partial
from server.registry.messages import MessageStore

OURS = ["0123abcd", "ffffffff"]
THEIRS = ["0123abc", "0123abcde", "0123ABCD", "notes", "0123abcd.1"]


def tree(folder, names):
    for name in names:
        (folder / name / "inside").mkdir(parents=True)
    return {folder / name for name in names}


def test_leftovers_are_what_we_name_so_and_nothing_else(tmp_path):
    ours = tree(tmp_path, [f".out.{end}.partial" for end in OURS])
    theirs = tree(tmp_path, [*(f".out.{end}.partial" for end in THEIRS), ".out2.0123abcd.partial", "out"])
    (tmp_path / ".out.0000000a.partial").symlink_to(tmp_path / "out")
    assert set(leftovers(tmp_path / "out")) == {*ours, tmp_path / ".out.0000000a.partial"}
    collect_partial(tmp_path / "out")  # of a plugging in that was killed
    assert set(tmp_path.iterdir()) == theirs
    assert all((path / "inside").is_dir() for path in theirs)  # also what a link of such a name led to
    assert leftovers(tmp_path / "nowhere" / "out") == []


def test_a_name_with_signs_that_patterns_read(tmp_path):
    tree(tmp_path, [".a.0123abcd.partial", ".[ab].0123abcd.partial"])
    assert [path.name for path in leftovers(tmp_path / "[ab]")] == [".[ab].0123abcd.partial"]


def test_checkpoints(tmp_path):
    tree(tmp_path, [f".checkpoint-3.{end}.partial" for end in OURS])
    theirs = tree(tmp_path, [*(f".checkpoint-3.{end}.partial" for end in THEIRS), "photos", ".x.partial"])
    collect_stale(tmp_path)
    assert set(tmp_path.iterdir()) == theirs
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for resume in (True, False):
        with pytest.raises(ConfigError, match="work folder 'link' is not a folder of its own"):
            require_work(tmp_path / "link", resume=resume)


@pytest.mark.parametrize("foreign", ["checkpoint-4", "photos", "payload/notes.txt", "payload"])
def test_a_pull_beside_a_work_folder_that_is_not_its_own(foreign, live_exchange, make_job, tmp_path):
    raw = read_sealed(live_exchange.offer("package", make_job()))
    manifest = parse_strict(raw.manifest_raw, SealedManifest, "manifest.json", {})
    work = tmp_path / "out.work"
    if foreign == "payload":
        tree(tmp_path, ["elsewhere"])
        work.mkdir()
        (work / "payload").symlink_to(tmp_path / "elsewhere")
    else:
        tree(work, [foreign])
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"'out\.work' is in the way"):
        _prepare(work, raw, manifest)
    assert set(tmp_path.rglob("*")) == before


def test_messages_of_closed_rounds(exchange):
    registry = exchange.registry
    notes = registry.folder / "notes"
    job = "0" * 32
    ours = [f"{job}/00001-{7:016d}", f"{job}/.00001-{8:016d}.partial"]
    later = [f"{job}/00002-{9:016d}"]
    theirs = ["album/00001-0000000000000007", f"{job}/0-1", f"{job}/holiday-photos", f"{job}/00001-7", "x/a-b"]
    for name in (*ours, *later, *theirs):
        (notes / name / "inside").mkdir(parents=True)
    MessageStore(registry).clear(1)
    assert not any((notes / name).exists() for name in ours)
    assert all((notes / name / "inside").is_dir() for name in (*later, *theirs))
