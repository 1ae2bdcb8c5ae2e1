"""Drawings: every shape as SVG with its coordinates and its class, and what words are in it as words."""

from __future__ import annotations

import re
from typing import get_args
from xml.etree import ElementTree

import pytest

from offsite.report.drawing import Circle, Cross, Drawing, Line, Polyline, Rectangle, Shape, Text, px
from offsite.report.engine import environment

SHAPES = [
    (Line(1, 2.04, 3.06, 4, "grid"), '<line x1="1" x2="2" y1="3.1" y2="4" class="grid"/>'),
    (Line.across(1, 2, 3, "a"), '<line x1="1" x2="2" y1="3" y2="3" class="a"/>'),
    (Line.down(1, 2, 3, "a"), '<line x1="1" x2="1" y1="2" y2="3" class="a"/>'),
    (Text("a<b", 1, 2, "axis"), '<text x="1" y="2" class="axis">a&lt;b</text>'),
    (Text("5%", 1, 2, "axis", "end"), '<text x="1" y="2" text-anchor="end" class="axis">5%</text>'),
    (Circle(1.25, 2, 4.5, "dot owner"), '<circle cx="1.2" cy="2" r="4.5" class="dot owner"/>'),
    (Polyline(((1, 2), (3.5, 4.25)), "line s1"), '<polyline points="1,2 3.5,4.2" class="line s1"/>'),
    (Rectangle(1, 2, 3, 15, "bar"), '<rect x="1" y="2" width="3" height="15" rx="2" class="bar"/>'),
    (Cross(10, 20, 5, "limit"), '<path d="M5 20H15M10 15V25" class="limit"/>'),
]


def svg(drawing):
    return environment().get_template("drawing.svg.jinja").module.svg(drawing)


@pytest.mark.parametrize(("shape", "made"), SHAPES)
def test_a_shape_is_drawn_where_its_numbers_say(shape, made):
    drawn = svg(Drawing("of one", 50, (shape,)))
    assert drawn == (
        f'<svg viewBox="0 0 720 50" role="img" aria-label="of one" class="chart"><title>of one</title>{made}</svg>'
    )


def test_every_shape_is_drawn_in_the_order_given():
    assert {type(shape) for shape, _ in SHAPES} == set(get_args(Shape))
    drawn = svg(Drawing("of all", 50, tuple(shape for shape, _ in SHAPES)))
    assert re.sub(r"^.*?</title>|</svg>$", "", drawn) == "".join(made for _, made in SHAPES)


def test_words_in_a_drawing_stay_words():
    evil = "</title></svg><script>\"'&"
    drawn = svg(Drawing(evil, 50, (Text(evil, 1, 2, evil),)))
    read = ElementTree.fromstring(drawn)
    assert [element.tag for element in read.iter()] == ["svg", "title", "text"]
    assert [read[0].text, read[1].text, read[1].get("class"), read.get("aria-label")] == [evil] * 4


def test_coordinates_have_one_decimal_at_most():
    assert [px(value) for value in (1, 1.0, 1.04, 1.05001, 99.96, -0.5)] == ["1", "1", "1", "1.1", "100", "-0.5"]
