"""A report's drawings as files, PNG and SVG. The only module that needs matplotlib."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lora_ensemble.dicor import record
from lora_ensemble.dicor.report.drawing import Box, Cells, Drawing, Line, Mark, Text
from lora_ensemble.dicor.report.palette import LEVELS, roles
from lora_ensemble.dicor.report.svg import TITLE, corners, svg
from lora_ensemble.errors import UserError

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Polygon, Rectangle
except ImportError as e:
    raise UserError(f"--plots needs matplotlib ({e}); run: pip install 'lora-ensemble[plots]'") from e

POINT = 0.72
"""Points in a unit of a drawing, of which there are 100 to an inch."""
EDGE = 12.0


def check_folder(folder: Path) -> None:
    """Make the folder of the plots; ``UserError`` where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"{folder}: plots cannot be written: {e.strerror}; give another folder with --plots") from e


def save(drawings: Iterable[Drawing], task: str, folder: Path) -> list[Path]:
    """Write each drawing of a task as ``task-name.png`` and ``.svg`` and return the paths; each whole or not at all."""
    saved = []
    for drawing in drawings:
        title, path = f"{task}: {drawing.title}", folder / f"{task}-{drawing.name}.png"
        beside = folder / f".{path.stem}.{os.getpid()}.png"
        FigureCanvasAgg(figure(drawing, title)).print_png(beside)
        os.replace(beside, path)
        with record.whole(path.with_suffix(".svg")) as f:
            f.write(svg(drawing, title=title))
        saved += [path, path.with_suffix(".svg")]
    return saved


def figure(drawing: Drawing, title: str) -> Figure:
    """The drawing in its light dress, a title above it, at 200 dots per inch."""
    colours = {role: light for role, (light, _) in roles().items()}
    wide, high = drawing.width + 2 * EDGE, drawing.height + TITLE + EDGE
    found = Figure(figsize=(wide / 100, high / 100), dpi=200, facecolor=colours["paper"])
    axes = found.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-EDGE, wide - EDGE), ylim=(high - TITLE, -TITLE))
    axes.axis("off")
    for order, part in enumerate([*drawing.parts, Text((0, 18 - TITLE), title, "ink", size=15, bold=True)]):
        _draw(axes, part, colours, order)
    return found


def _draw(axes: Axes, part: Line | Mark | Box | Text | Cells, colours: dict[str, str], order: int) -> None:
    if isinstance(part, Line) and part.area:
        axes.add_patch(Polygon(np.array(part.points), color=colours[part.colour], alpha=0.16, lw=0, zorder=order))
    elif isinstance(part, Line):
        x, y = zip(*part.points, strict=True) if part.points else ((), ())
        dashes = (0, [d / part.width for d in part.dash]) if part.dash else "solid"  # matplotlib's are in line widths
        axes.plot(x, y, color=colours[part.colour], lw=part.width * POINT, ls=dashes, zorder=order)
    elif isinstance(part, Mark):
        _mark(axes, part, colours, order)
    elif isinstance(part, Box) and part.colour:
        axes.add_patch(
            Rectangle((part.x, part.y), part.width, part.height, color=colours[part.colour], lw=0, zorder=order)
        )
    elif isinstance(part, Text):
        axes.text(
            *part.at,
            part.text.replace("$", r"\$"),  # a name is no formula
            color=colours[part.colour],
            fontsize=part.size * POINT,
            fontweight="bold" if part.bold else "normal",
            ha={"start": "left", "middle": "center", "end": "right"}[part.anchor],
            va="baseline",
            rotation=90 if part.upright else 0,
            rotation_mode="anchor",
            zorder=order,
        )
    elif isinstance(part, Cells):
        scale = ListedColormap([colours[f"h{i}"] for i in range(LEVELS)])
        extent = (part.x, part.x + part.width, part.y + part.height, part.y)
        axes.imshow(
            part.levels, scale, vmin=0, vmax=LEVELS - 1, extent=extent, aspect="auto", interpolation="nearest",
            zorder=order,
        )  # fmt: skip
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())


def _mark(axes: Axes, mark: Mark, colours: dict[str, str], order: int) -> None:
    colour = colours[mark.colour]
    if mark.shape == "plus":
        (x, y), r = mark.at, mark.radius
        axes.plot([x - r, x + r, np.nan, x, x], [y, y, np.nan, y - r, y + r], color=colour, lw=2 * POINT, zorder=order)
        return
    look = {"facecolor": colours["paper"] if mark.hollow else colour, "edgecolor": colour if mark.hollow else "none"}
    shape = Circle(mark.at, mark.radius) if mark.shape == "circle" else Polygon(np.array(corners(mark)))
    shape.set(**look, lw=1.6 * POINT if mark.hollow else 0, zorder=order)
    axes.add_patch(shape)
