"""Every member's score on each choosing part of the dev set, in one pass over the logits.

Axes: M members, N examples, C outputs of a head, E epochs, R repeats of K folds, S = R * K splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.choose.combine import majority, of_voices, shares, voices
from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.dicor.members import Dev
from lora_ensemble.scores import decisions

MANY = 10_000
"""Examples from which on they are counted."""
BLOCK = 32
"""Members whose right and wrong answers are counted by one matrix product."""


@dataclass(frozen=True, kw_only=True)
class FoldScores:
    """What one pass over all members finds."""

    scores: np.ndarray
    """(S + 1, M): each member's score on what is left of dev when a split's fold is held out, and, in the last row, on
    the whole of dev; NaN where undefined."""
    epochs: np.ndarray
    """(S, M): the epoch that is best there, the first of equals; -1 where the epochs were not kept."""
    omni: np.ndarray
    """(R + 1, N): what all members that have a score on the whole of dev decide together on each example, each
    member at the epoch chosen without it, and, in the last row, at its best epoch; see ``standardised``."""
    omni_probabilities: np.ndarray | None
    """(R + 1, N, classes): the probabilities that they give, if they were asked for."""


def fold_scores(dev: Dev, fold: np.ndarray, folds: int, *, omni: Strategy, probabilities: bool = False) -> FoldScores:
    """Members of ``dev`` on the parts that ``fold`` (R, N), see ``splits.stratified_folds``, leaves to choose by.

    Sums over folds are all that is kept of a member: a split's score is that of the whole less its fold, so that each
    member is read once, however many splits there are. ``omni``: how all members are combined. ``probabilities``: keep
    those that they give, too (classifiers).
    """
    repeats, n = fold.shape
    s, m = repeats * folds, len(dev)
    # (N, S + 1): a column for each split's fold; the last is empty, which leaves the whole.
    inside = np.zeros((n, s + 1), np.float32 if dev.kind != "regression" else np.float64)
    for r in range(repeats):
        inside[np.arange(n), r * folds + fold[r]] = 1
    scores, epochs = np.full((s + 1, m), np.nan), np.full((s, m), -1)
    together = _Omni(dev, omni, s)

    for start in range(0, m, BLOCK):
        block = range(start, min(start + BLOCK, m))
        opened = [np.asarray(dev.of_member(i)) for i in block]
        scores[:, start : block.stop] = _scores(opened, dev, inside).T
        for i, logits in zip(block, opened, strict=True):
            each = dev.epochs_of(i)
            if each is not None and s:
                of_epochs = np.nan_to_num(_scores(np.asarray(each), dev, inside[:, :s]), nan=-np.inf)  # (E, S)
                epochs[:, i] = np.argmax(of_epochs, axis=0)
                best = of_epochs.max(axis=0)
                scores[:s, i] = np.where(np.isinf(best), np.nan, best)
            if not np.isnan(scores[s, i]):
                together.add(i, logits, each, epochs[:, i])
    good = np.flatnonzero(~np.isnan(scores[s]))
    return FoldScores(
        scores=scores,
        epochs=epochs,
        omni=together.decided(good, scores, fold, folds),
        omni_probabilities=together.probabilities(good, fold, folds) if probabilities else None,
    )


def _scores(members: Sequence[np.ndarray] | np.ndarray, dev: Dev, inside: np.ndarray) -> np.ndarray:
    """Scores (B, S) of B members' logits (N, C) on all examples but those inside each split's fold (N, S)."""
    left = len(inside) - inside.sum(axis=0)
    if dev.kind != "regression" and len(inside) >= MANY:
        # Few folds of many examples: bytes are counted several times faster than numbers are multiplied.
        outside = np.ascontiguousarray(inside.T == 0)
        rights = (_right(one, dev) for one in members)
        return np.array([[np.count_nonzero(right & mask) for mask in outside] for right in rights], np.float64) / left
    logits = np.stack(list(members))
    if dev.kind != "regression":
        right = _right(logits, dev).astype(inside.dtype)  # counts below 2^24 are exact in float32
        return np.asarray(right.sum(axis=1, keepdims=True) - right @ inside).astype(np.float64) / left
    decided = decisions(logits, dev.kind)
    # Less the overall mean, so that little is lost where sums are subtracted from sums.
    x, y = decided - decided.mean(axis=1, keepdims=True), dev.labels - dev.labels.mean()

    def rest(values: np.ndarray) -> np.ndarray:
        return np.asarray(values.sum(axis=-1, keepdims=True) - values @ inside)

    sx, sy = rest(x), rest(y[None])
    xy = rest(x * y) - sx * sy / left
    xx, yy = rest(x * x) - sx * sx / left, rest(y[None] ** 2) - sy * sy / left
    with np.errstate(invalid="ignore", divide="ignore"):
        r = xy / np.sqrt(xx * yy)
    # What is left of a constant after rounding is no variance.
    constant = (xx <= 1e-12 * rest(x * x)) | (xx <= 0) | (yy <= 1e-12 * rest(y[None] ** 2)) | (yy <= 0)
    return np.where(constant, np.nan, r)


def _right(logits: np.ndarray, dev: Dev) -> np.ndarray:
    """Whether what a classifier's logits (..., N, C) decide is the label: (..., N) of bool."""
    if dev.kind == "binary":  # as decisions() does it, but without making numbers of it first
        return np.asarray((logits[..., 0] > 0) == (dev.labels > 0))
    return np.asarray(decisions(logits, dev.kind) == dev.labels)


class _Omni:
    """All members' decisions, from sums that are kept while each member is read once."""

    def __init__(self, dev: Dev, strategy: Strategy, splits: int) -> None:
        self.dev, self.strategy, self.splits = dev, strategy, splits
        n, outputs = np.asarray(dev.of_member(0)).shape
        # The last row is at the best epochs. Where no epochs were kept, it is all rows.
        rows = splits + 1 if any(dev.epochs_of(m) is not None for m in range(len(dev))) else 1
        by_votes = strategy == "majority"
        self.classes = 2 if dev.kind == "binary" else outputs
        self.total = np.zeros((0 if by_votes else rows, n, outputs))
        self.votes = np.zeros((rows if by_votes else 0, len(dev), n), np.min_scalar_type(self.classes))

    def add(self, m: int, logits: np.ndarray, each: np.ndarray | None, epochs: np.ndarray) -> None:
        """A member's logits (N, C), those of every epoch (E, N, C), and its epoch for each split (S,)."""
        rows = max(len(self.total), len(self.votes))
        for row in range(rows):
            said = logits if each is None or row == rows - 1 else each[epochs[row]]
            if self.strategy == "majority":
                self.votes[row, m] = decisions(said, self.dev.kind)
            else:
                self.total[row] += voices(said, self.dev.kind) if self.strategy == "mean-probability" else said

    def decided(self, members: np.ndarray, scores: np.ndarray, fold: np.ndarray, folds: int) -> np.ndarray:
        """(R + 1, N) of those members that were added; ``scores`` (S + 1, M) break the paper's ties."""
        decided = np.empty((len(fold) + 1, fold.shape[1]), np.float64 if self.dev.kind == "regression" else np.int64)
        scores = np.nan_to_num(scores, nan=-np.inf)
        for s, row, out in self._parts(fold, folds):
            if self.strategy == "majority":
                decided[row, out] = self._majority(_at(self.votes, s), members, out, scores[s])
                continue
            said = decisions(_at(self.total, s)[out] / max(len(members), 1), self.dev.kind)
            decided[row, out] = standardised(said) if s < self.splits else said
        return decided

    def probabilities(self, members: np.ndarray, fold: np.ndarray, folds: int) -> np.ndarray:
        """(R + 1, N, classes) of those members that were added, as ``choice.probabilities``."""
        found = np.empty((len(fold) + 1, fold.shape[1], self.classes))
        for s, row, out in self._parts(fold, folds):
            if self.strategy == "majority":
                found[row, out] = shares(_at(self.votes, s)[members][:, out], self.classes)
                continue
            mean = _at(self.total, s)[out] / max(len(members), 1)
            voice = mean if self.strategy == "mean-probability" else voices(mean, self.dev.kind)
            found[row, out] = of_voices(voice, self.dev.kind)
        return found

    def _parts(self, fold: np.ndarray, folds: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each split, the row of its repeat, and the examples that it holds out; at last the whole of dev."""
        for s in range(self.splits):
            yield s, s // folds, np.flatnonzero(fold[s // folds] == s % folds)
        yield self.splits, len(fold), np.arange(fold.shape[1])

    def _majority(
        self, votes: np.ndarray, members: np.ndarray, columns: np.ndarray, scores: np.ndarray, most: int = 4_000_000
    ) -> np.ndarray:
        """The paper's majority of some columns of decisions (M, N), so many at a time that ``most`` are looked at."""
        block = max(most // len(members), 1)
        parts = [
            majority(
                votes[np.ix_(members, columns[start : start + block])].astype(np.int64),
                num_classes=self.classes,
                ranks=[self.dev.ranks[m] for m in members],
                scores=scores[members],
                names=[self.dev.names[m] for m in members],
            )
            for start in range(0, len(columns), block)
        ]
        return np.concatenate(parts)


def _at(sums: np.ndarray, split: int) -> np.ndarray:
    """What was kept for a split: it is the same for all where no member's epochs were."""
    return np.asarray(sums[split if len(sums) > 1 else 0])


def standardised(decided: np.ndarray) -> np.ndarray:
    """Values (N,) of one held-out part less their mean, over their standard deviation; class numbers as they are.

    r does not look at an ensemble's scale. But the parts of dev are decided by different ensembles, and r over all
    parts would take a difference of their scales for an error. This way it is about the mean of the parts' own r, for
    labels are spread over the parts evenly. (By the mean and deviation on the choosing part, the error of these two
    would count as the ensemble's.)
    """
    if not np.issubdtype(decided.dtype, np.floating):
        return decided
    spread = decided.std()
    return (decided - decided.mean()) / (spread if spread > 0 else 1.0)
