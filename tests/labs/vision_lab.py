"""Small random vision encoders of every family that is taken, as checkpoints, and rows of images that tell apart."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy
import torch
from encoders_lab import shaken
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, CLIPConfig, PreTrainedModel

from offsite.encoders.trunk import empty_encoder

FAMILIES = ("vit", "dinov2", "clip_vision_model")
LABELS = ("red", "green", "blue")
SIZES = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
NORMAL = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "rescale_factor": 1 / 255}
BY_SHORT = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
READING: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "resample": 2},
    "dinov2": {"image_processor_type": "BitImageProcessor", "resample": 3, **BY_SHORT},
    "clip_vision_model": {"image_processor_type": "CLIPImageProcessor", "resample": 3, **BY_SHORT},
}


def config(family: str, **changes: Any) -> Any:
    """Return a small configuration of that family's trunk."""
    wide = {"mlp_ratio": 2} if family == "dinov2" else {"intermediate_size": 64}
    return AutoConfig.for_model(family, **{**SIZES, **wide, **changes})


def encoder(family: str, **changes: Any) -> PreTrainedModel:
    """Return a random trunk of that family, in evaluation mode and float32."""
    return shaken(empty_encoder(config(family, **changes)))


def saved(folder: Path, family: str, *, reading: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a random checkpoint with a classifier for other labels, as people have it, and how it reads images."""
    made = config(family, **changes)
    if family == "clip_vision_model":
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        made = CLIPConfig(vision_config=made.to_dict(), text_config={**text, "vocab_size": 99})
    shaken(AutoModelForImageClassification.from_config(made)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(reading or {**READING[family], **NORMAL}))
    return folder


def picture(number: int, label: str = "red", size: tuple[int, int] = (20, 24)) -> Image.Image:
    """Return noise in which one colour is brighter than the others; every number another one."""
    noise = numpy.random.default_rng(number).integers(0, 120, (*size, 3))
    noise[..., LABELS.index(label)] += 120
    return Image.fromarray(noise.astype("uint8"))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    """Return the image as a file of that form."""
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def write_rows(path: Path, begin: int, end: int) -> Path:
    """Write rows of an image and the colour that is brighter in it."""
    rows = []
    for number in range(begin, end):
        label = LABELS[number % 3]
        rows.append({"image": base64.b64encode(encoded(picture(number, label))).decode(), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pixels(num: int = 2, size: int = 16) -> torch.Tensor:
    """Return noise in place of images."""
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1))
