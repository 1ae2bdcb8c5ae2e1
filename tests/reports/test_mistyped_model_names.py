"""A model's name with a slip in it, and a hub that cannot be reached.

People waited most of a minute and read two dozen lines of retries before they heard that there was no such model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from checkpoints_lab import save

from offsite.errors import ConfigError
from offsite.modelling import locate as places
from offsite.modelling.load import load_model, load_tokenizer
from offsite.modelling.locate import locate


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFSITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_hub(monkeypatch):
    """Asking the hub fails the test."""

    def ask(*_args, **_settings):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(places, "_on_hub", ask)


NO_HUB_IDS = ["smolm2-135m", "smollm2-135M", "gpt2x", "model", "a b/c", "org/na me", "örg/name", "-x/y"]


@pytest.mark.parametrize("name", NO_HUB_IDS)
def test_what_is_no_hub_id_is_never_asked_for(name, no_hub):
    with pytest.raises(ConfigError, match="no model named"):
        load_model(name)
    with pytest.raises(ConfigError, match="no model named"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["smolm2-135m", "smollm2-135M", "smollm-135m"])
def test_a_near_name_is_offered(name, no_hub):
    with pytest.raises(ConfigError) as caught:
        load_model(name)
    assert caught.value.hint.startswith("did you mean smollm2-135m?")


def test_a_folder_of_nearly_that_name_is_offered(no_hub, tmp_path, full_llama, letters_tokenizer):
    save(tmp_path / "our-model", full_llama, letters_tokenizer)
    with pytest.raises(ConfigError) as caught:
        load_model("our-mode")
    assert caught.value.hint.startswith("did you mean our-model?")


def test_a_hub_that_cannot_be_reached_is_one_line_within_seconds(monkeypatch, capfd):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.file_download.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"no usable model under 'org/name': .* cannot be reached") as caught:
        load_model("org/name")
    assert time.monotonic() - began < 8
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_was_asked_for_before_is_found_without_a_hub(monkeypatch, tmp_path, full_llama, letters_tokenizer):
    """The hub's cache, as its client lays it out."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    save(repository / "snapshots" / ("0" * 40), full_llama, letters_tokenizer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for place in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{place}.HF_HUB_CACHE", str(cache))
    found = locate("org/name")
    assert (found.source, found.is_cached) == ("org/name", True)
    assert load_model("org/name").config.num_hidden_layers == 8
    assert load_tokenizer("org/name")("abc")["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("smolm2-135m", "did you mean"), ("org/name", "cannot be reached")])
def test_the_whole_verb_says_a_line_and_a_hint(name, words, tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "offsite", "distill", name, "-o", "package", "--method", "keep-all", "--steps", "0"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        check=False,
    )
    assert done.returncode == 2
    assert words in done.stderr
    others = [line for line in done.stderr.splitlines() if not line.startswith(("offsite: error:", "offsite: hint:"))]
    assert others == ["distill: loading", f"loading {Path(name).name!r}"]
    assert len(done.stderr.splitlines()) == 4
    assert time.monotonic() - began < 60  # most of it is importing
    assert not Path(tmp_path / "package").exists()
