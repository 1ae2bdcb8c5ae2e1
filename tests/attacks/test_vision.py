"""Attempts with packages and bundles of vision encoders: other numbers for images, other heads, text smuggled in."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from checkpoints_lab import distill
from safetensors.torch import load_file, save_file
from vision_lab import FAMILIES, LABELS, encoder, saved

from offsite.artefacts.bundle import AdapterSpec, Head
from offsite.artefacts.package import open_package
from offsite.errors import ArtefactError, BadSchema, NormTooLarge, NotFinite, WrongNames, WrongShape

HEAD = Head(task="classify", labels=LABELS, hidden=64, encoder="dinov2")
SPEC = AdapterSpec(kind="lora", rank=2, placement="1+1", dtype="float32", head=HEAD)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eye")
    assert distill(saved(folder / "eye", "dinov2"), folder / "package") == 0
    return open_package(folder / "package")


@pytest.fixture(scope="module")
def bundle(package, make_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("head") / "bundle"
    return make_bundle(out, package, shake=0.01, **{key: value for key, value in SPEC if key != "dtype"})


@pytest.fixture
def hand_in(exchange, package, tmp_path):
    """Take in a bundle's folder under a job for that adapter, both of the encoder's package."""
    exchange.package = package

    def handed(folder, spec=SPEC):
        job = exchange.job(adapter=spec)
        return exchange.take_in(exchange.seal(folder, job, tmp_path / f"sealed-{job.job_id}"))

    return handed


def other(**changes):
    return SPEC.model_copy(update={"head": HEAD.model_copy(update=changes)})


def pixels(**changes):
    return lambda manifest: manifest["pixels"].update(changes)


def without_pixels(manifest):
    del manifest["pixels"]


def smuggled(manifest):
    raw = b"{}"
    manifest["files"]["tokenizer.json"] = {"bytes": 2, "sha256": f"sha256:{hashlib.sha256(raw).hexdigest()}"}


PACKAGES = {
    "a size that is no number of patches": (pixels(crop=[15, 15]), None, BadSchema),
    "cut to more than is there": (pixels(crop=[20, 20]), None, BadSchema),
    "sides beyond all measure": (pixels(shortest=10**9), None, BadSchema),
    "a spread of zero": (pixels(std=[1.0, 1.0, 0.0]), None, BadSchema),
    "a mean that is no number": (pixels(mean=[1.0, 1.0, "nan"]), None, BadSchema),
    "a filter of another name": (pixels(resample="os.system"), None, BadSchema),
    "a class": (pixels(image_processor_type="ViTImageProcessor"), None, BadSchema),
    "an image of too many patches": (pixels(shortest=2000, crop=[2000, 2000]), None, BadSchema),
    "no numbers at all": (without_pixels, None, BadSchema),
    "a tokenizer": (smuggled, lambda folder: (folder / "tokenizer.json").write_bytes(b"{}"), WrongNames),
}


@pytest.mark.parametrize("case", PACKAGES)
def test_a_package_that_says_otherwise_how_images_are_read(case, package, tamper):
    edit, change, expected = PACKAGES[case]
    with pytest.raises(expected) as error:
        open_package(tamper(package.path, edit=edit, change=change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["image_size", "patch_size", "num_channels", "model_type"])
def test_a_config_of_other_images(key, package, tamper):
    """Patches of a size that the weights do not have; a model of text with numbers for images."""
    value = {"image_size": 10**6, "patch_size": 2, "num_channels": 4, "model_type": "bert"}[key]

    def change(folder):
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stated, key: value}))

    def edit(manifest):
        if key == "model_type":
            manifest["layout"]["model_type"] = value

    with pytest.raises(ArtefactError):
        open_package(tamper(package.path, change=change, edit=edit)).empty_model()


def test_a_sound_one_is_taken(hand_in, bundle):
    verdict = hand_in(bundle.path)
    assert verdict.state == "verified", verdict.error


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(other(hidden=32), id="of the first place's state alone"),
        pytest.param(other(encoder="vit"), id="another family's head"),
        pytest.param(other(labels=LABELS[::-1]), id="labels in another order"),
        pytest.param(SPEC.model_copy(update={"head": None}), id="a job for text"),
    ],
)
def test_row_17_another_head_than_the_jobs(hand_in, bundle, spec):
    verdict = hand_in(bundle.path, spec)
    assert (verdict.state, verdict.reason_class) == ("refused", "WrongBinding")


CONTENT = {
    "row 17: a head of half the size": ({"head.weight": torch.zeros(3, 32)}, WrongShape),
    "row 17: a row more": ({"head.weight": torch.zeros(4, 64)}, WrongShape),
    "row 17: an inner layer": ({"head.dense.weight": torch.zeros(64, 64)}, WrongNames),
    "row 17: the patches": ({"embeddings.patch_embeddings.projection.weight": torch.zeros(32, 3, 4, 4)}, WrongNames),
    "row 18: nan": ({"head.bias": torch.full((3,), math.nan)}, NotFinite),
    "row 19: too large a head": ({"head.weight": torch.full((3, 64), 11.0)}, NormTooLarge),
}


@pytest.mark.parametrize("case", CONTENT)
def test_rows_17_18_19_the_jobs_head_with_other_tensors(case, hand_in, bundle, tamper, exchange):
    tensors, expected = CONTENT[case]

    def rewrite(folder):
        save_file({**load_file(folder / "adapter.safetensors"), **tensors}, folder / "adapter.safetensors")

    verdict = hand_in(tamper(bundle.path, change=rewrite, redeclare=True))
    assert (verdict.state, verdict.reason_class) == ("refused", expected.__name__), verdict.error
    assert "\n" not in str(verdict.error)
    assert not list((exchange.registry_folder / "bundles").iterdir())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_package_of_every_family_is_what_its_model_says(name, tmp_path, capsys):
    """Nothing dropped: the tensors that a client opens are the full model's, to the bit, and nothing of its head."""
    checkpoint = saved(tmp_path / "eye", name)
    assert distill(checkpoint, tmp_path / "package") == 0, capsys.readouterr().err
    found, wanted = open_package(tmp_path / "package").load_model().state_dict(), encoder(name).state_dict()
    assert {key: tuple(one.shape) for key, one in found.items()} == {k: tuple(one.shape) for k, one in wanted.items()}
    assert sorted(path.name for path in (tmp_path / "package").iterdir()) == [
        "config.json", "model.safetensors", "offsite.json",
    ]  # fmt: skip
