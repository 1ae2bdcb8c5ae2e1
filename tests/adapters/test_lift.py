from __future__ import annotations

import copy

import pytest
import torch

from adapters.kinds import attach, declared
from adapters.lift import lift
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.errors import WrongShape
from offsite.modelling.blocks import block_list, decoder_stack, linear_dims, linear_names
from offsite.modelling.mlps import find_mlp, zero_mlp_channels
from offsite.tensors import spec_of

IDS = torch.tensor([[5, 17, 200, 3, 44, 90, 12]])
CHANNELS = {"middle.0": (1, 2, 3, 7, 40), "middle.1": tuple(range(0, 48, 2))}


def full_dims(full, record):
    found = {}
    for canonical, module in record.sites.items():
        block = full.get_submodule(module)
        found.update({f"{canonical}.{name}": linear_dims(block.get_submodule(name)) for name in linear_names(block)})
    return found


@pytest.mark.parametrize(
    ("name", "placement"), [("llama", "all"), ("gpt2", "all"), ("phi3", "all"), ("llama", "last:3")]
)
def test_lifted_onto_the_full_model_it_does_what_it_did(tmp_path, tiny, make_package, name, placement):
    """The oracle: the full model with the other channels silenced is the narrow model, with the adapter too."""
    full = tiny(name)
    package = make_package(tmp_path / "package", model=full, kept=tuple(range(6)), channels=CHANNELS)
    spec = AdapterSpec(kind="lora", placement=placement, rank=3, dtype="float32")
    names = declared(spec, package.layout, package.block_tensors())
    tuned = attach(package.load_model(), spec, package.layout.blocks, names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.trainable.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    record = read_owner_record(owner_record_path(package.path))
    lifted = lift(tuned.tensors(), record.channels, full_dims(full, record))
    silenced = copy.deepcopy(full)
    for role, kept in CHANNELS.items():
        block = block_list(silenced, decoder_stack(silenced))[2 + int(role.split(".")[1])]
        others = torch.tensor(sorted(set(range(48)) - set(kept)))
        zero_mlp_channels(block, find_mlp(block), others)
    plugged = attach(silenced, spec, record.sites, {name: spec_of(tensor) for name, tensor in lifted.items()})
    plugged.load(lifted)
    with torch.no_grad():
        expected = tuned.model(input_ids=IDS).logits
        torch.testing.assert_close(plugged.model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_lifting_is_padding_with_zeros():
    kept = (1, 4, 5)
    up = torch.randn(3, 2)
    down = torch.randn(2, 3)
    attention = torch.randn(8, 2)
    dims = {"middle.0.mlp.up": (8, 6), "middle.0.mlp.down": (6, 8), "middle.0.attn.o": (8, 8), "top.0.mlp.up": (8, 6)}
    tensors = {
        "middle.0.mlp.up.lora_A": torch.randn(2, 8),
        "middle.0.mlp.up.lora_B": up,
        "middle.0.mlp.down.lora_A": down,
        "middle.0.attn.o.lora_B": attention,
        "top.0.mlp.up.lora_B": torch.randn(6, 2),
    }
    found = lift(tensors, {"middle.0": kept}, dims)
    assert found["middle.0.mlp.up.lora_B"].shape == (6, 2)
    assert torch.equal(found["middle.0.mlp.up.lora_B"][list(kept)], up)
    assert not found["middle.0.mlp.up.lora_B"][[0, 2, 3]].any()
    assert torch.equal(found["middle.0.mlp.down.lora_A"][:, list(kept)], down)
    assert not found["middle.0.mlp.down.lora_A"][:, [0, 2, 3]].any()
    for name in ("middle.0.mlp.up.lora_A", "middle.0.attn.o.lora_B", "top.0.mlp.up.lora_B"):
        assert found[name] is tensors[name]


def test_gate_and_up_in_one_module_are_spread_in_both_halves():
    both = torch.arange(8.0).reshape(4, 2)
    found = lift({"middle.0.mlp.gate_up.lora_B": both}, {"middle.0": (0, 2)}, {"middle.0.mlp.gate_up": (8, 6)})
    lifted = found["middle.0.mlp.gate_up.lora_B"]
    assert torch.equal(lifted[[0, 2, 3, 5]], both)
    assert not lifted[[1, 4]].any()


@pytest.mark.parametrize("kept", [(0, 1), (0, 1, 2, 3), (0, 1, 6)])
def test_a_number_of_channels_that_does_not_fit(kept):
    with pytest.raises(WrongShape, match="has 3 channels, the owner's record says"):
        lift({"middle.0.mlp.up.lora_B": torch.ones(3, 2)}, {"middle.0": kept}, {"middle.0.mlp.up": (8, 6)})
