"""An exported adapter computes what the adapted folder does, and says no scale."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.load import load_model
from server.plugging.adapted import load_adapted
from server.plugging.config import PlugConfig
from server.plugging.export import run
from server.plugging.exportconfig import ExportConfig
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
        ("lora", {"rank": 513}, "ranks up to 512"),
    ],
)
def test_what_vllm_cannot_load_is_refused_and_nothing_is_written(adapted, tmp_path, kind, settings, reason):
    folder = adapted(kind, **settings)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        run(ExportConfig(lora=folder, output=tmp_path / "out"))
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*"))


def test_an_output_that_exists_stays(adapted, tmp_path):
    folder = adapted("lora")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        run(ExportConfig(lora=folder, output=tmp_path / "out"))
