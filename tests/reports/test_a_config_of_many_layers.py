"""A package whose configuration asks for a hundred thousand blocks, or as many of something else.

Its files are small and true to their manifest; building what the configuration describes took minutes before anything
was compared. The layout counts the blocks, and the manifest the tensors, so neither is ever exceeded.
"""

from __future__ import annotations

import json
import time

import pytest

from offsite.artefacts.package import open_package
from offsite.errors import ArtefactError, BadSchema


def stating(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.fixture
def no_blocks(monkeypatch):
    """Building a block fails the test."""

    def build(*_args, **_settings):
        raise AssertionError("a block was built")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer.__init__", build)


@pytest.mark.parametrize("number", [0, 6, 8, 4097, 100_000, 10**9])
def test_another_number_of_blocks_is_refused_before_one_is_built(number, dropped_package, tamper, no_blocks):
    package = open_package(tamper(dropped_package.path, change=stating(num_hidden_layers=number)))
    began = time.monotonic()
    with pytest.raises(BadSchema, match=rf"describes {number} blocks, the layout counts 7"):
        package.load_model()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("number", [-1, True, "7", [7], 7.5, None, 10**400])
def test_what_is_no_number_is_refused_too(number, dropped_package, tamper, no_blocks):
    with pytest.raises(ArtefactError):
        open_package(tamper(dropped_package.path, change=stating(num_hidden_layers=number))).load_model()


def test_building_stops_at_what_the_manifest_declares(dropped_package, monkeypatch):
    from offsite.artefacts import rebuild

    monkeypatch.setattr(rebuild, "_ROOM_BESIDE", 0)
    layout, declared = dropped_package.layout, dropped_package.manifest.tensors
    with pytest.raises(BadSchema, match="many more tensors than the package declares"):
        rebuild.empty_model(dropped_package.path, layout, dict(list(declared.items())[:4]))
    assert rebuild.empty_model(dropped_package.path, layout, declared).config.num_hidden_layers == 7
