"""Which members make the ensemble: good on dev, and unlike each other (Tolkunov, section 4.3).

Axes: M members, N examples of a split, C outputs of a head, k candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.combine import DECIMALS, precedence
from lora_ensemble.dicor.settings import Similarity
from lora_ensemble.dicor.similarity import features, similarity_to
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Kind, decisions, score


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What ``dicor`` chose. Members are indices into its arguments."""

    chosen: list[int]
    """The ensemble, in the order of choice."""
    similarities: list[list[float]]
    """For each chosen member its similarity to each one chosen before it; the first has none."""
    ranking: list[int]
    """All M members, the best dev score first."""
    scores: np.ndarray
    """(M,) dev scores."""

    @property
    def mean_similarity(self) -> list[float | None]:
        """For each chosen member the mean of its similarities to those before it; None for the first."""
        return [float(np.mean(row)) if row else None for row in self.similarities]


def dev_scores(logits: np.ndarray, labels: np.ndarray, *, kind: Kind, names: Sequence[str]) -> np.ndarray:
    """Scores (M,) of logits (M, N, C) against labels (N,).

    Raises ``UserError`` naming the first member whose Pearson r is undefined, or if the labels are constant.
    """
    scores = np.array([score(one, labels, kind) for one in logits], np.float64)
    undefined = np.flatnonzero(np.isnan(scores))
    if len(undefined):
        if len(labels) == 0 or np.all(labels == labels[0]):
            raise UserError("the dev labels are all the same, so Pearson r is undefined; give dev examples that differ")
        name, value = names[undefined[0]], decisions(logits[undefined[0]], kind)[0]
        raise UserError(
            f"member {name}: its dev predictions are constant (all {value:.6g}), so its Pearson r is undefined; "
            "train it again, or delete its folder to go on without it"
        )
    return scores


def dicor(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    kind: Kind,
    names: Sequence[str],
    size: int,
    top_k: int,
    similarity: Similarity,
) -> Selection:
    """Choose ``size`` members from dev logits (M, N, C) and labels (N,).

    The ``top_k`` best by dev score are candidates. The best comes first; then, each time, the candidate with the least
    mean similarity to those already chosen. The report says "lowest correlation" and not to what; the mean is the rho
    of its equation 2, Var(ens) = sigma^2 / N + (N - 1) / N * rho * sigma^2, which the choice is to make small.
    Equal similarities go by score, equal scores by name, so neither the order of the members nor that of the examples
    matters. Similarities of the candidates to the chosen are summed as it goes: size x k numbers, never M x M.

    Raises ``UserError`` as ``dev_scores`` and ``similarity.features`` do, and unless 1 <= size <= top_k <= M.
    """
    if not 1 <= size <= top_k <= len(names):
        raise UserError(f"size {size}, top_k {top_k}, {len(names)} members: expected 1 <= size <= top_k <= members")
    scores = dev_scores(logits, labels, kind=kind, names=names)
    ranking = precedence(scores, names)
    top = ranking[:top_k]
    candidates = features(
        logits[top], kind=kind, similarity=similarity, names=[names[m] for m in top], labels=np.asarray(labels)
    )
    picked, similarities = pick(candidates, size=size, similarity=similarity)
    return Selection(chosen=[top[p] for p in picked], similarities=similarities, ranking=ranking, scores=scores)


def pick(
    candidates: np.ndarray,
    *,
    size: int,
    similarity: Similarity,
    scores: np.ndarray | None = None,
    trade_off: float = 1.0,
) -> tuple[list[int], list[list[float]]]:
    """``size`` of k candidates, the best first, from what they are compared by, ``features`` (k, F).

    Returns their indices in the order of choice, and for each its similarities to those chosen before it.
    ``trade_off`` 1 is the paper's rule: the least mean similarity to those chosen. Below 1 the score counts too, as in
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
