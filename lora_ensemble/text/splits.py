"""Which part of a set of examples each is in: keyed on ids, so that no order of a file matters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lora_ensemble.tasks import Kind


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


def _sets(labels: np.ndarray, few: int) -> np.ndarray:
    """A class (N,) for each set of labels (N, L); sets of fewer examples than ``few`` go by their rarest label."""
    _, which, counts = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
    rarest = np.where(labels > 0, labels.sum(axis=0), len(labels) + 1).argmin(axis=1)
    return np.where(counts[which] < few, len(counts) + rarest, which)


class Deal:
    """Deals examples to parts, ``shares`` of them to each, by ids, labels and groups alone.

    Each class is dealt in these shares, too, to one example; of a regression, neighbouring labels are a class, of
    several labels (N, L) each set of them, or, of rare sets, those that have their rarest label in common. Examples
    (N,) of one of ``groups`` go to one part; then the shares are met as well as the groups' sizes allow: the largest
    is dealt first, each to the part that lacks most of what it has (as scikit-learn's StratifiedGroupKFold does).
    """

    def __init__(
        self,
        ids: Sequence[str] | np.ndarray,
        labels: np.ndarray,
        kind: Kind,
        shares: Sequence[float],
        groups: np.ndarray | None = None,
    ) -> None:
        labels = labels if labels.ndim == 1 or groups is not None else _sets(labels, round(1 / min(shares)))
        self._labels, self._kind, self._shares, n = labels, kind, np.asarray(shares), len(labels)
        self._group: np.ndarray | None
        names, self._group = (ids, None) if groups is None else np.unique(groups, return_inverse=True)
        self._key = hashes(names)
        # Whose turn it is: a part takes its k-th card at the time (k - 1/2) / its share.
        times = (np.arange(n) + 0.5) / self._shares[:, None]
        self._turns = np.lexsort((np.repeat(np.arange(len(shares)), n), times.ravel()))[:n] // max(n, 1)

    def __call__(self, salt: int) -> np.ndarray:
        """The part (N,) of each example; another deal for each ``salt``."""
        drawn, together = _mixed(self._key, salt), round(1 / self._shares.min())
        if self._group is not None:
            return self._dealt_groups(drawn, together, self._group)[self._group]
        if self._kind == "regression":  # neighbours in the order of labels go to different parts
            block = np.empty(len(self._labels), np.int64)
            block[np.lexsort((drawn, self._labels))] = np.arange(len(block)) // together
        else:
            block = self._labels.astype(np.int64)
        part = np.empty(len(block), np.int64)
        # Dealt out like cards, class after class, so that no part is behind by more than one.
        part[np.lexsort((drawn, block))] = self._turns
        return part

    def _dealt_groups(self, drawn: np.ndarray, together: int, group: np.ndarray) -> np.ndarray:
        labels = self._labels
        if self._kind == "regression":
            labels = np.searchsorted(np.quantile(labels, np.arange(1, together) / together), labels)
        several = labels.ndim > 1  # how often each label is there in a group, in place of classes
        counts = np.zeros((len(drawn), labels.shape[1] if several else int(labels.max(initial=0)) + 1))
        np.add.at(counts, group if several else (group, labels.astype(np.int64)), labels if several else 1)
        counts = np.column_stack([counts / np.maximum(counts.sum(0), 1), counts.sum(1) / len(labels)])
        part, filled = np.empty(len(drawn), np.int64), np.zeros((len(self._shares), counts.shape[1]))
        for g in np.lexsort((drawn, -counts[:, -1])):
            # How much further from its shares each part would be: the change of the sum of squares over the shares.
            cost = ((filled + counts[g] / 2) * counts[g]).sum(1) / self._shares
            part[g] = int(np.argmin(cost))
            filled[part[g]] += counts[g]
        return part
