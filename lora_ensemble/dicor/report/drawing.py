"""A drawing as data: lines, marks, boxes and texts in units of a CSS pixel, which ``svg`` and ``plots`` write out.

Colours are roles of ``palette``. x grows to the right, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Shape = Literal["circle", "square", "triangle", "diamond", "down", "plus"]
SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "diamond", "down", "plus")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 2.5), (8, 3, 2, 3))
FONT = 12.5
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Through points; with ``area`` what they enclose is filled, lightly."""

    points: Sequence[Point]
    colour: str
    width: float = 1.5
    dash: Sequence[float] = ()
    area: bool = False


@dataclass(frozen=True)
class Mark:
    """A shape around a point."""

    at: Point
    colour: str
    shape: Shape = "circle"
    radius: float = 4.0
    hollow: bool = False
    title: str = ""


@dataclass(frozen=True)
class Box:
    """A rectangle; a colour of "" shows nothing but its title."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str = ""


@dataclass(frozen=True)
class Text:
    """One line of text whose baseline starts, ends or has its middle at a point."""

    at: Point
    text: str
    colour: str = "soft"
    anchor: Literal["start", "middle", "end"] = "start"
    size: float = FONT
    bold: bool = False
    upright: bool = False
    """Turned by 90 degrees, read from below."""


@dataclass(frozen=True)
class Cells:
    """A grid of squares: numbers (rows, columns) of ``palette.LEVELS``, row 0 on top."""

    x: float
    y: float
    width: float
    height: float
    levels: np.ndarray


@dataclass
class Drawing:
    """A plot, what it says in words, and its numbers as a table."""

    name: str
    """Of its file: letters and hyphens."""
    title: str
    description: str
    """What is to be seen, for who does not see it."""
    width: float
    height: float
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    parts: list[Line | Mark | Box | Text | Cells] = field(default_factory=list)

    def add(self, *parts: Line | Mark | Box | Text | Cells) -> None:
        """Draw these above what is there."""
        self.parts += parts


def text_width(text: str, size: float = FONT) -> float:
    """How wide a text is at most, in pixels: no font is at hand to measure it with."""
    return 0.62 * size * len(text)


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def ticks(low: float, high: float, most: int = 8, *, whole: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most about so many: steps of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= most)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float, step: float) -> str:
    """A tick's number, with the decimals that its step needs."""
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


class Axes:
    """A rectangle of a drawing in which numbers have a place."""

    def __init__(
        self, drawing: Drawing, box: tuple[float, float, float, float], x: tuple[float, float], y: tuple[float, float]
    ) -> None:
        self.drawing = drawing
        self.left, self.top, self.right, self.bottom = box
        self.x_range, self.y_range = x, y

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def at(self, x: float, y: float) -> Point:
        return self.x(x), self.y(y)

    def frame(self, x_label: str, y_label: str, *, whole: bool = False, x_only: bool = False) -> None:
        """Grid, ticks and labels; ``whole``: x are whole numbers; ``x_only``: y has no numbers."""
        d = self.drawing
        for values, vertical in ((ticks(*self.x_range, whole=whole), True), (ticks(*self.y_range), False)):
            if not vertical and x_only:
                continue
            step = values[1] - values[0] if len(values) > 1 else 1.0
            for v in values:
                if vertical:
                    d.add(Line([(self.x(v), self.top), (self.x(v), self.bottom)], "grid", 1))
                    d.add(Text((self.x(v), self.bottom + 18), label(v, step), anchor="middle"))
                else:
                    d.add(Line([(self.left, self.y(v)), (self.right, self.y(v))], "grid", 1))
                    d.add(Text((self.left - 8, self.y(v) + 4), label(v, step), anchor="end"))
        d.add(Line([(self.left, self.bottom), (self.right, self.bottom)], "line", 1))
        d.add(Text(((self.left + self.right) / 2, self.bottom + 38), x_label, anchor="middle"))
        if not x_only:
            d.add(Text((14, (self.top + self.bottom) / 2), y_label, anchor="middle", upright=True))


@dataclass(frozen=True)
class Key:
    """An entry of a legend, and how its series looks."""

    text: str
    colour: str
    shape: Shape | None = None
    hollow: bool = False
    dash: Sequence[float] | None = None
    """None: the series has no line."""
    band: bool = False


def legend(drawing: Drawing, left: float, top: float, right: float, keys: Sequence[Key]) -> float:
    """Put a legend in rows from ``left`` to ``right``; returns where the rows end, below."""
    x, y = left, top
    for key in keys:
        wide = 34 + text_width(key.text)
        if x > left and x + wide > right:
            x, y = left, y + 20
        middle = y + 8
        if key.band:
            corners = [(x, middle - 6), (x + 24, middle - 6), (x + 24, middle + 6), (x, middle + 6)]
            drawing.add(Line(corners, key.colour, area=True))
        if key.dash is not None:
            drawing.add(Line([(x, middle), (x + 24, middle)], key.colour, 1.8, key.dash))
        if key.shape:
            drawing.add(Mark((x + 12, middle), key.colour, key.shape, 4, key.hollow))
        drawing.add(Text((x + 31, middle + 4.5), key.text, "ink"))
        x += wide + 8
    return y + 20


def span(values: Sequence[float] | np.ndarray, *, margin: float = 0.06, least: float = 0.01) -> tuple[float, float]:
    """From a little below the lowest to a little above the highest finite value; not narrower than ``least``."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    room = max(least - (high - low), 0) / 2 + margin * max(high - low, least)
    return low - room, high + room
