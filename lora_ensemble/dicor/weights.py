"""Convex weights of members, and a temperature for each.

Axes: k members, N examples, C outputs of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_ensemble.dicor.view import LEAST_PROBABILITY, losses
from lora_ensemble.tasks import Kind

SHRINK = 10.0
"""How strongly weights are drawn to 1/k: a penalty in nats of SHRINK k |w - 1/k|^2 against the sum of the log-losses,
so a thousand examples can say more against equal weights than a hundred."""
PRECISION = 1e-9
"""The search ends when no weight moves by more."""


def convex_weights(
    voices: np.ndarray, labels: np.ndarray, kind: Kind, *, true_probabilities: np.ndarray | None, shrink: float = SHRINK
) -> np.ndarray:
    """Weights (k,), none below 0, of sum 1, that make the weighted mean good on these examples.

    Classifiers: the log-loss of the weighted mean of probabilities, from ``true_probabilities`` (k, N): stacking of
    predictive distributions (Yao et al. 2018, section 3.3). Regression: the squared error of the weighted mean of
    ``voices`` (k, N, 1), in units of twice the plain mean's squared error, which makes it a Gaussian's log-loss.
    Plus the penalty of ``SHRINK``, which makes both strictly convex: there is one minimum.

    It is found by projected gradients rather than by scipy's SLSQP, which finds the same (the tests compare them): this
    is done for every split of the dev set, and importing scipy alone takes as long as all of them.
    """
    k = len(voices)
    equal = np.full(k, 1 / k)
    if k == 1:
        return equal
    if kind == "regression":
        error = voices[..., 0] - labels  # (k, N); weights of sum 1: the mean's error is the weighted mean of errors
        products = error @ error.T
        scale = max(float(equal @ products @ equal) / len(labels), 1e-12)
        curvature = products / scale

        def slope(w: np.ndarray) -> np.ndarray:
            return np.asarray(curvature @ w + 2 * shrink * k * (w - equal))
    else:
        assert true_probabilities is not None
        p = np.maximum(true_probabilities, LEAST_PROBABILITY)
        ratio = p / (equal @ p)
        curvature = ratio @ ratio.T

        def slope(w: np.ndarray) -> np.ndarray:
            return np.asarray(2 * shrink * k * (w - equal) - p @ (1 / np.maximum(w @ p, LEAST_PROBABILITY)))

    # Moves of sum 0 are all that the constraint allows, so the curvature along (1, ..., 1) does not count.
    centred = curvature - curvature.mean(axis=0) - curvature.mean(axis=1)[:, None] + curvature.mean()
    steepest = float(np.linalg.eigvalsh(centred)[-1]) + 2 * shrink * k
    w = _descend(slope, equal, steepest)
    w[w < 1e-6] = 0
    return np.asarray(w / w.sum())


def _descend(slope: Callable[[np.ndarray], np.ndarray], start: np.ndarray, steepest: float) -> np.ndarray:
    """The weights (k,) on the simplex where a convex function of gradient ``slope`` is least.

    Projected gradients with Nesterov's momentum, which starts again where it points uphill (O'Donoghue and Candès
    2015). ``steepest``: the largest curvature at the start; where it turns out too small, the step is halved.
    """
    w, ahead, momentum, down = start, start, 1.0, slope(start)
    for _ in range(2000):
        further = project(ahead - down / steepest)
        moved, turned = further - ahead, slope(further)
        # The gradient changes by at most `steepest` times the move, or the step was too long.
        if (turned - down) @ moved > 1.0001 * steepest * (moved @ moved) + 1e-18:
            steepest *= 2
            continue
        if (ahead - further) @ (further - w) > 0:
            momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        done = np.abs(further - w).max() < PRECISION and np.abs(moved).max() < PRECISION
        ahead = further + (momentum - 1) / following * (further - w)
        w, momentum = further, following
        if done:
            break
        down = slope(ahead)
    return w


def project(v: np.ndarray) -> np.ndarray:
    """The nearest weights (k,) that are none below 0 and of sum 1 (Held, Wolfe and Crowder 1974)."""
    falling = np.sort(v)[::-1]
    above = (np.cumsum(falling) - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - above[np.flatnonzero(falling > above)[-1]], 0)


def temperatures(logits: np.ndarray, labels: np.ndarray, kind: Kind) -> np.ndarray:
    """The temperature of each classifier (k,) that makes its log-loss least: logits (k, N, C) are divided by it.

    Guo et al. 2017, section 4.2. The loss is convex in 1 / T, which is searched from 1/20 to 20 by golden section.
    """
    low, high = np.full(len(logits), np.log(0.05)), np.full(len(logits), np.log(20.0))
    golden = (np.sqrt(5) - 1) / 2

    def loss(log_scale: np.ndarray) -> np.ndarray:
        return losses(logits * np.exp(log_scale)[:, None, None], labels, kind).mean(axis=1)

    # A function that falls and then rises in 1 / T does so in its logarithm too.
    for _ in range(30):
        width = golden * (high - low)
        a, b = high - width, low + width
        left = loss(a) <= loss(b)
        low, high = np.where(left, low, a), np.where(left, b, high)
    return np.exp(-(low + high) / 2)
