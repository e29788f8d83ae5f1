"""Which members make the ensemble: good on dev, and unlike each other (Tolkunov, section 4.3).

Axes: k candidates, the best first; F numbers that a member is compared by.
"""

from __future__ import annotations

import numpy as np

from lora_ensemble.dicor.choose.combine import DECIMALS
from lora_ensemble.dicor.choose.settings import Similarity
from lora_ensemble.dicor.choose.similarity import similarity_to


def pick(
    candidates: np.ndarray,
    *,
    size: int,
    similarity: Similarity,
    scores: np.ndarray | None = None,
    trade_off: float = 1.0,
) -> tuple[list[int], list[list[float]]]:
    """``size`` of k candidates, the best first, from what they are compared by, ``features`` (k, F).

    Returns their indices in the order of choice, and for each its similarities to those chosen before it: size x k
    numbers, never M x M. ``trade_off`` 1 is the paper's rule: the best comes first; then, each time, the candidate with
    the least mean similarity to those already chosen. The report says "lowest correlation" and not to what; the mean is
    the rho of its equation 2, Var(ens) = sigma^2 / N + (N - 1) / N * rho * sigma^2, which the choice is to make small.
    Below 1 the score counts too, as in
    maximal marginal relevance (Carbonell and Goldstein 1998): the next is the one with the largest
    (1 - trade_off) score - trade_off similarity, where both are scaled to 0..1 over the candidates that are left,
    for a difference of accuracies means nothing beside a difference of correlations. 0 takes the best by ``scores``
    (k,). The first of equals is taken: the one ranked higher.
    """
    k = len(candidates)
    picked = [0]
    to_picked = np.empty((size, k))  # row i: similarity of all candidates to the i-th chosen
    total = np.zeros(k)
    for i in range(size):
        to_picked[i] = similarity_to(candidates[picked[i]], candidates, similarity=similarity)
        total += to_picked[i]
        if i + 1 < size:
            cost = np.round(total / (i + 1), DECIMALS)
            if trade_off < 1:
                assert scores is not None
                left = np.setdiff1d(np.arange(k), picked)
                cost = trade_off * _scaled(cost, left) - (1 - trade_off) * _scaled(scores, left)
                cost = np.round(cost, DECIMALS)
            cost[picked] = np.inf
            picked.append(int(np.argmin(cost)))  # the first of equals: the one ranked higher
    return picked, [to_picked[:i, p].tolist() for i, p in enumerate(picked)]


def _scaled(values: np.ndarray, left: np.ndarray) -> np.ndarray:
    """``values`` (k,) with the least of those that are ``left`` at 0 and the largest at 1; all 0 where they tie."""
    low, high = values[left].min(), values[left].max()
    return np.asarray((values - low) / (high - low) if high - low > 10**-DECIMALS else np.zeros(len(values)))
