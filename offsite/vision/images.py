"""Images in rows: the bytes that a row holds, and what they show; PNG and JPEG alone, within limits.

An image stands in its row: as base64 in JSON, as bytes in Parquet (``datasets`` writes ``{bytes, path}``).
No file is opened by a name that a row holds: the digest of the data would not bind it. Errors name the row, never what
stands there.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from offsite.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 32 * 2**20
"""Most bytes of one image as it stands in a row."""

MAX_PIXELS = 32 * 2**20
"""Most pixels of one image: what a few bytes of a PNG can say they are is looked at before any is decoded."""

FORMATS = ("PNG", "JPEG")

# What Pillow is seen to raise on bytes that are no image, or a broken one.
_BROKEN = (
    ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    struct.error, zlib.error,
)  # fmt: skip


def image_bytes(value: object, error: Callable[[str], DataError]) -> bytes:
    """Return the bytes of the image in a row's field; nothing of them is decoded.

    Args:
        error: makes the error to raise.

    Raises:
        DataError: when there are none, or too many.
    """
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes")
    if isinstance(value, str):
        if len(value) > 2 * MAX_BYTES:
            raise error(f"its image has over {MAX_BYTES} bytes")
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise error("its image is no base64 (a file's name is not opened)") from None
    if not isinstance(value, bytes) or not value:
        raise error("its image is missing, expected base64 of a PNG or JPEG, or its bytes")
    if len(value) > MAX_BYTES:
        raise error(f"its image has over {MAX_BYTES} bytes")
    return value


def decoded(raw: bytes, error: Callable[[str], DataError]) -> Image:
    """Return what the bytes show, RGB, as transformers reads it: what is transparent is on white.

    Args:
        error: makes the error to raise.

    Raises:
        DataError: when they are no PNG or JPEG, a broken one, or one of more than `MAX_PIXELS`; or without Pillow.
    """
    try:
        from PIL import Image as Pillow
    except ImportError:
        raise DataError("images are read by Pillow, which is not installed", hint="pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a size that is looked at here, and of broken metadata
            image: Image = Pillow.open(io.BytesIO(raw), formats=FORMATS)
            too_large = image.width * image.height > MAX_PIXELS
            if not too_large:
                image.load()
                if "A" in image.getbands() or image.info.get("transparency") is not None:
                    over = image.convert("RGBA")
                    image = Pillow.alpha_composite(Pillow.new("RGBA", over.size, (255, 255, 255, 255)), over)
                return image.convert("RGB")
    except Pillow.DecompressionBombError:
        too_large = True
    except _BROKEN:
        raise error("its image is no PNG or JPEG, or breaks off") from None
    raise error(f"its image has more than {MAX_PIXELS} pixels")
