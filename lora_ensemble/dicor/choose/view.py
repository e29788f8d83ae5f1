"""What a method sees: members, best first, on the examples that it may choose by.

Axes: M members, N examples, C outputs of a head, k candidates (the members that are looked at).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from lora_ensemble.dicor.choose.combine import DECIMALS, LEAST_PROBABILITY, voices
from lora_ensemble.dicor.choose.settings import Criterion
from lora_ensemble.scores import decisions, score_decisions
from lora_ensemble.tasks import Kind


def true_probabilities(logits: np.ndarray, labels: np.ndarray, kind: Kind) -> np.ndarray:
    """The probability of the label: logits (..., N, C) of a classifier and labels (N,) to (..., N) float64."""
    logits = logits.astype(np.float64)
    if kind == "binary":
        x = np.where(labels > 0, logits[..., 0], -logits[..., 0])
        e = np.exp(-np.abs(x))  # never overflows
        return np.where(x >= 0, 1.0, e) / (1 + e)
    n = np.arange(len(labels))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(np.exp(shifted[..., n, labels]) / np.exp(shifted).sum(axis=-1))


def log_losses(true_probability: np.ndarray) -> np.ndarray:
    """Log-loss of each example in nats: probabilities of the labels (..., N) to (..., N)."""
    return np.asarray(-np.log(np.maximum(true_probability, LEAST_PROBABILITY)))


def losses(logits: np.ndarray, labels: np.ndarray, kind: Kind) -> np.ndarray:
    """The softer measure of each example, the less the better: log-loss, or squared error; (..., N, C) to (..., N)."""
    if kind == "regression":
        return np.asarray(np.square(logits[..., 0].astype(np.float64) - labels))
    return log_losses(true_probabilities(logits, labels, kind))


class View:
    """k members, the best first, on N examples.

    A method gets all that it may know in this: logits (k, N, C), labels (N,), kind, and each member's name, rank,
    score and loss on these examples. What several methods need is computed once.
    """

    def __init__(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        *,
        kind: Kind,
        names: Sequence[str],
        ranks: Sequence[int | None],
        scores: np.ndarray,
    ) -> None:
        self.logits, self.labels, self.kind = logits, labels, kind
        self.names, self.ranks, self.scores = list(names), list(ranks), scores

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def decided(self) -> np.ndarray:
        """(k, N)."""
        return decisions(self.logits, self.kind)

    @cached_property
    def voices(self) -> np.ndarray:
        """(k, N, C), see ``voices``."""
        return voices(self.logits, self.kind)

    @cached_property
    def true_probabilities(self) -> np.ndarray:
        """(k, N), classifiers only."""
        return true_probabilities(self.logits, self.labels, self.kind)

    def sums(self, criterion: Criterion) -> Sums:
        """A running sum of members, to be searched by ``criterion``."""
        if self.kind == "regression":
            return ValueSums(self.logits[..., 0].astype(np.float64), self.labels, criterion)
        if criterion == "loss":
            return LossSums(self.true_probabilities)
        return VoiceSums(self.voices, self.labels, self.kind)


class LossSums:
    """Members are added up; ``values`` says what the mean's loss would be with each further member.

    The log-loss of a mean of probabilities needs the probability of the label only: (k, N) numbers.
    """

    def __init__(self, true_probabilities: np.ndarray) -> None:
        self.each = true_probabilities

    def values(self, total: np.ndarray | float, count: int) -> np.ndarray:
        """(k,), the higher the better: minus the log-loss of (total + member) / (count + 1)."""
        return np.round(-log_losses((total + self.each) / (count + 1)).mean(axis=1), DECIMALS)

    def value(self, total: np.ndarray, count: int) -> float:
        """That of total / count alone."""
        return float(np.round(-log_losses(total / count).mean(), DECIMALS))


class VoiceSums:
    """The same by accuracy: (k, N, C) numbers."""

    def __init__(self, each: np.ndarray, labels: np.ndarray, kind: Kind) -> None:
        self.each, self.labels, self.kind = each, labels, kind

    def values(self, total: np.ndarray | float, count: int) -> np.ndarray:
        """(k,) accuracies of (total + member): dividing by the count changes no decision."""
        return (decisions(total + self.each, self.kind) == self.labels).mean(axis=1)

    def value(self, total: np.ndarray, count: int) -> float:
        """That of total alone."""
        return float((decisions(total, self.kind) == self.labels).mean())


class ValueSums:
    """The same for values (k, N): by Pearson r, or by mean squared error."""

    def __init__(self, each: np.ndarray, labels: np.ndarray, criterion: Criterion) -> None:
        self.each, self.labels, self.criterion = each, labels.astype(np.float64), criterion
        self._y = self.labels - self.labels.mean()
        centred = each - each.mean(axis=1, keepdims=True)
        self._xy, self._xx, self._centred = centred @ self._y, np.square(centred).sum(axis=1), centred

    def values(self, total: np.ndarray | float, count: int) -> np.ndarray:
        """(k,): r of total + member, or minus the error of (total + member) / (count + 1)."""
        if self.criterion == "loss":
            return np.round(-np.square((total + self.each) / (count + 1) - self.labels).mean(axis=1), DECIMALS)
        s = np.asarray(total - np.mean(total))
        both = self._xy + np.dot(s, self._y) if count else self._xy
        variance = self._xx + 2 * (self._centred @ s) + s @ s if count else self._xx
        with np.errstate(invalid="ignore", divide="ignore"):
            r = both / np.sqrt(variance * (self._y @ self._y))
        return np.round(np.nan_to_num(r, nan=-1.0, posinf=-1.0, neginf=-1.0), DECIMALS)

    def value(self, total: np.ndarray, count: int) -> float:
        """That of total alone."""
        if self.criterion == "loss":
            return float(np.round(-np.square(total / count - self.labels).mean(), DECIMALS))
        r = score_decisions(total, self.labels, "regression")
        return -1.0 if np.isnan(r) else float(np.round(r, DECIMALS))


Sums = LossSums | VoiceSums | ValueSums
