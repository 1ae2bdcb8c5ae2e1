import pytest
import torch

from emulator.audit.refill import _nearest, _places, missing, refilled
from emulator.compression.compress import Recipe, compress
from emulator.distillation.publish import publish
from offsite.digests import model_digest
from offsite.errors import ConfigError
from offsite.modelling.blocks import block_list, decoder_stack
from offsite.modelling.mlps import find_mlp
from offsite.modelling.split import make_plan

IDS = torch.arange(4, 20)[None]


@pytest.fixture
def pack_any(tokenizer, tmp_path, batch):
    """Write a package of a tiny model, one block at either end."""

    def pack(full, method, **recipe):
        plan = make_plan(full, num_bottom=1, num_top=1)
        compressed = compress(full, plan, method, Recipe(**recipe, calibration=[batch]))
        return publish(
            tmp_path / "package",
            model=compressed.model,
            tokenizer=tokenizer,
            plan=plan,
            compressed=compressed,
            method=method,
            base_digest=model_digest(full),
            figures={},
            dtype="float32",
        )

    return pack


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def blocks(model):
    return block_list(model, decoder_stack(model))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "phi3", "opt", "mixtral"])
def test_holes_are_filled_and_kept_blocks_are_the_packages(tiny, pack_any, architecture):
    package = pack_any(tiny(architecture), "drop", blocks=2)
    small = package.load_model()
    assert missing(small, package.layout, 6) == ("duplicate", "interpolate")
    for name in ("duplicate", "interpolate"):
        deep = refilled(name, package.load_model(), package.layout, 6, seed=0)
        assert len(blocks(deep)) == decoder_stack(deep).num_blocks == 6
        for place, kept in {0: 0, 1: 1, 4: 2, 5: 3}.items():
            theirs = blocks(small)[kept].state_dict()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in blocks(deep)[place].state_dict().items())
        below, above = (dict(blocks(small)[kept].named_parameters()) for kept in (1, 2))
        for key, parameter in blocks(deep)[2].named_parameters():
            wanted = below[key] if name == "duplicate" else torch.lerp(below[key], above[key], 1 / 3)
            torch.testing.assert_close(parameter, wanted)
        assert torch.isfinite(logits(deep)).all()
        owned = [parameter.data_ptr() for parameter in deep.parameters()]
        assert len(set(owned)) == len(owned)  # copies can learn to differ


def test_duplicates_compute_what_blocks_run_twice_compute(tiny, pack_any):
    package = pack_any(tiny("llama"), "drop", blocks=2)
    deep = refilled("duplicate", package.load_model(), package.layout, 6, seed=0)
    by_hand = tiny("llama")
    for block, source in zip(by_hand.model.layers, (0, 1, 1, 4, 4, 5), strict=True):
        block.load_state_dict(tiny("llama").model.layers[source].state_dict())
    torch.testing.assert_close(logits(deep), logits(by_hand))


def test_where_holes_are_guessed(tiny, pack_any):
    layout = pack_any(tiny("llama"), "drop", blocks=3).layout
    assert _places(layout, 6) == [0, 1, pytest.approx(1.5), 2, 3, 4]  # of the middle's four: 0, 2 and 3
    assert _places(layout, 10) == pytest.approx([0, *(1 + x / 4 for x in range(5)), *(2 + x / 3 for x in (1, 2, 3)), 4])
    assert [_nearest(place) for place in (1.0, 1.4, 1.5, 1.6, 2.5)] == [1, 1, 1, 2, 2]
    alone = layout.model_copy(update={"num_middle": 1})
    assert _places(alone, 5) == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "phi3", "opt", "gpt_neox"])
def test_regrown_channels_do_nothing_until_they_learn(tiny, pack_any, architecture):
    package = pack_any(tiny(architecture), "width", width=0.25)
    small = package.load_model()
    assert missing(small, package.layout, 6) == ("regrow", "split")
    wide = refilled("regrow", package.load_model(), package.layout, 6, seed=0)
    assert {find_mlp(block).num_channels for block in blocks(wide)} == {find_mlp(blocks(wide)[0]).num_channels}
    torch.testing.assert_close(logits(wide), logits(small), rtol=1e-4, atol=1e-5)
    again = refilled("regrow", package.load_model(), package.layout, 6, seed=0)
    other = refilled("regrow", package.load_model(), package.layout, 6, seed=1)
    assert model_digest(again) == model_digest(wide) != model_digest(other)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_split_channels_start_near_the_package_and_can_part(tiny, pack_any, architecture):
    package = pack_any(tiny(architecture), "width", width=0.25)
    small = package.load_model()
    wide = refilled("split", package.load_model(), package.layout, 6, seed=0)
    torch.testing.assert_close(logits(wide), logits(small), rtol=0.1, atol=0.5)
    lost = (logits(tiny(architecture)) - logits(small)).norm()
    assert (logits(wide) - logits(small)).norm() < lost / 4
    block = blocks(wide)[2]
    weight = block.get_submodule(find_mlp(block).inputs[0]).weight.detach()
    lines = weight.T if architecture == "gpt2" else weight
    assert len({tuple(line.tolist()) for line in lines}) == len(lines)


def test_nothing_is_missing_where_all_was_kept(tiny, pack_any):
    package = pack_any(tiny("llama"), "keep-all")
    model = package.load_model()
    assert missing(model, package.layout, 6) == ()
    assert refilled("as_is", model, package.layout, 6, seed=0) is model
    for name in ("regrow", "duplicate", "fold"):
        with pytest.raises(ConfigError, match=f"start '{name}' has nothing to do for this package"):
            refilled(name, model, package.layout, 6, seed=0)
