"""From logits to probabilities and losses.

A member's *soft vote*, what it adds to a mean of probabilities, (..., N, C) float64: multiclass: the probabilities;
binary: that of class 1 less 1/2, so that > 0 decides for class 1 as of a logit, without rounding a small one away;
regression: the values.
"""

from __future__ import annotations

import numpy as np

from lora_ensemble.scores import LEAST_PROBABILITY, probabilities
from lora_ensemble.tasks import Kind


def soft_votes(logits: np.ndarray, kind: Kind, temperatures: np.ndarray | None = None) -> np.ndarray:
    """Of logits (..., N, C); a classifier's, if (M, N, C), are divided by ``temperatures`` (M,) first."""
    if kind == "regression":
        return logits.astype(np.float64)
    if temperatures is not None:
        logits = logits.astype(np.float64) / temperatures[:, None, None]
    return np.tanh(logits.astype(np.float64) / 2) / 2 if kind == "binary" else probabilities(logits, kind)


def class_probabilities(votes: np.ndarray, kind: Kind) -> np.ndarray:
    """Probabilities (..., N, classes) from a classifier's soft votes (..., N, C), or from a mean of them."""
    return np.concatenate([0.5 - votes, 0.5 + votes], axis=-1) if kind == "binary" else votes


def true_probabilities(logits: np.ndarray, labels: np.ndarray, kind: Kind) -> np.ndarray:
    """The probability of the label: logits (..., N, C) of a classifier and labels (N,) to (..., N) float64."""
    logits = logits.astype(np.float64)
    if kind == "binary":
        x = np.where(labels > 0, logits[..., 0], -logits[..., 0])
        e = np.exp(-np.abs(x))  # never overflows
        return np.where(x >= 0, 1.0, e) / (1 + e)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(np.exp(shifted[..., np.arange(len(labels)), labels]) / np.exp(shifted).sum(axis=-1))


def log_losses(probability: np.ndarray) -> np.ndarray:
    """Log-loss of each example in nats: probabilities of the labels (..., N) to (..., N)."""
    return np.asarray(-np.log(np.maximum(probability, LEAST_PROBABILITY)))


def losses(logits: np.ndarray, labels: np.ndarray, kind: Kind) -> np.ndarray:
    """The softer measure, the less the better: log-loss, or squared error; (..., N, C) to (..., N)."""
    if kind == "regression":
        return np.asarray(np.square(logits[..., 0].astype(np.float64) - labels))
    return log_losses(true_probabilities(logits, labels, kind))
