"""Every member's score on each choosing part of the dev set, in one pass over the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.choose.combine import majority, shares, tie_order
from lora_ensemble.dicor.choose.probabilities import class_probabilities, soft_votes
from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.dicor.estimate.splits import held_out
from lora_ensemble.dicor.members import Dev
from lora_ensemble.scores import LEAST_PROBABILITY, decisions, said_of, scored
from lora_ensemble.tasks import SCORES, ScoreName

MANY = 10_000  # examples from which on they are counted
BLOCK = 32  # members whose right and wrong answers are counted by one matrix product


@dataclass(frozen=True, kw_only=True)
class FoldScores:
    """What one pass over all members finds."""

    scores: np.ndarray
    """(S + 1, M): each member's score on what a split leaves to choose by, last on all of dev, times its sign: the
    higher the better. NaN where undefined."""
    epochs: np.ndarray  # (S, M): the epoch that is best there, the first of equals; -1 where none were kept
    omni: np.ndarray
    """(R + 1, N) or (R + 1, N, classes): what all members that have a score on all of dev say together of each example,
    as ``combine.said``, each at the epoch chosen without it, and, in the last row, at its best epoch; see
    ``standardised``."""
    omni_probabilities: np.ndarray | None  # (R + 1, N, classes): those that they give, if they were asked for


def fold_scores(dev: Dev, fold: np.ndarray, folds: int, *, omni: Strategy, probabilities: bool = False) -> FoldScores:
    """Members of ``dev`` on the parts that ``fold`` (R, N), see ``splits.stratified_folds``, leaves to choose by.

    Sums over folds are all that is kept of a member, which is read once: a split's score is that of the whole less its
    fold. ``omni``: how all members are combined. ``probabilities``: keep those that they give, too (classifiers).
    """
    (repeats, n), m = fold.shape, len(dev)
    splits = repeats * folds
    # (N, S + 1): a column for each split's fold; the last is empty, which leaves the whole.
    inside = np.zeros((n, splits + 1), np.float32 if dev.kind != "regression" else np.float64)
    for r in range(repeats):
        inside[np.arange(n), r * folds + fold[r]] = 1
    scores, epochs = np.full((splits + 1, m), np.nan), np.full((splits, m), -1)
    together = _Omni(dev, omni, splits)
    for start in range(0, m, BLOCK):
        opened = {i: dev.logits_of(i) for i in range(start, min(start + BLOCK, m))}
        scores[:, [*opened]] = _scores([*opened.values()], dev, inside).T
        for i, logits in opened.items():
            by_epoch = dev.epochs_of(i)
            if by_epoch is not None and splits:
                of_epochs = np.nan_to_num(_scores(by_epoch, dev, inside[:, :splits]), nan=-np.inf)  # (E, S)
                epochs[:, i], best = of_epochs.argmax(axis=0), of_epochs.max(axis=0)
                scores[:splits, i] = np.where(np.isinf(best), np.nan, best)
            if not np.isnan(scores[splits, i]):
                together.add(i, logits, by_epoch, epochs[:, i])
    decided, likely = together.decided(scores, fold, folds, probabilities)
    return FoldScores(scores=scores, epochs=epochs, omni=decided, omni_probabilities=likely)


def _scores(members: Sequence[np.ndarray] | np.ndarray, dev: Dev, inside: np.ndarray) -> np.ndarray:
    """Scores (B, S) of B members' logits (N, C) on all examples but those inside each split's fold (N, S)."""
    left, name = len(inside) - inside.sum(axis=0), dev.scored_by
    if name not in ("accuracy", "pearson"):  # these two are had from sums, much faster
        outside, sign = 1.0 - inside.T, SCORES[name].sign
        said = (said_of(x, dev.kind, name) for x in members)
        each = [scored(one, dev.labels, dev.kind, name, outside, width=dev.width) for one in said]
        return np.stack(each) * sign
    if dev.kind != "regression" and len(inside) >= MANY:
        # Few folds of many examples: bytes are counted several times faster than numbers are multiplied.
        outside = np.ascontiguousarray(inside.T == 0)
        rights = (_right(logits, dev) for logits in members)
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

    sx, sy, x2, y2 = rest(x), rest(y[None]), rest(x * x), rest(y[None] ** 2)
    xy, xx, yy = rest(x * y) - sx * sy / left, x2 - sx * sx / left, y2 - sy * sy / left
    with np.errstate(invalid="ignore", divide="ignore"):
        r = xy / np.sqrt(xx * yy)
    # What is left of a constant after rounding is no variance.
    return np.where((xx <= 1e-12 * x2) | (xx <= 0) | (yy <= 1e-12 * y2) | (yy <= 0), np.nan, r)


def _right(logits: np.ndarray, dev: Dev) -> np.ndarray:
    """Whether what a classifier's logits (..., N, C) decide is the label: (..., N) of bool."""
    if dev.kind == "binary":  # as decisions() does it, but without making numbers of it first
        return np.asarray((logits[..., 0] > 0) == (dev.labels > 0))
    return np.asarray(decisions(logits, dev.kind) == dev.labels)


class _Omni:
    """All members' decisions, from sums (or votes) that are kept while each member is read once."""

    def __init__(self, dev: Dev, strategy: Strategy, splits: int) -> None:
        self.dev, self.strategy, self.splits = dev, strategy, splits
        n, outputs = dev.logits_of(0).shape
        self.classes = 2 if dev.kind == "binary" else outputs
        # The last row is at the best epochs. Where no epochs were kept, it is all rows.
        rows = splits + 1 if any(dev.epochs_of(m) is not None for m in range(len(dev))) else 1
        by_votes = strategy == "majority"
        shape = (rows, len(dev), n) if by_votes else (rows, n, outputs)
        self.sums = np.zeros(shape, np.min_scalar_type(self.classes) if by_votes else np.float64)
        self.members: list[int] = []

    def add(self, m: int, logits: np.ndarray, by_epoch: np.ndarray | None, epochs: np.ndarray) -> None:
        """A member's logits (N, C), those of every epoch (E, N, C), and its epoch for each split (S,)."""
        self.members.append(m)
        last = len(self.sums) - 1
        for row in range(len(self.sums)):
            said = logits if by_epoch is None or row == last else by_epoch[epochs[row]]
            if self.strategy == "majority":
                self.sums[row, m] = decisions(said, self.dev.kind)
            else:
                self.sums[row] += soft_votes(said, self.dev.kind) if self.strategy == "mean-probability" else said

    def decided(
        self, scores: np.ndarray, fold: np.ndarray, folds: int, probabilities: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """What is ``FoldScores.omni``, and probabilities (R + 1, N, classes) if asked for.

        ``scores`` (S + 1, M) break the paper's ties.
        """
        kind, members, name = self.dev.kind, self.members, self.dev.scored_by
        decided = np.empty((len(fold) + 1, fold.shape[1]), np.float64 if kind == "regression" else np.int64)
        by_probability = SCORES[name].of == "probabilities"
        likely = np.empty((*decided.shape, self.classes)) if probabilities or by_probability else None
        ranks, names = [self.dev.ranks[m] for m in members], [self.dev.names[m] for m in members]
        parts: list[tuple[int, int, np.ndarray | slice]] = [*held_out(fold, folds)]
        for s, row, out in [*parts, (self.splits, len(fold), slice(None))]:
            sums = self.sums[s if len(self.sums) > 1 else 0]
            if self.strategy == "majority":
                order = tie_order(ranks, np.nan_to_num(scores[s, members], nan=-np.inf), names)
                votes = sums[:, out]
                decided[row, out] = majority(votes, [members[i] for i in order], self.classes)
                if likely is not None:
                    likely[row, out] = shares(votes[members], self.classes)
                continue
            mean = sums[out] / max(len(members), 1)
            together = decisions(mean, kind)
            decided[row, out] = standardised(together, name, self.dev.width) if s < self.splits else together
            if likely is not None:
                mean = mean if self.strategy == "mean-probability" else soft_votes(mean, kind)
                likely[row, out] = class_probabilities(mean, kind)
        if likely is None or not by_probability:
            return decided, likely
        said = likely.copy()
        for _, row, out in parts:
            said[row, out] = standardised(likely[row, out], name, self.dev.width)
        return said, likely if probabilities else None


def standardised(said: np.ndarray, name: ScoreName, width: int = 1) -> np.ndarray:
    """What was said of one held-out part, (N,) or (N, classes), so that what other ensembles say of others compares.

    For correlations and scores of ranks: values, or the log-odds of each class or label, less their mean, over their
    standard deviation. Other scores look at what was said as it is. Over parts that different ensembles decide, a
    difference of their scales would count as an error; so it is about the mean of the parts' own scores. (With mean and
    deviation of the choosing part, their error would count, too. Ranks in the part in place of log-odds make average
    precision of few positives too low.)
    """
    if not SCORES[name].by_rank and name != "pearson":
        return said
    if SCORES[name].of == "probabilities":
        said = np.log(np.maximum(said, LEAST_PROBABILITY)) - np.log(np.maximum(1 - said, LEAST_PROBABILITY))
    each = said if width == 1 else said.reshape(-1, width, *said.shape[1:])
    spread = each.std(axis=0)
    return ((each - each.mean(axis=0)) / np.where(spread > 0, spread, 1.0)).reshape(said.shape)
