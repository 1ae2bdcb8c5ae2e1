import pytest
import torch
from tiny_architectures import tiny as tiny_of

from emulator.compression.compress import Recipe, compress
from emulator.compression.unequal import favour, wider_blocks
from offsite.errors import ConfigError
from offsite.modelling.split import make_plan


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        ((), {}),
        (("3:0.5",), {3: 0.5}),
        (("2-4:0.67", "7:1"), {2: 0.67, 3: 0.67, 4: 0.67, 7: 1.0}),
    ],
)
def test_blocks_and_their_shares_are_read(stated, wanted) -> None:
    assert wider_blocks(stated) == wanted


@pytest.mark.parametrize("stated", ["", *"2-8 2-8: a:0.5 8-2:0.5 2:0 2:1.5 -2:0.5 2-:0.5 2:0.5: \u0662:0.5".split()])
def test_what_is_not_of_the_form_is_refused(stated: str) -> None:
    with pytest.raises(ValueError, match=r"expected|not of the form"):
        wider_blocks([stated])


def test_a_block_is_named_once() -> None:
    with pytest.raises(ValueError, match="block 4 is named already"):
        wider_blocks(["2-4:0.5", "4-6:0.6"])


def test_blocks_keep_their_own_shares_and_the_average_is_stated(tiny, batch) -> None:
    full = tiny("llama")
    recipe = Recipe(width=0.25, wider={2: 0.5, 4: 1.0}, calibration=[batch])
    emulator = compress(full, make_plan(full, num_bottom=1, num_top=1), "width", recipe)
    assert {name: len(kept) for name, kept in emulator.channels.items()} == {
        "middle.0": 16,
        "middle.1": 32,
        "middle.2": 16,
    }
    assert emulator.settings == {"width": (16 + 32 + 16 + 64) / (4 * 64)}
    assert [block.mlp.down_proj.in_features for block in emulator.model.model.layers] == [64, 16, 32, 16, 64, 64]


def test_every_expert_of_a_wider_block_keeps_as_many(batch) -> None:
    full = tiny_of("mixtral")
    recipe = Recipe(width=0.5, wider={3: 0.8}, calibration=[batch])
    emulator = compress(full, make_plan(full, num_bottom=1, num_top=1), "width", recipe)
    widths = {name: {len(kept) for kept in lists} for name, lists in emulator.experts.items()}
    assert widths == {f"middle.{i}.mlp.experts": {40 if i == 2 else 24} for i in range(4)}


@pytest.mark.parametrize("outside", [0, 5, 40])
def test_blocks_of_the_ends_are_refused(tiny, batch, outside: int) -> None:
    full = tiny("llama")
    recipe = Recipe(width=0.25, wider={2: 0.5, outside: 0.5}, calibration=[batch])
    with pytest.raises(ConfigError, match=f"names block {outside}, expected blocks of the middle: 1 to 4"):
        compress(full, make_plan(full, num_bottom=1, num_top=1), "width", recipe)


def test_what_a_variant_favours_follows_from_its_number_and_place() -> None:
    one = favour(1, 0.5, "3.mlp.0", 4000)
    assert torch.equal(one, favour(1, 0.5, "3.mlp.0", 4000))
    torch.testing.assert_close(favour(1, 1.0, "3.mlp.0", 4000), one.square())
    assert float(one.log().std()) == pytest.approx(0.5, abs=0.03)
    for other in (favour(2, 0.5, "3.mlp.0", 4000), favour(1, 0.5, "4.mlp.0", 4000)):
        assert abs(float(torch.corrcoef(torch.stack([one.log(), other.log()]))[0, 1])) < 0.1


@pytest.mark.parametrize("channels", ["obs", "activation"])
def test_variants_keep_different_channels_and_the_same_ones_again(tiny, batch, channels: str) -> None:
    full = tiny("llama")
    plan = make_plan(full, num_bottom=1, num_top=1)

    def kept(variant, noise=0.5):
        recipe = Recipe(width=0.5, channels=channels, variant=variant, variant_noise=noise, calibration=[batch])
        made = compress(full, plan, "width", recipe)
        assert (made.variant, made.settings) == (variant, {"width": 0.5})
        return made.channels

    usual, first, second = kept(0), kept(1), kept(2)
    assert first == kept(1)
    shared = [
        len(set(one[name]) & set(other[name])) / len(one[name])
        for one, other in ((usual, first), (usual, second), (first, second))
        for name in usual
    ]
    assert 0.5 < sum(shared) / len(shared) < 1  # by chance it would be a half
    assert kept(1, noise=1e-6) == usual


def test_a_variants_weights_are_refitted_to_its_channels(tiny, batch) -> None:
    """The noise is in the choice alone: with every channel's own weights at their best, as for any choice."""
    from emulator.compression.width import Unit, activities, refit
    from offsite.modelling.blocks import block_list
    from offsite.modelling.mlps import find_mlp, outgoing_weight

    full = tiny("llama")
    plan = make_plan(full, num_bottom=1, num_top=1)
    made = compress(full, plan, "width", Recipe(width=0.5, variant=3, calibration=[batch]))
    small = made.model.model.layers[1]
    found = outgoing_weight(small, find_mlp(small)).clone()
    block = block_list(full, plan.stack)[1]
    [activity] = activities(full, [block], [batch], products=True)
    refit(Unit(small, find_mlp(small)), Unit(block, find_mlp(block)), made.channels["middle.0"], activity)
    assert torch.equal(found, outgoing_weight(small, find_mlp(small)))
