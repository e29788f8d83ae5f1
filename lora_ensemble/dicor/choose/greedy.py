"""Greedy ensemble selection (Caruana et al. 2004, "Ensemble selection from libraries of models").

Axes: M members, N examples, C outputs of a head, k candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.choose.choice import Choice, combined
from lora_ensemble.dicor.choose.methods import Method
from lora_ensemble.dicor.choose.settings import GREEDY_STEPS, GREEDY_TOP_K, SMOOTH, Criterion
from lora_ensemble.dicor.choose.view import Sums, View
from lora_ensemble.errors import UserError

MOST_SORTED = 25
"""How many of the best a sorted start takes at most (Caruana et al.: 5 to 25)."""


@dataclass(kw_only=True)
class Greedy(Method):
    """Members are added one at a time, with replacement, each time the one that makes the mean best.

    How often a member was taken is its weight in the mean of probabilities (regression: of values). Of equal additions
    a member that is already in goes first, as in AutoGluon's EnsembleSelection, then the one ranked higher (AutoGluon
    draws one); of the ensembles on the way the first of the best is kept, as there.

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

    def candidates(self, members: int) -> int:
        return min(self.top_k, members)

    def choose(self, view: View) -> Choice:
        k, n = self.candidates(len(view)), len(view.labels)
        if self.steps < 1 or self.bags < 1 or not 0 < self.model_share <= 1 or not 0 < self.example_share <= 1:
            raise UserError("greedy: expected steps and bags of at least 1, and shares above 0 and up to 1")
        criterion = self.criterion or SMOOTH[view.kind]
        if self.bags == 1:
            order, trace = _search(_part(view, k, None).sums(criterion), self.steps, self.sorted_start)
            weights = np.bincount(order, minlength=k) / len(order)
        else:
            rng, weights, trace, order = np.random.default_rng(self.seed), np.zeros(k), [], []
            for _ in range(self.bags):
                models = np.sort(rng.choice(k, max(1, round(self.model_share * k)), replace=False))
                rows = np.sort(rng.choice(n, max(1, round(self.example_share * n)), replace=False))
                part = _part(view, models, None if len(rows) == n else rows)
                found, _ = _search(part.sums(criterion), self.steps, self.sorted_start)
                bag = models[found]
                weights += np.bincount(bag, minlength=k) / len(bag) / self.bags
                order += [int(m) for m in bag]
        members = list(dict.fromkeys(int(m) for m in order))  # in the order of first choice
        return combined(view, members, "weighted", weights=weights[members], trace=trace)


def _part(view: View, models: int | np.ndarray, rows: np.ndarray | None) -> View:
    """The view of some members and examples."""
    which = np.arange(models) if isinstance(models, int) else models
    if rows is None and len(which) == len(view):
        return view
    logits = view.logits[which] if rows is None else view.logits[which][:, rows]
    return View(
        logits,
        view.labels if rows is None else view.labels[rows],
        kind=view.kind,
        names=[view.names[m] for m in which],
        ranks=[view.ranks[m] for m in which],
        scores=view.scores[which],
    )


def _search(sums: Sums, steps: int, sorted_start: bool) -> tuple[list[int], list[float]]:
    """The members (indices, with repetition) up to the first best ensemble on the way, and the value at each step."""
    k = len(sums.each)
    total, order, trace = np.zeros_like(sums.each[0], dtype=np.float64), [], []
    least = 1
    if sorted_start:
        for m in range(min(k, MOST_SORTED, steps)):
            total = total + sums.each[m]
            order.append(m)
            trace.append(sums.value(total, len(order)))
        least = int(np.argmax(trace)) + 1
        order, trace = order[:least], trace[:least]
        total = sums.each[:least].sum(axis=0)
    used = np.zeros(k, bool)
    used[order] = True
    while len(order) < steps:
        values = sums.values(total, len(order))
        best = np.flatnonzero(values == values.max())
        again = best[used[best]]
        m = int(again[0] if len(again) else best[0])
        total = total + sums.each[m]
        order.append(m)
        trace.append(float(values[m]))
        used[m] = True
    end = max(int(np.argmax(trace)) + 1, least)
    return order[:end], trace
