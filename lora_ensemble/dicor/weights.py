"""Convex weights of members, and a temperature for each.

Axes: k members, N examples, C outputs of a head.
"""

from __future__ import annotations

import numpy as np

from lora_ensemble.dicor.view import LEAST_PROBABILITY, losses
from lora_ensemble.tasks import Kind

SHRINK = 10.0
"""How strongly weights are drawn to 1/k: a penalty in nats of SHRINK k |w - 1/k|^2 against the sum of the log-losses,
so a thousand examples can say more against equal weights than a hundred."""


def convex_weights(
    voices: np.ndarray, labels: np.ndarray, kind: Kind, *, true_probabilities: np.ndarray | None, shrink: float = SHRINK
) -> np.ndarray:
    """Weights (k,), none below 0, of sum 1, that make the weighted mean good on these examples.

    Classifiers: the log-loss of the weighted mean of probabilities, from ``true_probabilities`` (k, N): stacking of
    predictive distributions (Yao et al. 2018, section 3.3). Regression: the squared error of the weighted mean of
    ``voices`` (k, N, 1), in units of twice the plain mean's squared error, which makes it a Gaussian's log-loss.
    Plus the penalty of ``SHRINK``. Both are convex: scipy's SLSQP, started at equal weights, finds the one minimum.
    """
    k = len(voices)
    if k == 1:
        return np.ones(1)
    from scipy.optimize import minimize

    equal = np.full(k, 1 / k)
    if kind == "regression":
        error = voices[..., 0] - labels  # (k, N); weights of sum 1: the mean's error is the weighted mean of errors
        products = error @ error.T
        scale = 2 * max(float(equal @ products @ equal) / len(labels), 1e-12)

        def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
            ahead = w - equal
            gradient = 2 * products @ w / scale + 2 * shrink * k * ahead
            return float(w @ products @ w / scale + shrink * k * ahead @ ahead), gradient
    else:
        assert true_probabilities is not None
        p = np.maximum(true_probabilities, LEAST_PROBABILITY)

        def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
            mixed, ahead = np.maximum(w @ p, LEAST_PROBABILITY), w - equal
            gradient = -p @ (1 / mixed) + 2 * shrink * k * ahead
            return float(-np.log(mixed).sum() + shrink * k * ahead @ ahead), gradient

    n = len(labels)
    found = minimize(
        lambda w: tuple(x / n for x in objective(w)),
        equal,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * k,
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(k)}],
        options={"maxiter": 200, "ftol": 1e-10},
    )
    w = np.maximum(found.x, 0)
    # Where the search failed, equal weights are what everything is drawn to.
    if not np.isfinite(w).all() or w.sum() <= 0 or objective(w / w.sum())[0] > objective(equal)[0]:
        return equal
    w[w < 1e-6] = 0
    return np.asarray(w / w.sum())


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
