"""The methods: each chooses an ensemble, and is used like any scikit-learn estimator.

greedy = Greedy(steps=50).fit(logits, labels, kind="multiclass", names=names)
greedy.names_, greedy.weights_, greedy.predict(test_logits)
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from lora_ensemble.dicor.choose import settings as s
from lora_ensemble.dicor.choose.combine import Choice, decide, probabilities
from lora_ensemble.dicor.choose.criteria import Sums
from lora_ensemble.dicor.choose.offsets import for_score
from lora_ensemble.dicor.choose.settings import Criterion, Similarity, Strategy
from lora_ensemble.dicor.choose.similarity import features, pick
from lora_ensemble.dicor.choose.weights import fitted
from lora_ensemble.dicor.members import Dev, Members, numbered
from lora_ensemble.errors import UserError
from lora_ensemble.scores import as_binary, by_example
from lora_ensemble.tasks import SCORES, Kind

MOST_SORTED = 25  # how many of the best a sorted start takes at most (Caruana et al.: 5 to 25)


class Method:
    """What all methods share. Its parameters are its fields; what ``fit`` finds has a name that ends with ``_``."""

    top_k: int  # how many members, the best, this method looks at
    has_offsets: ClassVar[bool] = True  # whether its decisions have offsets where the score wants them

    def choose(self, members: Members) -> Choice:
        """Choose from members, the best first; those beyond ``top_k`` are not looked at."""
        members = members.take(np.arange(min(self.top_k, len(members))))
        return for_score(members, self._choose(members)) if self.has_offsets else self._choose(members)

    def _choose(self, members: Members) -> Choice:
        raise NotImplementedError

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name, as in scikit-learn; ``deep`` has no meaning here."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def set_params(self, **params: Any) -> Self:
        """Change parameters by name; ``UserError`` for one that there is not."""
        for name, value in params.items():
            if name not in (known := self.get_params()):
                raise UserError(f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(known)}")
            setattr(self, name, value)
        return self

    def fit(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        *,
        kind: Kind,
        names: Sequence[str] | None = None,
        ranks: Sequence[int | None] | None = None,
        ids: Sequence[str] | None = None,
        score: str | None = None,
    ) -> Self:
        """Choose from dev logits (M, N, C) and labels (N,), or (N, L) for multilabel.

        ``names`` (M,), ``ranks`` (M,) and ``ids`` (N,) default to numbers, None and numbers. Sets ``members_``: indices
        into ``logits``, in the order of choice; ``names_``; ``scores_`` on these labels; ``weights_`` (k,) of sum 1;
        ``choice_``; ``notices_``: what was left out. ``score``: its name; None: the kind's default. ``UserError``
        where shapes do not fit, a value is not finite, the kind has no such score, or no member has it.
        """
        names = numbered(len(logits)) if names is None else list(names)
        dev = Dev.of(logits, labels, kind=kind, names=names, ranks=ranks, ids=ids, score=score)
        scores = np.array([dev.worth(m) for m in range(len(dev))])
        dev, good = dev.scored(scores)
        members = dev.top(scores[good], self.top_k)
        self.choice_ = self.choose(members)
        chosen, weights = members.take(self.choice_.members), self.choice_.weights
        self._chosen, self.names_, self.scores_ = chosen, chosen.names, chosen.scores * SCORES[dev.scored_by].sign
        self.members_ = [names.index(name) for name in chosen.names]
        self.weights_ = np.full(len(chosen), 1 / len(chosen)) if weights is None else weights
        self.notices_ = dev.notices
        return self

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """What the ensemble decides, (N,) or (N, L), from logits (M, N, C) of all members in the order of ``fit``."""
        return by_example(decide(self._said(logits), self.choice_), self._chosen.width)

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities (N, classes), or (N, L), from logits (M, N, C); ``UserError`` for a regression."""
        said = self._said(logits)
        p = probabilities(said.logits, self.choice_, kind=said.kind)
        return by_example(p[:, 1], said.width) if said.width > 1 else p

    def _said(self, logits: np.ndarray) -> Members:
        if not hasattr(self, "choice_"):
            raise UserError(f"{type(self).__name__}: not fitted yet; call fit first")
        chosen = np.stack([np.asarray(logits[m]) for m in self.members_])
        flat = as_binary(chosen, "multilabel")[0] if self._chosen.width > 1 else chosen
        return dataclasses.replace(self._chosen, logits=flat)


@dataclass(kw_only=True)
class Best(Method):
    """The single best member, as it is."""

    top_k = 1
    has_offsets = False

    def _choose(self, members: Members) -> Choice:
        return Choice(members=[0], strategy="mean")


@dataclass(kw_only=True)
class Omni(Method):
    """All members (Tolkunov's Omni). He lets classifiers vote; the mean is the harder one to beat."""

    top_k = sys.maxsize
    has_offsets = False
    strategy: Strategy = "mean"

    def _choose(self, members: Members) -> Choice:
        return fitted(members, Choice(members=list(range(len(members))), strategy=self.strategy))


@dataclass(kw_only=True)
class Dicor(Method):
    """Members that are good and unlike each other (Tolkunov, section 4.3; ``similarity.pick`` says the rule).

    With ``trade_off`` 1 and a number for ``size`` it is the paper's. ``size="auto"`` goes on to ``MOST_AUTO`` members
    and then keeps the first so many of them whose mean is best, by the measure that ``SMOOTH`` names.
    """

    size: int | Literal["auto"] = "auto"
    top_k: int = s.DEFAULT_TOP_K
    similarity: Similarity = "pearson"
    strategy: Strategy = "mean"
    trade_off: float = 1.0
    temperature: bool = False

    def _choose(self, members: Members) -> Choice:
        if self.size != "auto" and self.size < 1:
            raise UserError(f"size {self.size}: an ensemble needs at least one member")
        if not 0 <= self.trade_off <= 1:
            raise UserError(f"trade_off {self.trade_off}: expected 0 (score alone) to 1 (similarity alone)")
        size = min(s.MOST_AUTO if self.size == "auto" else self.size, len(members))
        compared = features(members.logits, kind=members.kind, similarity=self.similarity, labels=members.labels)
        picked, similarities = pick(compared, members.scores, size, self.similarity, self.trade_off)
        if self.size == "auto":
            sums = Sums(members)
            totals = np.cumsum(sums.each[picked], axis=0)
            size = int(np.argmax([sums.value(total, i + 1) for i, total in enumerate(totals)])) + 1
        choice = Choice(members=picked[:size], strategy=self.strategy, similarities=similarities[:size])
        return fitted(members, choice, temperature=self.temperature)


@dataclass(kw_only=True)
class Weighted(Method):
    """The ``top_k`` best, with convex weights drawn to equal ones (``weights.convex_weights``).

    ``offset``: a classifier's mean also gets ``weights.scale_and_offsets``; a regression's r looks at neither.
    """

    top_k: int = s.DEFAULT_TOP_K
    temperature: bool = False
    offset: bool = False

    def _choose(self, members: Members) -> Choice:
        choice = Choice(members=list(range(len(members))), strategy="weighted")
        return fitted(members, choice, temperature=self.temperature, offset=self.offset)


@dataclass(kw_only=True)
class Greedy(Method):
    """Members are added, with replacement, each time the one that makes the mean best (Caruana et al. 2004).

    How often it was taken is its weight in the mean of probabilities (regression: of values). Of equal additions a
    member that is already in goes first, as in AutoGluon's EnsembleSelection, then the one ranked higher; of the
    ensembles on the way the first of the best is kept, as there.

    ``criterion``: what is made best; None: as ``SMOOTH`` says. ``sorted_start``: begin with the n best members, n the
    number up to 25 whose mean is best, instead of none. ``bags`` > 1: as many searches, each on ``model_share`` of the
    candidates and ``example_share`` of the examples, drawn with ``seed``; their weights are averaged.
    """

    steps: int = s.GREEDY_STEPS
    top_k: int = s.GREEDY_TOP_K
    criterion: Criterion | None = None
    sorted_start: bool = False
    bags: int = 1
    model_share: float = 0.5
    example_share: float = 1.0
    seed: int = 0

    def _choose(self, members: Members) -> Choice:
        if self.steps < 1 or self.bags < 1 or not 0 < self.model_share <= 1 or not 0 < self.example_share <= 1:
            raise UserError("greedy: expected steps and bags of at least 1, and shares above 0 and up to 1")
        k, n = len(members), len(members.labels) // members.width
        order, weights, rng = list[int](), np.zeros(k), np.random.default_rng(self.seed)
        for _ in range(self.bags):
            which, part = np.arange(k), members
            if self.bags > 1:
                which = np.sort(rng.choice(k, max(1, round(self.model_share * k)), replace=False))
                some = np.sort(rng.choice(n, max(1, round(self.example_share * n)), replace=False))
                rows = (some[:, None] * members.width + np.arange(members.width)).ravel()
                part = members.take(which, None if len(some) == n else rows)
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
            values.append(float(sums.value(total, len(order)) if sums.proposes else with_each[m]))
            used[m] = True
        return order[: max(int(np.argmax(values)) + 1, least)]


@dataclass(kw_only=True)
class Exhaustive(Method):
    """The best of all 2^top_k - 1 ensembles of up to ``size`` of the ``top_k`` best members, with equal weights.

    ``criterion`` None: as ``SMOOTH`` says. Of equals, the one with fewer members, then the one ranked higher.
    """

    size: int | None = None
    top_k: int = s.EXHAUSTIVE_TOP_K
    criterion: Criterion | None = None
    strategy: Strategy = "mean-probability"

    def _choose(self, members: Members) -> Choice:
        k = len(members)
        if k > 16:
            raise UserError(f"exhaustive: {k} members have {2**k - 1} ensembles; give --top-k 16 or less")
        sums = Sums(members, self.criterion)
        best, chosen = -np.inf, tuple[int, ...]()
        for size in range(1, min(self.size or k, k) + 1):  # of equals, the first is kept
            for ensemble in itertools.combinations(range(k), size):
                value = float(sums.value(sums.each[list(ensemble)].sum(axis=0), size))
                if value > best:
                    best, chosen = value, ensemble
        return fitted(members, Choice(members=list(chosen), strategy=self.strategy))
