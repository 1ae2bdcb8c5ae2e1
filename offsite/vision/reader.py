"""What reads rows of images, where a tokenizer reads rows of text: numbers alone, no class and no file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from offsite.errors import ConfigError, DataError
from offsite.vision.images import decoded
from offsite.vision.models import num_places
from offsite.vision.pixels import PixelSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as the model will read it, (3, H, W) uint8, and the digest of the bytes that it was made of."""

    pixels: Tensor = field(repr=False)
    digest: str
    settings: PixelSettings

    @property
    def values(self) -> Tensor:
        """Its pixel values, (3, H, W) float32."""
        return self.settings.values(self.pixels)


@dataclass(frozen=True)
class ImageReader:
    """Reads images for one vision encoder, which has states at `num_places` of each."""

    settings: PixelSettings
    num_places: int

    @classmethod
    def of(cls, stated: Mapping[str, Any], settings: PixelSettings) -> ImageReader:
        """Return the reader for a model.

        Args:
            stated: the content of its ``config.json``.

        Raises:
            UnsupportedModel: when the model does not read images of that size.
        """
        return cls(settings, num_places(stated, settings.size))

    def picture(self, raw: bytes, error: Callable[[str], DataError]) -> Picture:
        """Return what the bytes show.

        Args:
            error: makes the error to raise.

        Raises:
            DataError: when they are no image that is taken.
        """
        pixels_CHW = self.settings.pixels(decoded(raw, error), error)
        return Picture(pixels_CHW, hashlib.sha256(raw).hexdigest(), self.settings)


Reader: TypeAlias = "PreTrainedTokenizerBase | ImageReader"
"""What turns rows into examples: of text a tokenizer, of images their reader."""


def tokenizer_in(reader: Reader) -> PreTrainedTokenizerBase:
    """Return the reader where it is a tokenizer.

    Raises:
        ConfigError: when it reads images.
    """
    if isinstance(reader, ImageReader):
        raise ConfigError("this model reads images, and no text", hint="give it rows of an image and a label")
    return reader
