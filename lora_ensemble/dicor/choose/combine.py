"""How an ensemble decides: by a mean of its members' logits or probabilities, or by the majority of their decisions.

Axes: M members, N examples of a split, C outputs of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions
from lora_ensemble.tasks import Kind

DECIMALS = 12
"""Scores and similarities are compared to so many decimals. What lies beyond is rounding, which depends on the order of
the examples; members that tie must tie whatever the order."""
LEAST_PROBABILITY = 1e-15
"""A probability is at least this before its logarithm is taken: one example cannot make a loss infinite."""


def precedence(scores: Sequence[float] | np.ndarray, names: Sequence[str]) -> list[int]:
    """Indices of members (M,), the best dev score first; equal scores by name."""
    rounded = [round(float(s), DECIMALS) for s in scores]
    return sorted(range(len(names)), key=lambda m: (-rounded[m], names[m]))


def mean(logits: np.ndarray) -> np.ndarray:
    """Mean of the members' logits: (M, N, C) to (N, C) float64 (Tolkunov, section 4.3, for STS)."""
    return np.asarray(np.mean(logits, axis=0, dtype=np.float64))


def voices(logits: np.ndarray, kind: Kind, temperatures: np.ndarray | None = None) -> np.ndarray:
    """What a member adds to a mean of probabilities: logits (..., N, C) to (..., N, C) float64.

    multiclass: the probabilities. binary: the probability of class 1 less 1/2, so that > 0 decides for class 1 as it
    does for a logit, and without rounding a small logit away. regression: the values.
    ``temperatures`` (M,): a classifier's logits are divided by them first.
    """
    logits = logits.astype(np.float64)
    if kind == "regression":
        return logits
    if temperatures is not None:
        logits = logits / temperatures[:, None, None]
    if kind == "binary":
        return np.tanh(logits / 2) / 2
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def of_voices(voice: np.ndarray, kind: Kind) -> np.ndarray:
    """Probabilities (N, classes) from a mean of ``voices`` (N, C) of a classifier."""
    return np.hstack([0.5 - voice, 0.5 + voice]) if kind == "binary" else voice


def log_probabilities(voice: np.ndarray, kind: Kind) -> np.ndarray:
    """Their logarithms (N, classes), from a mean of ``voices`` (N, C) of a classifier."""
    return np.log(np.maximum(of_voices(voice, kind), LEAST_PROBABILITY))


def vector_scaled(voice: np.ndarray, kind: Kind, scale: float, offsets: np.ndarray) -> np.ndarray:
    """Logits (N, C), as a head's, of a mean of ``voices`` (N, C) whose probabilities p become softmax(a log p + b).

    ``scale`` a, ``offsets`` b (classes,). Vector scaling (Guo et al. 2017, section 4.2) with one scale for all classes.
    """
    z = scale * log_probabilities(voice, kind) + offsets
    return z[:, 1:] - z[:, :1] if kind == "binary" else z


def shares(decided: np.ndarray, num_classes: int) -> np.ndarray:
    """The share of the votes that each class has: class numbers (M, N) to (N, num_classes)."""
    return np.stack([(decided == c).mean(axis=0) for c in range(num_classes)], axis=1)


def majority(
    decided: np.ndarray,
    *,
    num_classes: int,
    ranks: Sequence[int | None],
    scores: Sequence[float] | np.ndarray,
    names: Sequence[str],
) -> np.ndarray:
    """The class that most members decided for: class numbers (M, N) to (N,) int64.

    Of tied classes it is the one that the member of highest rank voted for (Tolkunov, section 4.3); a member without
    a rank comes last; members of the same rank go by dev score, then by name. A member that voted for none of the
    tied classes has no say.
    """
    n = decided.shape[1]
    cells = decided + num_classes * np.arange(n)  # (M, N): one counter for every example and class
    votes = np.bincount(cells.ravel(), minlength=n * num_classes).reshape(n, num_classes)
    leading = votes == votes.max(axis=1, keepdims=True)  # (N, num_classes)
    winner = np.argmax(leading, axis=1)
    tied = np.flatnonzero(leading.sum(axis=1) > 1)
    # sorted() is stable: members of the same rank stay in the order of score and name.
    order = sorted(precedence(scores, names), key=lambda m: -1 if (r := ranks[m]) is None else r, reverse=True)
    speaks = decided[order][:, tied]  # (M, tied), the member with the most say first
    counts = leading[tied, speaks]  # (M, tied): this member voted for one of the tied classes
    winner[tied] = speaks[np.argmax(counts, axis=0), np.arange(len(tied))]
    return winner


def combine(
    logits: np.ndarray,
    *,
    kind: Kind,
    strategy: Strategy,
    ranks: Sequence[int | None],
    scores: Sequence[float] | np.ndarray,
    names: Sequence[str],
    weights: np.ndarray | None = None,
    temperatures: np.ndarray | None = None,
    scale: float = 1.0,
    offsets: np.ndarray | None = None,
) -> np.ndarray:
    """What an ensemble of members with these logits (M, N, C) decides: (N,), as ``tasks.decisions``.

    mean: of the logits. mean-probability: of the probabilities (for regression, the values). weighted: the same with
    ``weights`` (M,), convex. ``temperatures`` (M,): a classifier's logits are divided by them before probabilities are
    taken. ``scale`` and ``offsets`` (classes,): of a weighted mean, see ``vector_scaled``. majority: of the decisions.
    The order of the members does not matter. Raises ``UserError`` for a majority of a regression and for weights that
    are missing.
    """
    # Summed in one order: in another the last bit could be another.
    order = precedence(scores, names)
    if strategy == "mean":
        return decisions(mean(logits[order]), kind)
    if strategy in ("mean-probability", "weighted"):
        if strategy == "weighted" and weights is None:
            raise UserError("strategy weighted: there are no weights; select again")
        each = voices(logits[order], kind, None if temperatures is None else temperatures[order])
        if strategy == "mean-probability" or weights is None:
            return decisions(each.mean(axis=0), kind)
        together = np.tensordot(weights[order], each, axes=1)
        return decisions(together if offsets is None else vector_scaled(together, kind, scale, offsets), kind)
    if kind == "regression":
        raise UserError("strategy majority: a regression has values, not classes to vote for; use the mean")
    num_classes = 2 if kind == "binary" else logits.shape[-1]
    return majority(decisions(logits, kind), num_classes=num_classes, ranks=ranks, scores=scores, names=names)
