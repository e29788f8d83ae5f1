"""Which columns of a file hold a model's outputs, and cells as numbers or classes.

Axes: N rows, C outputs of the task, K columns.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lora_ensemble.dicor.imports.request import Request
from lora_ensemble.dicor.imports.sources import Cells, Source
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Task, class_reader, number

_NAMES = ["p", "prob", "proba", "probs", "probability", "probabilities", "logit", "logits", "output", "pred"]
# What a lone column of outputs may be called, and what may stand before a label: p_0, prob.neg, logit 3, class_2.
_LONE = {*_NAMES, "preds", "prediction", "predictions", "predicted", "outputs"}
_PREFIXES = {*_NAMES, "", "pr", "prediction", "score", "scores", "class", "label"}


def pick(source: Source, task: Task, request: Request, notices: list[str]) -> list[str]:
    """The columns that hold the outputs, in the order of the labels.

    Those that were asked for; or those that are named after the labels; or the only one of numbers (of labels, where
    decisions are asked for), the column of the true labels left out. ``UserError`` where it is not clear which.
    """
    asked = list(request.columns) or ([source.name] if request.member_columns else [])
    source.require(asked)
    if asked or source.table is None:
        return asked or list(source.columns)
    names = [name for name in source.columns if name != request.label_column]
    decisions, labels = request.from_ == "decisions", ", ".join(task.labels)
    if task.kind != "regression" and not decisions and (named := _named_after_labels(source, names, task, notices)):
        return named
    holds = class_of(task) if decisions else _number
    likely = [n for n in names if n.lower() in _LONE] or [n for n in names if holds(_first(source, n)) is not None]
    if len(likely) != 1:
        what = f"columns {', '.join(likely[:5])} may be outputs" if likely else "no column of outputs"
        expected = f"one for each label ({labels})" if task.kind == "multiclass" else "one of predictions"
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
    labels, sets = ", ".join(task.labels), []
    for endings in (task.labels, [str(i) for i in range(len(task.labels))]):
        prefixes = [name.removesuffix(endings[0]) for name in names if name.endswith(endings[0])]
        sets += [(prefix, [prefix + ending for ending in endings]) for prefix in prefixes]
    sets = [(prefix, columns) for prefix, columns in sets if set(names).issuperset(columns)]
    # What stands before the label tells outputs from other columns of numbers.
    prefix, picked = next((s for s in sets if s[0].rstrip("_-.: ").lower() in _PREFIXES), ("", []))
    if not picked:
        return []
    others = [name for name in names if name not in picked and _number(_first(source, name)) is not None]
    for _, columns in sets:
        if set(others).issuperset(columns):
            both = f"columns {', '.join(picked)}, but also {', '.join(columns)}"
            raise UserError(f"{source.path}: {both}; say which with --columns")
    extra = [name for name in others if name.startswith(prefix) and _is_of_a_class(source, name, prefix)]
    if extra:
        what = f"column {extra[0]} is" if len(extra) == 1 else f"columns {', '.join(extra[:5])} are"
        raise UserError(
            f"{source.path}: {what} called after no label ({labels}); if there are other labels, name all with "
            f"--label-names; if not, say --columns {shlex.join(picked)}"
        )
    if picked != [prefix + label for label in task.labels]:
        order = f"columns {', '.join(picked)} are taken in the order of the labels: {labels}"
        notices.append(f"{source.path.name}: {order}")
    return picked


def _is_of_a_class(source: Source, name: str, prefix: str) -> bool:
    """Whether a column of numbers with the outputs' prefix may be of a class that the labels lack."""
    # With nothing between prefix and label: p3, but not place. Lengths and folds are whole, outputs hardly ever.
    apart = bool(prefix) and not prefix[-1].isalnum()
    numbered = not math.isnan(number(name.removeprefix(prefix)))
    return apart or numbered or any(number(str(cell)) % 1 > 0 for cell in source.columns[name])


def _first(source: Source, name: str) -> Any:
    """The first cell of a column that is not empty, by which the column is judged."""
    return next((cell for cell in source.columns[name] if cell not in ("", None)), None)


def _number(cell: Any) -> Any:
    """A cell that is a number, or a list; None where it is neither."""
    is_one = isinstance(cell, list | bool | int | float) or (isinstance(cell, str) and not math.isnan(number(cell)))
    return cell if is_one else None


def class_of(task: Task) -> Callable[[Any], int | None]:
    """From a cell to the number of its class, None where it is no label; of 0 and 1 also false and true."""
    return class_reader(task.labels, truth=task.labels == ["0", "1"])


def read_classes(source: Source, name: str, cells: Cells, task: Task) -> np.ndarray:
    """Class numbers (N,) int64 of cells of a column; ``UserError`` for one that is none of the task's labels."""
    read = class_of(task)
    classes = [read(cell) for cell in cells]
    expected = f"one of {', '.join(task.labels)}"
    if task.kind == "multiclass":
        expected += "; if there are others, name all with --label-names"
    source.refuse([c is None for c in classes], lambda row: f"{source.cell(name, cells[row])}; expected {expected}")
    return np.array(classes, np.int64)


def read_numbers(source: Source, name: str) -> np.ndarray:
    """A column's cells as finite numbers (N, K) float64; K is 1 unless its cells are lists or it is an array."""
    cells = source.columns[name]
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind not in "biuf":
            raise UserError(f"{source.where}: it is an array of {cells.dtype}; expected numbers")
        values = np.asarray(cells, np.float64).reshape(len(cells), -1)
    elif isinstance(cells[0], list):
        width = len(cells[0])
        source.refuse(
            [not (isinstance(cell, list) and len(cell) == width and all(map(_fits, cell))) for cell in cells],
            lambda row: f"{source.cell(name, cells[row])}; expected {width} numbers, as many as in the first row",
        )
        values = np.array(cells, np.float64).reshape(len(cells), width)
    else:
        try:
            values = np.array(cells, np.float64).reshape(-1, 1)
        except (TypeError, ValueError, OverflowError):
            values = np.array([[number(str(cell).strip())] for cell in cells])

    def wrong(row: int) -> str:
        comma = "; write 0,5 as 0.5" if isinstance(cells[row], str) and "," in cells[row] else ""
        expected = "finite numbers" if values.shape[1] > 1 else "a finite number"
        return f"{source.cell(name, cells[row])}; expected {expected}{comma}"

    source.refuse(~np.isfinite(values).all(axis=1), wrong)
    return values


def _fits(value: Any) -> bool:
    # JSON's whole numbers have no end, float64 has.
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1e300)


def check_width(source: Source, width: int, picked: Sequence[str], task: Task) -> None:
    """``UserError`` unless there are as many columns of outputs as the kind can have."""
    if width == task.num_outputs or (task.kind == "binary" and width == 2):
        return
    names = f" ({', '.join(picked[:8])})" if source.table else ""
    expected = {
        "multiclass": f"{len(task.labels)}, one for each label ({', '.join(task.labels)}); if there are others, name "
        f"all with --label-names{'; class labels alone go in with --from decisions' if width == 1 else ''}",
        "binary": "one of the positive class, or two: negative, positive",
        "regression": "one of values",
    }[task.kind]
    raise UserError(f"{source.where}: {width} column{'s' * (width > 1)} of outputs{names}; expected {expected}")
