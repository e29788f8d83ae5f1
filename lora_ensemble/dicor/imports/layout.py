"""Which columns of a file hold a model's outputs, and their cells as numbers.

Axes: N rows, C outputs of the task, K columns.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_ensemble.dicor.imports.sources import ARRAY, Source
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Kind, class_reader, number

# What may stand before a label in the name of its column: p_0, prob.neg, logit 3, class_2.
_PREFIXES = {"", "p", "pr", "prob", "proba", "probs", "probability", "probabilities", "logit", "logits", "score"}
_PREFIXES |= {"scores", "class", "label", "output", "pred", "prediction"}
_VALUE_NAMES = {"p", "prob", "proba", "probs", "probability", "probabilities", "logit", "logits", "pred", "preds"}
_VALUE_NAMES |= {"prediction", "predictions", "predicted", "output", "outputs"}


def pick(
    source: Source, kind: Kind, labels: Sequence[str], columns: Sequence[str], *, but: str, decisions: bool
) -> tuple[list[str], list[str]]:
    """Which columns hold the outputs, in the order of the labels, and what to say about it.

    ``columns``: those that were asked for. None: those that are named after the labels, or the only one of numbers
    (``decisions``: of labels), leaving out the column ``but``, which holds the true labels. ``UserError`` where it is
    not clear which.
    """
    if columns:
        missing = [name for name in columns if name not in source.columns]
        if missing:
            raise UserError(f"{source.path}: no column {missing[0]!r}; columns found: {source.found}")
        return list(columns), []
    if ARRAY in source.columns:
        return [ARRAY], []
    names = [name for name in source.columns if name != but]
    if kind != "regression" and not decisions:
        numbered = [str(i) for i in range(len(labels))]
        by_label, by_number = _named_after(names, labels), _named_after(names, numbered)
        # What stands before the label tells outputs from other columns of numbers.
        for prefix, picked in [*by_label.items(), *by_number.items()]:
            if prefix.rstrip("_-.: ").lower() in _PREFIXES:
                _refuse_others(source, names, labels, prefix, picked, [*by_label.values(), *by_number.values()])
                order = f"columns {', '.join(picked)} are taken in the order of the labels: {', '.join(labels)}"
                return picked, [] if picked in by_label.values() else [f"{source.path.name}: {order}"]
    found = [n for n in names if n.lower() in _VALUE_NAMES] or [
        n for n in names if _is_value(source, n, labels, decisions)
    ]
    if len(found) != 1:
        what = f"columns {', '.join(found[:5])} may be outputs" if found else "no column of outputs"
        expected = f"one for each label ({', '.join(labels)})" if kind == "multiclass" else "one of predictions"
        raise UserError(
            f"{source.path}: {what}; expected {expected}; say which with --columns, or, where each is another model, "
            f"with --member-columns; columns found: {source.found}"
        )
    if kind == "binary" and found[0] in (labels[0], f"p_{labels[0]}", f"prob_{labels[0]}", f"proba_{labels[0]}"):
        raise UserError(
            f"{source.path}: the one column of numbers, {found[0]!r}, is called after the negative label; give the "
            f"positive one's ({labels[1]}), or, if that is what it holds, say --columns {found[0]}"
        )
    return found, []


def _named_after(names: Sequence[str], labels: Sequence[str]) -> dict[str, list[str]]:
    """Every full set of columns that are some prefix and a label, by the prefix."""
    prefixes = [name.removesuffix(labels[0]) for name in names if name.endswith(labels[0])]
    sets = {prefix: [prefix + label for label in labels] for prefix in prefixes}
    return {prefix: wanted for prefix, wanted in sets.items() if set(names).issuperset(wanted)}


def _refuse_others(
    source: Source, names: Sequence[str], labels: Sequence[str], prefix: str, picked: list[str], sets: list[list[str]]
) -> None:
    """``UserError`` where columns beside those picked could be outputs too: of a class, a model, or the truth."""
    numbers = [name for name in names if name not in picked and _is_value(source, name, labels, False)]
    other = next((one for one in sets if set(numbers).issuperset(one)), None)
    if other is not None:
        raise UserError(
            f"{source.path}: columns {', '.join(picked)}, but also {', '.join(other)}; say which with --columns"
        )

    def is_output(name: str) -> bool:
        # With nothing between prefix and label: p3, but not place. Lengths and folds are whole, outputs hardly ever.
        apart = bool(prefix) and not prefix[-1].isalnum()
        counts = not math.isnan(number(name.removeprefix(prefix)))
        return apart or counts or any(number(str(cell)) % 1 > 0 for cell in source.columns[name])

    extra = [name for name in numbers if name.startswith(prefix) and is_output(name)]
    if extra:
        what = f"column {extra[0]} is" if len(extra) == 1 else f"columns {', '.join(extra[:5])} are"
        raise UserError(
            f"{source.path}: {what} called after no label ({', '.join(labels)}); if there are other labels, name all "
            f"with --label-names; if not, say --columns {shlex.join(picked)}"
        )


def _is_value(source: Source, name: str, labels: Sequence[str], decisions: bool) -> bool:
    cell = next((c for c in source.columns[name] if c not in ("", None)), None)
    if decisions:
        return class_reader(labels, truth=list(labels) == ["0", "1"])(cell) is not None
    return isinstance(cell, (list, bool, int, float)) or (isinstance(cell, str) and number(cell) == number(cell))


def read(source: Source, name: str) -> np.ndarray:
    """A column's cells as finite numbers (N, K) float64; K is 1 unless its cells are lists or it is an array."""
    cells = source.columns[name]
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind not in "biuf":
            raise UserError(f"{source.where}: it is an array of {cells.dtype}; expected numbers")
        values = np.asarray(cells, np.float64).reshape(len(cells), -1)
    elif cells and isinstance(cells[0], list):
        values = _lists(source, name, cells)
    else:
        try:
            values = np.array(cells, np.float64).reshape(-1, 1)
        except (TypeError, ValueError, OverflowError):
            values = np.array([[number(str(cell).strip())] for cell in cells])
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        row = int(bad[0])
        cell = cells[row]
        expected = "finite numbers" if values.shape[1] > 1 else "a finite number"
        if isinstance(cell, str) and "," in cell:
            expected += "; write 0,5 as 0.5"
        raise UserError(f"{source.at(row)}: {called(name)}{shown(cell)}; expected {expected}{count(len(bad))}")
    return values


def _lists(source: Source, name: str, cells: Sequence[Any]) -> np.ndarray:
    width = len(cells[0])
    for row, cell in enumerate(cells):
        if not isinstance(cell, list) or len(cell) != width or not all(_is_number(v) for v in cell):
            raise UserError(
                f"{source.at(row)}: {called(name)}{shown(cell)}; expected {width} numbers, as many as in the first row"
            )
    return np.array(cells, np.float64).reshape(len(cells), width)


def _is_number(value: Any) -> bool:
    # JSON's whole numbers have no end, float64 has.
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1e300)


def called(name: str) -> str:
    """The subject of an error about a cell of a column."""
    return f"column {name!r} is " if name else "found "


def shown(cell: Any) -> str:
    """A cell, for an error."""
    if isinstance(cell, (np.ndarray, np.generic)):
        cell = cell.tolist()
    return "empty" if cell in ("", None) else repr(cell)[:80]


def count(rows: int) -> str:
    """How many rows are bad, for the end of an error about the first of them."""
    return f" ({rows} such rows)" if rows > 1 else ""


def check_width(source: Source, found: int, picked: Sequence[str], kind: Kind, labels: Sequence[str]) -> None:
    """``UserError`` unless as many columns were found as the kind can have."""
    expected = {"multiclass": (len(labels),), "binary": (1, 2), "regression": (1,)}[kind]
    if found in expected:
        return
    names = f" ({', '.join(picked[:8])})" if picked != [ARRAY] else ""
    what = {
        "multiclass": f"{len(labels)}, one for each label ({', '.join(labels)}); if there are others, name all with "
        "--label-names",
        "binary": "one of the positive class, or two: negative, positive",
        "regression": "one of values",
    }[kind]
    if kind == "multiclass" and found == 1:
        what += "; class labels alone go in with --from decisions"
    raise UserError(f"{source.where}: {found} column{'s' * (found > 1)} of outputs{names}; expected {what}")
