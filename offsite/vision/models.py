"""Vision encoders: models of one block stack that read an image as patches, with a place before them for the whole.

They are encoders (`offsite.encoders`), held as their trunk, that read pixel values in place of tokens. Of CLIP it is
the image tower, also where the checkpoint holds both towers. Those of `VISION_TYPES` are seen by tests to be cut, tuned
and plugged in right; others are refused by name.

Shapes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offsite.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

PIXELS = "pixel_values"
"""Name in a batch of what a vision encoder reads, (B, C, H, W) float32; absent of other models."""

VISION_TYPES = ("vit", "dinov2", "clip_vision_model")

MAX_PLACES = 2**14
"""Most places of an image: attention takes memory of their square, and who opens a package has not chosen them."""

_HOLDING = {"clip": "clip_vision_model"}
"""Architectures of checkpoints that hold such an encoder among other parts."""


def states_vision(stated: Mapping[str, object]) -> bool:
    """Say whether the content of a ``config.json`` is of a vision encoder."""
    return stated.get("model_type") in VISION_TYPES


def as_tower(stated: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint's ``config.json`` as that of the vision encoder in it, where it holds one."""
    held = _HOLDING.get(str(stated.get("model_type")))
    return stated if held is None else {**stated, "model_type": held}


def reads_images(model: nn.Module) -> bool:
    """Say whether the model is called with pixel values: a vision encoder's trunk, or a classifier of one."""
    return getattr(model, "main_input_name", None) == PIXELS


def image_size(stated: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of the images that a vision encoder's configuration is made for, in pixels."""
    return _pair(stated.get("image_size"))


def num_places(stated: Mapping[str, Any], size: tuple[int, int]) -> int:
    """Return at how many places the model has states for an image of that size: the patches, and one for the whole.

    Raises:
        UnsupportedModel: when the configuration names no sizes, an image is no whole number of patches or more than
            `MAX_PLACES` of them, or the model has learnt positions for other images alone.
    """
    patch = _pair(stated.get("patch_size"))
    if size[0] % patch[0] or size[1] % patch[1]:
        raise UnsupportedModel(
            f"images of {size[0]}x{size[1]} pixels are no whole number of patches of {patch[0]}x{patch[1]}"
        )
    own = image_size(stated)
    if stated.get("model_type") != "dinov2" and size != own:  # which interpolates the positions that it has learnt
        raise UnsupportedModel(f"images of {size[0]}x{size[1]} pixels, the model reads {own[0]}x{own[1]} alone")
    found, learnt = (1 + (one[0] // patch[0]) * (one[1] // patch[1]) for one in (size, own))
    if max(found, learnt) > MAX_PLACES:
        raise UnsupportedModel(f"images of {max(found, learnt)} patches, at most {MAX_PLACES} are taken")
    return found


def made_up_pixels(config: PreTrainedConfig, num_images: int) -> Tensor:
    """Return noise (B, C, H, W) float32 of the size that the model is made for, always the same."""
    import torch

    tower = getattr(config, "vision_config", config)
    height, width = image_size(tower.to_dict())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_images, int(tower.num_channels), height, width, generator=generator)


def _pair(value: Any) -> tuple[int, int]:
    found = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(found) != 2 or not all(type(one) is int and one > 0 for one in found):
        raise UnsupportedModel("the configuration of a vision encoder states no image_size and patch_size in pixels")
    return found[0], found[1]
