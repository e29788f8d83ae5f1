"""Which columns of a file hold a model's outputs, and cells as numbers or classes.

Axes: N rows, C outputs of the task, K columns.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_ensemble.dicor.imports.request import Request
from lora_ensemble.dicor.imports.sources import Cells, Source
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Task, class_reader, number

_VALUE_NAMES = {"p", "prob", "proba", "probs", "probability", "probabilities", "logit", "logits", "output", "pred"}
_VALUE_NAMES |= {"prediction"}
# What may stand before a label in the name of its column: p_0, prob.neg, logit 3, class_2.
_PREFIXES = {*_VALUE_NAMES, "", "pr", "score", "scores", "class", "label"}
_VALUE_NAMES |= {"preds", "predictions", "predicted", "outputs"}


def pick(source: Source, task: Task, request: Request, notices: list[str]) -> list[str]:
    """The columns that hold the outputs, in the order of the labels.

    Those that were asked for; or those that are named after the labels; or the only one of numbers (of labels, where
    decisions are asked for), the column of the true labels left out. ``UserError`` where it is not clear which.
    """
    columns = request.columns or ([source.name] if request.member_columns else [])
    source.require(columns)
    if columns or source.table is None:
        return list(columns or source.columns)
    decisions = request.from_ == "decisions"
    names = [name for name in source.columns if name != request.label_column]
    if task.kind != "regression" and not decisions and (named := _named_after_labels(source, names, task, notices)):
        return named
    likely = [n for n in names if n.lower() in _VALUE_NAMES] or [
        n for n in names if _is_output(source.columns[n], task.labels if decisions else None)
    ]
    if len(likely) != 1:
        what = f"columns {', '.join(likely[:5])} may be outputs" if likely else "no column of outputs"
        expected = (
            f"one for each label ({', '.join(task.labels)})" if task.kind == "multiclass" else "one of predictions"
        )
        raise UserError(
            f"{source.path}: {what}; expected {expected}; say which with --columns, or, where each is another model, "
            f"with --member-columns; {source.shown}"
        )
    if task.kind == "binary" and likely[0] in [p + task.labels[0] for p in ("", "p_", "prob_", "proba_")]:
        raise UserError(
            f"{source.path}: the one column of numbers, {likely[0]!r}, is called after the negative label; give the "
            f"positive one's ({task.labels[1]}), or, if that is what it holds, say --columns {likely[0]}"
        )
    return likely


def _named_after_labels(source: Source, names: list[str], task: Task, notices: list[str]) -> list[str]:
    """The one set of columns that are a usual prefix and a label, or the label's number; empty where there is none.

    ``UserError`` where columns beside them could be outputs too: of a class, a model, or the truth.
    """
    labels, numbers = task.labels, [str(i) for i in range(len(task.labels))]
    sets = [
        (prefix, [prefix + label for label in own]) for own in (labels, numbers) for prefix in _before(names, own[0])
    ]
    sets = [(prefix, columns) for prefix, columns in sets if set(names).issuperset(columns)]
    # What stands before the label tells outputs from other columns of numbers.
    prefix, picked = next((s for s in sets if s[0].rstrip("_-.: ").lower() in _PREFIXES), ("", []))
    if not picked:
        return []
    others = [name for name in names if name not in picked and _is_output(source.columns[name])]
    for _, columns in sets:
        if set(others).issuperset(columns):
            both = f"columns {', '.join(picked)}, but also {', '.join(columns)}"
            raise UserError(f"{source.path}: {both}; say which with --columns")
    extra = [name for name in others if name.startswith(prefix) and _is_of_a_class(name, prefix, source.columns[name])]
    if extra:
        what = f"column {extra[0]} is" if len(extra) == 1 else f"columns {', '.join(extra[:5])} are"
        raise UserError(
            f"{source.path}: {what} called after no label ({', '.join(labels)}); if there are other labels, name all "
            f"with --label-names; if not, say --columns {shlex.join(picked)}"
        )
    if picked != [prefix + label for label in labels]:
        order = f"columns {', '.join(picked)} are taken in the order of the labels: {', '.join(labels)}"
        notices.append(f"{source.path.name}: {order}")
    return picked


def _before(names: Sequence[str], label: str) -> list[str]:
    """What stands before a label in the names that end with it."""
    return [name.removesuffix(label) for name in names if name.endswith(label)]


def _is_of_a_class(name: str, prefix: str, cells: Cells) -> bool:
    """Whether a column of numbers with the outputs' prefix may be of a class that the labels lack."""
    # With nothing between prefix and label: p3, but not place. Lengths and folds are whole, outputs hardly ever.
    apart = bool(prefix) and not prefix[-1].isalnum()
    numbered = not math.isnan(number(name.removeprefix(prefix)))
    return apart or numbered or any(number(str(cell)) % 1 > 0 for cell in cells)


def _is_output(cells: Cells, labels: Sequence[str] | None = None) -> bool:
    """Whether cells look like numbers or lists, or like one of the labels, by the first that is not empty."""
    cell = next((c for c in cells if c not in ("", None)), None)
    if labels is not None:
        return to_class(labels)(cell) is not None
    return isinstance(cell, list | bool | int | float) or (isinstance(cell, str) and not math.isnan(number(cell)))


def to_class(labels: Sequence[str]) -> Any:
    """From a cell to the number of its class, None where it is none of ``labels``; of 0 and 1 also false and true."""
    return class_reader(labels, truth=list(labels) == ["0", "1"])


def read_classes(source: Source, name: str, cells: Cells, task: Task) -> np.ndarray:
    """Class numbers (N,) int64 of cells of a column; ``UserError`` for one that is none of the task's labels."""
    read = to_class(task.labels)
    classes = [read(cell) for cell in cells]
    if None in classes:
        row = classes.index(None)
        raise UserError(
            f"{source.at(row)}: {source.cell(name, _shown(cells[row]))}; expected one of {', '.join(task.labels)}"
            + ("; if there are others, name all with --label-names" if task.kind == "multiclass" else "")
        )
    return np.array(classes, np.int64)


def read_numbers(source: Source, name: str) -> np.ndarray:
    """A column's cells as finite numbers (N, K) float64; K is 1 unless its cells are lists or it is an array."""
    cells = source.columns[name]
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind not in "biuf":
            raise UserError(f"{source.where}: it is an array of {cells.dtype}; expected numbers")
        values = np.asarray(cells, np.float64).reshape(len(cells), -1)
    elif cells and isinstance(cells[0], list):
        values = _read_lists(source, name, cells)
    else:
        try:
            values = np.array(cells, np.float64).reshape(-1, 1)
        except (TypeError, ValueError, OverflowError):
            values = np.array([[number(str(cell).strip())] for cell in cells])
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        expected = "finite numbers" if values.shape[1] > 1 else "a finite number"
        if isinstance(cells[row], str) and "," in cells[row]:
            expected += "; write 0,5 as 0.5"
        raise UserError(f"{source.at(row)}: {source.cell(name, _shown(cells[row]))}; expected {expected}{such(bad)}")
    return values


def _read_lists(source: Source, name: str, cells: Cells) -> np.ndarray:
    width = len(cells[0])
    for row, cell in enumerate(cells):
        # JSON's whole numbers have no end, float64 has.
        if (
            not isinstance(cell, list)
            or len(cell) != width
            or not all(isinstance(v, float) or (isinstance(v, int) and abs(v) < 1e300) for v in cell)
        ):
            raise UserError(
                f"{source.at(row)}: {source.cell(name, _shown(cell))}; expected {width} numbers, as many as in the first row"
            )
    return np.array(cells, np.float64).reshape(len(cells), width)


def _shown(cell: Any) -> str:
    if isinstance(cell, np.ndarray | np.generic):
        cell = cell.tolist()
    return "empty" if cell in ("", None) else repr(cell)[:80]


def such(bad: np.ndarray) -> str:
    """How many rows are ``bad`` (N,), for the end of an error about the first of them."""
    return f" ({bad.sum()} such rows)" if bad.sum() > 1 else ""


def check_width(source: Source, width: int, picked: Sequence[str], task: Task) -> None:
    """``UserError`` unless there are as many columns of outputs as the kind can have."""
    if width == task.num_outputs or (task.kind == "binary" and width == 2):
        return
    names = f" ({', '.join(picked[:8])})" if source.table else ""
    expected = {
        "multiclass": f"{len(task.labels)}, one for each label ({', '.join(task.labels)}); if there are others, name "
        "all with --label-names",
        "binary": "one of the positive class, or two: negative, positive",
        "regression": "one of values",
    }[task.kind]
    if task.kind == "multiclass" and width == 1:
        expected += "; class labels alone go in with --from decisions"
    raise UserError(f"{source.where}: {width} column{'s' * (width > 1)} of outputs{names}; expected {expected}")
