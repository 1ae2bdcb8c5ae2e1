"""Pixel values are those of transformers' own image processors, to the bit; what is unclear or too much is refused."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import AutoImageProcessor
from vision_lab import BY_SHORT, FAMILIES, NORMAL, READING, config, encoded, picture

from offsite.errors import ConfigError, DataError, UnsupportedModel
from offsite.vision.pixels import PixelSettings, as_preprocessor, read_settings
from offsite.vision.reader import ImageReader


def settings(family, **changes):
    return read_settings({**READING[family], **NORMAL, **changes}, family, "preprocessor_config.json")


def error(problem):
    return DataError(problem)


FILES = {
    "vit": ("vit", {**READING["vit"], **NORMAL}),
    "vit, old": (
        "vit",
        {"size": 16, "resample": 2, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        | {"do_normalize": True, "image_processor_type": "ViTImageProcessor"},
    ),
    "dinov2": ("dinov2", {**READING["dinov2"], **NORMAL}),
    "clip": ("clip_vision_model", {**READING["clip_vision_model"], **NORMAL}),
    "clip, old": (
        "clip_vision_model",
        {**NORMAL, "size": 17, "crop_size": 16, "resample": 3, "image_processor_type": "CLIPImageProcessor"},
    ),
    "not normal": ("dinov2", {**READING["dinov2"], "do_normalize": False}),
}


@pytest.mark.parametrize("name", FILES)
def test_values_are_those_of_transformers_to_the_bit(name, tmp_path):
    """Of all shapes, in colour, grey, with a palette and see-through; and of what we write of it, too."""
    family, stated = FILES[name]
    ours = read_settings(stated, family, "file")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    theirs = [AutoImageProcessor.from_pretrained(tmp_path)]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(as_preprocessor(ours, family)))
    theirs.append(AutoImageProcessor.from_pretrained(tmp_path))
    assert read_settings(as_preprocessor(ours, family), family, "file") == ours
    reader = ImageReader(ours, 17)
    images = [picture(number, size=size) for number, size in enumerate([(16, 16), (7, 31), (40, 17), (23, 24), (3, 5)])]
    images += [picture(5).convert("L"), picture(6).convert("P"), picture(7).convert("RGBA")]
    images[-1].putalpha(picture(8).convert("L"))
    for image in images:
        found = reader.picture(encoded(image), error).values
        assert found.shape == (3, 16, 16)
        if image.mode == "RGB" or family != "vit":  # whose processor takes RGB alone
            assert torch.equal(found, theirs[0](image, return_tensors="pt")["pixel_values"][0])
        assert torch.equal(found, theirs[1](image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize(
    "changes",
    [
        {"size": None},
        {"size": {"longest_edge": 16}},
        {"size": {"height": 16}},
        {"size": {"height": 16, "width": 10**6}},
        {"do_resize": False},
        {"resample": 7},
        {"resample": "os.system"},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0.0]},
        {"image_mean": [0.5, 0.5, float("nan")]},
        {"rescale_factor": "x"},
        {"size": {"shortest_edge": 12}, "crop_size": 16, "do_center_crop": True},
    ],
)
def test_a_file_that_does_not_say_how_is_refused_in_a_line(changes):
    with pytest.raises(ConfigError, match=r"^preprocessor_config.json does not say how images are read[^\n]*$"):
        settings("vit", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"resize": [16, 16], "shortest": 16},
        {"resize": None},
        {"resize": [16, 4096]},
        {"resize": [16, 0]},
        {"crop": [16, 16]},
        {"resize": None, "shortest": 16},
        {"resize": None, "shortest": 16, "crop": [16, 17]},
        {"resample": "area"},
        {"scale": 0.0},
        {"std": [1.0, 1.0, -1.0]},
        {"mean": [1.0, 1.0]},
        {"image_processor_type": "ViTImageProcessor"},
    ],
)
def test_numbers_that_crossed_are_held_to_their_form(changes):
    sound = json.loads(settings("vit").model_dump_json())
    assert PixelSettings.model_validate_json(json.dumps(sound)) == settings("vit")
    with pytest.raises(ValidationError):
        PixelSettings.model_validate_json(json.dumps({**sound, **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_is_of_the_size_that_the_model_reads(family):
    stated = config(family).to_dict()
    assert ImageReader.of(stated, settings(family)).num_places == 17
    larger = settings(family, **BY_SHORT | {"size": {"shortest_edge": 24}, "crop_size": 24})
    if family == "dinov2":  # which interpolates its positions
        assert ImageReader.of(stated, larger).num_places == 37
    else:
        with pytest.raises(UnsupportedModel, match="images of 24x24 pixels, the model reads 16x16 alone"):
            ImageReader.of(stated, larger)
    with pytest.raises(UnsupportedModel, match="no whole number of patches of 5x5"):
        ImageReader.of({**stated, "patch_size": 5}, settings(family))
    for wrong in ({"patch_size": 0}, {"patch_size": "4"}, {"patch_size": [4, 4, 4]}):
        with pytest.raises(UnsupportedModel, match="states no image_size and patch_size"):
            ImageReader.of({**stated, **wrong}, settings(family))


def test_a_long_thin_image_does_not_grow_beyond_measure():
    with pytest.raises(DataError, match="too long for its width"):
        settings("dinov2").pixels(Image.new("RGB", (1, 2**18)), error)
