"""Settings that modelling code reads by name, though the configuration class does not declare them.

OPT models of before a certain date lack a final norm (``_remove_final_layer_norm``), and a Phi-3 may state a
``head_dim`` of its own. Packages of them passed on the owner's side, and no client could open them. Plain numbers that
are known to be read so cross now; for everything else the owner is told, before any training.
"""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints_lab import distill, random_model, save

from emulator.compression.compress import Recipe, compress
from emulator.distillation.publish import try_out
from offsite.artefacts.package import open_package
from offsite.errors import BadSchema, UnsupportedModel
from offsite.modelling.load import load_model
from offsite.modelling.split import make_plan

MODELS = {
    "opt": {"_remove_final_layer_norm": True, "word_embed_proj_dim": 32, "ffn_dim": 48},
    "phi3": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


@pytest.fixture(params=list(MODELS))
def checkpoint(request, tmp_path, letters_tokenizer):
    return save(tmp_path / "model", random_model(request.param, **MODELS[request.param]), letters_tokenizer)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 35)[None], use_cache=False).logits


def test_they_cross_and_the_client_computes_the_same(checkpoint, tmp_path):
    assert distill(checkpoint, tmp_path / "package") == 0
    model = open_package(tmp_path / "package").load_model()
    assert torch.equal(logits(model), logits(load_model(str(checkpoint))))
    if model.config.model_type == "opt":
        assert model.model.decoder.final_layer_norm is None
    else:
        assert model.model.layers[0].self_attn.head_dim == 16


@pytest.mark.parametrize("value", ["16", 16.5, [16], {"a": 1}, None, "torch.load"])
def test_a_client_takes_them_as_plain_numbers_only(value, tmp_path, letters_tokenizer, tamper):
    checkpoint = save(tmp_path / "model", random_model("phi3", **MODELS["phi3"]), letters_tokenizer)
    assert distill(checkpoint, tmp_path / "package") == 0

    def change(folder):
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stated, "head_dim": value}))

    with pytest.raises(BadSchema, match="does not declare"):
        open_package(tamper(tmp_path / "package", change=change)).load_model()


def test_a_setting_that_does_not_cross_is_found_by_what_the_model_computes(full_llama):
    """A stand-in for any model whose code reads something that its class does not declare."""
    plan = make_plan(full_llama)
    compressed = compress(full_llama, plan, "keep-all", Recipe())
    try_out(plan, compressed)
    emulator = compressed.model
    emulator.config.secret_scale = 0.5
    emulator.model.norm.register_forward_hook(lambda _module, _args, out: out * emulator.config.secret_scale)
    with pytest.raises(UnsupportedModel, match="a client would build a model that computes something else") as caught:
        try_out(plan, compressed)
    assert "secret_scale" in caught.value.hint


def test_a_setting_that_changes_the_tensors_is_found_by_them(full_llama):
    plan = make_plan(full_llama)
    compressed = compress(full_llama, plan, "keep-all", Recipe())
    compressed.model.model.extra = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedModel, match=r"a client could not build it: .*'model\.extra\.weight'"):
        try_out(plan, compressed)


def test_nothing_stands_after_a_refusal(tmp_path, letters_tokenizer, monkeypatch, capsys):
    """Refused before a step is trained, and before anything is written."""
    monkeypatch.setattr("offsite.artefacts.layout.UNDECLARED", {})
    checkpoint = save(tmp_path / "model", random_model("opt", **MODELS["opt"]), letters_tokenizer)
    assert distill(checkpoint, tmp_path / "package") == 2
    told = capsys.readouterr().err
    assert "OPTForCausalLM cannot be sent" in told
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
