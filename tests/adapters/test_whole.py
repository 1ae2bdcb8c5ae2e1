from __future__ import annotations

import pytest
import torch

from adapters.kinds import attach, declared
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError, UnsupportedModel
from offsite.tensors import TensorSpec


def names_of(package, **settings):
    spec = AdapterSpec(**settings)
    return spec, declared(spec, package.layout, package.block_tensors())


def test_whole_blocks_are_all_their_parameters(dropped_package):
    _, names = names_of(dropped_package, kind="blocks", placement="1+1")
    assert {name.split(".", 2)[2] for name in names} == {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert {name.rsplit(".", name.count(".") - 1)[0] for name in names} == {"bottom.0", "top.1"}


def test_what_is_no_parameter_is_not_trained(tmp_path, tiny, make_package):
    package = make_package(tmp_path / "package", model=tiny("deepseek_v3"), kept=(0, 1, 2, 4, 5))
    assert "top.1.mlp.gate.e_score_correction_bias" in package.block_tensors().keys() & set(package.layout.buffers)
    spec, names = names_of(package, kind="blocks", placement="0+1")
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    block = package.load_model().get_submodule(package.layout.blocks["top.1"])
    assert {name.split(".", 2)[2] for name in attached.trainable} == {name for name, _ in block.named_parameters()}


def test_bitfit_is_every_vector(tmp_path, tiny, make_package, dropped_package):
    _, names = names_of(dropped_package, kind="bitfit", placement="0+1")
    assert set(names) == {"top.1.input_layernorm.weight", "top.1.post_attention_layernorm.weight"}
    package = make_package(tmp_path / "package", model=tiny("gpt2"), kept=(0, 1, 2, 4, 5))
    _, names = names_of(package, kind="bitfit", placement="0+1")
    assert {"top.1.attn.c_attn.bias", "top.1.mlp.c_fc.bias", "top.1.ln_1.weight", "top.1.ln_1.bias"} <= set(names)
    assert all(len(spec.shape) == 1 for spec in names.values())


@pytest.mark.parametrize("kind", ["blocks", "bitfit"])
def test_everywhere_only_where_the_middle_is_whole(whole_package, narrow_package, kind):
    spec, names = names_of(whole_package, kind=kind, placement="all")
    assert {name.split(".")[0] for name in names} == {"bottom", "middle", "top"}
    with pytest.raises(ConfigError, match="needs a package whose middle blocks are whole") as caught:
        declared(spec, narrow_package.layout, narrow_package.block_tensors())
    assert "--adapter lora" in caught.value.hint


def test_the_last_whole_blocks_take_in_the_middle_only_where_it_is_whole(whole_package, narrow_package):
    _, names = names_of(whole_package, kind="blocks", placement="last:3")
    assert {".".join(name.split(".")[:2]) for name in names} == {"middle.3", "top.0", "top.1"}
    _, names = names_of(narrow_package, kind="blocks", placement="last:2")
    assert {name.split(".")[0] for name in names} == {"top"}
    with pytest.raises(ConfigError, match="--placement last:3 needs a package whose middle blocks are whole"):
        names_of(narrow_package, kind="blocks", placement="last:3")


def test_masters_are_float32_and_everything_else_stays(dropped_package):
    spec, names = names_of(dropped_package, kind="blocks", placement="0+1")
    model = dropped_package.load_model(dtype="bfloat16")
    attached = attach(model, spec, dropped_package.layout.blocks, names)
    assert attached.model is model
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("model.layers.6.")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("model.layers.6.")} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["top.1.mlp", "top.1.forward", "top.1.mlp.act_fn", "top.1.self_attn.config"])
def test_only_parameters_are_unfrozen(dropped_package, name):
    spec = AdapterSpec(kind="blocks", placement="0+1")
    with pytest.raises(UnsupportedModel, match="is not a parameter of the model"):
        attach(
            dropped_package.load_model(),
            spec,
            dropped_package.layout.blocks,
            {name: TensorSpec(shape=(1,), dtype="float32")},
        )
