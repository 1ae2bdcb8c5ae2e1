from __future__ import annotations

import errno

import pytest

from offsite.errors import ConfigError, RunFailed
from offsite.staging import refuse_existing, staged_file, staged_folder


def test_a_folder_appears_whole_and_only_at_the_end(tmp_path):
    out = tmp_path / "new" / "package"
    with staged_folder(out) as stage:
        (stage / "inside").mkdir()
        (stage / "inside" / "file").write_text("content")
        assert not out.exists()
        assert stage.parent == out.parent  # a rename within one file system
    assert (out / "inside" / "file").read_text() == "content"
    assert [path.name for path in out.parent.iterdir()] == ["package"]


def test_a_file_appears_whole_and_only_at_the_end(tmp_path):
    out = tmp_path / "new" / "report.html"
    with staged_file(out) as stage:
        stage.write_text("content")
        assert not out.exists()
    assert out.read_text() == "content"
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


FAILURES = [
    (KeyboardInterrupt(), KeyboardInterrupt, None),
    (ConfigError("wrong"), ConfigError, "wrong"),
    (OSError(errno.ENOSPC, "No space left on device"), RunFailed, "cannot write 'out': no space left on device"),
    (OSError("the library says so"), RunFailed, "cannot write 'out': the library says so"),
    (PermissionError(errno.EACCES, "Permission denied"), RunFailed, "permission denied"),
]


@pytest.mark.parametrize("staged", [staged_folder, staged_file])
@pytest.mark.parametrize(("raised", "expected", "message"), FAILURES)
def test_nothing_is_left_after_a_failure(tmp_path, staged, raised, expected, message):
    def work():
        with staged(tmp_path / "out") as stage:
            (stage / "half" if stage.is_dir() else stage).write_text("half a file")
            raise raised

    with pytest.raises(expected, match=message):
        work()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("staged", [staged_folder, staged_file])
def test_an_existing_output_is_never_touched(tmp_path, staged):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    for name in ("file", "folder", "link"):
        with (
            pytest.raises(ConfigError, match=f"output '{name}' already exists") as caught,
            staged(tmp_path / name),
        ):
            pytest.fail("the work must not begin")
        assert caught.value.hint == "choose another name with -o, or delete it first"
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="the parent of output 'out' is not a folder"):
        refuse_existing(tmp_path / "file" / "out")
    with (
        pytest.raises(RunFailed, match="cannot write 'out': not a directory"),
        staged_folder(tmp_path / "file" / "deeper" / "out"),
    ):
        pytest.fail("the work must not begin")


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "record.json"
    out.write_text("old")

    def work():
        with staged_file(out, replace=True) as stage:
            stage.write_text("new")
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(RunFailed):
        work()
    assert out.read_text() == "old"
    with staged_file(out, replace=True) as stage:
        stage.write_text("new")
    assert out.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_folder_that_came_into_being_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def work():
        with staged_folder(out) as stage:
            (stage / "file").write_text("content")
            out.mkdir()
            (out / "theirs").write_text("theirs")

    with pytest.raises(RunFailed, match="cannot write 'out'"):
        work()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]
