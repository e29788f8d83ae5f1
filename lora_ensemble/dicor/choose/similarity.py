"""How alike two members' predictions are, and the choice of members that are unlike each other.

**cosine**: of a regression's values, -1 to 1; of a classifier's one-hot decisions, 0 to 1, which is the share of the
examples on which two members decide the same. (Tolkunov, section 4.3, takes it of the class numbers. But these are
names: renumbering them would change such a cosine, and a decision for class 0 would be a zero, like no other.)
**pearson**: the correlation of values or logits, -1 to 1 (Tolkunov, section 4.3, for STS); multiclass: of all N C
logits, each less the mean over its example's C, for a shift of these changes no decision and no probability.
**error**: the correlation of residuals, or of a classifier's 0/1 vectors of what is wrong, -1 to 1 (the rho of Kuncheva
and Whitaker 2003, "Measures of diversity in classifier ensembles", section 2).
**kappa**, classifiers only: Cohen's kappa of the decisions (Cohen 1960; for ensembles Margineantu and Dietterich 1997),
-1 to 1: agreement beyond what their shares of each class would give by chance.
**double-fault**, classifiers only: the share of examples on which both are wrong (Giacinto and Roli 2001), 0 to 1. The
only one for which a good member is unlike others for being good.

The higher, the more alike. Where one is undefined (a constant has no correlation, nor have the errors of who is never
wrong) it is 1, the most alike there is: who says the same of every example is never chosen for being different.
"""

from __future__ import annotations

import numpy as np

from lora_ensemble.dicor.choose.settings import Similarity
from lora_ensemble.dicor.members import DECIMALS
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions
from lora_ensemble.tasks import Kind


def features(logits: np.ndarray, *, kind: Kind, similarity: Similarity, labels: np.ndarray | None = None) -> np.ndarray:
    """What members are compared by: logits (M, N, C) to (M, F), the input of ``similarity_to``.

    Class numbers, whether they are wrong, or vectors of length 1, of NaN where that is undefined. ``labels`` (N,): for
    error and double-fault. ``UserError`` for kappa and double-fault of a regression.
    """
    if similarity in ("kappa", "double-fault") and kind == "regression":
        raise UserError(
            f"similarity {similarity}: a regression has values, not classes to agree on; use pearson, cosine or error"
        )
    if similarity in ("error", "double-fault"):
        if labels is None:
            raise UserError(f"similarity {similarity}: it is of the errors, so it needs labels")
        decided = decisions(logits, kind)
        if similarity == "double-fault":
            return decided != labels
        return _unit(decided - labels if kind == "regression" else (decided != labels).astype(np.float64))
    if similarity == "kappa" or (similarity == "cosine" and kind != "regression"):
        return decisions(logits, kind)
    values = logits.astype(np.float64)
    if similarity == "cosine" or kind != "multiclass":
        return _unit(values[..., 0], centre=similarity == "pearson")
    # Judged on the logits as they are: less a rounded mean, a constant need not be exactly zero.
    constant = (logits == logits[..., :1]).all(axis=(1, 2))
    values -= values.mean(axis=-1, keepdims=True)
    values[constant] = 0
    return _unit(values.reshape(len(values), -1), centre=False)


def _unit(values: np.ndarray, *, centre: bool = True) -> np.ndarray:
    """Rows (M, F) less their mean, at length 1; a row of NaN where that is undefined."""
    undefined = (values == (values[:, :1] if centre else 0)).all(axis=1)
    if centre:
        values = values - values.mean(axis=1, keepdims=True)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    length[undefined] = np.nan
    return np.asarray(values / length)


def similarity_to(member: np.ndarray, members: np.ndarray, *, similarity: Similarity = "cosine") -> np.ndarray:
    """Similarity (M,) of one member's features (F,) to those of all members (M, F), both from ``features``."""
    if similarity == "kappa":
        return _kappa(member, members)
    if members.dtype == bool:
        return np.asarray((members & member).mean(axis=1))
    if np.issubdtype(members.dtype, np.integer):
        return np.asarray(np.mean(members == member, axis=1))
    return np.nan_to_num(np.clip(members @ member, -1.0, 1.0), nan=1.0)


def _kappa(member: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Cohen's kappa (M,) of decisions (N,) with decisions (M, N); 1 where it is undefined."""
    agree, chance = (members == member).mean(axis=1), np.zeros(len(members))
    for c in np.unique(member):
        chance += (member == c).sum() / len(member) * ((members == c).sum(axis=1) / len(member))
    return np.where(chance >= 1, 1.0, (agree - chance) / np.where(chance >= 1, 1.0, 1 - chance))


def pairwise(members: np.ndarray, *, similarity: Similarity = "cosine") -> np.ndarray:
    """Similarity of every pair (M, M) from features (M, F): for plots. Selection does not need it."""
    return np.stack([similarity_to(member, members, similarity=similarity) for member in members])


def pick(
    candidates: np.ndarray, scores: np.ndarray, size: int, similarity: Similarity, trade_off: float
) -> tuple[list[int], list[list[float]]]:
    """``size`` of k candidates, the best first, from their ``features`` (k, F) and ``scores`` (k,).

    Returns their indices in the order of choice, and for each its similarities to those chosen before it. ``trade_off``
    1 is the paper's rule (Tolkunov, section 4.3): the best comes first; then, each time, the candidate with the least
    mean similarity to those already chosen. (It says "lowest correlation" and not to what; the mean is the rho of its
    equation 2, which the choice is to make small.) Below 1 the next is the one with the largest (1 - trade_off) score -
    trade_off similarity (maximal marginal relevance, Carbonell and Goldstein 1998), both scaled to 0..1 over the
    candidates that are left, to be comparable. Of equals it is the one ranked higher.
    """
    picked, k = [0], len(candidates)
    to_picked = np.empty((size, k))  # row i: similarity of all candidates to the i-th chosen
    total = np.zeros(k)
    for i in range(size):
        to_picked[i] = similarity_to(candidates[picked[i]], candidates, similarity=similarity)
        total += to_picked[i]
        if i + 1 < size:
            cost = np.round(total / (i + 1), DECIMALS)
            if trade_off < 1:
                left = np.setdiff1d(np.arange(k), picked)
                cost = trade_off * _scaled(cost, left) - (1 - trade_off) * _scaled(scores, left)
                cost = np.round(cost, DECIMALS)
            cost[picked] = np.inf
            picked.append(int(np.argmin(cost)))
    return picked, [to_picked[:i, p].tolist() for i, p in enumerate(picked)]


def _scaled(values: np.ndarray, left: np.ndarray) -> np.ndarray:
    """``values`` (k,) with the least of those that are ``left`` at 0 and the largest at 1; all 0 where they tie."""
    low, high = values[left].min(), values[left].max()
    return np.asarray((values - low) / (high - low) if high - low > 10**-DECIMALS else np.zeros(len(values)))
