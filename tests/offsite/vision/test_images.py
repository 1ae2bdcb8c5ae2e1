"""Bytes that are no image, too large, broken or a bomb are refused; nothing is opened by a name that a row holds."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from PIL import Image
from vision_lab import encoded, picture

from offsite.errors import DataError
from offsite.vision import images
from offsite.vision.images import decoded, image_bytes


def error(problem):
    return DataError(problem)


def bomb(width=60_000, height=60_000):
    """Return a PNG of a few bytes that says it has billions of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def bmp():
    out = io.BytesIO()
    picture(0).save(out, "BMP")
    return out.getvalue()


WHOLE = encoded(picture(0))
BROKEN = {
    "a bomb": (bomb(), "its image has more than 33554432 pixels"),
    "a smaller bomb": (bomb(6000, 6000), "its image has more than 33554432 pixels"),
    "another form": (bmp(), "its image is no PNG or JPEG, or breaks off"),
    "no image": (b"GIF89a and so on", "its image is no PNG or JPEG, or breaks off"),
    "truncated": (WHOLE[: len(WHOLE) // 2], "its image is no PNG or JPEG, or breaks off"),
    "truncated JPEG": (encoded(picture(0), "JPEG")[:400], "its image is no PNG or JPEG, or breaks off"),
    "a byte": (b"\x89", "its image is no PNG or JPEG, or breaks off"),
    "without its data": (bomb(4, 4), "its image is no PNG or JPEG, or breaks off"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_sound_image_is_refused(name):
    raw, told = BROKEN[name]
    with pytest.raises(DataError, match=f"^{told}$"):
        decoded(raw, error)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_both_forms_are_read_as_rgb(form):
    assert decoded(encoded(picture(0).convert("L"), form), error).mode == "RGB"
    found = decoded(encoded(picture(0), form), error)
    assert found.size == (24, 20)
    if form == "PNG":
        assert found.tobytes() == picture(0).tobytes()


def test_what_is_see_through_is_on_white():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decoded(encoded(clear), error).getcolors() == [(16, (255, 255, 255))]


def test_the_ways_in_which_an_image_stands_in_a_row(tmp_path, monkeypatch):
    for value in (base64.b64encode(WHOLE).decode(), WHOLE, {"bytes": WHOLE, "path": "/etc/passwd"}):
        assert image_bytes(value, error) == WHOLE
    (tmp_path / "cat.png").write_bytes(WHOLE)
    monkeypatch.chdir(tmp_path)
    for value in ("cat.png", str(tmp_path / "cat.png"), "data:image/png;base64,AAAA"):
        with pytest.raises(DataError, match=r"no base64 \(a file's name is not opened\)"):
            image_bytes(value, error)
    for value in (None, 7, "", [1, 2], {"bytes": None, "path": "cat.png"}, {"other": WHOLE}):
        with pytest.raises(DataError, match="its image is missing"):
            image_bytes(value, error)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    for value in (WHOLE, base64.b64encode(WHOLE).decode(), base64.b64encode(b"7" * 120).decode()):
        with pytest.raises(DataError, match="its image has over 100 bytes"):
            image_bytes(value, error)
