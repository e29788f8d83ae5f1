"""Greedy ensemble selection (Caruana et al. 2004, "Ensemble selection from libraries of models").

Axes: N examples, k candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.choose.combine import Choice
from lora_ensemble.dicor.choose.criteria import Sums
from lora_ensemble.dicor.choose.methods import Method
from lora_ensemble.dicor.choose.settings import GREEDY_STEPS, GREEDY_TOP_K, Criterion
from lora_ensemble.dicor.members import Members
from lora_ensemble.errors import UserError

MOST_SORTED = 25  # how many of the best a sorted start takes at most (Caruana et al.: 5 to 25)


@dataclass(kw_only=True)
class Greedy(Method):
    """Members are added one at a time, with replacement, each time the one that makes the mean best.

    How often it was taken is its weight in the mean of probabilities (regression: of values). Of equal additions a
    member that is already in goes first, as in AutoGluon's EnsembleSelection, then the one ranked higher; of the
    ensembles on the way the first of the best is kept, as there.

    ``criterion``: what is made best; None: as ``SMOOTH`` says. ``sorted_start``: begin with the n best members, n the
    number up to 25 whose mean is best, instead of none. ``bags`` > 1: as many searches, each on ``model_share`` of the
    candidates and ``example_share`` of the examples, drawn with ``seed``; their weights are averaged.
    """

    steps: int = GREEDY_STEPS
    top_k: int = GREEDY_TOP_K
    criterion: Criterion | None = None
    sorted_start: bool = False
    bags: int = 1
    model_share: float = 0.5
    example_share: float = 1.0
    seed: int = 0

    def _choose(self, members: Members) -> Choice:
        if self.steps < 1 or self.bags < 1 or not 0 < self.model_share <= 1 or not 0 < self.example_share <= 1:
            raise UserError("greedy: expected steps and bags of at least 1, and shares above 0 and up to 1")
        k, n = len(members), len(members.labels)
        order, weights, rng = list[int](), np.zeros(k), np.random.default_rng(self.seed)
        for _ in range(self.bags):
            which, part = np.arange(k), members
            if self.bags > 1:
                which = np.sort(rng.choice(k, max(1, round(self.model_share * k)), replace=False))
                rows = np.sort(rng.choice(n, max(1, round(self.example_share * n)), replace=False))
                part = members.take(which, None if len(rows) == n else rows)
            bag = which[self._search(Sums(part, self.criterion))]
            weights += np.bincount(bag, minlength=k) / len(bag) / self.bags
            order += bag.tolist()
        chosen = list(dict.fromkeys(order))  # in the order of first choice
        return Choice(members=chosen, strategy="weighted", weights=weights[chosen])

    def _search(self, sums: Sums) -> list[int]:
        """Members (indices, with repetition) up to the first best ensemble on the way."""
        total, order, values, least = np.zeros_like(sums.each[0]), list[int](), list[float](), 1
        if self.sorted_start:
            totals = np.cumsum(sums.each[: min(MOST_SORTED, self.steps)], axis=0)
            values = [float(sums.value(total, m + 1)) for m, total in enumerate(totals)]
            least = int(np.argmax(values)) + 1
            order, values, total = list(range(least)), values[:least], totals[least - 1]
        used = np.zeros(len(sums.each), bool)
        used[order] = True
        while len(order) < self.steps:
            with_each = sums.values(total, len(order))
            best = np.flatnonzero(with_each == with_each.max())
            m = int(next(iter(best[used[best]]), best[0]))
            total = total + sums.each[m]
            order.append(m)
            values.append(float(with_each[m]))
            used[m] = True
        return order[: max(int(np.argmax(values)) + 1, least)]
