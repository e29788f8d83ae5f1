"""How good a growing sum of members is: what the searches make best."""

from __future__ import annotations

import numpy as np

from lora_ensemble.dicor.choose.probabilities import class_probabilities, log_losses
from lora_ensemble.dicor.choose.settings import SMOOTH, Criterion
from lora_ensemble.dicor.members import DECIMALS, Members
from lora_ensemble.scores import decisions, scored
from lora_ensemble.tasks import SCORES


class Sums:
    """Members are added up, and their mean is judged by the score or by the softer loss; the higher the better.

    ``each`` is what they add: for a log-loss the label's probabilities (k, N), for another score of a classifier soft
    votes (k, N, C), of a regression the values (k, N). ``criterion`` None: as ``SMOOTH`` says. ``proposes``: whether
    further members are judged by log-loss, or r, and only their sum by the score, which is one of ranks.
    """

    def __init__(self, members: Members, criterion: Criterion | None = None) -> None:
        self.kind, self.labels, self.name = members.kind, members.labels, members.scored_by
        self.width = members.width
        self.by_loss = (criterion or SMOOTH[members.kind]) == "loss" or self.name == "log_loss"
        self.proposes = not self.by_loss and SCORES[self.name].by_rank
        if members.kind != "regression":
            self.each = members.true_probabilities if self.by_loss else members.soft_votes
            return
        self.each, self.labels = members.soft_votes[..., 0], members.labels.astype(np.float64)
        self._y = self.labels - self.labels.mean()
        self._centred = self.each - self.each.mean(axis=1, keepdims=True)
        self._xy, self._xx = self._centred @ self._y, np.square(self._centred).sum(axis=1)

    def value(self, total: np.ndarray, count: int) -> np.ndarray:
        """Of sums of ``count`` members, (..., N) or (..., N, C): (...); r of one sum (N,) alone."""
        if self.by_loss:
            mean = total / count
            loss = np.square(mean - self.labels) if self.kind == "regression" else log_losses(mean)
            return np.round(-loss.mean(axis=-1), DECIMALS)
        if SCORES[self.name].of == "probabilities":
            said = class_probabilities(total / count, self.kind)
        else:
            said = total / (1 if self.name == "pearson" else count)  # r of the sum is r of the mean, to the last bit
            said = said if self.kind == "regression" else decisions(total, self.kind)
        value = SCORES[self.name].sign * scored(said, self.labels, self.kind, self.name, width=self.width)
        return _rounded(value) if self.kind == "regression" else np.nan_to_num(value, nan=-np.inf)

    def values(self, total: np.ndarray, count: int) -> np.ndarray:
        """(k,): of a sum of ``count`` members and each further one."""
        if self.proposes and self.kind != "regression":
            likely = class_probabilities((total + self.each) / (count + 1), self.kind)
            true = likely[:, np.arange(len(self.labels)), self.labels.astype(np.int64)]
            return np.round(-log_losses(true).mean(axis=-1), DECIMALS)
        if self.by_loss or self.name not in ("pearson", "spearman"):
            return self.value(total + self.each, count + 1)
        s = np.asarray(total - np.mean(total))
        both = self._xy + np.dot(s, self._y) if count else self._xy
        variance = self._xx + 2 * (self._centred @ s) + s @ s if count else self._xx
        with np.errstate(invalid="ignore", divide="ignore"):
            return _rounded(both / np.sqrt(variance * (self._y @ self._y)))


def _rounded(value: np.ndarray) -> np.ndarray:
    """As scores are compared; an r that is undefined is the worst, and r2 cannot be."""
    return np.round(np.where(np.isfinite(value), value, -1.0), DECIMALS)
