"""A drawing as SVG text: colours by class, so that they follow the page's or the reader's light or dark dress."""

from __future__ import annotations

from html import escape

import numpy as np

from lora_ensemble.dicor.report.drawing import Box, Cells, Drawing, Line, Mark, Shape, Text
from lora_ensemble.dicor.report.palette import css

_CORNERS: dict[Shape, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
    "down": [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
    "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
}


def corners(mark: Mark) -> list[tuple[float, float]]:
    """The corners of a mark that has some; none of a circle or a plus."""
    x, y = mark.at
    return [(x + mark.radius * a, y + mark.radius * b) for a, b in _CORNERS.get(mark.shape, [])]


TITLE = 40.0
"""Room above a drawing that stands alone, for its title."""


def svg(drawing: Drawing, *, title: str = "") -> str:
    """The drawing as an element of a page; with a ``title`` as a file's whole text, with that above it."""
    id_, wide, high = drawing.name, _n(drawing.width), drawing.height
    inside = "".join(_part(part) for part in drawing.parts)
    # On a page the width may shrink, and the height follows.
    size, style = f'viewBox="0 0 {wide} {_n(high)}" width="{wide}"', ""
    if title:
        size = f'viewBox="-12 {_n(-TITLE)} {_n(drawing.width + 24)} {_n(high + TITLE + 12)}"'
        style = f"<style>{escape(css(), quote=False)}svg{{background:var(--paper)}}</style>"
        inside += _part(Text((0, 18 - TITLE), title, "ink", size=15, bold=True))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="{id_}-title {id_}-desc">'
        f'<title id="{id_}-title">{escape(title or drawing.title)}</title>'
        f'<desc id="{id_}-desc">{escape(drawing.description)}</desc>'
    )
    return f"{head}{style}{inside}</svg>\n"


def _n(value: float) -> str:
    """A number as short as it may be: a tenth of a pixel is enough."""
    return f"{value:.1f}".removesuffix(".0")


def _points(points: object) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)  # type: ignore[attr-defined]


def _titled(start: str, tag: str, title: str) -> str:
    return f"{start}><title>{escape(title)}</title></{tag}>" if title else f"{start}/>"


def _part(part: Line | Mark | Box | Text | Cells) -> str:
    if isinstance(part, Line):
        if part.area:
            return f'<polygon class="f-{part.colour}" fill-opacity=".16" points="{_points(part.points)}"/>'
        dash = f' stroke-dasharray="{" ".join(_n(d) for d in part.dash)}"' if part.dash else ""
        width = f'stroke-width="{_n(part.width)}" stroke-linejoin="round"'
        return f'<polyline class="s-{part.colour}" {width}{dash} points="{_points(part.points)}"/>'
    if isinstance(part, Mark):
        return _mark(part)
    if isinstance(part, Box):
        look = f'class="f-{part.colour}"' if part.colour else 'fill="transparent"'
        place = f'x="{_n(part.x)}" y="{_n(part.y)}" width="{_n(part.width)}" height="{_n(part.height)}"'
        return _titled(f"<rect {look} {place}", "rect", part.title)
    if isinstance(part, Text):
        x, y = (_n(v) for v in part.at)
        look = f'class="f-{part.colour}" font-size="{_n(part.size)}" text-anchor="{part.anchor}"'
        look += ' font-weight="600"' if part.bold else ""
        place = f'x="{x}" y="{y}"' + (f' transform="rotate(-90 {x} {y})"' if part.upright else "")
        return f"<text {look} {place}>{escape(part.text)}</text>"
    return _cells(part)


def _mark(mark: Mark) -> str:
    x, y, r = *mark.at, mark.radius
    if mark.shape == "plus":
        d = f"M{_n(x - r)} {_n(y)}H{_n(x + r)}M{_n(x)} {_n(y - r)}V{_n(y + r)}"
        return _titled(f'<path class="s-{mark.colour}" stroke-width="2" d="{d}"', "path", mark.title)
    look = f'class="o-{mark.colour}" stroke-width="1.6"' if mark.hollow else f'class="f-{mark.colour}"'
    if mark.shape == "circle":
        return _titled(f'<circle {look} cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}"', "circle", mark.title)
    return _titled(f'<polygon {look} points="{_points(corners(mark))}"', "polygon", mark.title)


def _cells(cells: Cells) -> str:
    """A path for each level, with a rectangle for each run of equal cells in a row: far less text than cells."""
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(cells.levels.tolist()):
        ends = np.flatnonzero(np.diff(row)).tolist()
        starts = [0, *(e + 1 for e in ends)]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            paths.setdefault(row[start], []).append(f"M{start} {i}h{end - start}v1h{start - end}z")
    rows, columns = cells.levels.shape
    scale = f"translate({_n(cells.x)} {_n(cells.y)}) scale({cells.width / columns:.5f} {cells.height / rows:.5f})"
    inside = "".join(f'<path class="f-h{level}" d="{"".join(d)}"/>' for level, d in sorted(paths.items()))
    return f'<g transform="{scale}" shape-rendering="crispEdges">{inside}</g>'
