"""The work folder is one join's at a time, and nobody else's to read."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from client.join import work
from client.join.config import InvitedConfig
from client.join.work import Place, compute, drop_used, taken
from offsite.config import build
from offsite.errors import ConfigError
from offsite.stages import Stage


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


def test_canaries_that_went_into_a_bundle_are_not_used_for_another(tmp_path):
    """So it is where a run was killed between its bundle and the note of it, or settings changed."""
    folder = tmp_path / "work"
    (folder / "notes").mkdir(parents=True)
    canaries = Stage("canaries", tmp_path, ["canaries"], folder / "canaries", {"run": "a"})
    tuned = Stage("tune", tmp_path, ["tune"], folder / "bundle", {"run": "a"}, resumes=True)
    of_bundle = {**tuned.inputs, "canaries": "sha256:1"}

    def note(stage, inputs, outcome):
        found = {**stage.binding(), "inputs": inputs, "outcome": outcome}
        (folder / "notes" / f"{stage.name}.json").write_text(json.dumps(found))

    def made(used):
        for name in ("canaries", "bundle"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "canaries" / "used.json").write_text(json.dumps({"bundle": used}))
        note(canaries, canaries.inputs, {"commitment": "sha256:1"})
        tuned.inputs = {"run": "a"}

    place = Place(folder, -1)
    made("sha256:2")
    note(tuned, of_bundle, {"bundle_digest": "sha256:2"})
    drop_used(canaries, tuned, place)
    assert (folder / "canaries").is_dir(), "the bundle that they went into still counts"
    (folder / "notes" / "tune.json").unlink()
    made(None)
    drop_used(canaries, tuned, place)
    assert (folder / "canaries").is_dir(), "a run that was begun on them goes on"
    made("sha256:2")
    drop_used(canaries, tuned, place)
    assert not (folder / "canaries").exists()
    assert not (folder / "bundle").exists()


def test_an_audit_that_was_stopped_goes_on_with_its_retunings(tmp_path, monkeypatch):
    """As tuning does: what either left half done is kept for the same words and inputs."""
    data, played = tmp_path / "rows.jsonl", []
    data.write_text('{"text": "a cough"}\n')

    def play(stages, _notes):
        for stage in stages:
            stage.outcome = {"commitment": "sha256:1", "bundle_digest": "sha256:2"}
            played.append(stage)

    monkeypatch.setattr(work, "play", play)
    config = build(InvitedConfig, flags={"invitation": "i.json", "data": [str(data)], "retunings": 5})
    opened = SimpleNamespace(package=SimpleNamespace(digest="sha256:3"), job=SimpleNamespace(digest="sha256:4"))
    place = Place(tmp_path / "work", -1, round=2)
    compute(config, place, opened, ["steps=3"], data="sha256:5", num_canaries=8)
    assert {stage.name: stage.resumes for stage in played} == {"canaries": False, "tune": True, "audit": True}
    assert {stage.leaves.parent for stage in played} == {tmp_path / "work" / "round-2"}
    assert played[2].words[played[2].words.index("--retunings") + 1] == "5"
