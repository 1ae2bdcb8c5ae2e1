import os
import time
from pathlib import Path

import pytest

from offsite.artefacts import known as module
from offsite.artefacts.known import KnownFiles, clock_ns
from offsite.artefacts.package import open_package
from offsite.errors import BadDigest
from offsite.tensors import read_header

LATER = 10**10


@pytest.fixture
def counted(monkeypatch):
    """Bytes that were hashed, by file."""
    read = {}
    real = module.os.fstat

    def digest(file, name):
        import hashlib

        data = file.read()
        read[real(file.fileno()).st_ino] = len(data)
        return hashlib.new(name, data)

    monkeypatch.setattr("offsite.artefacts.manifest.hashlib.file_digest", digest)
    return read


@pytest.fixture
def package(make_package, tmp_path, monkeypatch):
    made = make_package(tmp_path / "package")
    monkeypatch.setattr("offsite.artefacts.manifest.clock_ns", lambda: clock_ns() + LATER)  # its files have settled
    return made


def opened(package, tmp_path, **options):
    known = KnownFiles(tmp_path / "list", **options)
    found = open_package(package.path, known)
    known.save()
    return found


def test_what_is_unchanged_is_not_read_again(package, tmp_path, counted):
    first = opened(package, tmp_path)
    assert sum(counted.values()) == package.num_bytes
    assert (tmp_path / "list").stat().st_mode & 0o777 == 0o600
    counted.clear()
    assert opened(package, tmp_path) == first
    assert sum(counted.values()) == 0
    assert opened(package, tmp_path, trusted=False) == first
    assert sum(counted.values()) == package.num_bytes


def flipped(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def in_place(path):
    flipped(path)


def with_its_time_turned_back(path):
    before = path.stat()
    time.sleep(0.02)  # more than a tick of the clock that files are stamped by
    flipped(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def by_another_file(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    flipped(path)


@pytest.mark.parametrize("change", [in_place, with_its_time_turned_back, by_another_file])
def test_what_was_changed_is_seen(package, tmp_path, change):
    opened(package, tmp_path)
    path = package.path / "model.safetensors"
    time.sleep(0.02)
    change(path)
    assert read_header(path)
    with pytest.raises(BadDigest, match=r"SHA-256 of 'model\.safetensors'"):
        opened(package, tmp_path)


def test_what_was_written_just_now_is_not_remembered(make_package, tmp_path, counted):
    made = make_package(tmp_path / "package")
    opened(made, tmp_path)
    counted.clear()
    opened(made, tmp_path)
    assert sum(counted.values()) == made.num_bytes
    assert not (tmp_path / "list").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format":"offsite/known-files/2","files":{}}', b"\xff"])
def test_a_list_that_cannot_be_read_is_an_empty_one(package, tmp_path, counted, content):
    (tmp_path / "list").write_bytes(content)
    opened(package, tmp_path)
    assert sum(counted.values()) == package.num_bytes


def test_a_digest_that_is_known_must_still_be_the_stated_one(package, tmp_path):
    opened(package, tmp_path)
    stated = (package.path / "offsite.json").read_text()
    digest = package.manifest.files["model.safetensors"].sha256
    (package.path / "offsite.json").write_text(stated.replace(digest, "sha256:" + "0" * 64))
    with pytest.raises(BadDigest, match=r"SHA-256 of 'model\.safetensors'"):
        opened(package, tmp_path)
