"""Whether probabilities mean what they say: reliability diagram, expected calibration error, Brier score, log-loss.

Axes: R repeats, N examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.choose.probabilities import log_losses
from lora_ensemble.tasks import Kind

BINS = 10
"""Bins of equal width from 0 to 1; a probability on the border of two is in the lower one."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How well the probabilities of a classifier are calibrated."""

    said: np.ndarray
    """(BINS,) mean probability in each bin; NaN where a bin is empty."""
    came_true: np.ndarray
    """(BINS,) share of the bin's examples for which it came true; NaN where it is empty."""
    counts: np.ndarray
    """(BINS,) predictions in each bin: an example held out R times counts R times."""
    ece: float
    """Expected calibration error: the mean of abs(said - came_true) over bins, each by its share of the predictions."""
    brier: float
    """Brier (1950). binary: the mean of (p - y)^2 for class 1, 0 to 1. multiclass: the mean over examples of the sum of
    the squares over all classes, 0 to 2."""
    log_loss: float
    """Mean of -log p(label), in nats; a probability counts as 1e-15 at least."""


def calibration(probabilities: np.ndarray, labels: np.ndarray, kind: Kind) -> Calibration:
    """From probabilities (R, N, classes) and labels (N,) of a classifier.

    What is looked at is, for binary, the probability of class 1 and whether it is class 1, and, for multiclass, the
    probability of the class that was decided for and whether it is right (Guo et al. 2017, section 2: the confidence).
    """
    repeats, n, classes = probabilities.shape
    p = probabilities.reshape(repeats * n, classes)
    y = np.tile(labels.astype(np.int64), repeats)
    said, true = (p[:, 1], y == 1) if kind == "binary" else (p.max(axis=1), p.argmax(axis=1) == y)
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], said)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bins, said, minlength=BINS) / counts
        share = np.bincount(bins, true, minlength=BINS) / counts
    filled = counts > 0
    right = p[np.arange(len(y)), y]
    squares = np.square(1 - right) if kind == "binary" else np.square(p - np.eye(classes)[y]).sum(axis=1)
    return Calibration(
        said=mean,
        came_true=share,
        counts=counts,
        ece=float(np.abs(mean - share)[filled] @ counts[filled] / len(y)),
        brier=float(squares.mean()),
        log_loss=float(log_losses(right).mean()),
    )
