from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.load import load_model, load_tokenizer

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture
def checkpoint(tmp_path, full_llama, letters_tokenizer):
    folder = tmp_path / "llama"
    full_llama.save_pretrained(folder)
    letters_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFSITE_CACHE", str(tmp_path / "cache"))


def test_a_local_folder(checkpoint, full_llama, letters_tokenizer):
    model = load_model(str(checkpoint))
    assert not model.training
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(input_ids=ids).logits, full_llama(input_ids=ids).logits)
    assert load_model(str(checkpoint), dtype="bfloat16").dtype is torch.bfloat16
    assert load_tokenizer(str(checkpoint))("abc")["input_ids"] == letters_tokenizer("abc")["input_ids"]


def test_a_fetched_name(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="model 'smollm2-135m' has not been fetched yet") as caught:
        load_model("smollm2-135m")
    assert caught.value.hint == "offsite fetch smollm2-135m"
    (tmp_path / "cache").mkdir()
    checkpoint.rename(tmp_path / "cache" / "smollm2-135m")
    assert load_model("smollm2-135m").config.num_hidden_layers == 8


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "a/b/c", "~/model"])
def test_what_can_only_be_a_folder_is_never_looked_up_elsewhere(monkeypatch, name):
    with pytest.raises(ConfigError, match="no model folder"):
        load_model(name)


def test_a_hub_id_that_is_not_there():
    with pytest.raises(ConfigError, match="no usable model under 'nobody/nothing'"):
        load_model("nobody/nothing")
    with pytest.raises(ConfigError, match="no usable tokenizer under 'nobody/nothing'"):
        load_tokenizer("nobody/nothing")


def test_a_folder_without_configuration(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"folder 'empty' holds no config\.json"):
        load_model(str(tmp_path / "empty"))


def test_code_of_its_own_is_never_run(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "modeling.py").write_text("raise SystemExit('the code ran')")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="brings code of its own"):
        load_model(str(checkpoint))


def test_pickled_weights_are_never_read(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UnsupportedModel, match="has pickled weights"):
        load_model(str(checkpoint))


def test_weights_that_are_missing_are_not_made_up(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.5.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of its weights, such as 'model\.layers\.5\.mlp\.up_proj\.weight'"):
        load_model(str(checkpoint))


def wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.5.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json of model 'llama' is not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no usable model under 'llama'"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
            "model.safetensors of model 'llama' is cut",
        ),
        (wrong_shape, "the weights of model 'llama' are not those its config"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(ConfigError, match=message):
        load_model(str(checkpoint))


def test_other_kinds_of_model(tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModel, match="model 't5'"):
        load_model(str(tmp_path / "t5"))
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModel, match="model 'bert' is an encoder"):
        load_model(str(tmp_path / "bert"))


def test_a_missing_tokenizer(tmp_path, full_llama):
    full_llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="no usable tokenizer under 'llama'"):
        load_tokenizer(str(tmp_path / "llama"))
