"""What all plots share: how a series looks, and a chart as a specification for scripts, as SVG and as PNG.

Colours are named as in ``page.css``: a chart says var(--ink), which the page paints light or dark.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import altair as alt
import numpy as np
import vl_convert

from lora_ensemble.files import replacing

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""The version that Altair writes, as vl-convert names it."""
INK, SOFT, GRID, LINE, ACCENT, PAPER = (f"var(--{c})" for c in ("ink", "soft", "grid", "line", "accent", "paper"))
SERIES = [f"var(--s{i})" for i in range(6)]
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
DASHES = ((1, 0), (6, 3), (2, 2.5), (8, 3, 2, 3))
_CONFIG = {
    "aria": False,  # the page says what is to be seen
    "background": PAPER,
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "domainColor": LINE, "gridColor": GRID, "labelColor": SOFT, "labelFlush": False, "labelFontSize": 12,
        "labelLimit": 0, "labelPadding": 7, "tickSize": 0, "titleColor": SOFT, "titleFontSize": 12.5,
        "titleFontWeight": "normal", "titlePadding": 9,
    },
    "axisTop": {"domain": False, "grid": False, "labelFlush": True, "labelFontSize": 10, "labelPadding": 2,
                "titleFontSize": 11, "titlePadding": 2},
    "legend": {
        "columnPadding": 40, "labelColor": INK, "labelFontSize": 12.5, "labelLimit": 0, "orient": "top",
        "symbolOpacity": 1, "symbolSize": 90, "titleColor": INK, "titleFontSize": 12.5, "titleFontWeight": "normal",
    },
    "point": {"opacity": 1, "strokeWidth": 1.6},
    "text": {"color": INK, "fontSize": 12.5},
    "title": {"anchor": "start", "color": INK, "fontSize": 15, "offset": 16},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A chart, what it says in words, and its numbers as a table."""

    name: str  # of its file: letters and hyphens
    title: str
    description: str  # what is to be seen, for who does not see it
    chart: Any  # of Altair, in layers or side by side
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    picture: bool = False  # too many marks for a still SVG: a PNG is smaller

    @functools.cached_property
    def specification(self) -> dict[str, Any]:
        """As Vega-Lite. Its parameter ``ticked`` is a list of members, by their place in ``Facts.shown``."""
        return self.chart.add_params(alt.param(name="ticked", value=[])).to_dict() | {"config": _CONFIG}

    def svg(self) -> str:
        """As an element of a page, which has the colours."""
        return _svg(self.specification).replace("<svg", '<svg aria-hidden="true"', 1)

    def file(self, title: str) -> str:
        """As SVG that stands alone, in the light dress, with a title above it."""
        svg = _svg(self.specification | {"title": title, "padding": 12})
        told = f' role="img"><title>{escape(title)}</title><desc>{escape(self.description)}</desc>'
        return painted(svg, "light").replace(">", told, 1)

    def png(self, dress: Literal["light", "dark"]) -> bytes:
        """As a still picture in one dress."""
        return _png(painted(self.svg(), dress))


def _svg(specification: dict[str, Any]) -> str:
    return str(vl_convert.vegalite_to_svg(specification, vl_version=VEGA_LITE))


def _png(svg: str) -> bytes:
    """As PNG, two pixels to a unit, packed anew: vl-convert packs fast, to six times the size."""
    png, pixels, at = vl_convert.svg_to_png(svg, scale=2), b"", 33  # behind the signature and the header
    while at < len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4])
        pixels += png[at + 8 : end] if png[at + 4 : at + 8] == b"IDAT" else b""
        at = end + 4
    parts = (b"IDAT", zlib.compress(zlib.decompress(pixels), 9)), (b"IEND", b"")
    chunks = (len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in parts)
    return png[:33] + b"".join(chunks)


def save(plots: Iterable[Plot], task: str, folder: Path) -> list[Path]:
    """Write each plot of a task as ``task-name.png`` and ``.svg`` and return the paths; each whole or not at all."""
    saved = []
    for plot in plots:
        svg = plot.file(f"{task}: {plot.title}")
        for ending, content in (("png", _png(svg)), ("svg", svg.encode())):
            saved.append(folder / f"{task}-{plot.name}.{ending}")
            with replacing(saved[-1]) as beside:
                beside.write_bytes(content)
    return saved


@functools.cache
def palette() -> dict[str, dict[str, str]]:
    """By dress, light and dark: what a colour is for, and the colour."""
    css = (files(__package__) / "page.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", css)
    return {"light": {name: light for name, light, _ in pairs}, "dark": {name: dark for name, _, dark in pairs}}


def painted(svg: str, dress: Literal["light", "dark"]) -> str:
    """SVG with the colours of a dress instead of their names; texts, which may be the user's, stay as they are."""
    colours = palette()[dress]
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], tag[0]), svg)


@dataclass(frozen=True)
class Look:
    """A series in a legend; one without points has the shape "stroke"."""

    series: str
    colour: str
    shape: str = "circle"
    dash: Sequence[float] = DASHES[0]
    hollow: bool = False


def channels(looks: Sequence[Look], width: float) -> tuple[list[Any], list[Any], list[Any]]:
    """The channels of points, lines and areas of these series, by the field ``series``, with one legend for all."""
    names = [look.series for look in looks]
    columns = max(int(width / (7.2 * max(map(len, names)) + 36)), 1)
    legend = alt.Legend(title=None, columns=columns)

    def channel(kind: Any, values: Sequence[Any]) -> Any:
        return kind("series:N", scale=alt.Scale(domain=names, range=list(values)), legend=legend)

    stroke = channel(alt.Stroke, [look.colour for look in looks])
    fill = channel(alt.Fill, [PAPER if look.hollow else look.colour for look in looks])
    shape = channel(alt.Shape, [look.shape for look in looks])
    dash = channel(alt.StrokeDash, [list(look.dash) for look in looks])
    return [stroke, fill, shape], [stroke, dash], [fill]


def chart(values: Iterable[Mapping[str, Any]]) -> alt.Chart:
    """A chart of rows; those with an undefined number cannot be drawn."""
    return alt.Chart(alt.InlineData(values=[dict(v) for v in values if all(x == x for x in v.values())]))


def rings(values: Iterable[Mapping[str, Any]], **at: Any) -> alt.Chart:
    """Rings around the marks whose ``holds``, a list of members, has one that is ticked."""
    held = chart(values).transform_flatten(["holds"]).transform_filter("indexof(ticked, datum.holds) >= 0")
    return held.mark_point(size=330, filled=False, stroke=INK, strokeWidth=2.4).encode(**at)


def tooltip(fields: Iterable[str]) -> list[alt.Tooltip]:
    """What is told of a mark where the pointer is: these fields, all texts."""
    return [alt.Tooltip(field=name, type="nominal") for name in fields]


def span(values: Iterable[float] | np.ndarray, *, margin: float = 0.06, least: float = 0.01) -> list[float]:
    """From a little below the lowest to a little above the highest finite value; not narrower than ``least``."""
    finite = np.array([v for v in values if np.isfinite(v)] or [0.0, 1.0], float)
    low, high = float(finite.min()), float(finite.max())
    room = max(least - (high - low), 0) / 2 + margin * max(high - low, least)
    return [low - room, high + room]


def axes(x: str, x_range: Sequence[float], y: str, y_range: Sequence[float], *, whole: bool = False) -> dict[str, Any]:
    """The places of marks with fields ``x`` and ``y`` in these ranges; ``whole``: x are whole numbers."""
    step = alt.Axis(title=x, tickMinStep=1) if whole else alt.Axis(title=x, tickCount=8)
    return {
        "x": alt.X("x:Q", scale=alt.Scale(domain=list(x_range), nice=False, zero=False), axis=step),
        "y": alt.Y("y:Q", scale=alt.Scale(domain=list(y_range), nice=False, zero=False), axis=alt.Axis(title=y)),
    }
