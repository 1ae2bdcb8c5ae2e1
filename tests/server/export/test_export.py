"""An exported adapter computes what the adapted folder does, and says no scale."""

from __future__ import annotations

import copy
import json

import gguf
import pytest
import torch
from llama_cpp import LlamaCpp, write_base
from pydantic import ValidationError
from safetensors.torch import load_file

from offsite import cli
from offsite.errors import ConfigError, UnsupportedModel, WrongBinding
from offsite.modelling.load import load_model
from server.export.config import ExportConfig
from server.export.export import run
from server.plugging.adapted import load_adapted
from server.plugging.config import PlugConfig
from server.plugging.peftfolder import open_with_peft
from server.plugging.plug import run as plug_in


@pytest.fixture
def adapted(shelve, dropped_package, make_bundle, llama_folder, tmp_path):
    """Return the folder that plug-in writes of a bundle of a kind."""

    def make(kind, *, rank=3, **settings):
        bundle = make_bundle(tmp_path / f"bundle-{kind}", dropped_package, kind=kind, rank=rank, shake=0.2)
        named = shelve(bundle.path, dropped_package.path, tmp_path / f"shelf-{kind}")
        plug_in(PlugConfig(model=str(llama_folder), output=tmp_path / kind, **named, **settings))
        return tmp_path / kind

    return make


@pytest.mark.parametrize(("kind", "scale"), [("lora", 1.0), ("rslora", 0.5)])
def test_what_is_exported_computes_the_same_with_a_scale_of_one(
    adapted, llama_folder, logits_of, tmp_path, kind, scale
):
    folder = adapted(kind, scale=scale)
    told = run(ExportConfig(lora=folder, output=tmp_path / "out"))
    assert (told["rank"], told["max_lora_rank"]) == (3, 8)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == settings["r"] == 3
    assert not settings["use_rslora"]
    exported = open_with_peft(load_model(str(llama_folder)), tmp_path / "out")
    expected = logits_of(load_adapted(folder, str(llama_folder))[0])
    torch.testing.assert_close(logits_of(exported), expected, rtol=1e-4, atol=1e-4)
    stored = load_file(folder / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        factor = told["scale"] if "lora_B" in name else 1.0
        torch.testing.assert_close(tensor, stored[name].float() * factor)
    assert not torch.allclose(logits_of(load_model(str(llama_folder))), expected, atol=0.1)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("dora", {}, "no dora adapter"),
        ("blocks", {}, "no blocks adapter"),
        ("bitfit", {}, "no bitfit adapter"),
        ("lora", {"merge": True}, "merged checkpoint"),
    ],
)
def test_what_others_cannot_load_is_refused_and_nothing_is_written(adapted, tmp_path, kind, settings, reason):
    folder = adapted(kind, **settings)
    for to in ("vllm", "gguf"):
        _refused(folder, tmp_path / "out", to, reason)


def test_vllm_serves_ranks_up_to_a_bound(adapted, tmp_path):
    _refused(adapted("lora", rank=513), tmp_path / "out", "vllm", "ranks up to 512")


def _refused(folder, output, to, reason):
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        run(ExportConfig(lora=folder, to=to, output=output))
    assert caught.value.hint
    assert not list(output.parent.glob(f"*{output.name}*"))


def test_a_gguf_file_holds_shares_by_module(adapted, tmp_path, capsys):
    folder = adapted("rslora", rank=7, scale="attention=0.5,mlp=0.25")
    out = tmp_path / "out.gguf"
    assert cli.run(["export", str(folder), "--to", "gguf", "-o", str(out)]) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out.splitlines()[-1])
    assert (told["to"], told["architecture"], told["rank"], told["num_tensors"]) == ("gguf", "llama", 7, 56)
    assert f"llama-server -m MODEL.gguf --lora {out}" in shown.err
    found = {each.name: torch.from_numpy(each.data.copy()) for each in gguf.GGUFReader(out).tensors}
    settings = json.loads((folder / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / 7**0.5
    stored = load_file(folder / "adapter_model.safetensors")
    for inner, part in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        theirs = (stored[f"base_model.model.model.layers.7.{inner}.lora_{side}.weight"] for side in "BA")
        written = (found[f"blk.7.{part}.weight.lora_{side}"] for side in "ba")
        torch.testing.assert_close(next(written) @ next(written), scale * next(theirs) @ next(theirs))
    assert cli.run(["export", str(folder), "--to", "gguf", "-o", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_gguf_file_is_of_the_model_that_was_plugged_into(adapted, full_llama, llama_folder, tmp_path):
    folder, out = adapted("lora"), tmp_path / "out.gguf"
    other = copy.deepcopy(full_llama)
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBinding, match="belongs to"):
        run(ExportConfig(lora=folder, to="gguf", base=str(tmp_path / "other"), output=out))
    assert run(ExportConfig(lora=folder, to="gguf", base=str(llama_folder), output=out))["num_tensors"] == 56
    (tmp_path / "lora.base.json").unlink()
    with pytest.raises(ConfigError, match="is not here") as caught:
        run(ExportConfig(lora=folder, to="gguf", output=tmp_path / "again.gguf"))
    assert "--base" in caught.value.hint
    assert not list(tmp_path.glob("*again*"))
    with pytest.raises(ValidationError, match="goes with --to gguf"):
        ExportConfig(lora=folder, base="x", output=out)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), [("lora", {}), ("rslora", {"rank": 7, "scale": "attention=0.5,mlp=1"})])
def test_llama_cpp_computes_what_the_adapted_folder_does(adapted, full_llama, llama_folder, tmp_path, kind, settings):
    folder = adapted(kind, **settings)
    run(ExportConfig(lora=folder, to="gguf", output=tmp_path / "out.gguf"))
    engine = LlamaCpp(write_base(full_llama, tmp_path / "base.gguf"), tmp_path / "out.gguf")
    model = load_adapted(folder, str(llama_folder))[0]
    for prompt in ([5], [9, 100, 41, 7], list(range(3, 250, 11))):
        with torch.no_grad():
            expected, plain = (
                torch.log_softmax(one(torch.tensor([prompt])).logits[0, -1], -1) for one in (model, full_llama)
            )
        found = engine.log_probabilities(prompt, 0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert (found - plain).abs().max() > 0.1
        torch.testing.assert_close(engine.log_probabilities(prompt), plain, rtol=0, atol=1e-4)


def test_an_output_that_exists_stays(adapted, tmp_path):
    folder = adapted("lora")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        run(ExportConfig(lora=folder, output=tmp_path / "out"))
