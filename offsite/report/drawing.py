"""A drawing as data: lines, texts and shapes by their coordinates. ``templates/drawing.svg.jinja`` makes SVG of it.

Coordinates are CSS pixels of a drawing 720 wide that scales with the page. ``css`` is the class that the page's style
sheet colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

WIDTH = 720

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A straight line from (x1, y1) to (x2, y2)."""

    kind: ClassVar = "line"
    x1: float
    x2: float
    y1: float
    y2: float
    css: str

    @classmethod
    def across(cls, left: float, right: float, y: float, css: str) -> Line:
        """Return a level line."""
        return cls(left, right, y, y, css)

    @classmethod
    def down(cls, x: float, top: float, bottom: float, css: str) -> Line:
        """Return an upright line."""
        return cls(x, x, top, bottom, css)


@dataclass(frozen=True)
class Text:
    """Words whose base line is at y; they begin at x, or have it in their middle or at their end."""

    kind: ClassVar = "text"
    text: str
    x: float
    y: float
    css: str
    anchor: Literal["start", "middle", "end"] = "start"


@dataclass(frozen=True)
class Circle:
    """A circle about (x, y)."""

    kind: ClassVar = "circle"
    x: float
    y: float
    radius: float
    css: str


@dataclass(frozen=True)
class Polyline:
    """Straight lines from point to point."""

    kind: ClassVar = "polyline"
    points: tuple[Point, ...]
    css: str


@dataclass(frozen=True)
class Rectangle:
    """A rectangle with slightly rounded corners, its upper left one at (x, y)."""

    kind: ClassVar = "rectangle"
    x: float
    y: float
    width: float
    height: float
    css: str


@dataclass(frozen=True)
class Cross:
    """A small upright cross about (x, y), whose arms are that long."""

    kind: ClassVar = "cross"
    x: float
    y: float
    arm: float
    css: str


Shape = Line | Text | Circle | Polyline | Rectangle | Cross


@dataclass(frozen=True)
class Drawing:
    """Shapes, later ones over earlier ones, and the title that tells them to those who do not see them."""

    title: str
    height: int
    shapes: tuple[Shape, ...]
    width: int = WIDTH


def px(value: float) -> str:
    """Return a coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")
