"""From a file's columns to the logits that the pool keeps: logits, probabilities or decisions?

A probability p becomes a logit whose softmax or sigmoid gives it back: log p for each of several classes, for one
log(p / (1 - p)). Axes: N examples, C outputs of the task (one per class; 1 for binary and regression), K columns of a
file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from lora_ensemble.dicor.imports.layout import check_width, class_of, pick, read_classes, read_numbers
from lora_ensemble.dicor.imports.request import Form, Request
from lora_ensemble.dicor.imports.sources import Cells, Source
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Task

EPSILON = 1e-6
"""Probabilities are kept this far from 0 and 1: a forest's certain 0 is "none of my trees", not log 0, and files have
about six digits. Its logit, 13.8, still outweighs any that BERT gives."""
_PROBABILITY = re.compile(r"p(r|rob\w*)?([_\W\d]|$)")  # p, p1, p_1, pr.yes, prob, proba_1, probability
_SLACK = 1e-6  # what rounding may add beyond 0 and 1


def to_logits(source: Source, task: Task, request: Request, notices: list[str]) -> tuple[np.ndarray, Form]:
    """Logits (N, C) float32 of a source's rows, and what the file held: never "auto".

    ``UserError`` where columns or values are not what ``request`` says, or where "auto" could be mistaken.
    """
    form = request.from_
    if task.kind == "regression" and form not in ("auto", "logits"):
        raise UserError(f"--from {form}: a regression has values; leave it out")
    picked = pick(source, task, request, notices)
    cells = _one_each(source.columns[picked[0]]) if len(picked) == 1 else None
    if form == "decisions":
        return _decided(source, picked[0], cells, task, notices), form
    if form == "auto" and task.kind != "regression" and cells is not None:
        _refuse_decisions(source, picked[0], cells, task)
    values = np.concatenate([read_numbers(source, name) for name in picked], axis=1)
    check_width(source, values.shape[1], picked, task)
    if task.kind != "regression" and values.shape[1] > len(picked):  # columns without names
        notices.append(f"{source.where}: its columns are taken in the order of the labels: {', '.join(task.labels)}")
    if form == "auto":
        form = "logits" if task.kind == "regression" else _guess(source, values, picked[0] if source.table else "")
    if form == "probabilities":
        values = _log_probabilities(source, values, picked, notices)
    if task.kind == "binary" and values.shape[1] == 2:
        values = values[:, 1:] - values[:, :1]  # the sigmoid of this is the softmax of those
    with np.errstate(over="ignore"):
        logits = values.astype(np.float32)
    large = ~np.isfinite(logits)
    source.refuse(
        large.any(axis=1),
        lambda row: f"found {values[row][large[row]][0]:g}; expected a number that fits 32 bits (up to 3e38)",
    )
    return logits, form


def _one_each(cells: Cells) -> list | None:
    """Cells that are one value each; None where they are lists, or an array of several columns."""
    if isinstance(cells, np.ndarray):
        return cells.reshape(-1).tolist() if cells.size == len(cells) else None
    return None if isinstance(cells[0], list) else list(cells)


def _refuse_decisions(source: Source, name: str, cells: list, task: Task) -> None:
    """``UserError`` where the outputs can only be class labels: what is lost with them is for the user to accept."""
    read = class_of(task)
    # A binary 0 or 1 may be a certain probability as well, which comes to the same; any other label may not.
    if all(read(cell) is not None for cell in cells):
        what = f"column {name!r} holds" if source.table else "it holds"
        raise UserError(
            f"{source.where}: {what} class labels only; give probabilities or logits if you can: votes know no doubt, "
            "so averages of logits, log-loss and calibration lose theirs; to take them as votes, say --from decisions"
        )


def _decided(source: Source, name: str, cells: list | None, task: Task, notices: list[str]) -> np.ndarray:
    """Logits that say a class and nothing of how sure: 1 for it and 0 for the others; binary: 1 or -1."""
    if cells is None:
        raise UserError(f"{source.where}: --from decisions: several columns; expected one of class labels")
    logits = np.eye(len(task.labels), dtype=np.float32)[read_classes(source, name, cells, task)]
    notices.append(
        f"{source.where}: decisions are taken as one weak vote each (a logit of 1); a majority counts them fully, "
        "an average of logits or probabilities hardly"
    )
    return logits[:, 1:] - logits[:, :1] if task.kind == "binary" else logits


def _guess(source: Source, values: np.ndarray, name: str) -> Form:
    """Logits or probabilities, where it cannot be mistaken: by the values, and by what the columns are called."""
    ask, called = "say --from probabilities or --from logits", name.lower()
    probabilities, logits = bool(_PROBABILITY.match(called)), called.startswith("logit")
    negative, several = (values < -_SLACK).any(axis=1), values.shape[1] > 1
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


def _log_probabilities(source: Source, values: np.ndarray, picked: Sequence[str], notices: list[str]) -> np.ndarray:
    """(N, K) logits of probabilities (N, K): logarithms of several, for a column alone log(p / (1 - p))."""
    outside = (values < -_SLACK) | (values > 1 + _SLACK)

    def wrong(row: int) -> str:
        k = int(np.argmax(outside[row]))
        cell = source.cell(picked[k] if len(picked) > 1 else picked[0], values[row, k])
        more = "; divide percentages by 100" if values.min() >= 0 and 1 < values.max() <= 100 else ""
        return f"{cell}; expected a probability, from 0 to 1{more}; or say --from logits"

    source.refuse(outside.any(axis=1), wrong)
    p = np.clip(values, 0, 1)
    alone = p.shape[1] == 1
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
        notices.append(
            f"{source.where}: {certain.sum()} of {len(p)} rows hold certain (or almost certain) probabilities; they "
            f"are kept {EPSILON:g} from 0 and 1"
        )
    p = np.clip(p, EPSILON, 1 - EPSILON if alone else 1)
    return np.log(p) - np.log1p(-p) if alone else np.log(p)
