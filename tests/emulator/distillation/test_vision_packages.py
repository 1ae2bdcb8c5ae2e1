"""Packages of vision encoders: made without training by every method, on public images, and opened without code."""

from __future__ import annotations

import pytest
import torch
from vision_lab import picture, pixels, saved, write_rows

from offsite import cli
from offsite.artefacts.package import open_package
from offsite.encoders.outputs import outputs_of
from offsite.encoders.trunk import is_encoder
from offsite.modelling.load import load_model, load_reader
from offsite.vision.reader import ImageReader


@pytest.fixture(scope="module")
def eye(tmp_path_factory):
    """A checkpoint, public images, and what the model makes of images that are like them."""
    folder = tmp_path_factory.mktemp("eye")
    checkpoint, public = saved(folder / "eye", "dinov2"), write_rows(folder / "public.jsonl", 0, 24)
    reader = load_reader(str(checkpoint))
    values = torch.stack([reader.settings.values(reader.settings.pixels(picture(n), None)) for n in range(90, 96)])
    return checkpoint, public, values


def states(model, values):
    with torch.no_grad():
        return outputs_of(model, {"pixel_values": values})


def distil(checkpoint, out, public, *words):
    stated = ["--public", str(public), "--batch-size", "4", "--device", "cpu", "--bottom", "1", "--top", "1"]
    return cli.run(["distill", str(checkpoint), "-o", str(out), "--steps", "0", *stated, *words])


def test_what_a_client_opens_is_what_was_made(eye, tmp_path, capsys):
    """Nothing dropped: equal to the bit. Half the channels, refitted: nearer than half the channels as they were."""
    checkpoint, public, values = eye
    full = states(load_model(str(checkpoint), encoders=True), values)
    ways = {"whole": ("--width", "1"), "narrow": ("--width", "0.5"), "factors": ("--method", "low-rank")}
    ways |= {"plain": ("--width", "0.5", "--channels", "activation", "--no-refit"), "int8": ("--method", "packed")}
    found = {}
    for way, words in ways.items():
        more = ("--pack", "int8") if way == "int8" else ()
        assert distil(checkpoint, tmp_path / way, public, *words, *more) == 0, capsys.readouterr().err
        package = open_package(tmp_path / way)
        model = package.load_model()
        assert is_encoder(model)
        assert isinstance(package.load_reader(), ImageReader)
        found[way] = float((states(model, values) - full).norm())
    assert found["whole"] == 0
    assert 0 < found["int8"] < found["narrow"] < found["plain"]
    assert found["factors"] > 0


@pytest.mark.parametrize("choice", ["uniform", "influence", "crash"])
def test_blocks_are_dropped_by_every_choice(choice, eye, tmp_path, capsys):
    checkpoint, public, _ = eye
    words = ("--method", "drop", "--blocks", "2", "--choice", choice)
    assert distil(checkpoint, tmp_path / "package", public, *words) == 0, capsys.readouterr().err
    package = open_package(tmp_path / "package")
    assert package.layout.num_middle == 2
    assert states(package.load_model(), pixels()).shape == (2, 17, 32)
