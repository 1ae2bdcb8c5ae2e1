"""A GGUF adapter computes in llama.cpp what the adapter does in transformers."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import gguf
import pytest
import torch
from llama_cpp import LlamaCpp, in_pairs, write_base
from row_adapters import fitted
from tiny_architectures import GROUPED, PLAIN
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.errors import UnsupportedModel, WrongNames, WrongShape
from server.export.export import folded
from server.export.gguffile import ARCHITECTURES, architecture_of, gguf_tensors, rows_in_pairs, write_gguf
from server.plugging.fit import Fitted, plugged, scaled

PROMPTS = ([5], [9, 100, 41, 7], list(range(3, 250, 11)))
SHAPES = {
    **dict.fromkeys(ARCHITECTURES, PLAIN),
    "qwen3": GROUPED,
    "gemma2": {**GROUPED, "query_pre_attn_scalar": 8},
    "granite": {
        **PLAIN,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
}


def tiny(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPES[kind]))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
    return model.eval()


def unscaled(adapter):
    return Fitted(adapter.spec, folded(adapter), adapter.sites)


@torch.no_grad()
def next_token(model, prompt):
    return torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)


def test_rows_stand_in_pairs_head_by_head():
    rows = torch.arange(24.0).reshape(24, 1)
    for heads in (1, 2, 3):
        assert rows[rows_in_pairs(24, heads)].numpy().tolist() == in_pairs(rows.numpy(), heads).tolist()
    with pytest.raises(WrongShape, match="even size"):
        rows_in_pairs(24, 8)


def test_names_shapes_and_values_are_those_of_llama_cpp(full_llama, tmp_path):
    adapter = scaled(full_llama, fitted(full_llama, "rslora", 5, rank=7), 0.5)
    tensors = gguf_tensors(full_llama, ARCHITECTURES["llama"], unscaled(adapter))
    write_gguf(tmp_path / "x.gguf", tensors, architecture=ARCHITECTURES["llama"], rank=7, base="base")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    stated = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert stated == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.file_type": 0,
        "general.base_model.count": 1,
        "general.base_model.0.name": "base",
        "adapter.type": "lora",
        "adapter.lora.alpha": 7.0,
    }
    found = {each.name: torch.from_numpy(each.data.copy()) for each in reader.tensors}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{block}.{part}.weight.lora_{side}" for block in (0, 7) for part in parts for side in "ab"}
    assert found.keys() == names
    scale = 0.5 * 4.0 / 7**0.5
    for block, role in ((0, "bottom.0"), (7, "top.0")):
        for part, inner, heads in (("attn_q", "self_attn.q_proj", 4), ("attn_k", "self_attn.k_proj", 2)):
            factors = adapter.tensors[f"{role}.{inner}.lora_B"], adapter.tensors[f"{role}.{inner}.lora_A"]
            update = in_pairs((scale * factors[0] @ factors[1]).numpy(), heads)
            written = (found[f"blk.{block}.{part}.weight.lora_{side}"] for side in "ba")
            torch.testing.assert_close(next(written) @ next(written), torch.from_numpy(update))
        down = found[f"blk.{block}.ffn_down.weight.lora_b"]
        assert tuple(down.shape) == (32, 7)
        torch.testing.assert_close(down, scale * adapter.tensors[f"{role}.mlp.down_proj.lora_B"])


def test_what_llama_cpp_has_no_place_for_is_refused(full_llama):
    with pytest.raises(UnsupportedModel, match="'mixtral', only of gemma2") as caught:
        architecture_of(SimpleNamespace(model_type="mixtral"))
    assert caught.value.hint
    adapter = unscaled(fitted(full_llama, "lora", 1))
    name = "top.0.mlp.up_proj.lora_"
    a, b = adapter.tensors[f"{name}A"], adapter.tensors[f"{name}B"]
    for module, error in (("mlp.down_proj", WrongShape), ("mlp.nowhere", WrongNames), ("mlp", WrongNames)):
        tensors = {f"top.0.{module}.lora_A": a, f"top.0.{module}.lora_B": b}
        with pytest.raises(error, match=module):
            gguf_tensors(full_llama, ARCHITECTURES["llama"], Fitted(adapter.spec, tensors, adapter.sites))
    odd = copy.deepcopy(full_llama)
    odd.model.layers[7].mlp.extra = torch.nn.Linear(32, 48)
    tensors = {"top.0.mlp.extra.lora_A": a, "top.0.mlp.extra.lora_B": b}
    with pytest.raises(UnsupportedModel, match=r"no tensor of its own for 'model.layers.7.mlp.extra'"):
        gguf_tensors(odd, ARCHITECTURES["llama"], Fitted(adapter.spec, tensors, adapter.sites))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_llama_cpp_computes_the_same(tmp_path, kind):
    model = tiny(kind)
    adapters = [
        fitted(model, "lora", 1, at=(0, 5), size=0.3),
        scaled(model, fitted(model, "rslora", 2, at=(1, 5), rank=7, size=0.3), 0.5),
    ]
    architecture = architecture_of(model.config)
    for number, adapter in enumerate(adapters):
        tensors = gguf_tensors(model, architecture, unscaled(adapter))
        rank = adapter.spec.rank
        write_gguf(tmp_path / f"{number}.gguf", tensors, architecture=architecture, rank=rank, base=kind)
    engine = LlamaCpp(write_base(model, tmp_path / "base.gguf"), tmp_path / "0.gguf", tmp_path / "1.gguf")
    near = {"rtol": 0, "atol": 1e-2 if kind == "gemma2" else 1e-4}  # its GELU is a table of 16-bit values in llama.cpp
    for prompt in PROMPTS:
        plain = next_token(model, prompt)
        torch.testing.assert_close(engine.log_probabilities(prompt), plain, **near)
        for number, adapter in enumerate(adapters):
            with plugged(model, adapter) as one:
                expected = next_token(one, prompt)
            assert (expected - plain).abs().max() > 0.5
            torch.testing.assert_close(engine.log_probabilities(prompt, number), expected, **near)
