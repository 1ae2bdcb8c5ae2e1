from __future__ import annotations

import pytest

from adapters.place import placed_blocks, placed_linears
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError


def spec(**changes):
    return AdapterSpec(**{"kind": "lora", "rank": 2, **changes})


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("2+2", ("bottom.0", "bottom.1", "top.0", "top.1")),
        ("1+1", ("bottom.0", "top.1")),
        ("0+2", ("top.0", "top.1")),
        ("2+0", ("bottom.0", "bottom.1")),
        ("0+1", ("top.1",)),
    ],
)
def test_counts_are_taken_from_the_outside(dropped_package, placement, expected):
    assert placed_blocks(spec(placement=placement), dropped_package.layout) == expected


@pytest.mark.parametrize("placement", ["3+2", "2+3", "0+9"])
def test_no_more_blocks_than_the_ends_have(dropped_package, placement):
    with pytest.raises(ConfigError, match="the package's ends have 2\\+2 blocks") as caught:
        placed_blocks(spec(placement=placement), dropped_package.layout)
    assert caught.value.hint == "use at most --placement 2+2"


def test_all_blocks_where_the_middle_can_be_lifted(narrow_package, dropped_package):
    assert placed_blocks(spec(placement="all"), narrow_package.layout) == tuple(narrow_package.layout.blocks)
    with pytest.raises(ConfigError, match="keeps no module one to one") as caught:
        placed_blocks(spec(placement="all"), dropped_package.layout)
    assert caught.value.hint == "use --placement 2+2"


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("top", ("top.0", "top.1")),
        ("last:1", ("top.1",)),
        ("last:2", ("top.0", "top.1")),
        ("last:4", ("middle.2", "middle.3", "top.0", "top.1")),
        ("last:7", ("bottom.1", "middle.0", "middle.1", "middle.2", "middle.3", "top.0", "top.1")),
    ],
)
def test_the_last_blocks_take_in_the_middle(narrow_package, placement, expected):
    assert placed_blocks(spec(placement=placement), narrow_package.layout) == expected
    names = placed_linears(spec(placement=placement, targets="mlp"), narrow_package.layout)
    assert tuple(dict.fromkeys(".".join(name.split(".")[:2]) for name in names)) == expected
    assert {name.split(".", 2)[2] for name in names} == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def test_all_blocks_by_their_number_are_all_blocks(narrow_package):
    assert placed_blocks(spec(placement="last:8"), narrow_package.layout) == tuple(narrow_package.layout.blocks)
    with pytest.raises(ConfigError, match="--placement last:9: the package has 8 blocks") as caught:
        placed_blocks(spec(placement="last:9"), narrow_package.layout)
    assert caught.value.hint == "use at most --placement last:8"


def test_the_last_blocks_stay_in_the_end_where_the_middle_cannot_be_lifted(dropped_package):
    assert placed_blocks(spec(placement="last:2"), dropped_package.layout) == ("top.0", "top.1")
    with pytest.raises(ConfigError, match=r"--placement last:3: .*keeps no module one to one") as caught:
        placed_blocks(spec(placement="last:3"), dropped_package.layout)
    assert caught.value.hint == "use --placement 2+2"


def test_linears_by_target(dropped_package):
    layout = dropped_package.layout
    every = placed_linears(spec(placement="1+0"), layout)
    attention = placed_linears(spec(placement="1+0", targets="attention"), layout)
    feed_forward = placed_linears(spec(placement="1+0", targets="mlp"), layout)
    assert every == {**attention, **feed_forward}
    assert {name.removeprefix("bottom.0.") for name in attention} == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    }
    assert feed_forward == {
        "bottom.0.mlp.gate_proj": (32, 48),
        "bottom.0.mlp.up_proj": (32, 48),
        "bottom.0.mlp.down_proj": (48, 32),
    }


def test_only_adaptable_modules_of_the_middle(narrow_package):
    layout = narrow_package.layout.model_copy(update={"adaptable_middle": ("self_attn.q_proj", "mlp.up_proj")})
    found = placed_linears(spec(placement="all"), layout)
    assert {name for name in found if name.startswith("middle.1.")} == {
        "middle.1.self_attn.q_proj",
        "middle.1.mlp.up_proj",
    }
    same = placed_linears(spec(placement="all"), layout, same_size_only=True)
    assert {name for name in same if name.startswith("middle.1.")} == {"middle.1.self_attn.q_proj"}
    assert "bottom.0.mlp.up_proj" in same


def test_nothing_left_to_adapt(dropped_package):
    layout = dropped_package.layout.model_copy(update={"mlp_linears": ()})
    with pytest.raises(ConfigError, match="--targets mlp: no linear module of the placed blocks is left"):
        placed_linears(spec(targets="mlp"), layout)
