"""A checkpoint that was quantised, given where the model in full precision is wanted.

Without the quantiser's library people met a traceback out of its inside, with it a model that cannot be cut. It stands
in config.json, so one line says what the checkpoint is and what to do, whatever is installed.
"""

from __future__ import annotations

import json

import pytest
from checkpoints_lab import distill, edit_config, save

from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.load import load_model, load_tokenizer

CONFIGS = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "hqq": {"quant_method": "hqq", "quant_config": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": []},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "torchao": {"quant_method": "torchao", "quant_type": {}},
    "aqlm": {"quant_method": "aqlm"},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "eetq": {"quant_method": "eetq", "weights": "int8"},
    "vptq": {"quant_method": "vptq"},
    "bitnet": {"quant_method": "bitnet"},
}


@pytest.fixture
def checkpoint(tmp_path, full_llama, letters_tokenizer):
    return save(tmp_path / "model", full_llama, letters_tokenizer)


@pytest.mark.parametrize("method", list(CONFIGS))
def test_every_method_is_named_in_one_line(method, checkpoint, tmp_path, capsys):
    edit_config(checkpoint, quantization_config=CONFIGS[method])
    assert distill(checkpoint, tmp_path / "package") == 2
    error, hint = [line for line in capsys.readouterr().err.splitlines() if line.startswith("offsite:")]
    assert f"is quantised ({method})" in error
    assert "give the original" in hint


def test_older_forms(checkpoint):
    edit_config(checkpoint, quantization_config={"load_in_8bit": True, "llm_int8_threshold": 6.0})
    with pytest.raises(UnsupportedModel, match=r"is quantised \(bitsandbytes\)"):
        load_model(str(checkpoint))
    edit_config(checkpoint, quantization_config=None, text_config={"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(UnsupportedModel, match=r"is quantised \(fp8\)"):
        load_model(str(checkpoint))
    edit_config(checkpoint, text_config=None)
    (checkpoint / "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(UnsupportedModel, match=r"is quantised \(gptq, by its quantize_config\.json\)"):
        load_model(str(checkpoint))


@pytest.mark.parametrize("word", ["\x1b[31mred", "g\u202eptq", "x" * 500, ["gptq"], 7])
def test_the_method_is_shown_only_when_it_is_a_word(word, checkpoint):
    edit_config(checkpoint, quantization_config={"quant_method": word})
    with pytest.raises(UnsupportedModel, match=r"is quantised \(of an unknown kind\)"):
        load_model(str(checkpoint))


@pytest.mark.parametrize("error", [ImportError("\nThis needs a package.\nInstall it."), KeyError("x")])
def test_a_library_that_is_missing_is_one_line(error, checkpoint, monkeypatch):
    """Whatever a class of the library asks for when it is built."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fail(*_args, **_settings):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UnsupportedModel) as caught:
        load_model(str(checkpoint))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no usable tokenizer under"):
        load_tokenizer(str(checkpoint))


def test_settings_that_make_no_sense_are_one_line(checkpoint):
    stated = json.loads((checkpoint / "config.json").read_text())
    for change in ({"num_attention_heads": 0}, {"hidden_size": "many"}, {"rope_parameters": 7}, {"hidden_act": "no"}):
        (checkpoint / "config.json").write_text(json.dumps({**stated, **change}))
        with pytest.raises((ConfigError, UnsupportedModel)) as caught:
            load_model(str(checkpoint))
        assert "\n" not in str(caught.value)
        assert str(checkpoint.parent) not in str(caught.value)
