"""How a logit becomes a decision, and how good the decisions are. What decides anything is computed here, in numpy.

Axes: N examples of a split, C outputs of a head (one per class; one alone for binary and regression), K classes, W sets
of weights of the examples. ``tasks.SCORES`` says which kind of task has which score. What they are where something is
missing: a class without examples does not count in balanced_accuracy, auroc and average_precision; one that was not
decided for either does not in f1_macro. An F1 of nobody is 0, and so is mcc where all labels or all decisions are the
same (both as scikit-learn has it). NaN, undefined: auroc and average_precision where no class has examples beside
others, kappa_quadratic where labels and decisions are all one class, r2 of constant labels, pearson and spearman of
anything constant.

Of **several labels** of a text, logits and labels are (N, L). They are taken for a binary task with a row for each
example and label, (N L), example by example (``as_binary``, ``width`` L), which says what accuracy (the share of right
decisions: 1 less the Hamming loss) and log_loss are. F1s are those of the labels' presence: f1_micro over all rows,
f1_macro and f1_weighted over the labels, as auroc and average_precision are, a label for a class in what is said above.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_ensemble.tasks import SCORES, Kind, ScoreName, Task, check_score

LEAST_PROBABILITY = 1e-15  # before its logarithm is taken: one example cannot make a loss infinite


def as_binary(logits: np.ndarray, kind: Kind) -> tuple[np.ndarray, Kind, int]:
    """Logits (..., N, L) of several labels as those of a binary task, (..., N L, 1), its kind, and the width L.

    Those of another kind as they are, with width 1.
    """
    if kind != "multilabel":
        return logits, kind, 1
    return logits.reshape(*logits.shape[:-2], -1, 1), "binary", logits.shape[-1]


def by_example(said: np.ndarray, width: int) -> np.ndarray:
    """What was said of the rows that ``as_binary`` made, (..., N L), by example: (..., N, L); for width 1 as it is."""
    return said if width == 1 else said.reshape(*said.shape[:-1], -1, width)


def decisions(logits: np.ndarray, kind: Kind) -> np.ndarray:
    """What each row of logits decides.

    ``logits``: (..., N, C). Returns (..., N): int64 class numbers (multiclass: argmax, the lowest of equals;
    binary: logit > 0) or float64 values (regression). multilabel: (..., N, L), each as binary.
    """
    if kind == "multiclass":
        return np.argmax(logits, axis=-1)
    if kind == "multilabel":
        return (logits > 0).astype(np.int64)
    if kind == "binary":
        return (logits[..., 0] > 0).astype(np.int64)
    return logits[..., 0].astype(np.float64)


def probabilities(logits: np.ndarray, kind: Kind) -> np.ndarray:
    """A classifier's probabilities (..., N, K) from its logits (..., N, C), in float64."""
    z = logits.astype(np.float64)
    z = np.concatenate([np.zeros_like(z), z], axis=-1) if kind == "binary" else z
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def said_of(logits: np.ndarray, kind: Kind, name: ScoreName | None = None) -> np.ndarray:
    """What the score ``name`` is of: decisions (..., N) of logits (..., N, C), or probabilities (..., N, K)."""
    of = SCORES[check_score(name, kind)].of
    return probabilities(logits, kind) if of == "probabilities" else decisions(logits, kind)


def score(logits: np.ndarray, labels: np.ndarray, kind: Kind, name: ScoreName | None = None) -> float:
    """The score of logits (N, C) against labels (N,), or (N, L); ``name`` None: the kind's default. NaN: undefined."""
    name = check_score(name, kind)
    logits, kind, width = as_binary(logits, kind)
    return float(scored(said_of(logits, kind, name), labels.reshape(-1), kind, name, width=width))


def scored(
    said: np.ndarray,
    labels: np.ndarray,
    kind: Kind,
    name: ScoreName | None = None,
    weights: np.ndarray | None = None,
    *,
    width: int = 1,
) -> np.ndarray:
    """The score ``name`` (None: the kind's default) of what was said, see ``said_of``, against labels (N,).

    ``weights`` (W, N), none below 0: how often each example counts. ``width``: as ``as_binary`` has it. Returns (...),
    or (..., W) with weights.
    """
    name = check_score(name, kind)
    if name == "pearson" and weights is None:
        flat = said.reshape(-1, said.shape[-1])
        return np.array([pearson(row, labels) for row in flat]).reshape(said.shape[:-1])
    w = np.ones((1, len(labels))) if weights is None else np.asarray(weights, np.float64)
    if SCORES[name].offsets and width > 1:
        right, true, decided = (w[:, ::width] @ by_example(x, width) for x in (said * labels, labels, said))
        found = _of_f1s(right, true, decided, name)
    elif SCORES[name].offsets:
        found = _of_confusion(confusion(said, labels, w), name)
    elif SCORES[name].by_rank or name == "pearson":
        one = said.reshape(-1, *said.shape[said.ndim - 1 - (SCORES[name].of == "probabilities") :])
        truth = _midranks(labels, w) if name == "spearman" else labels
        found = np.array([_of_order(row, truth, kind, name, w, width) for row in one])
        found = found.reshape(*said.shape[: said.ndim - one.ndim + 1], len(w))
    else:
        found = _of_means(said, labels, name, w)
    return found[..., 0] if weights is None else found


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two vectors (N,), in float64; NaN where either is constant (r is undefined there)."""
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    # Judged on the values, not on a rounded variance: a constant may leave a variance of 1e-34.
    if len(a) == 0 or a.min() == a.max() or b.min() == b.max():
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    # Scaled before they are squared: the squares of small deviations would underflow.
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1.0, 1.0))


# Functions of the confusion matrix


def confusion(decided: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Decisions (..., N) against labels (N,) with weights (W, N): (..., W, K, K), a row for each true class."""
    k = int(max(decided.max(initial=1), labels.max(initial=1))) + 1
    cells = (labels.astype(np.int64) * k + decided).reshape(-1, 1, len(labels))
    shape = (len(cells), len(weights), len(labels))
    place = cells + k * k * np.arange(shape[0] * shape[1]).reshape(*shape[:2], 1)
    counts = np.bincount(place.ravel(), np.broadcast_to(weights, shape).ravel(), shape[0] * shape[1] * k * k)
    return counts.reshape(*decided.shape[:-1], len(weights), k, k)


def _of_confusion(counts: np.ndarray, name: ScoreName) -> np.ndarray:
    """A score (...) of confusion matrices (..., K, K)."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    true, decided = counts.sum(axis=-1), counts.sum(axis=-2)  # (..., K)
    n = true.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        if name == "balanced_accuracy":
            return np.asarray(np.where(true > 0, right / true, 0).sum(axis=-1) / (true > 0).sum(axis=-1))
        if name == "kappa_quadratic":
            apart = np.square(np.subtract.outer(*[np.arange(counts.shape[-1])] * 2))
            by_chance = np.einsum("...i,ij,...j->...", true, apart, decided) / n
            return np.asarray(np.where(by_chance > 0, 1 - (counts * apart).sum(axis=(-2, -1)) / by_chance, np.nan))
        if name == "mcc":  # Gorodkin 2004
            spread = (n**2 - np.square(true).sum(axis=-1)) * (n**2 - np.square(decided).sum(axis=-1))
            r = (n * right.sum(axis=-1) - (true * decided).sum(axis=-1)) / np.sqrt(spread)
            return np.asarray(np.where(spread > 0, r, 0.0))
        if name == "f1":
            right, true, decided = right[..., 1:2], true[..., 1:2], decided[..., 1:2]
    return _of_f1s(right, true, decided, name)


def _of_f1s(right: np.ndarray, true: np.ndarray, decided: np.ndarray, name: ScoreName) -> np.ndarray:
    """F1s (...) from how many of each class or label (..., K) are rightly decided, are true and are decided."""
    if name == "f1_micro":
        right, true, decided = (np.asarray(x.sum(axis=-1, keepdims=True)) for x in (right, true, decided))
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(true + decided > 0, 2 * right / (true + decided), 0.0)
    share = true if name == "f1_weighted" else true + decided > 0
    total = share.sum(axis=-1)
    return np.asarray((f1 * share).sum(axis=-1) / np.where(total > 0, total, 1))


# Functions of means over examples, and of their order


def _of_means(said: np.ndarray, labels: np.ndarray, name: ScoreName, weights: np.ndarray) -> np.ndarray:
    """A score (..., W) of what was said, (..., N) or (..., N, K), that is made of means over the examples."""

    def mean(x: np.ndarray) -> np.ndarray:
        return np.asarray(x @ weights.T / weights.sum(axis=1))

    if name == "accuracy":
        return mean(said == labels)
    if name == "log_loss":
        return mean(-np.log(np.maximum(said[..., np.arange(len(labels)), labels.astype(int)], LEAST_PROBABILITY)))
    error = said - labels
    if name == "mae":
        return mean(np.abs(error))
    squared = mean(np.square(error))
    if name == "rmse":
        return np.sqrt(squared)
    y = labels - labels.mean()
    variance = mean(np.square(y)) - np.square(mean(y))
    with np.errstate(invalid="ignore", divide="ignore"):
        # What is left of a constant after rounding is no variance.
        return np.where(variance > 1e-12 * np.square(y).max(initial=0), 1 - squared / variance, np.nan)


def _of_order(
    said: np.ndarray, labels: np.ndarray, kind: Kind, name: ScoreName, weights: np.ndarray, width: int
) -> np.ndarray:
    """auroc, average_precision of probabilities (N, K), pearson, spearman of values (N,): (W,).

    ``labels`` (N,); of spearman their ranks (W, N). Of several classes each one is held against the rest, and the mean
    over classes, or over several labels, is taken ("macro").
    """
    if kind == "regression":
        x = _midranks(said, weights) if name == "spearman" else np.broadcast_to(said, weights.shape)
        return _correlation(x, np.broadcast_to(labels, weights.shape), weights)
    classes = [1] if kind == "binary" else range(said.shape[1])
    parts = [(slice(label, None, width), c) for label in range(width) for c in classes]
    found = np.array([_of_curve(said[at, c], labels[at] == c, name, weights[:, at]) for at, c in parts])  # (K, W)
    there = np.isfinite(found)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, found, 0).sum(axis=0) / there.sum(axis=0))


def _of_curve(p: np.ndarray, positive: np.ndarray, name: ScoreName, weights: np.ndarray) -> np.ndarray:
    """The area under the ROC curve, or average precision, of a class's probabilities (N,): (W,); ties are one step."""
    order = np.argsort(-p, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(p[order]) != 0, True))
    tp, fp = (np.cumsum((weights * who)[:, order], axis=1)[:, ends].astype(np.float64) for who in (positive, ~positive))
    gained = np.diff(tp, prepend=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        if name == "auroc":
            return np.asarray(((tp - gained / 2) * np.diff(fp, prepend=0.0)).sum(axis=1) / (tp[:, -1] * fp[:, -1]))
        return np.asarray((gained * np.where(gained > 0, tp / (tp + fp), 0)).sum(axis=1) / tp[:, -1])


def _midranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The ranks (W, N) of values (N,), each there as often as a weight says, from 1; of equals the mean."""
    order = np.argsort(values, kind="stable")
    new = np.append(True, np.diff(values[order]) != 0)
    upto = np.cumsum(weights[:, order], axis=1)[:, np.append(np.flatnonzero(new)[1:] - 1, len(values) - 1)]
    middle = (upto + np.hstack([np.zeros((len(weights), 1)), upto[:, :-1]]) + 1) / 2
    ranks = np.empty(weights.shape)
    ranks[:, order] = middle[:, np.cumsum(new) - 1]
    return ranks


def _correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's r (W,) of the rows of a and b (W, N); NaN where one is constant."""

    def centred(x: np.ndarray) -> np.ndarray:
        return np.asarray(x - ((weights * x).sum(axis=1) / weights.sum(axis=1))[:, None])

    x, y = centred(a), centred(b)
    xx, yy = (weights * x * x).sum(axis=1), (weights * y * y).sum(axis=1)
    constant = (xx <= 1e-20 * np.square(a).max(axis=1)) | (yy <= 1e-20 * np.square(b).max(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(constant, np.nan, np.clip((weights * x * y).sum(axis=1) / np.sqrt(xx * yy), -1.0, 1.0))


# What is said of them


def one_label(labels: np.ndarray | None, names: Sequence[str], what: str = "labels") -> list[str]:
    """A notice where all labels (N,) are the same, values or class numbers of ``names``; ``what``: their name in it.

    Of several, (N, L), one that names those which no example has, or every one.
    """
    if labels is None or not len(labels):
        return []
    if labels.ndim > 1:
        alike = [name for name, same in zip(names, (labels == labels[0]).all(axis=0), strict=True) if same]
        return [f"of the {what} none or all of {len(labels)} examples have {', '.join(alike)}"] if alike else []
    if (labels != labels[0]).any():
        return []
    label = f"{labels[0]:g}" if not names else names[int(labels[0])]
    return [f"all {len(labels)} {what} are the same ({label}), so a score on them says nothing of how good a member is"]


def overall_score(scores: dict[str, tuple[float, Kind]]) -> float:
    """Mean of the tasks' accuracies and, of regressions, of (r + 1) / 2.

    For sst, quora and sts it is the course's overall score (Oyeniyi, section 5.2). ``scores``: task name to
    (score, kind). NaN if one is NaN.
    """
    return float(np.mean([(s + 1) / 2 if kind == "regression" else s for s, kind in scores.values()]))


def overall(scores: Sequence[float], tasks: Sequence[Task]) -> float:
    """What a run's best epoch is chosen by, the higher the better, from the score of each task.

    That of one task alone; else the mean by the weights that ``data.overall`` gives, or ``overall_score``. A score of
    which lower is better counts negative.
    """
    if len(tasks) > 1 and any(t.overall is None for t in tasks):
        return overall_score({t.name: (s, t.kind) for s, t in zip(scores, tasks, strict=True)})
    signed = [t.sign * s for s, t in zip(scores, tasks, strict=True)]
    return signed[0] if len(tasks) == 1 else float(np.average(signed, weights=[t.overall or 0.0 for t in tasks]))
