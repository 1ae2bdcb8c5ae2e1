"""A folder that was plugged in could not be handed on: no tokenizer, no card, unreadable, with a path of its maker.

What people met: adapters that other programs open only after files were copied to them by hand, and whose configuration
points into the home folder of whoever made them. Here the folder goes elsewhere, with the full model beside it, and is
opened by peft and transformers alone.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from offsite.errors import ConfigError
from server.plugging.adapted import load_adapted, open_adapted
from server.plugging.config import PlugConfig
from server.plugging.plug import run

IDS = torch.tensor([[5, 17, 40, 9, 33]])


@pytest.fixture
def plug_in(make_bundle, make_package, full_llama, save_model, shelve, tmp_path):
    """Plug an adapter in at the owner's; return the folder and what the full model is there."""
    home = tmp_path / "at-the-owners"
    package = make_package(home / "package", licence="Apache-2.0")
    base = save_model(full_llama, home / "models" / "tiny-llama")

    def make(form):
        kind = "blocks" if form == "own" else "lora"
        bundle = make_bundle(home / "bundle", package, kind=kind)
        named = shelve(bundle.path, package.path, home / "shelf")
        run(PlugConfig(model=str(base), output=home / "adapted", merge=form == "merged", **named))
        return home / "adapted", base

    return make


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def moved(folder, base, tmp_path, monkeypatch):
    """The folder and the full model where nothing else is; what the owner had is gone."""
    expected = logits(load_adapted(folder)[0])
    there = tmp_path / "elsewhere"
    shutil.copytree(folder, there / "adapted")
    shutil.copytree(base, there / "tiny-llama")
    shutil.rmtree(tmp_path / "at-the-owners")
    monkeypatch.chdir(there)
    return expected


@pytest.mark.parametrize("form", ["peft", "own", "merged"])
def test_nothing_in_it_names_the_machine_that_made_it(form, plug_in, tmp_path):
    folder, _ = plug_in(form)
    places = [str(tmp_path), tmp_path.name, str(Path.home()), os.uname().nodename]
    for path in folder.iterdir():
        raw = path.read_bytes()
        assert not any(place.encode() in raw for place in places if len(place) > 5), path.name
        assert path.stat().st_mode & 0o777 == 0o644, path.name
    assert folder.stat().st_mode & 0o777 == 0o755
    assert open_adapted(folder).base == "tiny-llama"
    text = (folder / "README.md").read_text()
    assert "Apache-2.0" in text
    assert "`tiny-llama`" in text
    assert open_adapted(folder).base_digest in text
    assert "moves the logits by" in text


def test_a_stricter_umask_is_kept_to(plug_in):
    before = os.umask(0o077)
    try:
        folder, _ = plug_in("peft")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_peft_and_transformers_open_the_adapter(plug_in, letters_tokenizer, tmp_path, monkeypatch):
    expected = moved(*plug_in("peft"), tmp_path, monkeypatch)
    assert PeftConfig.from_pretrained("adapted").base_model_name_or_path == "tiny-llama"
    vanilla = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny-llama"), "adapted").eval()
    torch.testing.assert_close(logits(vanilla), expected, rtol=0, atol=1e-5)
    by_itself = AutoModelForCausalLM.from_pretrained("adapted").eval()  # finds the base by its name
    torch.testing.assert_close(logits(by_itself), expected, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained("adapted")
    assert tokenizer("a fever")["input_ids"] == letters_tokenizer("a fever")["input_ids"]
    assert tokenizer.chat_template == letters_tokenizer.chat_template


def test_transformers_opens_the_merged_checkpoint(plug_in, letters_tokenizer, tmp_path, monkeypatch):
    expected = moved(*plug_in("merged"), tmp_path, monkeypatch)
    shutil.rmtree("tiny-llama")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("adapted").eval()), expected)
    assert AutoTokenizer.from_pretrained("adapted")("a fever") == letters_tokenizer("a fever")


@pytest.mark.parametrize("form", ["peft", "own"])
def test_offsite_finds_the_full_model_again_or_asks_for_it(form, plug_in, tmp_path, monkeypatch):
    folder, base = plug_in(form)
    assert json.loads((folder.parent / "adapted.base.json").read_text())["base"] == str(base)
    expected = moved(folder, base, tmp_path, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.testing.assert_close(logits(load_adapted(Path("adapted"))[0]), expected)
        Path("tiny-llama").rename(tmp_path / "renamed")
        with pytest.raises(ConfigError, match="the full model 'tiny-llama' of adapter 'adapted' is not here") as caught:
            load_adapted(Path("adapted"))
        assert caught.value.hint == "name its folder with --base"
        found, _ = load_adapted(Path("adapted"), base=str(tmp_path / "renamed"))
        torch.testing.assert_close(logits(found), expected)


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_tokenizer_of_several_templates_comes_along(form, plug_in, monkeypatch):
    from server.plugging import plug

    real = plug.load_reader

    def with_two(name):
        tokenizer = real(name)
        tokenizer.chat_template = {"default": "{{ 'a' }}", "rag": "{{ 'b' }}"}
        return tokenizer

    monkeypatch.setattr(plug, "load_reader", with_two)
    folder, _ = plug_in(form)
    load_adapted(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == {"default": "{{ 'a' }}", "rag": "{{ 'b' }}"}
