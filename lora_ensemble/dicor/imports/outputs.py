"""From a file's columns to the logits that the pool keeps: which columns, and logits, probabilities or decisions?

A probability p becomes a logit whose softmax or sigmoid gives it back: log p for each of several classes, for one, or
for each of several labels, log(p / (1 - p)). Axes: N examples, C outputs of the task (one per class or label; 1 for
binary and regression), K columns of a file.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lora_ensemble.dicor.imports.sources import Source
from lora_ensemble.dicor.options import Form, Request
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Task
from lora_ensemble.text.cells import class_reader, number

EPSILON = 1e-6
"""Probabilities are kept this far from 0 and 1: a forest's certain 0 is "none of my trees", not log 0, and files have
about six digits. Its logit, 13.8, still outweighs any that BERT gives."""
LARGEST = 1e38  # of a number: the difference of two fits 32 bits as well
_PROBABILITY = re.compile(r"p(r|rob\w*)?([_\W\d]|$)")  # p, p1, p_1, pr.yes, prob, proba_1, probability
_SLACK = 1e-6  # what rounding may add beyond 0 and 1
_NAMES = ["p", "prob", "proba", "probs", "probability", "probabilities", "logit", "logits", "output", "pred"]
_CERTAIN = (
    "give probabilities or logits if you can: votes know no doubt, so averages of logits, log-loss and calibration "
    "lose theirs; to take them as votes, say --from decisions"
)
_VOTES = (
    "decisions are taken as one weak vote each (a logit of 1); a majority counts them fully, an average of logits or "
    "probabilities hardly"
)
# What a lone column of outputs may be called, and what may stand before a label: p_0, prob.neg, logit 3, class_2.
_LONE = {*_NAMES, "preds", "prediction", "predictions", "predicted", "outputs"}
_PREFIXES = {*_NAMES, "", "pr", "prediction", "score", "scores", "class", "label"}


def to_logits(source: Source, task: Task, request: Request) -> tuple[np.ndarray, Form]:
    """Logits (N, C) float32 of a source's rows, and what the file held: never "auto".

    ``UserError`` where columns or values are not what ``request`` says, or where "auto" could be mistaken.
    """
    form = request.from_
    if task.kind == "regression" and form not in ("auto", "logits"):
        raise UserError(f"--from {form}: a regression has values; leave it out")
    picked, each = _pick(source, task, request), task.kind == "multilabel"
    alone = len(picked) == 1 and not isinstance(source.columns[picked[0]][0], list)
    if form == "decisions" and not each:
        if not alone:
            raise UserError(f"{source.where}: --from decisions: several columns; expected one of class labels")
        return _decided(source, picked[0], task), form
    if form == "auto" and task.kind != "regression" and alone:
        _refuse_decisions(source, picked[0], task)
    values = np.concatenate([_read_numbers(source, name) for name in picked], axis=1)
    _check_width(source, values.shape[1], picked, task)
    if each and form in ("auto", "decisions"):
        sure = np.isin(values, (0, 1)).all(axis=1)
        if form == "decisions":
            source.refuse(~sure, lambda row: f"found {values[row].tolist()}; expected 0 or 1 for each label")
            source.notices.append(f"{source.where}: {_VOTES}")
            return np.asarray(2 * values - 1, np.float32), form
        if sure.all():
            raise UserError(f"{source.where}: it holds 0 and 1 only; {_CERTAIN}")
    if task.kind != "regression" and values.shape[1] > len(picked):  # columns without names
        order = f"its columns are taken in the order of the labels: {', '.join(task.labels)}"
        source.notices.append(f"{source.where}: {order}")
    if form == "auto":
        called = picked[0] if source.table else ""
        form = "logits" if task.kind == "regression" else _guess(source, values, called, each)
    if form == "probabilities":
        values = _log_probabilities(source, values, picked, each)
    if task.kind == "binary" and values.shape[1] == 2:
        values = values[:, 1:] - values[:, :1]  # the sigmoid of this is the softmax of those
    return values.astype(np.float32), form


def _refuse_decisions(source: Source, name: str, task: Task) -> None:
    """``UserError`` where the outputs can only be class labels: what is lost with them is for the user to accept."""
    read = _class_of(task)
    # A binary 0 or 1 may be a certain probability as well, which comes to the same; any other label may not.
    if all(read(cell) is not None for cell in source.columns[name]):
        what = f"column {name!r} holds" if source.table else "it holds"
        raise UserError(f"{source.where}: {what} class labels only; {_CERTAIN}")


def _decided(source: Source, name: str, task: Task) -> np.ndarray:
    """Logits that say a class and nothing of how sure: 1 for it and 0 for the others; binary: 1 or -1."""
    logits = np.eye(len(task.labels), dtype=np.float32)[read_classes(source, name, task)]
    source.notices.append(f"{source.where}: {_VOTES}")
    return logits[:, 1:] - logits[:, :1] if task.kind == "binary" else logits


def _guess(source: Source, values: np.ndarray, name: str, each: bool) -> Form:
    """Logits or probabilities, where it cannot be mistaken: by the values, and by what the columns are called.

    ``each``: the columns are of several labels, of which any may be true.
    """
    ask, called = "say --from probabilities or --from logits", name.lower()
    probabilities, logits = bool(_PROBABILITY.match(called)), called.startswith("logit")
    negative, several = (values < -_SLACK).any(axis=1), values.shape[1] > 1 and not each
    if probabilities:
        source.refuse(negative, lambda _: f"column {name!r} is negative, which no probability is; {ask}")
    within = bool((values <= 1 + _SLACK).all())
    sums = within and several and not _wrong_sums(values).any()
    if negative.any() or (logits and not sums):
        return "logits"
    if probabilities or (sums and not logits):
        return "probabilities"
    what = "all values are between 0 and 1, as probabilities are and logits may be"
    if sums:
        what = f"columns are called {name!r}, but their rows sum to 1 as probabilities do"
    elif within and several:
        what = "all values are between 0 and 1, but their rows do not sum to 1"
    elif not within:
        what = f"no value is negative and the highest is {values.max():g}: logits, or percentages or counts of votes?"
    raise UserError(f"{source.where}: {what}; {ask}")


def _wrong_sums(p: np.ndarray) -> np.ndarray:
    """(N,) rows of K probabilities that are further from 1 than rounding each to two digits makes them, up to 0.05."""
    return np.abs(p.sum(axis=1) - 1) > min(0.005 * p.shape[1], 0.05) + _SLACK


def _log_probabilities(source: Source, values: np.ndarray, picked: Sequence[str], each: bool) -> np.ndarray:
    """(N, K) logits of probabilities (N, K): logarithms of several, for ``each`` or one alone log(p / (1 - p))."""
    outside = (values < -_SLACK) | (values > 1 + _SLACK)

    def wrong(row: int) -> str:
        k = int(np.argmax(outside[row]))
        cell = source.cell(picked[k] if len(picked) > 1 else picked[0], values[row, k])
        more = "; divide percentages by 100" if values.min() >= 0 and 1 < values.max() <= 100 else ""
        return f"{cell}; expected a probability, from 0 to 1{more}; or say --from logits"

    source.refuse(outside.any(axis=1), wrong)
    p = np.clip(values, 0, 1)
    alone = each or p.shape[1] == 1
    if not alone:
        sums = p.sum(axis=1, keepdims=True)
        source.refuse(
            _wrong_sums(p),
            lambda row: (
                f"the probabilities sum to {sums[row, 0]:g}; expected 1: one for each class, one of which is "
                "true; or say --from logits"
            ),
        )
        p = p / sums
    certain = ((p < EPSILON) | (p > 1 - EPSILON)).any(axis=1)
    if certain.any():
        source.notices.append(
            f"{source.where}: {certain.sum()} of {len(p)} rows hold certain (or almost certain) probabilities; they "
            f"are kept {EPSILON:g} from 0 and 1"
        )
    p = np.clip(p, EPSILON, 1 - EPSILON if alone else 1)
    return np.log(p) - np.log1p(-p) if alone else np.log(p)


def _pick(source: Source, task: Task, request: Request) -> list[str]:
    """The columns of the outputs, in the order of the labels: as asked, named after labels, or the one of numbers."""
    asked = list(request.columns) or ([source.name] if request.member_columns else [])
    source.require(asked)
    if asked or source.table is None:
        return asked or list(source.columns)
    truth = request.label_columns if task.kind != "multilabel" else []  # outputs may be called after labels, too
    names = [name for name in source.columns if name not in truth]
    decisions, labels = request.from_ == "decisions" and task.kind != "multilabel", ", ".join(task.labels)
    if task.kind != "regression" and not decisions and (named := _named_after_labels(source, names, task)):
        return named
    holds = _class_of(task) if decisions else _number
    likely = [n for n in names if n.lower() in _LONE] or [n for n in names if holds(_first(source, n)) is not None]
    if len(likely) != 1:
        what = f"columns {', '.join(likely[:5])} may be outputs" if likely else "no column of outputs"
        expected = f"one for each label ({labels})" if task.num_outputs > 1 else "one of predictions"
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


def _named_after_labels(source: Source, names: list[str], task: Task) -> list[str]:
    """The one set of columns that are a usual prefix and a label or its number, if no others could be outputs too."""
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
        source.notices.append(f"{source.path.name}: {order}")
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


def _class_of(task: Task) -> Callable[[Any], int | None]:
    """From a cell to the number of its class, None where it is no label; of 0 and 1 also false and true."""
    return class_reader(task.labels, truth=task.labels == ["0", "1"])


def read_classes(source: Source, name: str, task: Task) -> np.ndarray:
    """Class numbers (N,) int64 of the cells of a column; ``UserError`` for one that is none of the task's labels."""
    cells, read = source.columns[name], _class_of(task)
    classes = [read(cell) for cell in cells]
    expected = f"one of {', '.join(task.labels)}"
    if task.kind == "multiclass":
        expected += "; if there are others, name all with --label-names"
    source.refuse([c is None for c in classes], lambda row: f"{source.cell(name, cells[row])}; expected {expected}")
    return np.array(classes, np.int64)


def _read_numbers(source: Source, name: str) -> np.ndarray:
    """A column's cells as finite numbers (N, K) float64; K is 1 unless its cells are lists."""
    cells = source.columns[name]
    several = isinstance(cells[0], list)
    width = len(cells[0]) if several else 1
    expected = f"{width} number{'s' * (width != 1)}, as many as in the first row"
    source.refuse(
        [isinstance(cell, list) != several or (several and len(cell) != width) for cell in cells],
        lambda row: f"{source.cell(name, cells[row])}; expected {expected}",
    )
    values = np.array([[_float(v) for v in (cell if several else [cell])] for cell in cells]).reshape(len(cells), width)

    def wrong(row: int) -> str:
        way = "; write 0,5 as 0.5" if isinstance(cells[row], str) and "," in cells[row] else ""
        way = f", at most {LARGEST:g}" if np.isfinite(values[row]).all() else way
        return f"{source.cell(name, cells[row])}; expected {'finite numbers' if several else 'a finite number'}{way}"

    source.refuse(~(np.abs(values) <= LARGEST).all(axis=1), wrong)
    return values


def _float(cell: Any) -> float:
    """The number that a cell is; NaN where it is none."""
    try:
        return number(cell.strip()) if isinstance(cell, str) else float(cell)
    except (TypeError, ValueError, OverflowError):  # JSON's whole numbers have no end, float64 has
        return math.nan


def _check_width(source: Source, width: int, picked: Sequence[str], task: Task) -> None:
    """``UserError`` unless there are as many columns of outputs as the kind can have."""
    if width == task.num_outputs or (task.kind == "binary" and width == 2):
        return
    names = f" ({', '.join(picked[:8])})" if source.table else ""
    expected = {
        "multiclass": f"{len(task.labels)}, one for each label ({', '.join(task.labels)}); if there are others, name "
        f"all with --label-names{'; class labels alone go in with --from decisions' if width == 1 else ''}",
        "multilabel": f"{len(task.labels)}, one for each label ({', '.join(task.labels)})",
        "binary": "one of the positive class, or two: negative, positive",
        "regression": "one of values",
    }[task.kind]
    raise UserError(f"{source.where}: {width} column{'s' * (width > 1)} of outputs{names}; expected {expected}")
