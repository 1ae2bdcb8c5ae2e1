from __future__ import annotations

from emulator.compression.methods import METHODS
from emulator.compression.width import MULTIPLE, num_kept
from emulator.dial.sizes import LADDERS, SIZES, Shape, between, halfway, nearest

SHAPE = Shape(num_middle=26, num_channels=1536, multiple=MULTIPLE)


def test_sizes_of_width_are_those_that_width_makes():
    for size in between("width", 0.0, 1.0, SHAPE):
        typed = float(LADDERS["width"].words(size, SHAPE)[-1])
        assert num_kept(1536, typed) == round(size * 1536)
    found = nearest("width", SIZES, SHAPE)
    assert [round(size * 1536) for size in found] == [num_kept(1536, size) for size in SIZES]


def test_few_channels_are_counted_singly():
    assert between("width", 0, 1, Shape(4, 6, 8)) == [number / 6 for number in range(1, 7)]


def test_sizes_of_drop_are_blocks():
    assert LADDERS["drop"].words(13 / 26, SHAPE) == ["--method", "drop", "--blocks", "13"]
    assert nearest("drop", SIZES, Shape(4, 1536, 8)) == [0.5, 0.75]
    assert between("drop", 0, 1, Shape(3, 8, 8)) == [2 / 3, 1.0]


def test_halfway_lies_between_neighbours_and_only_where_there_is_room():
    assert halfway("drop", [2 / 8, 3 / 8, 7 / 8], Shape(8, 8, 8)) == [5 / 8]
    sizes = nearest("width", SIZES, SHAPE)
    found = halfway("width", sizes, SHAPE)
    assert [low < rung < high for low, rung, high in zip(sizes, found, sizes[1:], strict=False)] == [True] * 4


def test_every_ladder_is_of_a_method():
    assert LADDERS.keys() <= METHODS
