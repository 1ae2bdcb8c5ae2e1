from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from offsite.artefacts.owner import find_owner_record, owner_record_path, read_owner_record, write_owner_record
from offsite.errors import ArtefactError, BadSchema, ConfigError


@pytest.fixture
def record(narrow_package):
    return read_owner_record(owner_record_path(narrow_package.path))


def test_a_record_stands_beside_its_package_for_the_owner_alone(tmp_path, record, narrow_package):
    path = write_owner_record(tmp_path / "package", record)
    assert path == tmp_path / "package.owner.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_owner_record(path) == record
    write_owner_record(tmp_path / "package", record)  # replaced, not refused
    assert record.package_digest == narrow_package.digest


def test_a_record_without_experts_is_written_as_before_there_were_any(tmp_path, record):
    assert "experts" not in json.loads(write_owner_record(tmp_path / "package", record).read_text())
    some = record.model_copy(update={"experts": {"middle.0.mlp.experts": ((1, 3), (0, 2))}})
    assert read_owner_record(write_owner_record(tmp_path / "package", some)) == some


def test_where_a_record_stands(tmp_path, monkeypatch):
    (tmp_path / "package" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "package")
    expected = tmp_path / "package.owner.json"
    for name in (".", "../package", "inside/..", str(tmp_path / "package" / ".")):
        assert owner_record_path(Path(name)) == expected


def test_sites_are_the_full_models(dropped_package):
    record = read_owner_record(owner_record_path(dropped_package.path))
    assert record.sites["bottom.1"] == "model.layers.1"
    assert record.sites["middle.1"] == "model.layers.4"
    assert record.sites["top.0"] == "model.layers.6"


BROKEN = {
    "another version": {"format": "offsite/owner/2"},
    "too few blocks": {"kept": [0, 1, 2]},
    "a block that the model does not have": {"kept": [0, 1, 2, 3, 4, 5, 6, 8]},
    "blocks out of order": {"kept": [0, 1, 2, 4, 3, 5, 6, 7]},
    "a block twice": {"kept": [0, 1, 2, 3, 3, 5, 6, 7]},
    "a block below zero": {"kept": [-1, 1, 2, 3, 4, 5, 6, 7]},
    "channels of no block": {"channels": {"middle.9": [1]}},
    "channels out of order": {"channels": {"middle.0": [3, 1]}},
    "a channel twice": {"channels": {"middle.0": [1, 1]}},
    "experts of no block": {"experts": {"middle.9.mlp.experts": [[1]]}},
    "a block in place of its experts": {"experts": {"middle.0": [[1]]}},
    "experts without lists": {"experts": {"middle.0.mlp.experts": []}},
    "an expert's channels out of order": {"experts": {"middle.0.mlp.experts": [[1, 3], [3, 1]]}},
    "an unknown key": {"more": 1},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_contradicts_itself(tmp_path, record, name):
    path = tmp_path / "package.owner.json"
    path.write_text(json.dumps({**record.model_dump(mode="json"), **BROKEN[name]}))
    with pytest.raises(BadSchema, match=r"'package\.owner\.json' is not an owner's record of this version"):
        read_owner_record(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10_000])
def test_a_file_that_is_no_record(tmp_path, content):
    path = tmp_path / "package.owner.json"
    path.write_bytes(content)
    with pytest.raises(BadSchema):
        read_owner_record(path)


def test_no_record(tmp_path):
    with pytest.raises(ArtefactError, match=r"no owner's record 'package\.owner\.json'"):
        read_owner_record(tmp_path / "package.owner.json")


def test_a_record_is_found_by_its_packages_digest(tmp_path, record):
    other = record.model_copy(update={"package_digest": "sha256:" + "0" * 64, "base_digest": record.package_digest})
    (tmp_path / "a").mkdir()
    (tmp_path / "aa.owner.json").mkdir()
    write_owner_record(tmp_path / "a" / "first", other)  # holds the digest, but as its base's
    write_owner_record(tmp_path / "a" / "second", record)
    assert find_owner_record(record.package_digest, None, [tmp_path]) == record
    assert find_owner_record(record.package_digest, tmp_path / "a" / "second", []) == record
    with pytest.raises(ConfigError, match="no owner's record for package sha256:111") as caught:
        find_owner_record("sha256:" + "1" * 64, None, [tmp_path])
    assert "--package" in caught.value.hint
    with pytest.raises(ArtefactError):
        find_owner_record(record.package_digest, tmp_path / "gone", [tmp_path])


FIGURES = {"recovery": 0.7, "recovery_nats": 0.6, "withheld": 0.3, "gap": 1.8, "num_bytes": 60_000_000}
DIAL = {
    **{"target": "recovery", "value": 0.7, "method": "width", "size": 0.47},
    **{"predicted": FIGURES, "measured": FIGURES, "exploration": "sha256:" + "0" * 64},
}


def test_a_record_says_what_a_package_was_asked_for_if_anything_was(tmp_path, record):
    path = write_owner_record(tmp_path / "package", record)
    stated = json.loads(path.read_text())
    assert "dial" not in stated
    path.write_text(json.dumps({**stated, "dial": DIAL}))
    found = read_owner_record(path)
    assert found.dial.measured.gap == 1.8
    assert json.loads(write_owner_record(tmp_path / "package", found).read_text()) == {**stated, "dial": DIAL}


@pytest.mark.parametrize(
    "change",
    [
        {"size": 1.5},
        {"size": 0},
        {"exploration": "sha256:0"},
        {"measured": {**FIGURES, "gap": 0}},
        {"measured": {**FIGURES, "num_bytes": 0}},
        {"predicted": {**FIGURES, "taste": 1}},
        {"predicted": {name: value for name, value in FIGURES.items() if name != "recovery"}},
        {"value": "0.7"},
        {"extra": 1},
    ],
)
def test_a_broken_dial_is_refused(change, tmp_path, record):
    path = write_owner_record(tmp_path / "package", record)
    path.write_text(json.dumps({**json.loads(path.read_text()), "dial": {**DIAL, **change}}))
    with pytest.raises(BadSchema):
        read_owner_record(path)
