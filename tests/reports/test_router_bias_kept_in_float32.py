"""A mixture of experts in bfloat16 whose routers correct their choice by a float32 bias.

People found other experts chosen, and other text, once such a bias had been rounded to bfloat16 with the rest: the
numbers that it tells apart are finer than bfloat16 writes. Whatever a checkpoint keeps finer has to arrive as fine.
"""

from __future__ import annotations

import pytest
import torch
from checkpoints_lab import distill, random_model, save
from safetensors.torch import load_file

from adapters.kinds import attach
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.package import open_package
from offsite.modelling.dtypes import cast_model, finer, stored_in
from offsite.modelling.load import load_model
from offsite.tensors import TensorSpec

BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, letters_tokenizer):
    """A bfloat16 checkpoint whose biases lie between two bfloat16 numbers."""
    model = random_model(
        "glm4_moe",
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        head_dim=8,
        n_group=1,
        topk_group=1,
    )
    model.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if hasattr(module, BIAS):
            # around 1, bfloat16 tells apart only steps of 2^-7: experts that differ by less become equals
            setattr(module, BIAS, 1 + 2**-9 * torch.randn(8, generator=generator))
    return save(tmp_path_factory.mktemp("moe") / "model", model, letters_tokenizer)


@pytest.fixture(scope="module")
def package(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("sent") / "package"
    assert distill(checkpoint, out) == 0
    return open_package(out)


def logits(model):
    ids = torch.randint(3, 259, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_each_tensor_crosses_in_its_own_dtype(checkpoint, package):
    stored = load_file(checkpoint / "model.safetensors")
    sent = load_file(package.path / "model.safetensors")
    biases = [name for name in sent if name.endswith(BIAS)]
    assert len(biases) == 5
    for name, tensor in sent.items():
        if name in stored:  # experts are fused when they are loaded
            assert tensor.dtype is stored[name].dtype, name
            assert torch.equal(tensor, stored[name]), name
    assert {sent[name].dtype for name in biases} == {torch.float32}
    assert {tensor.dtype for name, tensor in sent.items() if name not in biases} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_package_that_keeps_all_is_the_full_model_bit_for_bit(checkpoint, package, dtype):
    full = load_model(str(checkpoint))
    cast_model(full, getattr(torch, dtype))
    model = package.load_model(dtype=dtype)
    assert {tensor.dtype for name, tensor in model.named_buffers() if name.endswith(BIAS)} == {torch.float32}
    assert torch.equal(logits(model), logits(full))


def test_rounding_it_chooses_other_experts(checkpoint):
    """The oracle's own check: the biases at hand are such that rounding them shows."""
    full, rounded = load_model(str(checkpoint)), load_model(str(checkpoint))
    for module in rounded.modules():
        if hasattr(module, BIAS):
            setattr(module, BIAS, getattr(module, BIAS).to(torch.bfloat16))
    assert not torch.equal(logits(rounded), logits(full))


def test_a_dtype_that_is_asked_for_lowers_all_but_what_the_architecture_keeps(checkpoint, tmp_path):
    assert distill(checkpoint, tmp_path / "half", "--dtype", "float16") == 0
    specs = open_package(tmp_path / "half").manifest.tensors
    assert {spec.dtype for name, spec in specs.items() if name.endswith(BIAS)} == {"float32"}
    assert {spec.dtype for name, spec in specs.items() if not name.endswith(BIAS)} == {"float16"}


def test_a_package_that_rounded_it_still_opens(checkpoint, tmp_path, make_package):
    """Packages of before hold one dtype throughout."""
    model = load_model(str(checkpoint))
    dtypes = dict.fromkeys(model.state_dict(), "bfloat16")
    old = make_package(tmp_path / "old", model=model, kept=tuple(range(6)), dtypes=dtypes)
    assert {spec.dtype for spec in old.manifest.tensors.values()} == {"bfloat16"}
    opened = old.load_model(dtype="bfloat16")
    assert {tensor.dtype for name, tensor in opened.named_buffers() if name.endswith(BIAS)} == {torch.float32}
    assert bool(logits(opened).isfinite().all())


def test_what_no_architecture_names_is_kept_as_well(full_llama):
    """A model some of whose tensors are finer than most: cast to another half, those stay."""
    import copy

    model = copy.deepcopy(full_llama).to(torch.bfloat16)
    norm = model.model.norm
    norm.weight.data = norm.weight.data.float() + 2**-12
    finer = norm.weight.detach().clone()
    cast_model(model, torch.float16)
    assert torch.equal(norm.weight, finer)
    assert model.lm_head.weight.dtype is torch.float16
    cast_model(model, torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapted_model_in_another_dtype_keeps_it_too(checkpoint, dtype):
    """An adapter is put on first: its layers stand in the way of names, and its own tensors are lowered."""
    full = load_model(str(checkpoint))
    stay = finer(full, stored_in(full), dtype)
    sites = {f"bottom.{number}": f"model.layers.{number}" for number in range(6)}
    linear = [f"{block}.self_attn.{name}" for block in sites for name in ("q_proj", "o_proj")]
    names = {
        f"{one}.{part}": TensorSpec(shape=shape, dtype="float32")
        for one in linear
        for part, shape in (("lora_A", (2, 32)), ("lora_B", (32, 2)))
    }
    attached = attach(full, AdapterSpec(kind="lora", rank=2, placement="all", targets="attention"), sites, names)
    cast_model(attached.model, dtype, stay=stay)
    found = {name: tensor.dtype for name, tensor in attached.model.state_dict().items()}
    assert {one for name, one in found.items() if name.endswith(BIAS)} == {torch.float32}
    assert {one for name, one in found.items() if not name.endswith(BIAS)} == {dtype}
    assert any("lora_A" in name for name in found)
    assert any(".base_layer." in name for name in found)
    assert bool(logits(attached.model).isfinite().all())
