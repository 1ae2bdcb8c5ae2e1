"""Packages of vision encoders: made without training by every method, on public images, and opened without code."""

from __future__ import annotations

import json

import pytest
import torch
from vision_lab import picture, pixels, saved, write_rows

import emulator.distillation.imitation as module
from offsite import cli
from offsite.artefacts.package import open_package
from offsite.encoders.outputs import outputs_of
from offsite.encoders.trunk import is_encoder
from offsite.errors import RunFailed
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
    steps = () if "--steps" in words else ("--steps", "0")
    return cli.run(["distill", str(checkpoint), "-o", str(out), *steps, *stated, *words])


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


DISTILLED = "--method drop --blocks 2 --holdout 0.25 --steps 24 --learning-rate 3e-3 --warmup-steps 2".split()


def test_an_emulator_learns_the_states_of_images(eye, tmp_path, capsys):
    """What is learnt holds on images that no one saw, and says of what it is the error: there are no tokens."""
    checkpoint, public, values = eye
    full = states(load_model(str(checkpoint), encoders=True), values)
    assert distil(checkpoint, tmp_path / "cut", public, *DISTILLED[:4]) == 0
    words = (*DISTILLED, "--precision", "fp32", "--evaluate-every", "8")
    assert distil(checkpoint, tmp_path / "learnt", public, *words) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert "hidden states alone are matched: the model reads images" in err
    assert told["best_loss"] == told["held_out_hidden_error"] < told["evaluations"][0][1]
    package = open_package(tmp_path / "learnt")
    stated = {"distillation_steps", "distillation_tokens", "held_out_hidden_error"}
    assert set(package.manifest.figures) == stated
    cut, learnt = (open_package(tmp_path / name).load_model() for name in ("cut", "learnt"))
    assert float((states(learnt, values) - full).norm()) < 0.9 * float((states(cut, values) - full).norm())


def test_a_run_on_images_goes_on_as_it_was(eye, tmp_path, monkeypatch, capsys):
    """Also with a cache for states, which of images are never taken from one: every row has the same tokens."""
    checkpoint, public, _ = eye
    words = (*DISTILLED, "--precision", "fp32", "--checkpoint-every", "8", "--cache-bytes", "100000000")
    assert distil(checkpoint, tmp_path / "whole", public, *words) == 0, capsys.readouterr().err
    train, calls = module.train, []

    def killed(pair, trainable, batches, loss, loop, **given):
        def counted(pair, batch):
            calls.append(1)
            if len(calls) == 13:
                raise RunFailed("killed")
            return loss(pair, batch)

        return train(pair, trainable, batches, counted, loop, **given)

    monkeypatch.setattr(module, "train", killed)
    assert distil(checkpoint, tmp_path / "again", public, *words) == 5
    monkeypatch.setattr(module, "train", train)
    assert distil(checkpoint, tmp_path / "again", public, *words, "--resume") == 0, capsys.readouterr().err
    one, two = (open_package(tmp_path / name) for name in ("whole", "again"))
    assert one.digest == two.digest
