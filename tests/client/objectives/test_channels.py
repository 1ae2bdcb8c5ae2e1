"""Channels left out: an oracle that silences them in the weights, evaluation as ever, masks of seed and step alone."""

from __future__ import annotations

import pytest
import torch

from adapters.kinds import attach, declared
from client.objectives.channels import ChannelDropout
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError
from offsite.modelling.mlps import find_mlp, outgoing_weight

IDS = torch.tensor([[5, 17, 200, 3, 44, 90], [9, 8, 77, 6, 1, 2]])
MIDDLE = ("middle.0", "middle.1", "middle.2", "middle.3")


def attached_to(package, kind="lora", placement="all"):
    spec = AdapterSpec(kind=kind, placement=placement, rank=2, dtype="float32")
    names = declared(spec, package.layout, package.block_tensors())
    return attach(package.load_model(), spec, package.layout.blocks, names)


def dropping(attached, package, probability=0.4, seed=3):
    return ChannelDropout(attached, package, probability=probability, seed=seed)


@pytest.mark.parametrize("kind", ["lora", "blocks"])
def test_it_is_the_emulator_without_those_channels_and_the_rest_scaled(narrow_package, kind):
    attached = attached_to(narrow_package, kind, "all" if kind == "lora" else "2+2")
    channels = dropping(attached, narrow_package)
    attached.model.train()
    with torch.no_grad():
        assert torch.equal(attached.model(input_ids=IDS).logits, narrow_package.load_model()(input_ids=IDS).logits)
        channels.begin(11)
        found = attached.model(input_ids=IDS).logits
        silenced = narrow_package.load_model().eval()
        for name in MIDDLE:
            mask = channels.mask(11, name)
            assert set(mask.tolist()) <= {0.0, float(torch.tensor(1.0) / 0.6)}
            block = silenced.get_submodule(narrow_package.layout.blocks[name])
            mlp = find_mlp(block)
            assert len(mask) == mlp.num_channels
            outgoing_weight(block, mlp).mul_(mask)
        expected = silenced(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, narrow_package.load_model()(input_ids=IDS).logits, atol=1e-2)

        attached.model.eval()
        assert torch.equal(attached.model(input_ids=IDS).logits, narrow_package.load_model()(input_ids=IDS).logits)


def test_a_mask_is_of_the_seed_the_step_and_the_block(narrow_package):
    one = dropping(attached_to(narrow_package), narrow_package, 0.5)
    torch.manual_seed(99)
    same = dropping(attached_to(narrow_package), narrow_package, 0.5)
    other = dropping(attached_to(narrow_package), narrow_package, 0.5, seed=4)
    assert torch.equal(one.mask(2, "middle.1"), same.mask(2, "middle.1"))
    for mask in (one.mask(3, "middle.1"), other.mask(2, "middle.1")):
        assert not torch.equal(one.mask(2, "middle.1"), mask)


def test_each_channel_is_left_out_as_often_as_was_asked(narrow_package):
    channels = dropping(attached_to(narrow_package), narrow_package, 0.3)
    share = torch.stack([channels.mask(step, "middle.2") == 0 for step in range(400)]).float().mean(0)
    assert float(share.mean()) == pytest.approx(0.3, abs=0.03)
    assert bool(((share > 0.15) & (share < 0.45)).all())


def test_experts_have_no_channels_of_their_own(tmp_path, make_package):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=259, num_key_value_heads=2, num_local_experts=2, **sizes))
    package = make_package(tmp_path / "mixture", model=model.eval(), kept=(0, 1, 2, 4, 5))
    with pytest.raises(ConfigError, match="--channel-dropout: the MLP of MixtralDecoderLayer is a mixture of experts"):
        dropping(attached_to(package, "blocks", "1+1"), package)
