"""Convex weights of members, a temperature for each, and a scale and offsets of the classes for their mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lora_ensemble.dicor.choose.combine import Choice, log_probabilities, of_labels
from lora_ensemble.dicor.choose.probabilities import losses
from lora_ensemble.dicor.members import Members
from lora_ensemble.errors import UserError
from lora_ensemble.scores import LEAST_PROBABILITY
from lora_ensemble.tasks import Kind

SHRINK = 1.0
"""How strongly weights are drawn to 1/k: a penalty in nats of SHRINK k |w - 1/k|^2 against the sum of the log-losses.
With 0.1, weights fit a dev set's noise; with 10, weak members keep too much; between 1 and 3 it hardly matters
(benchmarks/penalties.py)."""
PULL = 10.0
"""How strongly a scale is drawn to 1 and offsets to 0: the prior that each is normal, with variance 1 / PULL. With 1,
offsets learn the class shares of a small dev set: of 100 examples of ten classes 0.011 of accuracy was lost, with 10
0.003, and members that do lean to a class were mended as well but for 0.002 (benchmarks/penalties.py)."""
PRECISION = 1e-9  # the search ends when no weight moves by more


def fitted(members: Members, choice: Choice, *, temperature: bool = False, offset: bool = False) -> Choice:
    """The choice with the weights that the strategy ``weighted`` needs; members without weight are none.

    ``temperature``: with temperatures (``UserError`` where they have no meaning). ``offset``: with scale and offsets.
    """
    chosen = members.take(choice.members)
    if temperature:
        if chosen.kind == "regression" or choice.strategy in ("mean", "majority"):
            raise UserError(
                "--temperature: only a classifier's probabilities have one; use --strategy mean-probability"
            )
        choice = replace(choice, temperatures=(degrees := temperatures(chosen)))
        chosen = replace(chosen, logits=chosen.logits / degrees[:, None, None])
    if choice.strategy != "weighted":
        return choice
    weights = convex_weights(chosen)
    if offset and chosen.kind != "regression":
        mean = np.tensordot(weights, chosen.soft_votes, axes=1)
        scale, offsets = scale_and_offsets(mean, chosen.labels, chosen.kind)
        if chosen.width > 1:  # one for all labels
            offsets = of_labels(np.full(chosen.width, offsets[1] - offsets[0]))
        choice = replace(choice, scale=scale, offsets=offsets)
    kept = np.flatnonzero(weights > 0)
    return replace(
        choice,
        members=[choice.members[i] for i in kept],
        weights=weights[kept],
        temperatures=None if choice.temperatures is None else choice.temperatures[kept],
        similarities=choice.similarities if len(kept) == len(chosen) else [],
    )


def convex_weights(members: Members, *, shrink: float = SHRINK) -> np.ndarray:
    """Weights (k,), none below 0, of sum 1, that make the weighted mean good on these examples.

    Classifiers: the log-loss of the weighted mean of probabilities: stacking of predictive distributions (Yao et al.
    2018, section 3.3). Regression: the squared error of the weighted mean or, where the score looks at neither level
    nor scale, as r does, of the best straight line through it; in units of twice what the plain mean, or its line,
    leaves, which makes it a Gaussian's log-loss. Plus the penalty of ``SHRINK``, which makes both strictly convex:
    there is one minimum. scipy's SLSQP finds the same (the tests compare them), but importing scipy alone takes as long
    as all splits of a dev set.
    """
    k = len(members)
    equal, pull = np.full(k, 1 / k), 2 * shrink * k
    if k == 1:
        return equal
    if members.kind != "regression":
        p = np.maximum(members.true_probabilities, LEAST_PROBABILITY)
        ratio = p / (equal @ p)
        curvature = ratio @ ratio.T

        def slope(w: np.ndarray) -> np.ndarray:
            return np.asarray(pull * (w - equal) - p @ (1 / np.maximum(w @ p, LEAST_PROBABILITY)))

        # Moves of sum 0 are all that the constraint allows, so the curvature along (1, ..., 1) does not count.
        centred = curvature - curvature.mean(axis=0) - curvature.mean(axis=1)[:, None] + curvature.mean()
        w = _descend(slope, equal, float(np.linalg.eigvalsh(centred)[-1]) + pull, project)
    else:
        w = _of_values(members, equal, pull)
        if w is equal:
            return equal
    w = np.where(w < 1e-6 * w.sum(), 0.0, w)  # the rest is only rounding
    return np.asarray(w / w.sum())


def _of_values(members: Members, equal: np.ndarray, pull: float) -> np.ndarray:
    """A regression's weights (k,), none below 0 and not all 0, before they are made to sum to 1."""
    x, y = members.soft_votes[..., 0], members.labels
    if members.scored_by in ("pearson", "spearman"):
        # Of all weights none below 0, those of the least squares fit have the highest r: a fit with an intercept is as
        # good as its r. The plain mean's line has the slope b, so what is divided by it is drawn to 1/k.
        x, y = x - x.mean(axis=1, keepdims=True), y - y.mean()
        mean = equal @ x
        if mean @ y <= 0 or mean @ mean <= 1e-24 * np.square(x).max(axis=0).sum():
            # The mean goes against the labels, or is constant: there is no line to be drawn to.
            return equal
        b = float(mean @ y) / float(mean @ mean)
        x, sum_to_1 = b * x, False
    else:  # less the plain mean: of weights of sum 1 it is the same fit, with less to round
        x, y, sum_to_1 = x - equal @ x, y - equal @ x, True
        if not y.any():
            return equal
    left = max(float(np.mean(np.square(equal @ x - y))), 1e-12 * float(np.mean(y * y)))
    curvature, towards = x @ x.T / left, x @ y / left

    def slope(w: np.ndarray) -> np.ndarray:
        return np.asarray(curvature @ w - towards + pull * (w - equal))

    steepest = float(np.linalg.eigvalsh(curvature)[-1]) + pull
    w = _descend(slope, equal, steepest, project if sum_to_1 else lambda w: np.maximum(w, 0))
    return w if w.any() else equal


def _descend(
    slope: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    steepest: float,
    nearest: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """The allowed numbers (k,) where a convex function of gradient ``slope`` is least; ``nearest`` finds them."""
    # Projected gradients with Nesterov's momentum, which starts again where it points uphill (O'Donoghue and Candès
    # 2015). `steepest`: the largest curvature at the start; where it turns out too small, the step is halved.
    w, ahead, momentum, down = start, start, 1.0, slope(start)
    for _ in range(2000):
        further = nearest(ahead - down / steepest)
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


def temperatures(members: Members) -> np.ndarray:
    """The temperature of each classifier (k,) that makes its log-loss least: its logits are divided by it.

    Guo et al. 2017, section 4.2. The loss is convex in 1 / T, which is searched from 1/20 to 20 by golden section.
    """
    low, high = np.full(len(members), np.log(0.05)), np.full(len(members), np.log(20.0))
    golden = (np.sqrt(5) - 1) / 2

    def loss(log_scale: np.ndarray) -> np.ndarray:
        scaled = members.logits * np.exp(log_scale)[:, None, None]
        return losses(scaled, members.labels, members.kind).mean(axis=1)

    # A function that falls and then rises in 1 / T does so in its logarithm too.
    for _ in range(30):
        width = golden * (high - low)
        a, b = high - width, low + width
        left = loss(a) <= loss(b)
        low, high = np.where(left, low, a), np.where(left, b, high)
    return np.exp(-(low + high) / 2)


def scale_and_offsets(
    votes: np.ndarray, labels: np.ndarray, kind: Kind, *, pull: float = PULL
) -> tuple[float, np.ndarray]:
    """The scale a and the offsets b (K,) with which softmax(a log p + b) has the least log-loss: vector scaling.

    ``votes`` (N, C): a classifier's mean of soft votes, whose probabilities are p; ``labels`` (N,). Guo et al. 2017,
    section 4.2, with one scale for all classes: members that were trained on one set are biased towards the same
    classes, which no weights can mend.

    Added to the sum of the log-losses: ``pull`` / 2 ((a - 1)^2 + |b|^2), see ``PULL``. It makes the minimum unique,
    also for classes that never occur, and the b of sum 0, so that no class is special. Found by Newton's method.
    """
    z = log_probabilities(votes, kind)
    z = z - z.mean(axis=1, keepdims=True)
    n, k = z.shape
    start, rows = np.r_[1.0, np.zeros(k)], np.arange(n)

    def at(theta: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective and the probabilities (N, K)."""
        u = theta[0] * z + theta[1:]
        u = u - u.max(axis=1, keepdims=True)
        total = np.exp(u).sum(axis=1)
        value = float(np.sum(np.log(total) - u[rows, labels]) + pull / 2 * np.sum(np.square(theta - start)))
        return value, np.exp(u) / total[:, None]

    theta = start
    value, p = at(theta)
    for _ in range(100):
        mean = np.sum(p * z, axis=1)
        slope = np.r_[np.sum(mean - z[rows, labels]), p.sum(axis=0) - np.bincount(labels, minlength=k)]
        slope += pull * (theta - start)
        curvature = pull * np.eye(k + 1)
        curvature[0, 0] += np.sum(p * np.square(z - mean[:, None]))
        curvature[0, 1:] = curvature[1:, 0] = np.sum(p * (z - mean[:, None]), axis=0)
        curvature[1:, 1:] += np.diag(p.sum(axis=0)) - p.T @ p
        step = np.linalg.solve(curvature, slope)
        # A whole step can go too far where p is near 0 or 1. What a step gains at last is below rounding.
        length, gain = 1.0, float(slope @ step)
        further, of_further = at(theta - step)
        while further > value - 1e-4 * length * gain + 1e-12 * abs(value) and length > 1e-6:
            length /= 2
            further, of_further = at(theta - length * step)
        theta, value, p = theta - length * step, further, of_further
        if np.abs(step).max() < PRECISION:
            break
    return float(theta[0]), theta[1:] - theta[1:].mean()
