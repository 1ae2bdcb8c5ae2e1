"""From an image to the pixel values that a model reads, by a few numbers out of ``preprocessor_config.json``.

The numbers are data: they cross in a package's manifest and are checked there. No class is looked up by a name that
crossed. The values are those of transformers' own image processors (its PIL backend), to the bit.

Shapes: C = 3 channels, H and W pixels.

Source: transformers, ``image_processing_backends.PilBackend``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from offsite.errors import ConfigError, DataError
from offsite.strictjson import Strict

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from torch import Tensor

FILE_NAME = "preprocessor_config.json"
MAX_SIDE = 2048
"""Most pixels of a side of what a model reads."""

_MAX_RESIZED = 64 * 2**20
"""Most pixels of an image on its way: a very long one would grow by its short side."""

_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic", 1: "lanczos"}
_PROCESSORS = {"vit": "ViTImageProcessor", "dinov2": "BitImageProcessor", "clip_vision_model": "CLIPImageProcessor"}
_SQUARE = frozenset({"vit"})
"""Families whose old files mean a square by one number for a size, and not the short side."""

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Channel = Annotated[float, Field(ge=-1e6, le=1e6)]
Spread = Annotated[float, Field(ge=1e-6, le=1e6)]


class PixelSettings(Strict):
    """How an image becomes pixel values: resized, cut from the middle, scaled, and less a mean, over a spread.

    Either ``resize`` is height and width, or ``shortest`` is what the short side becomes and ``crop`` height and width
    of what is cut out of the middle then.
    """

    resize: tuple[Side, Side] | None = None
    shortest: Side | None = None
    crop: tuple[Side, Side] | None = None
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic"]
    scale: float = Field(ge=1e-6, le=1e6)
    mean: tuple[Channel, Channel, Channel]
    std: tuple[Spread, Spread, Spread]

    @model_validator(mode="after")
    def _is_of_one_size(self) -> Self:
        if (self.resize is None) == (self.shortest is None):
            raise ValueError("images are resized either to a height and a width or by their short side")
        if self.shortest is not None and (self.crop is None or max(self.crop) > self.shortest):
            raise ValueError("an image resized by its short side is cut to no more than that")
        if self.resize is not None and self.crop is not None:
            raise ValueError("an image of a given height and width is not cut")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model reads, in pixels."""
        found = self.resize or self.crop
        assert found is not None  # noqa: S101 - one of the two is there
        return found

    def pixels(self, image: Image, error: Callable[[str], DataError]) -> Tensor:
        """Return the image (C, H, W) uint8, resized and cut.

        Args:
            image: RGB.
            error: makes the error to raise.

        Raises:
            DataError: when it is so long and thin that it would grow beyond all measure.
        """
        import numpy
        import torch
        from PIL.Image import Resampling

        width, height = image.size
        if self.resize is not None:
            target = self.resize
        else:
            short, long = self.shortest or 1, int((self.shortest or 1) * max(width, height) / min(width, height))
            target = (long, short) if width <= height else (short, long)
        if target[0] * target[1] > _MAX_RESIZED:
            raise error("its image is too long for its width")
        small = image.resize((target[1], target[0]), resample=Resampling[self.resample.upper()])
        if self.crop is not None:
            top, left = (target[0] - self.crop[0]) // 2, (target[1] - self.crop[1]) // 2
            small = small.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return torch.from_numpy(numpy.array(small)).permute(2, 0, 1).contiguous()

    def values(self, pixels_CHW: Tensor) -> Tensor:
        """Return the pixel values (C, H, W) float32 of a resized image (C, H, W) uint8."""
        import torch

        mean_C11, std_C11 = (torch.tensor(one, dtype=torch.float32)[:, None, None] for one in (self.mean, self.std))
        return ((pixels_CHW.double() * self.scale).float() - mean_C11) / std_C11


def read_settings(stated: Mapping[str, Any], family: str, what: str) -> PixelSettings:
    """Return the numbers that a checkpoint's ``preprocessor_config.json`` states.

    Args:
        stated: its content.
        family: the vision encoder's architecture.
        what: names the file.

    Raises:
        ConfigError: when it does something else with images, or does not say.
    """
    found: dict[str, Any] = {}
    try:
        size = stated.get("size")
        if isinstance(size, int):
            size = {"height": size, "width": size} if family in _SQUARE else {"shortest_edge": size}
        if not stated.get("do_resize", True) or not isinstance(size, dict):
            raise ValueError("no size is stated")
        if "shortest_edge" in size:
            found["shortest"] = size["shortest_edge"]
        else:
            found["resize"] = (size["height"], size["width"])
        if stated.get("do_center_crop", family not in _SQUARE):
            crop = stated["crop_size"]
            found["crop"] = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        if found.get("resize") and found.get("crop") == found["resize"]:
            del found["crop"]
        found["resample"] = _RESAMPLE[stated["resample"]]
        found["scale"] = float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 1.0
        normal = stated.get("do_normalize", True)
        found["mean"] = tuple(map(float, stated["image_mean"])) if normal else (0.0,) * 3
        found["std"] = tuple(map(float, stated["image_std"])) if normal else (1.0,) * 3
        return PixelSettings.model_validate(found)
    except (KeyError, TypeError, ValueError) as error:
        first = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else ""
        raise ConfigError(
            f"{what} does not say how images are read{f': {first.lower()}' if first else ''}",
            hint="it needs size, resample, image_mean, image_std and, by the short side, crop_size",
        ) from None


def as_preprocessor(settings: PixelSettings, family: str) -> dict[str, Any]:
    """Return the content of the ``preprocessor_config.json`` by which transformers reads images so."""
    height, width = settings.size
    by_short = settings.shortest is not None
    found: dict[str, Any] = {"size": {"shortest_edge": settings.shortest} if by_short else _sides(height, width)}
    found |= {"crop_size": _sides(height, width)} if by_short else {}
    numbers = {name: number for number, name in _RESAMPLE.items()}
    return {
        "image_processor_type": _PROCESSORS[family],
        "do_convert_rgb": True,
        "do_resize": True,
        **found,
        "do_center_crop": by_short,
        "resample": numbers[settings.resample],
        "do_rescale": True,
        "rescale_factor": settings.scale,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }


def _sides(height: int, width: int) -> dict[str, int]:
    return {"height": height, "width": width}
