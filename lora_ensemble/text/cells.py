"""What a cell of a table says: a number, a class, or any of several labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lora_ensemble.errors import UserError


def number(text: str) -> float:
    """The number that a cell's text is; NaN where it is none."""
    try:
        return math.nan if "_" in text else float(text)  # Python alone reads 1_0 as 10
    except ValueError:
        return math.nan


def class_reader(labels: Sequence[str], *, truth: bool) -> Callable[[Any], int | None]:
    """A function from a cell to the number of its class, None where it is none of ``labels``.

    Numbers match whatever way they are written (1 is 1.0). ``truth``: of two labels, "false" is 0 and "true" is 1 too.
    """
    names = {name: i for i, name in enumerate(labels)}
    # NaN, which stands for "no number", is no key that could be found. Of "1" and "1.0", the first counts.
    numbers = {number(name): i for i, name in reversed(list(enumerate(labels)))}
    numbers = {value: i for value, i in numbers.items() if value == value}
    words = {"false": 0, "true": 1} if truth else {}

    def read(cell: Any) -> int | None:
        text = str(cell).strip()
        label = names.get(text, numbers.get(number(text)))
        return words.get(text.lower()) if label is None else label

    return read


def is_empty(cell: Any) -> bool:
    """Whether a cell holds nothing."""
    return cell is None or (cell.strip() == "" if isinstance(cell, str) else cell != cell)  # NaN is not itself


def sets_reader(
    labels: Sequence[str], columns: Sequence[str], separator: str
) -> Callable[[Sequence[Any]], list[int] | str]:
    """A function from a row's cells to 0 or 1 for each of ``labels`` (L,), or to what is wrong with a cell, in words.

    The one cell of one column names the labels that are there, joined by ``separator`` or as a list; empty: none is. Of
    several ``columns`` (L,) each says 0 or 1, or false or true. ``UserError`` where a label holds the separator.
    """
    if len(columns) == 1 and (torn := next((name for name in labels if separator in name), None)):
        raise UserError(f"label {torn!r} holds {separator!r}, which stands between labels; set another label_separator")
    read, flag = class_reader(labels, truth=False), class_reader(["0", "1"], truth=True)

    def of_row(cells: Sequence[Any]) -> list[int] | str:
        if len(columns) > 1:
            flags = [flag(cell) for cell in cells]
            wrong = next((i for i, found in enumerate(flags) if found is None), None)
            return f"{columns[wrong]} is {cells[wrong]!r}; expected 0 or 1" if wrong is not None else flags  # type: ignore[return-value]
        (cell,) = cells
        names = cell if isinstance(cell, list) else [] if is_empty(cell) else str(cell).split(separator)
        unknown = next((name for name in names if read(name) is None), None)
        if unknown is not None:
            known = f"names out of {', '.join(labels)}, joined by {separator!r}, or a list of them"
            return f"{columns[0]} is {cell!r}, and {str(unknown).strip()!r} is no label; expected {known}"
        there = {read(name) for name in names}
        return [int(i in there) for i in range(len(labels))]

    return of_row
