"""Which part of the dev set an example is in, in each of several cuts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lora_ensemble.tasks import Kind
from lora_ensemble.text.splits import Deal

FOLDS = 3
"""Few and large. With ten, where one of nearly equal members leads by little, it is chosen in just those splits whose
held-out tenth speaks against it: in simulations (``benchmarks/honest.py``) the single best's interval held its true
score in 74 of 100 cases, with three in 91. What choosing on two thirds costs is corrected in ``honest``."""
REPEATS = 10


def stratified_folds(
    ids: Sequence[str] | np.ndarray,
    labels: np.ndarray,
    kind: Kind,
    *,
    folds: int = FOLDS,
    repeats: int = REPEATS,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """The fold (R, N), 0 to folds - 1, in which each example is held out in each repeat, see :class:`Deal`.

    Of ``labels`` (N,), or of several, (N, L).
    """
    deal = Deal(ids, labels, kind, [1 / folds] * folds, groups)
    return np.array([deal(r + 1) for r in range(repeats)], np.int64).reshape(repeats, len(labels))


def held_out(fold: np.ndarray, folds: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Each split's number, its repeat, and the examples (N',) that it holds out, from ``stratified_folds``."""
    for s in range(len(fold) * folds):
        yield s, s // folds, np.flatnonzero(fold[s // folds] == s % folds)
