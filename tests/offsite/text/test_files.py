"""Files in the encodings that people have: read where a mark says so, else told what they are and how to convert."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess

import pytest

from offsite.errors import DataError
from offsite.text.records import read_records

TEXT = "Grüße \u2013 \u201cschön\u201d, 5 € für SECRET\nzweite Zeile\n"
KINDS = {
    ".txt": TEXT,
    ".jsonl": "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in TEXT.splitlines()),
    ".json": json.dumps([{"text": line} for line in TEXT.splitlines()], ensure_ascii=False),
    ".csv": "text,n\n" + "".join(f'"{line}",1\n' for line in TEXT.splitlines()),
}
MARKED = {
    "utf-8": b"\xef\xbb\xbf",
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32-le": b"\xff\xfe\0\0",
    "utf-32-be": b"\0\0\xfe\xff",
}


def put(path, raw):
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def texts(path):
    return [(record.segments, record.row, record.place.partition(": ")[2]) for record in read_records(path)]


def refused(path):
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert "SECRET" not in str(caught.value) + str(caught.value.hint)
    assert str(caught.value).startswith(path.name + ": ")
    return caught.value


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_order_mark_is_read(tmp_path, kind, encoding, ending):
    plain = put(tmp_path / f"plain{kind}", KINDS[kind].encode())
    marked = put(tmp_path / f"marked{kind}{ending}", MARKED[encoding] + KINDS[kind].encode(encoding))
    assert texts(marked) == texts(plain)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["CP1252", "UTF-16LE", "UTF-16BE"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_hint_is_the_command_that_makes_it_readable(tmp_path, kind, encoding, ending):
    path = put(tmp_path / f"o'ur file{kind}{ending}", KINDS[kind].encode(encoding))
    error = refused(path)
    assert ("Windows-1252" if encoding == "CP1252" else "UTF-16 without a byte-order mark") in str(error)
    assert f"-f {encoding} -t UTF-8" in error.hint
    if shutil.which("iconv") is None:
        return
    subprocess.run(["bash", "-c", error.hint], cwd=tmp_path, check=True)
    assert texts(tmp_path / f"o'ur file-utf8{kind}{ending}") == texts(
        put(tmp_path / f"plain{kind}", KINDS[kind].encode())
    )


@pytest.mark.parametrize("encoding", ["koi8-r", "gb18030", "shift-jis", "cp1251"])
def test_other_encodings_are_not_taken_for_windows(tmp_path, encoding):
    text = "Привет, мир и всё" if encoding in ("koi8-r", "cp1251") else "日本語の文章です"
    error = refused(put(tmp_path / "a.txt", f"SECRET {text}\n".encode(encoding)))
    assert str(error) == "a.txt: line 1: byte 8 is not UTF-8"
    assert "CP1252" not in error.hint
    assert "iconv -f ENCODING -t UTF-8 a.txt > a-utf8.txt" in error.hint


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_one_bad_byte_in_a_file_of_utf_8_is_to_be_mended_not_converted(tmp_path, mark):
    error = refused(put(tmp_path / "a.txt", mark + "schön und größer SECRET\n".encode() + b"\xe9\n"))
    assert str(error) == "a.txt: line 2: byte 1 is not UTF-8, the rest of the file is"
    assert "iconv" not in error.hint


def test_nul_is_not_text(tmp_path):
    assert "line 2: byte 7 is NUL" in str(refused(put(tmp_path / "a.txt", b"one\nSECRET\0\n")))
    assert "no text" in str(refused(put(tmp_path / "a.txt", bytes(range(256)))))
    wide = put(tmp_path / "b.txt", b"\xff\xfe" + "one\nSECRET\0\n".encode("utf-16-le"))
    assert "line 2: holds NUL" in str(refused(wide))


def test_a_wide_file_that_breaks_off_is_told_with_its_line(tmp_path):
    raw = b"\xff\xfe" + "one\nSECRET".encode("utf-16-le")[:-1]
    assert str(refused(put(tmp_path / "a.txt", raw))) == "a.txt: line 2: begins as UTF-16 and is not"
