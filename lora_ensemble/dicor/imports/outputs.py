"""From a file's columns to the logits that the pool keeps: logits, probabilities or decisions?

A probability p becomes a logit whose softmax or sigmoid gives it back: log p for each of several classes, for one
log(p / (1 - p)). Axes: N examples, C outputs of the task (one per class; 1 for binary and regression), K columns of a
file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lora_ensemble.dicor.imports.layout import called, check_width, count, pick, read, shown
from lora_ensemble.dicor.imports.sources import Source
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Kind, class_reader

Form = Literal["auto", "logits", "probabilities", "decisions"]

EPSILON = 1e-6
"""Probabilities are kept this far from 0 and 1: a forest's certain 0 is "none of my trees", not log 0, and files have
about six digits. Its logit, 13.8, still outweighs any that BERT gives."""
_PROBABILITY = re.compile(r"p(r|rob\w*)?([_\W\d]|$)")  # p, p1, p_1, pr.yes, prob, proba_1, probability
_SLACK = 1e-6  # what rounding may add beyond 0 and 1


@dataclass(frozen=True, eq=False)
class Outputs:
    """A model's logits (N, C) float32 in its file's order, and how they were come by."""

    logits: np.ndarray
    form: Form
    """What the file held; never auto."""
    notices: list[str] = field(default_factory=list)


def to_logits(
    source: Source,
    kind: Kind,
    labels: Sequence[str],
    form: Form,
    columns: Sequence[str] = (),
    *,
    label_column: str = "label",
) -> Outputs:
    """Logits of a source's rows.

    ``labels``: the task's, in the order of its outputs. ``columns``: those to take, in the order of the labels; none:
    see ``layout.pick``. ``label_column``: the one with the true labels, where the file has them. ``UserError`` where
    columns or values are not what ``form`` says, or where "auto" could be mistaken.
    """
    if kind == "regression" and form not in ("auto", "logits"):
        raise UserError(f"--from {form}: a regression has values; leave it out")
    picked, notices = pick(source, kind, labels, columns, but=label_column, decisions=form == "decisions")
    if form == "decisions":
        if len(picked) != 1:
            raise UserError(f"{source.where}: --from decisions: {len(picked)} columns; expected one of class labels")
        return _decided(source, picked[0], kind, labels)
    if form == "auto" and kind != "regression":
        _refuse_decisions(source, picked, kind, labels)
    values = np.concatenate([read(source, name) for name in picked], axis=1)
    check_width(source, values.shape[1], picked, kind, labels)
    if kind == "regression":
        return Outputs(_float32(source, values, picked), "logits", notices)
    if values.shape[1] > len(picked):  # columns without names
        notices.append(f"{source.where}: its columns are taken in the order of the labels: {', '.join(labels)}")
    if form == "auto":
        form = _guess(source, values, picked)
    if form == "logits":
        if kind == "binary" and values.shape[1] == 2:
            values = values[:, 1:] - values[:, :1]  # the sigmoid of this is the softmax of those
        return Outputs(_float32(source, values, picked), form, notices)
    return Outputs(_float32(source, _from_probabilities(source, values, picked, kind, notices), picked), form, notices)


def _refuse_decisions(source: Source, picked: Sequence[str], kind: Kind, labels: Sequence[str]) -> None:
    """``UserError`` where the outputs can only be class labels: what is lost with them is for the user to accept."""
    if len(picked) != 1:
        return
    cells = source.columns[picked[0]]
    if isinstance(cells, np.ndarray):
        if cells.ndim == 2 and cells.shape[1] > 1:
            return
        cells = cells.reshape(-1).tolist()
    elif cells and isinstance(cells[0], list):
        return
    to_class = class_reader(labels, truth=list(labels) == ["0", "1"])
    known: dict[str, bool] = {}
    for cell in cells:
        text = str(cell)
        # A binary 0 or 1 may be a certain probability as well, which comes to the same; any other label may not.
        if text not in known and not known.setdefault(text, to_class(cell) is not None):
            return
    what = f"column {picked[0]!r} holds" if picked[0] else "it holds"
    raise UserError(
        f"{source.where}: {what} class labels only; give probabilities or logits if you can: votes know no doubt, so "
        "averages of logits, log-loss and calibration lose theirs; to take them as votes, say --from decisions"
    )


def _decided(source: Source, name: str, kind: Kind, labels: Sequence[str]) -> Outputs:
    """Logits that say a class and nothing of how sure: 1 for it and 0 for the others; binary: 1 or -1."""
    cells = source.columns[name]
    if isinstance(cells, np.ndarray):
        if cells.ndim == 2 and cells.shape[1] != 1:
            raise UserError(f"{source.where}: --from decisions: {cells.shape[1]} columns; expected one of class labels")
        cells = cells.reshape(-1).tolist()
    to_class = class_reader(labels, truth=list(labels) == ["0", "1"])
    decided = [to_class(cell) for cell in cells]
    bad = next((row for row, value in enumerate(decided) if value is None), None)
    if bad is not None:
        raise UserError(
            f"{source.at(bad)}: {called(name)}{shown(cells[bad])}; expected one of {', '.join(labels)}"
            + ("; if there are others, name all with --label-names" if kind == "multiclass" else "")
        )
    logits = np.eye(len(labels), dtype=np.float32)[np.array(decided, np.int64)]
    if kind == "binary":
        logits = logits[:, 1:] - logits[:, :1]
    notice = f"{source.where}: decisions are taken as one weak vote each (a logit of 1); a majority counts them fully, "
    return Outputs(logits, "decisions", [notice + "an average of logits or probabilities hardly"])


def _guess(source: Source, values: np.ndarray, picked: Sequence[str]) -> Form:
    """Logits or probabilities, where it cannot be mistaken: by the values, and by what the columns are called."""
    ask = "say --from probabilities or --from logits"
    name = picked[0].lower()
    told = "logits" if name.startswith("logit") else "probabilities" if _PROBABILITY.match(name) else None
    if (values < -_SLACK).any():
        if told == "probabilities":
            row = int(np.argmax((values < -_SLACK).any(axis=1)))
            raise UserError(f"{source.at(row)}: column {picked[0]!r} is negative, which no probability is; {ask}")
        return "logits"
    within = bool((values <= 1 + _SLACK).all())
    sums = (
        within and values.shape[1] > 1 and bool((np.abs(values.sum(axis=1) - 1) <= _tolerance(values.shape[1])).all())
    )
    if told == "logits" and not sums:
        return "logits"
    if told == "probabilities" or (sums and told is None):
        return "probabilities"
    what = "all values are between 0 and 1, as probabilities are and logits may be"
    if sums:
        what = f"columns are called {picked[0]!r}, but their rows sum to 1 as probabilities do"
    elif within and values.shape[1] > 1:
        what = "all values are between 0 and 1, but their rows do not sum to 1"
    elif not within:
        what = f"no value is negative and the highest is {values.max():g}: logits, or percentages or counts of votes?"
    raise UserError(f"{source.where}: {what}; {ask}")


def _tolerance(width: int) -> float:
    """How far from 1 a row of ``width`` probabilities may sum: what rounding each to two digits can do, up to 0.05."""
    return min(0.005 * width, 0.05) + _SLACK


def _from_probabilities(
    source: Source, values: np.ndarray, picked: Sequence[str], kind: Kind, notices: list[str]
) -> np.ndarray:
    """(N, C) logits of probabilities (N, K)."""
    outside = (values < -_SLACK) | (values > 1 + _SLACK)
    if outside.any():
        row, k = (int(i) for i in np.argwhere(outside)[0])
        name = picked[k] if len(picked) > 1 else picked[0]
        more = "; divide percentages by 100" if values.max() > 1 and values.max() <= 100 and values.min() >= 0 else ""
        raise UserError(
            f"{source.at(row)}: {called(name)}{values[row, k]:g}; expected a probability, from 0 to 1{more}; or say "
            f"--from logits{count(int(outside.any(axis=1).sum()))}"
        )
    p = np.clip(values, 0, 1)
    if p.shape[1] > 1:
        sums = p.sum(axis=1, keepdims=True)
        wrong = np.abs(sums[:, 0] - 1) > _tolerance(p.shape[1])
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(
                f"{source.at(row)}: the probabilities sum to {sums[row, 0]:g}; expected 1: one for each class, one "
                f"of which is true; or say --from logits{count(int(wrong.sum()))}"
            )
        p = p / sums
    clipped = int(((p < EPSILON) | (p > 1 - EPSILON)).any(axis=1).sum())
    if clipped:
        notices.append(
            f"{source.where}: {clipped} of {len(p)} rows hold certain (or almost certain) probabilities; they are kept "
            f"{EPSILON:g} from 0 and 1"
        )
    if kind == "multiclass":
        return np.log(np.maximum(p, EPSILON))
    if p.shape[1] == 1:
        p = np.clip(p, EPSILON, 1 - EPSILON)
        return np.log(p) - np.log1p(-p)
    p = np.maximum(p, EPSILON)
    return np.log(p[:, 1:]) - np.log(p[:, :1])


def _float32(source: Source, values: np.ndarray, picked: Sequence[str]) -> np.ndarray:
    with np.errstate(over="ignore"):
        logits = values.astype(np.float32)
    if not np.isfinite(logits).all():
        row, k = (int(i) for i in np.argwhere(~np.isfinite(logits))[0])
        raise UserError(f"{source.at(row)}: found {values[row, k]:g}; expected a number that fits 32 bits (up to 3e38)")
    return logits
