from __future__ import annotations

import json
import os
import re

import pytest
from pydantic import Field

from offsite.artefacts import manifest as module
from offsite.artefacts.manifest import FileEntry, check_files, entries, read_manifest, write_manifest
from offsite.errors import ArtefactError, BadDigest, BadSchema, TooLarge, WrongBinding, WrongNames
from offsite.strictjson import Strict

FORMAT = "offsite/thing/1"
ALLOWED = re.compile(r"[a-z]+\.bin")


class Thing(Strict):
    format: str
    number: float = Field(0.0, ge=0)
    words: dict[str, int] = {}
    files: dict[str, FileEntry] = {}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "thing"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"aaa")
    (folder / "b.bin").write_bytes(b"bb")
    write_manifest(folder, Thing(format=FORMAT, number=0.5, files=entries(folder, ["b.bin", "a.bin"])))
    return folder


def test_what_was_written_is_read_and_its_digest_is_of_the_bytes(folder):
    found, digest = read_manifest(folder, Thing, FORMAT)
    assert found.number == 0.5
    assert list(found.files) == ["a.bin", "b.bin"]
    check_files(folder, found.files, ALLOWED)
    assert read_manifest(folder, Thing, FORMAT) == (found, digest)
    assert write_manifest(folder, found) == digest
    raw = (folder / "offsite.json").read_text()
    (folder / "offsite.json").write_text(raw + " ")
    assert read_manifest(folder, Thing, FORMAT)[1] != digest


GOOD = {"format": FORMAT, "number": 1.0, "words": {"a": 1}, "files": {}}
BROKEN = {
    "empty": (b"", BadSchema, "is not JSON"),
    "cut off": (json.dumps(GOOD).encode()[:-3], BadSchema, "is not JSON"),
    "not UTF-8": (b'{"format": "\xff"}', BadSchema, "is not JSON"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), BadSchema, "is not JSON"),
    "a key twice": (b'{"format": "offsite/thing/1", "format": "offsite/thing/1"}', BadSchema, "distinct keys"),
    "an inner key twice": (b'{"format": "offsite/thing/1", "words": {"a": 1, "a": 2}}', BadSchema, "distinct keys"),
    "nested too deep": (b"[" * 100_000, BadSchema, "is not JSON"),
    "a list": (b"[]", WrongBinding, "another format"),
    "another version": (json.dumps({**GOOD, "format": "offsite/thing/2"}).encode(), WrongBinding, "offsite/thing/2"),
    "another kind": (json.dumps({**GOOD, "format": "offsite/other/1"}).encode(), WrongBinding, "offsite/other/1"),
    "a format with escapes": (json.dumps({**GOOD, "format": "\x1b[2J"}).encode(), WrongBinding, "is another format"),
    "no format": (b"{}", WrongBinding, "another format"),
    "an unknown key": (json.dumps({**GOOD, "code": "x"}).encode(), BadSchema, "'code': extra inputs"),
    "an unknown key with escapes": (json.dumps({**GOOD, "\x1b[2J": 1}).encode(), BadSchema, "x1b"),
    "a number as text": (json.dumps({**GOOD, "number": "1"}).encode(), BadSchema, "number"),
    "NaN": (b'{"format": "offsite/thing/1", "number": NaN}', BadSchema, "finite"),
    "infinity": (b'{"format": "offsite/thing/1", "number": 1e999}', BadSchema, "finite"),
    "a digest of another form": (
        json.dumps({**GOOD, "files": {"a": {"bytes": 1, "sha256": "md5:0"}}}).encode(),
        BadSchema,
        "files.a.sha256",
    ),
    "a negative size": (
        json.dumps({**GOOD, "files": {"a": {"bytes": -1, "sha256": "sha256:" + "0" * 64}}}).encode(),
        BadSchema,
        "files.a.bytes",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest(folder, name):
    content, expected, message = BROKEN[name]
    (folder / "offsite.json").write_bytes(content)
    with pytest.raises(expected, match=message) as caught:
        read_manifest(folder, Thing, FORMAT)
    assert type(caught.value) is expected
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_large_manifest_is_refused_unread(folder, monkeypatch):
    monkeypatch.setattr(module, "MANIFEST_LIMIT_BYTES", 10)
    with pytest.raises(TooLarge, match="over 10 bytes"):
        read_manifest(folder, Thing, FORMAT)


def test_no_folder_and_no_manifest(tmp_path, folder):
    with pytest.raises(ArtefactError, match="no thing folder named 'gone'"):
        read_manifest(tmp_path / "gone", Thing, FORMAT)
    with pytest.raises(ArtefactError, match=r"no thing folder named 'offsite\.json'"):
        read_manifest(folder / "offsite.json", Thing, FORMAT)
    (folder / "offsite.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(ArtefactError, match=r"holds no offsite\.json"):
        read_manifest(folder, Thing, FORMAT)
    (folder / "offsite.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ArtefactError, match=r"holds no offsite\.json"):
        read_manifest(folder, Thing, FORMAT)


def swap_for_link(folder):
    (folder / "a.bin").rename(folder.parent / "real")
    (folder / "a.bin").symlink_to(folder.parent / "real")


def swap_for_pipe(folder):
    (folder / "a.bin").unlink()
    os.mkfifo(folder / "a.bin")


def swap_for_folder(folder):
    (folder / "a.bin").unlink()
    (folder / "a.bin").mkdir()


CHANGES = {
    "a missing file": (lambda folder: (folder / "a.bin").unlink(), WrongNames, "file 'a.bin' is missing"),
    "one more file": (
        lambda folder: (folder / "c.bin").write_text("x"),
        WrongNames,
        "the manifest does not bind 'c.bin'$",
    ),
    "a hidden file": (lambda folder: (folder / ".hidden").write_text("x"), WrongNames, "not bind '.hidden'$"),
    "a folder": (lambda folder: (folder / "more").mkdir(), WrongNames, "not bind 'more'$"),
    "a link to the same bytes": (swap_for_link, WrongNames, "'a.bin' is not a plain file"),
    "a pipe": (swap_for_pipe, WrongNames, "'a.bin' is not a plain file"),
    "a folder of that name": (swap_for_folder, WrongNames, "'a.bin' is not a plain file"),
    "one byte changed": (lambda folder: (folder / "a.bin").write_bytes(b"aab"), BadDigest, "SHA-256 of 'a.bin'"),
    "one byte more": (lambda folder: (folder / "a.bin").write_bytes(b"aaaa"), BadDigest, "has 4 bytes"),
    "emptied": (lambda folder: (folder / "a.bin").write_bytes(b""), BadDigest, "has 0 bytes"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_that_is_not_the_one_that_was_bound(folder, name):
    change, expected, message = CHANGES[name]
    manifest, _ = read_manifest(folder, Thing, FORMAT)
    change(folder)
    with pytest.raises(expected, match=message):
        check_files(folder, manifest.files, ALLOWED)


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "a.bin/../a.bin", "A.BIN", "a.py", "", "a.bin\n"])
def test_a_name_that_is_not_allowed_is_refused_before_the_disk_is_asked(folder, name):
    bound = {name: FileEntry(bytes=3, sha256="sha256:" + "0" * 64)}
    with pytest.raises(WrongNames, match="binds a file name that an artefact may not hold"):
        check_files(folder / "not even there", bound, ALLOWED)
