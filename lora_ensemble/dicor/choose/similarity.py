"""How alike two members' predictions are.

Axes: M members, N examples of a split, C outputs of a head, F numbers that a member is compared by.

The higher, the more alike, for all five. Where a similarity is undefined (a constant has no correlation) it is 1, the
most alike there is: a member that says the same of every example is never chosen for being different.
"""

from __future__ import annotations

import numpy as np

from lora_ensemble.dicor.choose.settings import Similarity
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions
from lora_ensemble.tasks import Kind

NEEDS_LABELS = ("error", "double-fault")


def features(
    logits: np.ndarray,
    *,
    kind: Kind,
    similarity: Similarity,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """What members are compared by: logits (M, N, C) to (M, F), the input of ``similarity_to``.

    **cosine**, multiclass and binary: the decisions (M, N), as integers. Tolkunov (section 4.3) takes the cosine of the
    predictions, that is of class numbers. But the numbers 0 to 4 are names: renumbering the classes would change such
    a cosine, and a decision for class 0 would be a zero that agrees with nothing. So it is the cosine of the
    *one-hot* decisions: what the ensemble votes with, indifferent to the numbering. It equals the share of the
    examples on which two members decide the same, from 0 to 1, which is how it is computed. Never undefined.

    **cosine**, regression: the values (M, N) as unit vectors, -1 to 1. Undefined for a member of zeros.

    **pearson**, regression and binary: the values or logits (M, N), less their mean, as unit vectors, -1 to 1
    (Tolkunov, section 4.3, for STS). Exchanging the two classes turns the sign of both members' logits, which leaves r
    as it is. Undefined for a constant.

    **pearson**, multiclass: the logits less their mean over the C classes of the same example, flattened to (M, N * C),
    as unit vectors. A shift of all C logits of an example changes no decision and no probability, so it must not
    change r; renumbering the classes permutes the same pairs of numbers.

    **error**: the correlation of errors, -1 to 1; ``labels`` (N,) are needed. Classifiers: of the 0/1 vectors of what
    is wrong, the phi coefficient (the rho of Kuncheva and Whitaker 2003, "Measures of diversity in classifier
    ensembles", section 2). Regression: of the residuals. Undefined where a member is never, or always, wrong.

    **kappa**, classifiers only: Cohen's kappa of two members' decisions (Cohen 1960; for ensembles Margineantu and
    Dietterich 1997), -1 to 1: agreement beyond what their shares of each class would give by chance. The features are
    the decisions (M, N) followed by nothing else; see ``similarity_to``. Undefined where both decide for one and the
    same class everywhere.

    **double-fault**, classifiers only: the share of examples on which both are wrong (Giacinto and Roli 2001), 0 to 1;
    ``labels`` are needed. The only one of the five for which a good member is unlike others for being good. Never
    undefined.

    Raises ``UserError`` for kappa and double-fault of a regression.
    """
    if similarity in ("kappa", "double-fault") and kind == "regression":
        raise UserError(
            f"similarity {similarity}: a regression has values, not classes to agree on; use pearson, cosine or error"
        )
    if similarity == "kappa" or (similarity == "cosine" and kind != "regression"):
        return decisions(logits, kind)
    if similarity in NEEDS_LABELS:
        if labels is None:
            raise UserError(f"similarity {similarity}: it is of the errors, so it needs labels")
        decided = decisions(logits, kind)
        if similarity == "double-fault":
            return decided != labels
        return _unit(decided - labels if kind == "regression" else (decided != labels).astype(np.float64))
    if similarity == "cosine":
        return _unit(logits[..., 0].astype(np.float64), centre=False)
    values = logits.astype(np.float64)
    if kind == "multiclass":
        # Judged on the logits as they are: less a rounded mean, a constant need not be exactly zero.
        constant = (logits == logits[..., :1]).all(axis=(1, 2))
        values -= values.mean(axis=-1, keepdims=True)
        values[constant] = 0
        return _unit(values.reshape(len(values), -1), centre=False)
    return _unit(values[..., 0])


def _unit(values: np.ndarray, *, centre: bool = True) -> np.ndarray:
    """Rows (M, F) less their mean, at length 1; a row of NaN where that is undefined."""
    undefined = (values == (values[:, :1] if centre else 0)).all(axis=1)
    if centre:
        values = values - values.mean(axis=1, keepdims=True)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    length[undefined] = np.nan
    return np.asarray(values / length)


def similarity_to(chosen: np.ndarray, all_features: np.ndarray, *, similarity: Similarity = "cosine") -> np.ndarray:
    """Similarity (M,) of one member's features (F,) to those of all members (M, F), both from ``features``."""
    if similarity == "kappa":
        return _kappa(chosen, all_features)
    if all_features.dtype == bool:
        return np.asarray((all_features & chosen).mean(axis=1))
    if np.issubdtype(all_features.dtype, np.integer):
        return np.asarray(np.mean(all_features == chosen, axis=1))
    return np.nan_to_num(np.clip(all_features @ chosen, -1.0, 1.0), nan=1.0)


def _kappa(chosen: np.ndarray, decided: np.ndarray) -> np.ndarray:
    """Cohen's kappa (M,) of decisions (N,) with decisions (M, N); 1 where it is undefined."""
    n = len(chosen)
    agree = (decided == chosen).mean(axis=1)
    chance = np.zeros(len(decided))
    for c in np.unique(chosen):
        chance += (chosen == c).sum() / n * ((decided == c).sum(axis=1) / n)
    return np.where(chance >= 1, 1.0, (agree - chance) / np.where(chance >= 1, 1.0, 1 - chance))


def pairwise(all_features: np.ndarray, *, similarity: Similarity = "cosine") -> np.ndarray:
    """Similarity of every pair (M, M) from features (M, F): for plots. Selection does not need it."""
    return np.stack([similarity_to(one, all_features, similarity=similarity) for one in all_features])
