"""The work folder is one join's at a time, and nobody else's to read."""

from __future__ import annotations

import subprocess
import sys

import pytest

from client.join.work import taken
from offsite.errors import ConfigError


def test_two_joins_do_not_share_a_folder(tmp_path):
    with taken(tmp_path / "work") as place:
        assert place.folder.stat().st_mode & 0o777 == 0o700
        with pytest.raises(ConfigError, match="another join works in 'work'"), taken(tmp_path / "work"):
            pass
        held = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[place.lock])
    try:
        with pytest.raises(ConfigError, match="a step of one that was killed still runs"), taken(tmp_path / "work"):
            pass
    finally:
        held.communicate(b"\n")
    with taken(tmp_path / "work") as place:
        assert place.recalled("terms") is None
        place.note("terms", {"job": "a"})
        assert place.recalled("terms") == {"job": "a"}
        (place.notes / "terms.json").write_text("[")
        assert place.recalled("terms") is None


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds what no join made"), taken(tmp_path / "mine"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"), taken(tmp_path / "file"):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
