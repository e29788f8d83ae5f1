"""Everything that a report shows, computed once: of one task, one comparison, and the method that it is about."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_ensemble.dicor.choose.combine import tie_order
from lora_ensemble.dicor.choose.methods import Dicor, Exhaustive, Greedy, Method, Omni, Weighted
from lora_ensemble.dicor.choose.settings import (
    DEFAULT_METHOD,
    DEFAULT_SIMILARITY,
    DEFAULT_TOP_K,
    MOST_AUTO,
    MethodName,
    Similarity,
)
from lora_ensemble.dicor.choose.similarity import features, pairwise
from lora_ensemble.dicor.compare import Comparison, Judgement
from lora_ensemble.dicor.estimate.honest import Estimate, estimate
from lora_ensemble.dicor.members import Dev, ranked
from lora_ensemble.dicor.report.theory import Calibration, Theory, calibration, theory
from lora_ensemble.dicor.table import number
from lora_ensemble.pool import MemberRecord

MOST_SHOWN = 200  # members: with more, a row of the heat map is finer than a pixel, and a page is slow to open
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30)  # sizes between the later ones hardly differ
FEW_SIZES = (1, 2, 5, 10, 15, 25)  # for a method of many bags, each of which is a search of its own
_NAMES = {"best": "single best", "omni": "Omni"}


def display_name(method: str) -> str:
    """What a method is called in plots and tables."""
    return _NAMES.get(method, method)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One method at growing sizes."""

    method: str
    of_n: str  # what n is for this method, in words
    used: int | None  # the n of the comparison, where it is one number and within the curve
    sizes: list[int]
    estimates: list[Estimate]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The numbers of a report."""

    comparison: Comparison
    method: str  # what the report is about
    shown: list[MemberRecord]  # (S,) the best members by score, at most ``MOST_SHOWN``, best first
    scores: np.ndarray  # (S,)
    similarity: Similarity
    similarities: np.ndarray  # (S, S)
    curves: list[Curve]
    calibrations: dict[str, Calibration]  # by method; empty for a regression
    theories: dict[str, Theory]  # by method
    judgement: Judgement | None  # of each method, on another split

    @property
    def task(self) -> str:
        return self.comparison.task_pool.name

    @property
    def score_name(self) -> str:
        return self.comparison.score.words

    @property
    def split(self) -> str:
        """What was chosen on."""
        return self.comparison.task_pool.split

    @property
    def regression(self) -> bool:
        return self.comparison.kind == "regression"

    @property
    def estimate(self) -> Estimate:
        """Of the method that the report is about."""
        return self.comparison.estimates.of[self.method]

    @property
    def mean_similarity(self) -> np.ndarray:
        """(S,) of each member to the others that are shown; NaN for a single one."""
        s = len(self.shown)
        if s < 2:
            return np.full(s, np.nan)
        return np.asarray((self.similarities.sum(axis=1) - np.diagonal(self.similarities)) / (s - 1))


def method_shown(comparison: Comparison, named: Sequence[MethodName] | None) -> str:
    """The method that a report is about: the first that was named, or what ``dicor select`` takes by default."""
    return named[0] if named else DEFAULT_METHOD[comparison.kind]


def gather(comparison: Comparison, method: str, *, judgement: Judgement | None = None) -> Facts:
    """The facts of a comparison that kept its probabilities. Raises ``UserError`` as ``features`` does."""
    task_pool, estimates, dev = comparison.task_pool, comparison.estimates, comparison.dev
    names, scores = list(estimates.scores), np.array(list(estimates.scores.values()))
    order = ranked(comparison.score.sign * scores, names)[:MOST_SHOWN]
    shown = [task_pool.record(names[i]) for i in order]
    asked = [comparison.methods[m].get_params().get("similarity") for m in (method, "dicor") if m in comparison.methods]
    similarity = next((s for s in asked if s), DEFAULT_SIMILARITY[dev.kind])
    logits = np.stack([_logits(dev, r.name) for r in shown])
    compared_by = features(logits, kind=dev.kind, similarity=similarity, labels=dev.labels)
    return Facts(
        comparison=comparison,
        method=method,
        shown=shown,
        scores=scores[order],
        similarity=similarity,
        similarities=pairwise(compared_by, similarity=similarity),
        curves=curves(comparison, [m for m in ("dicor", method) if m in comparison.methods]),
        calibrations={
            m: calibration(p, estimates.candidates.labels, dev.kind)
            for m in dict.fromkeys(("best", "omni", method))
            if (p := estimates.of[m].probabilities) is not None
        },
        theories={
            m: _theory(comparison, estimates.of[m].names)
            for m in dict.fromkeys(("omni", "dicor", method))
            if m in estimates.of and m != "best"
        },
        judgement=judgement,
    )


def _logits(dev: Dev, name: str) -> np.ndarray:
    """(N, C) of a member, whose file was checked when it was compared."""
    return dev.logits_of(bisect_left(dev.names, name))  # they are sorted


def _theory(comparison: Comparison, names: Sequence[str]) -> Theory:
    task_pool, dev = comparison.task_pool, comparison.dev
    scores = comparison.score.sign * np.array([comparison.estimates.scores[name] for name in names])
    order = tie_order([task_pool.record(name).rank for name in names], scores, names)
    logits = (_logits(dev, name) for name in names)
    return theory(logits, dev.labels, dev.kind, outputs=len(task_pool.labels), order=order)


def curves(comparison: Comparison, names: Sequence[str]) -> list[Curve]:
    """A curve for each of these methods that has a size, by the same folds; none for a pool of one member."""
    members = len(comparison.estimates.of["omni"].names)
    planned, asked = list[tuple[str, str, int | None, list[int]]](), dict[str, Method]()
    for name in dict.fromkeys(names):
        method = comparison.methods[name]
        sizing = _sizing(method, members)
        if sizing is None or sizing[1] < 2:
            continue
        of_n, most, used, with_size = sizing
        some = FEW_SIZES if isinstance(method, Greedy) and method.bags > 1 else SIZES
        sizes = sorted({n for n in (*some, used, most) if n is not None and n <= most})
        asked |= {f"{name} {n}": with_size(n) for n in sizes}
        planned.append((name, of_n, used, sizes))
    if not asked:
        return []
    of = estimate(comparison.dev, {"omni": comparison.methods["omni"], **asked}).of
    return [
        Curve(method=name, of_n=of_n, used=used, sizes=sizes, estimates=[of[f"{name} {n}"] for n in sizes])
        for name, of_n, used, sizes in planned
    ]


def _sizing(method: Method, members: int) -> tuple[str, int, int | None, Callable[[int], Method]] | None:
    """What n is for a method, the largest of a pool, its own, and the method with another n; None: it has no size."""
    if isinstance(method, Dicor):
        own = None if method.size == "auto" else min(method.size, method.top_k, members)
        most = min(method.top_k, members, max(own or 0, MOST_AUTO))
        return "n members", most, own, lambda n: replace(method, size=n, top_k=max(method.top_k, n))
    if isinstance(method, Weighted):
        own = min(method.top_k, members)
        return "of the n best", own, own, lambda n: replace(method, top_k=n)
    if isinstance(method, Greedy):
        return "n steps", method.steps, method.steps, lambda n: replace(method, steps=n)
    if isinstance(method, Exhaustive):
        own = min(method.top_k, method.size or method.top_k, members)
        return "n members at most", own, own, lambda n: replace(method, size=n)
    if isinstance(method, Omni):
        most, own = min(DEFAULT_TOP_K, members), members if members <= DEFAULT_TOP_K else None
        return "the n best", most, own, lambda n: Dicor(size=n, top_k=n, trade_off=0.0, strategy=method.strategy)
    return None


def members_table(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Header and rows (S,) of what is told of each member that is shown: settings, score, and who is like it."""
    chosen, means = set(facts.estimate.names), facts.mean_similarity
    header = ["member", "rank r", "scaling c", "targets", "lr", "seed", facts.score_name, f"in {facts.method}"]
    header += [f"mean {facts.similarity} similarity", "most like", "its similarity"]
    others = facts.similarities - 2 * np.eye(len(facts.shown))  # a member is not like itself
    rows = []
    for i, r in enumerate(facts.shown):
        row = [*settings(r), number(facts.scores[i]), "yes" if r.name in chosen else "no"]
        most = int(np.argmax(others[i]))
        like = [number(means[i]), facts.shown[most].name, number(others[i, most])] if len(others) > 1 else ["-"] * 3
        rows.append(row + like)
    return header, rows


def settings(r: MemberRecord) -> list[str]:
    """A member's name, rank, scaling, targets, learning rate and seed as texts, with what is special about them."""

    def text(*values: object) -> str:
        known = (f"{v:g}" if isinstance(v, float) else str(v) for v in values if v is not None)
        return ", ".join(known) or "-"

    dropout, rate_b, decay = (
        None if of is None else f"{word} {of:g}"
        for word, of in (("dropout", r.dropout), ("B", r.lr_b), ("decay", r.weight_decay))
    )
    targets = text(r.targets, r.layers, dropout, r.init)
    return [r.name, text(r.rank), text(r.scaling), targets, text(r.lr, rate_b, decay), text(r.seed)]
