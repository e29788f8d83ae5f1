"""Calibration, and Tolkunov's two formulas beside what is observed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtrc

from lora_ensemble.dicor.choose.combine import majority
from lora_ensemble.dicor.choose.probabilities import log_losses
from lora_ensemble.dicor.choose.similarity import features
from lora_ensemble.scores import decisions
from lora_ensemble.tasks import Kind

BINS = 10  # bins of equal width from 0 to 1; a probability on the border of two is in the lower one


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How well the probabilities of a classifier are calibrated."""

    said: np.ndarray  # (BINS,) mean probability in each bin; NaN where a bin is empty
    came_true: np.ndarray  # (BINS,) share of the bin's examples for which it came true; NaN where it is empty
    counts: np.ndarray  # (BINS,) predictions in each bin: an example held out R times counts R times
    ece: float  # the mean of abs(said - came_true) over bins, each by its share of the predictions
    brier: float
    """Brier (1950): the mean of (p - y)^2, binary: for class 1, 0 to 1; multiclass: summed over classes, 0 to 2."""
    log_loss: float  # mean of -log p(label), in nats; a probability counts as 1e-15 at least


def calibration(probabilities: np.ndarray, labels: np.ndarray, kind: Kind) -> Calibration:
    """From probabilities (R, N, classes) and labels (N,) of a classifier.

    binary: of the probability of class 1; multiclass: of the class that was decided for (Guo et al. 2017, section 2).
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


@dataclass(frozen=True, kw_only=True)
class Theory:
    """One ensemble on the dev set that it was chosen on: of values, or of votes."""

    size: int  # k
    level: float  # sigma^2, the mean of the members' variances of value - label; p, of their shares of wrong decisions
    rho: float  # mean correlation of two members' errors, where it is defined; NaN for a single one
    expected: float  # by the report: the variance of the error (equation 2), or how often a majority is wrong
    independent: float  # the same if errors were independent; ties of votes are not counted as wrong (Condorcet)
    observed: float  # the same of the members' plain mean, or of their majority with the paper's ties


def theory(
    logits: Iterable[np.ndarray], labels: np.ndarray, kind: Kind, *, outputs: int, order: Sequence[int]
) -> Theory:
    """Of k members whose logits (N, C) come one by one; C is ``outputs``, ``order`` (k,) that of ``tie_order``.

    Members are looked at one at a time; of classifiers the decisions (k, N) are kept, a byte each.
    """
    k, n = len(order), len(labels)
    votes = np.empty((0 if kind == "regression" else k, n), np.min_scalar_type(outputs))
    levels, errors, units, correlated = [], np.zeros(n), np.zeros(n), 0
    for i, member_logits in enumerate(logits):
        decided = decisions(member_logits, kind)
        if kind == "regression":
            levels.append(float(np.var(decided - labels)))
            errors += (decided - labels) / k
        else:
            levels.append(float(np.mean(decided != labels)))
            votes[i] = decided
        unit = features(member_logits[None], kind=kind, similarity="error", labels=labels)[0]
        if not np.isnan(unit).any():  # a member that is never, or always, wrong has no correlation
            units, correlated = units + unit, correlated + 1
    # The mean of the products of all pairs of M unit vectors is (|sum|^2 - M) / (M (M - 1)): no need of M x M numbers.
    pairs, level = correlated * (correlated - 1), float(np.mean(levels))
    rho = float((np.square(units).sum() - correlated) / pairs) if pairs else float("nan")
    if kind == "regression":
        expected, independent, observed = ensemble_variance(level, rho, k), level / k, float(np.var(errors))
    else:
        expected, independent = majority_error(level, rho, k), independent_majority_error(level, k)
        decided = majority(votes, order, max(outputs, 2))
        observed = float(np.mean(decided != labels))
    return Theory(size=k, level=level, rho=rho, expected=expected, independent=independent, observed=observed)


def ensemble_variance(variance: float, rho: float, size: int) -> float:
    """Tolkunov, equation 2: Var(ens) = sigma^2 / N + (N - 1) / N * rho * sigma^2, with N = ``size`` members."""
    return variance / size + ((size - 1) / size * rho * variance if size > 1 else 0.0)


def majority_error(p: float, rho: float, size: int) -> float:
    """Tolkunov's approximation of the probability that a majority of N = ``size`` members is wrong.

    p_eff = rho p + (1 - rho) p^2 and P = sum_{k = floor(N/2)}^{N} C(N,k) p_eff^k (1 - p_eff)^(N-k), as printed, faults
    included. NaN where ``rho`` is undefined or p_eff is no probability. For one member it is 1.
    """
    if size == 1:
        return 1.0
    effective = rho * p + (1 - rho) * p * p
    return float(bdtrc(size // 2 - 1, size, effective)) if 0 <= effective <= 1 else float("nan")


def independent_majority_error(p: float, size: int) -> float:
    """The probability that more than half of ``size`` votes are wrong, each independently with probability p."""
    return float(bdtrc(size // 2, size, p))
