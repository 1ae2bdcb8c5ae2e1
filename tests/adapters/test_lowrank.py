"""peft reaches exactly the modules that were named, with the shapes that were declared."""

from __future__ import annotations

import re

import pytest
import torch

from adapters import lowrank
from adapters.kinds import attach, declared
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import UnsupportedModel
from offsite.tensors import TensorSpec

IDS = torch.tensor([[5, 17, 200, 3, 44, 90, 12]])


def attached_to(package, **settings):
    spec = AdapterSpec(**{"rank": 2, "dtype": "float32", **settings})
    names = declared(spec, package.layout, package.block_tensors())
    return spec, names, attach(package.load_model(), spec, package.layout.blocks, names)


def reached(model):
    """Names of all modules that peft wrapped, in the package's model."""
    suffix = ".lora_A.default.weight"
    names = [name for name, _ in model.named_parameters() if name.endswith(suffix)]
    return {name.removeprefix("base_model.model.").removesuffix(suffix) for name in names}


ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "phi3": {"qkv_proj", "o_proj"},
}


@pytest.mark.parametrize("placement", ["2+2", "0+1", "1+2"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_exactly_the_attention_of_the_placed_blocks(tmp_path, tiny, make_package, name, placement, kind):
    package = make_package(tmp_path / "package", model=tiny(name), kept=(0, 1, 2, 4, 5))
    spec, names, attached = attached_to(package, kind=kind, placement=placement, targets="attention")
    bottom, top = spec.counts
    numbers = [*range(bottom), *range(5 - top, 5)]
    stack = package.layout.stack
    inside = "attn" if name == "gpt2" else "self_attn"
    assert reached(attached.model) == {f"{stack}.{n}.{inside}.{last}" for n in numbers for last in ATTENTION[name]}
    assert set(attached.trainable) == set(names)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "phi3"])
def test_all_linears_never_reach_routers_experts_or_heads(tmp_path, tiny, make_package, name):
    package = make_package(tmp_path / "package", model=tiny(name), kept=tuple(range(6)))
    _, _, attached = attached_to(package, kind="lora", placement="all")
    found = reached(attached.model)
    assert not any(re.search(r"expert|gate$|router|lm_head|embed|wte|wpe", module) for module in found)
    assert len(found) == 6 * len({inner.split(".", 2)[2] for inner in package.layout.linears})


def test_conv1d_has_its_factors_the_right_way_round(tmp_path, tiny, make_package):
    package = make_package(tmp_path / "package", model=tiny("gpt2"), kept=(0, 1, 2, 4, 5))
    _, names, attached = attached_to(package, kind="lora", placement="0+1")
    assert names["top.1.attn.c_attn.lora_A"].shape == (2, 32)
    assert names["top.1.attn.c_attn.lora_B"].shape == (96, 2)
    assert names["top.1.mlp.c_proj.lora_A"].shape == (2, 48)
    with torch.no_grad():
        for name, parameter in attached.trainable.items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1)
    before = attached.model(input_ids=IDS).logits
    merged = attached.model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "scale"), [("lora", 8 / 4), ("rslora", 8 / 2)])
def test_the_scale_is_alpha_over_rank_or_its_root(dropped_package, kind, scale):
    _, _, attached = attached_to(dropped_package, kind=kind, placement="0+1", rank=4, alpha=8.0, targets="attention")
    with torch.no_grad():
        for parameter in attached.trainable.values():
            parameter.normal_(0, 0.1)
    plain = dropped_package.load_model()
    with torch.no_grad():
        for last in ATTENTION["llama"]:
            a, b = (attached.trainable[f"top.1.self_attn.{last}.lora_{x}"] for x in "AB")
            getattr(plain.model.layers[6].self_attn, last).weight += scale * (b @ a)
        torch.testing.assert_close(
            attached.model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )


def test_dora_stays_off_shrunk_modules(narrow_package):
    spec = AdapterSpec(kind="dora", placement="all", rank=2)
    names = declared(spec, narrow_package.layout, narrow_package.block_tensors())
    assert not any(name.startswith("middle.") and ".mlp." in name for name in names)
    assert "middle.0.self_attn.q_proj.magnitude" in names
    assert names["bottom.0.mlp.up_proj.magnitude"].shape == (48,)


def test_a_module_that_is_not_there_is_refused(dropped_package):
    spec = AdapterSpec(kind="lora", placement="0+1", rank=2)
    for missing in ("mlp", "self_attn.q_projection"):
        shape = TensorSpec(shape=(2, 32), dtype="float32")
        names = {f"top.1.{missing}.lora_A": shape, f"top.1.{missing}.lora_B": shape}
        with pytest.raises(UnsupportedModel, match="is not a linear module of the model at"):
            attach(dropped_package.load_model(), spec, dropped_package.layout.blocks, names)


def test_what_peft_refuses_is_one_line_of_ours(dropped_package, monkeypatch):
    import peft

    def refuse(model, config):
        raise ValueError("lora.ParamWrapper does not work with use_dora=True.\nmore")

    monkeypatch.setattr(peft, "get_peft_model", refuse)
    with pytest.raises(UnsupportedModel, match=r"cannot put dora on this architecture: lora\.ParamWrapper .*=True$"):
        attached_to(dropped_package, kind="dora", placement="0+1")


def test_modules_that_peft_adds_on_its_own_are_refused(dropped_package, monkeypatch):
    from peft.tuners.lora import LoraModel

    def careless(self, model, adapter_name, *, state_dict=None, **settings):
        if state_dict:
            [first, *others] = state_dict
            state_dict = dict.fromkeys([*others, first.replace(".6.", ".5.")])
        return original(self, model, adapter_name, state_dict=state_dict, **settings)

    original = LoraModel.inject_adapter
    monkeypatch.setattr(LoraModel, "inject_adapter", careless)
    with pytest.raises(UnsupportedModel, match=r"on 7 modules, expected exactly 7, .* not among them"):
        attached_to(dropped_package, kind="lora", placement="0+1")


def test_dropout_is_active_in_training_only(dropped_package):
    _, _, attached = attached_to(dropped_package, kind="lora", placement="0+1", dropout=0.5)
    with torch.no_grad():
        for parameter in attached.trainable.values():
            parameter.normal_(0, 0.3)
    attached.model.eval()
    assert torch.equal(attached.model(input_ids=IDS).logits, attached.model(input_ids=IDS).logits)
    attached.model.train()
    assert not torch.equal(attached.model(input_ids=IDS).logits, attached.model(input_ids=IDS).logits)


def test_canonical_parts_are_those_of_the_declaration():
    assert set(lowrank.PARTS) | set(lowrank.MAGNITUDE) == {"lora_A", "lora_B", "magnitude"}
