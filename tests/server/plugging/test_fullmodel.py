"""Where the full model of an adapted folder is found, and what of that travels."""

from __future__ import annotations

import pytest

from offsite.errors import ConfigError
from server.plugging.fullmodel import FullModel, called, found, note_path, remember

DIGEST = "sha256:" + "a" * 64


def model_at(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_a_folder_is_called_by_its_last_part_and_a_name_by_itself(tmp_path, monkeypatch):
    folder = model_at(tmp_path / "models" / "llama")
    monkeypatch.chdir(folder.parent)
    for given in (str(folder), "llama", "./llama/", "llama/../llama"):
        assert called(given) == FullModel("llama", "folder", folder)
    assert called("example/llama") == FullModel("example/llama")
    assert called("example/llama").is_hub_id
    assert not called("smollm2-135m").is_hub_id


def find(adapted, **changes):
    return found(adapted, **{"base": "llama", "kind": "folder", "digest": DIGEST, **changes})


def test_the_note_comes_first_then_what_lies_beside(tmp_path):
    adapted = tmp_path / "adapted"
    elsewhere = model_at(tmp_path / "models" / "llama")
    with pytest.raises(
        ConfigError, match=r"'llama' of adapter 'adapted' is not here; its digest is sha256:a"
    ) as caught:
        find(adapted)
    assert "--base" in caught.value.hint
    beside = model_at(tmp_path / "llama")
    assert find(adapted) == str(beside)
    remember(adapted, called(str(elsewhere)), DIGEST)
    assert find(adapted) == str(elsewhere)
    assert find(adapted, digest="sha256:" + "b" * 64) == str(beside)
    assert find(tmp_path / "renamed") == str(elsewhere)
    assert note_path(adapted).stat().st_mode & 0o777 == 0o600
    remember(adapted, FullModel("example/llama"), DIGEST)
    assert not note_path(adapted).exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"base": 5}', b"[" * 100_000, b"x" * 70_000])
def test_a_spoilt_note_is_no_note(tmp_path, content):
    note_path(tmp_path / "adapted").write_bytes(content)
    beside = model_at(tmp_path / "llama")
    assert find(tmp_path / "adapted") == str(beside)


def test_a_name_in_a_manifest_leads_nowhere_else(tmp_path):
    model_at(tmp_path / "secret")
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match="'secret' of adapter"):
        find(tmp_path / "here" / "adapted", base="../secret")


def test_a_name_is_taken_as_it_is(tmp_path):
    assert find(tmp_path / "adapted", base="example/llama", kind="name") == "example/llama"
