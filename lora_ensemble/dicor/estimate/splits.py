"""Which part of the dev set an example is in: folds keyed on ids, so that no order matters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from lora_ensemble.tasks import Kind

FOLDS = 3
"""Few and large. With ten, where one of nearly equal members leads by little, it is chosen in just those splits whose
held-out tenth speaks against it: in simulations (``benchmarks/honest.py``) the single best's interval held its true
score in 74 of 100 cases, with three in 91. What choosing on two thirds costs is corrected in ``honest``."""
REPEATS = 10


def hashes(ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """A number (N,) uint64 for each id, from its text alone."""
    digests = b"".join(hashlib.blake2b(str(i).encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _mixed(numbers: np.ndarray, salt: int) -> np.ndarray:
    """Other numbers, as if drawn anew for each salt (splitmix64's finaliser, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64((salt * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def canonical(ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """The order (N,) of examples in which everything that depends on an order is done: by hash, then by id."""
    return np.lexsort((np.asarray(ids, np.str_), hashes(ids)))


def stratified_folds(
    ids: Sequence[str] | np.ndarray, labels: np.ndarray, kind: Kind, *, folds: int = FOLDS, repeats: int = REPEATS
) -> np.ndarray:
    """The fold (R, N), 0 to folds - 1, in which each example is held out in each repeat, by ids and labels alone.

    Folds differ by at most one example, of a class as well; of a regression, ``folds`` neighbouring labels are a class.
    """
    key, n = hashes(ids), len(labels)
    fold = np.empty((repeats, n), np.int64)
    for r in range(repeats):
        drawn = _mixed(key, r + 1)
        if kind == "regression":  # neighbours in the order of labels go to different folds
            block = np.empty(n, np.int64)
            block[np.lexsort((drawn, labels))] = np.arange(n) // folds
        else:
            block = labels.astype(np.int64)
        # Dealt out like cards, class after class, so that no fold is behind by more than one.
        fold[r, np.lexsort((drawn, block))] = np.arange(n) % folds
    return fold


def held_out(fold: np.ndarray, folds: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Each split's number, its repeat, and the examples (N',) that it holds out, from ``stratified_folds``."""
    for s in range(len(fold) * folds):
        yield s, s // folds, np.flatnonzero(fold[s // folds] == s % folds)
