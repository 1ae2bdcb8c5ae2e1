"""Every file in configs/ loads with the settings of the verb it is named after."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from client.tuning.config import TuneConfig
from emulator.distillation.config import DistillConfig
from offsite.config import VerbConfig, build

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
WORDS: dict[str, tuple[type[VerbConfig], dict[str, object]]] = {
    "distill": (DistillConfig, {"model": "model", "public": "public.txt", "output": "package"}),
    "tune": (TuneConfig, {"package": "package", "data": "private.txt", "output": "bundle"}),
}


def test_there_is_one_per_verb_that_people_edit():
    assert {path.stem for path in FILES} == {
        *("distill-drop", "distill-width", "tune-blocks", "tune-lora", "tune-lora-private"),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_and_says_how_to_use_it(path):
    verb, variant, *_ = path.stem.split("-")
    settings, words = WORDS[verb]
    config = build(settings, file=path, flags=words)
    assert variant in (getattr(config, "method", None), getattr(config, "adapter", None))
    assert f"offsite {verb} " in path.read_text().splitlines()[0]
    assert f"--config configs/{path.name}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("stem", ["distill-width", "tune-blocks"])
def test_what_says_that_it_holds_the_defaults_does(stem):
    path = next(path for path in FILES if path.stem == stem)
    settings, words = WORDS[stem.partition("-")[0]]
    stated, default = build(settings, file=path, flags=words), build(settings, flags=words)
    if isinstance(default, TuneConfig):
        default = default.model_copy(update={"learning_rate": default.rate()})
    assert "# The defaults, written out." in path.read_text()
    assert stated == default


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_numbers_are_numbers_to_other_readers_too(path):
    settings, words = WORDS[path.stem.partition("-")[0]]
    compare(yaml.safe_load(path.read_text()), build(settings, file=path, flags=words))


def compare(plain, found):
    for key, value in plain.items():
        stated = getattr(found, key)
        if isinstance(value, dict):
            compare(value, stated)
        else:
            assert float(value) == stated if isinstance(stated, float) else value == stated
