"""How alike two members' predictions are.

Axes: M members, N examples of a split, C outputs of a head, F numbers that a member is compared by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_ensemble.dicor.settings import Similarity
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Kind, decisions


def features(logits: np.ndarray, *, kind: Kind, similarity: Similarity, names: Sequence[str]) -> np.ndarray:
    """What members are compared by: logits (M, N, C) to (M, F), the input of ``similarity_to``.

    cosine, multiclass and binary: the decisions (M, N), as integers. Tolkunov (section 4.3) takes the cosine of the
    predictions, that is of class numbers. But the numbers 0 to 4 are names: renumbering the classes would change such
    a cosine, and a decision for class 0 would be a zero that agrees with nothing. So it is the cosine of the
    *one-hot* decisions: what the ensemble votes with, indifferent to the numbering. It equals the share of the
    examples on which two members decide the same, from 0 to 1, which is how it is computed.

    cosine, regression: the values (M, N) as unit vectors.

    pearson, regression and binary: the values or logits (M, N), less their mean, as unit vectors. Exchanging the two
    classes turns the sign of both members' logits, which leaves r as it is.

    pearson, multiclass: the logits less their mean over the C classes of the same example, flattened to (M, N * C),
    as unit vectors. A shift of all C logits of an example changes no decision and no probability, so it must not
    change r; renumbering the classes permutes the same pairs of numbers.

    Raises ``UserError`` naming the first member for which the similarity is undefined: constant logits (pearson), or
    values that are all zero (cosine, regression).
    """
    if similarity == "cosine" and kind != "regression":
        return decisions(logits, kind)
    # Judged on the logits as they are: less a rounded mean, a constant need not be exactly zero.
    axis = -1 if kind == "multiclass" else -2  # constant over the classes of each example, or over the examples
    constant = (logits == logits[..., :1] if axis == -1 else logits == logits[:, :1]).all(axis=(1, 2))
    undefined = constant if similarity == "pearson" else (logits == 0).all(axis=(1, 2))
    if undefined.any():
        name = names[int(np.argmax(undefined))]
        what = "constant, so their correlation" if similarity == "pearson" else "all zero, so their cosine"
        raise UserError(
            f"member {name}: its predictions are {what} with others is undefined; "
            "train it again, or delete its folder to go on without it"
        )
    values = logits.astype(np.float64)
    if similarity == "pearson":
        values -= values.mean(axis=axis, keepdims=True)
    vectors = values.reshape(len(values), -1)  # (M, N, C) -> (M, F)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def similarity_to(chosen: np.ndarray, all_features: np.ndarray) -> np.ndarray:
    """Similarity (M,) of one member's features (F,) to those of all members (M, F), both from ``features``.

    Decisions (integers): the share that is equal. Unit vectors (floats): their dot product, -1 to 1.
    """
    if np.issubdtype(all_features.dtype, np.integer):
        return np.mean(all_features == chosen, axis=1)
    return np.clip(all_features @ chosen, -1.0, 1.0)


def pairwise(all_features: np.ndarray) -> np.ndarray:
    """Similarity of every pair (M, M) from features (M, F): for plots. Selection does not need it."""
    return np.stack([similarity_to(one, all_features) for one in all_features])
