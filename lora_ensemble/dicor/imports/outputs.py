"""From a file's columns to the logits that the pool keeps: logits, probabilities or decisions?

A probability p becomes a logit whose softmax or sigmoid gives it back: log p for each of several classes, for one
log(p / (1 - p)). Axes: N examples, C outputs of the task (one per class; 1 for binary and regression), K columns of a
file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from lora_ensemble.dicor.imports.layout import check_width, pick, read_classes, read_numbers, such, to_class
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
    votes = _one_column(source.columns[picked[0]]) if len(picked) == 1 else None
    if form == "decisions":
        return _decided(source, picked, votes, task, notices), form
    if form == "auto" and task.kind != "regression" and votes is not None:
        _refuse_decisions(source, picked[0], votes, task)
    values = np.concatenate([read_numbers(source, name) for name in picked], axis=1)
    check_width(source, values.shape[1], picked, task)
    if task.kind == "regression":
        return _float32(source, values), "logits"
    if values.shape[1] > len(picked):  # columns without names
        notices.append(f"{source.where}: its columns are taken in the order of the labels: {', '.join(task.labels)}")
    if form == "auto":
        form = _guess(source, values, picked[0] if source.table else "")
    if form == "probabilities":
        values = _log_probabilities(source, values, picked, notices)
    if task.kind == "binary" and values.shape[1] == 2:
        values = values[:, 1:] - values[:, :1]  # the sigmoid of this is the softmax of those
    return _float32(source, values), form


def _one_column(cells: Cells) -> list | None:
    """Cells that are one value each; None where they are lists, or an array of several columns."""
    if isinstance(cells, np.ndarray):
        return cells.reshape(-1).tolist() if cells.size == len(cells) else None
    return None if cells and isinstance(cells[0], list) else list(cells)


def _refuse_decisions(source: Source, name: str, votes: list, task: Task) -> None:
    """``UserError`` where the outputs can only be class labels: what is lost with them is for the user to accept."""
    read = to_class(task.labels)
    # A binary 0 or 1 may be a certain probability as well, which comes to the same; any other label may not.
    if all(read(vote) is not None for vote in votes):
        raise UserError(
            f"{source.where}: {f'column {name!r} holds' if source.table else 'it holds'} class labels only; give probabilities "
            "or logits if you can: votes know no doubt, so averages of logits, log-loss and calibration lose theirs; "
            "to take them as votes, say --from decisions"
        )


def _decided(source: Source, picked: Sequence[str], votes: list | None, task: Task, notices: list[str]) -> np.ndarray:
    """Logits that say a class and nothing of how sure: 1 for it and 0 for the others; binary: 1 or -1."""
    if votes is None:
        raise UserError(f"{source.where}: --from decisions: several columns; expected one of class labels")
    logits = np.eye(len(task.labels), dtype=np.float32)[read_classes(source, picked[0], votes, task)]
    notices.append(
        f"{source.where}: decisions are taken as one weak vote each (a logit of 1); a majority counts them fully, "
        "an average of logits or probabilities hardly"
    )
    return logits[:, 1:] - logits[:, :1] if task.kind == "binary" else logits


def _guess(source: Source, values: np.ndarray, name: str) -> Form:
    """Logits or probabilities, where it cannot be mistaken: by the values, and by what the columns are called."""
    ask = "say --from probabilities or --from logits"
    told = "logits" if name.lower().startswith("logit") else _PROBABILITY.match(name.lower()) and "probabilities"
    negative, several = (values < -_SLACK).any(axis=1), values.shape[1] > 1
    if negative.any():
        if told == "probabilities":
            where = source.at(int(np.argmax(negative)))
            raise UserError(f"{where}: column {name!r} is negative, which no probability is; {ask}")
        return "logits"
    within = bool((values <= 1 + _SLACK).all())
    sums = within and several and not _wrong_sums(values).any()
    if told == "logits" and not sums:
        return "logits"
    if told == "probabilities" or (sums and told is None):
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
    if outside.any():
        row, k = (int(i) for i in np.argwhere(outside)[0])
        found = source.cell(picked[k] if len(picked) > 1 else picked[0], f"{values[row, k]:g}")
        more = "; divide percentages by 100" if values.max() > 1 and values.max() <= 100 and values.min() >= 0 else ""
        raise UserError(
            f"{source.at(row)}: {found}; expected a probability, from 0 to 1{more}; or say "
            f"--from logits{such(outside.any(axis=1))}"
        )
    p = np.clip(values, 0, 1)
    if p.shape[1] > 1:
        wrong = _wrong_sums(p)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(
                f"{source.at(row)}: the probabilities sum to {p[row].sum():g}; expected 1: one for each class, one "
                f"of which is true; or say --from logits{such(wrong)}"
            )
        p = p / p.sum(axis=1, keepdims=True)
    certain = ((p < EPSILON) | (p > 1 - EPSILON)).any(axis=1)
    if certain.any():
        notices.append(
            f"{source.where}: {certain.sum()} of {len(p)} rows hold certain (or almost certain) probabilities; they "
            f"are kept {EPSILON:g} from 0 and 1"
        )
    if p.shape[1] == 1:
        p = np.clip(p, EPSILON, 1 - EPSILON)
        return np.log(p) - np.log1p(-p)
    return np.log(np.maximum(p, EPSILON))


def _float32(source: Source, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        logits = values.astype(np.float32)
    if not np.isfinite(logits).all():
        row, k = (int(i) for i in np.argwhere(~np.isfinite(logits))[0])
        raise UserError(f"{source.at(row)}: found {values[row, k]:g}; expected a number that fits 32 bits (up to 3e38)")
    return logits
