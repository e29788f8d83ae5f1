"""Pieces of an HTML page. Every text is escaped here, so that a member may be called anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

from lora_ensemble.dicor.report.drawing import Drawing
from lora_ensemble.dicor.report.svg import svg

MOST_PRINTED = (10, 60)
"""Columns and rows above which the numbers of a plot are on the screen only: on paper they would be cut off."""


def paragraph(text: str, *, look: str = "") -> str:
    """One paragraph of plain text."""
    return f"<p{_class(look)}>{escape(text)}</p>\n"


def section(id_: str, heading: str, *parts: str) -> str:
    """A section with its heading."""
    head = f'<h2 id="{id_}-h">{escape(heading)}</h2>\n'
    return f'<section id="{id_}" aria-labelledby="{id_}-h">\n{head}{"".join(parts)}</section>\n'


def definitions(pairs: Sequence[tuple[str, str]], *, look: str = "") -> str:
    """Terms and what they stand for."""
    return (
        f"<dl{_class(look)}>"
        + "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in pairs)
        + "</dl>\n"
    )


MOST_ON_A_LINE = 40
"""Characters of a row's heading above which it is broken."""
Cell = str | tuple[str, str]
"""A text, or one with a smaller one below it."""


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str, marked: Collection[int] = ()) -> str:
    """A table in a box of its own that scrolls sideways; the first cell of a row is its heading, the others numbers.

    ``marked``: rows that are highlighted, and say so in words.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = []
    for i, (first, *others) in enumerate(rows):
        own = i in marked
        look = "long" if len(first) > MOST_ON_A_LINE else ""
        badge = ' <span class="badge">chosen</span>' if own else ""
        cells = "".join(f"<td>{_cell(cell)}</td>" for cell in others)
        body.append(
            f'<tr{_class("own" if own else "")}><th scope="row"{_class(look)}>{_cell(first)}{badge}</th>{cells}</tr>\n'
        )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n"
        "</table>\n</div>\n"
    )


def figure(drawing: Drawing, *notes: str, numbers: bool = True) -> str:
    """A drawing with its caption, and, unless the page has them anyway, its numbers as a table that opens."""
    large = len(drawing.header) > MOST_PRINTED[0] or len(drawing.rows) > MOST_PRINTED[1]
    caption = "".join(paragraph(note) for note in notes)
    title = escape(drawing.title)
    opened = (
        f"<details{_class('large' if large else '')}>"
        f'<summary>The numbers<span class="hidden"> of {title}</span></summary>\n'
        f"{table(drawing.header, drawing.rows, caption=drawing.title)}</details>\n"
    )
    return (
        f'<figure id="figure-{drawing.name}">\n<h3>{title}</h3>\n'
        f'<div class="plot" role="region" tabindex="0" aria-label="{title}: plot">\n{svg(drawing)}</div>\n'
        f"<figcaption>{caption}</figcaption>\n{opened if numbers else ''}</figure>\n"
    )


def commands(lines: Sequence[str], *, name: str) -> str:
    """Lines for a shell."""
    code = f"<code>{escape(chr(10).join(lines))}</code>"
    return f'<pre role="region" tabindex="0" aria-label="{escape(name)}">{code}</pre>\n'


def _cell(cell: Cell) -> str:
    return escape(cell) if isinstance(cell, str) else f'{escape(cell[0])}<span class="below">{escape(cell[1])}</span>'


def _class(look: str) -> str:
    return f' class="{look}"' if look else ""
