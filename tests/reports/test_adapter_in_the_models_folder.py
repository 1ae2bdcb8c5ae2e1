"""A PEFT adapter that lies in a model's folder, left there by training.

The library puts it on the model without a word; what came of it was a refusal that named a symptom. The adapter is
named, and what to do about it.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
from checkpoints_lab import distill, save
from peft import LoraConfig, get_peft_model

from adapters.lowrank import quiet_peft
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.checkpoint import refuse_adapted
from offsite.modelling.load import load_model


@pytest.fixture
def tuned(tmp_path, full_llama, letters_tokenizer):
    """A model's folder into which its adapter was saved as well."""
    folder = save(tmp_path / "model", full_llama, letters_tokenizer)
    with quiet_peft():
        get_peft_model(copy.deepcopy(full_llama), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def test_it_is_named(tuned, tmp_path, capsys):
    assert distill(tuned, tmp_path / "package") == 2
    told = capsys.readouterr().err
    assert "a PEFT adapter lies in the folder of model" in told
    assert "(adapter_config.json: LORA)" in told
    assert "merge it" in told
    (tuned / "adapter_config.json").unlink()
    assert distill(tuned, tmp_path / "package") == 0


def test_a_folder_that_holds_nothing_else(tuned, tmp_path):
    alone = tmp_path / "adapter"
    alone.mkdir()
    (tuned / "adapter_config.json").rename(alone / "adapter_config.json")
    with pytest.raises(ConfigError, match="holds a PEFT adapter, no model") as caught:
        load_model(str(alone))
    assert "merge the adapter into its base model" in caught.value.hint


@pytest.mark.parametrize("stated", ["{", "[]", '{"peft_type": "\\u202eLORA"}'])
def test_a_broken_one_is_one_line(stated, tuned):
    (tuned / "adapter_config.json").write_text(stated)
    with pytest.raises((ConfigError, UnsupportedModel)) as caught:
        load_model(str(tuned))
    assert str(caught.value).isprintable()


def test_one_that_came_along_from_a_hub():
    """There it is met only once it is on the model."""
    model = SimpleNamespace(peft_config={"default": LoraConfig(r=2)})
    with pytest.raises(UnsupportedModel, match=r"model 'org/name' comes with a PEFT adapter \(LORA\)"):
        refuse_adapted(model, "org/name")
    refuse_adapted(SimpleNamespace(peft_config={}), "org/name")
