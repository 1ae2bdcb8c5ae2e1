"""A sealed folder as named bytes: exact there and back, and no name from the wire becomes a path."""

from __future__ import annotations

import pytest

from offsite.errors import ConfigError, TooLarge, WrongNames
from offsite.exchange.packing import pack, unpack
from offsite.sealed.manifest import MAX_FILES

NAME = "payload/" + "a" * 64 + ".enc"
SMALL = {"manifest.json": b"m", "signatures.json": b"s", "keys.json": b"k"}


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_and_back(tmp_path):
    parts = {**SMALL, NAME: b"\x00\xff" * 1000, "payload/" + "0" * 64 + ".enc": b""}
    unpack(parts, tmp_path / "sealed", limit_bytes=3000)
    assert content(tmp_path / "sealed") == parts
    assert pack(tmp_path / "sealed") == parts


def test_what_is_in_the_folder_besides_is_not_packed(tmp_path):
    unpack({**SMALL, NAME: b"x"}, tmp_path / "sealed", limit_bytes=100)
    (tmp_path / "sealed" / "notes.txt").write_text("mine")
    assert pack(tmp_path / "sealed").keys() == {*SMALL, NAME}


HOSTILE = [
    "../x", "/etc/x", "payload/../x", f"payload/../{'a' * 64}.enc", f"../payload/{'a' * 64}.enc", "a" * 64 + ".enc",
    f"payload/{'a' * 63}.enc", f"payload/{'A' * 64}.enc", f"payload/{'a' * 64}.enc\n", f"payload/{'a' * 64}", "payload",
    f"payload/{'a' * 64}.enc/x", f"payload//{'a' * 64}.enc", f"payload\\{'a' * 64}.enc", "", ".",
    "manifest.json\0", "x.py",
    f"payload/{'а' * 64}.enc",  # noqa: RUF001 - Cyrillic
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(tmp_path, name):
    with pytest.raises(WrongNames) as caught:
        unpack({**SMALL, name: b"x"}, tmp_path / "sealed", limit_bytes=100)
    assert list(tmp_path.iterdir()) == []
    assert name == "" or name not in str(caught.value) or name in (".", "payload")


@pytest.mark.parametrize("missing", SMALL)
def test_a_small_file_is_missing(tmp_path, missing):
    parts = {**SMALL, NAME: b"x"}
    del parts[missing]
    with pytest.raises(WrongNames, match="not all there"):
        unpack(parts, tmp_path / "sealed", limit_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_too_many_and_too_large(tmp_path):
    many = {f"payload/{number:064x}.enc": b"" for number in range(MAX_FILES + 1)}
    with pytest.raises(WrongNames, match="too many"):
        unpack({**SMALL, **many}, tmp_path / "sealed", limit_bytes=100)
    with pytest.raises(TooLarge, match="over 100 bytes"):
        unpack({**SMALL, NAME: b"x" * 98}, tmp_path / "sealed", limit_bytes=100)
    assert list(tmp_path.iterdir()) == []
    unpack({**SMALL, NAME: b"x" * 97}, tmp_path / "sealed", limit_bytes=100)


def test_what_stands_there_stays(tmp_path):
    (tmp_path / "sealed").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        unpack({**SMALL, NAME: b"x"}, tmp_path / "sealed", limit_bytes=100)
    assert list((tmp_path / "sealed").iterdir()) == []
