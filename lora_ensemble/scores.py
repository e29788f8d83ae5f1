"""How a logit becomes a decision, and how good the decisions are. What decides anything is computed here, in numpy.

Axes: N examples of a split, C outputs of a head (one per class; one alone for binary and regression).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_ensemble.tasks import Kind


def decisions(logits: np.ndarray, kind: Kind) -> np.ndarray:
    """What each row of logits decides.

    ``logits``: (..., N, C). Returns (..., N): int64 class numbers (multiclass: argmax, the lowest of equals;
    binary: logit > 0) or float64 values (regression).
    """
    if kind == "multiclass":
        return np.argmax(logits, axis=-1)
    if kind == "binary":
        return (logits[..., 0] > 0).astype(np.int64)
    return logits[..., 0].astype(np.float64)


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


def score_decisions(decided: np.ndarray, labels: np.ndarray, kind: Kind) -> float:
    """The task's score of decisions (N,) against labels (N,): accuracy, or Pearson r for regression."""
    if kind == "regression":
        return pearson(decided, labels)
    return float(np.mean(decided == labels))


def score(logits: np.ndarray, labels: np.ndarray, kind: Kind) -> float:
    """The task's score of logits (N, C) against labels (N,). NaN where Pearson r is undefined."""
    return score_decisions(decisions(logits, kind), labels, kind)


def one_label(labels: np.ndarray | None, names: Sequence[str], what: str = "labels") -> list[str]:
    """A notice where all labels (N,) are the same, values or class numbers of ``names``; ``what``: their name in it."""
    if labels is None or not len(labels) or (labels != labels[0]).any():
        return []
    label = f"{labels[0]:g}" if not names else names[int(labels[0])]
    return [f"all {len(labels)} {what} are the same ({label}), so a score on them says nothing of how good a member is"]


def overall_score(scores: dict[str, tuple[float, Kind]]) -> float:
    """Mean of the tasks' scores, a Pearson r entering as (r + 1) / 2.

    For sst, quora and sts it is the course's overall score (Oyeniyi, section 5.2). ``scores``: task name to
    (score, kind). NaN if one is NaN.
    """
    return float(np.mean([(s + 1) / 2 if kind == "regression" else s for s, kind in scores.values()]))


def overall(scores: dict[str, tuple[float, Kind]]) -> float:
    """What a run's best epoch is chosen by: the score of its one task, or the overall score (task: score, kind)."""
    return next(iter(scores.values()))[0] if len(scores) == 1 else overall_score(scores)
