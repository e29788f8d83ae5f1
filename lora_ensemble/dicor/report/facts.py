"""Everything that a report shows, computed once: of one task, one comparison, and the method that it is about.

Axes: M members, N examples of dev, C outputs of a head, S members that are shown, k members of an ensemble.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.choose.settings import DEFAULT_METHOD, DEFAULT_SIMILARITY, MethodName, Similarity
from lora_ensemble.dicor.choose.similarity import features, pairwise
from lora_ensemble.dicor.compare import Comparison
from lora_ensemble.dicor.estimate.honest import Estimate
from lora_ensemble.dicor.members import Dev, ranked
from lora_ensemble.dicor.report.by_size import Curve, curves
from lora_ensemble.dicor.report.calibration import Calibration, calibration
from lora_ensemble.dicor.report.theory import Theory, theory
from lora_ensemble.pool import MemberRecord
from lora_ensemble.tasks import score_name

MOST_SHOWN = 200
"""Members in the plots: with more, a row of the heat map is finer than a pixel, and a page is slow to open."""
NAMES = {"best": "single best", "omni": "Omni"}
"""What two of the methods are called in plots and headings; the others have their own names."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The numbers of a report."""

    comparison: Comparison
    method: str
    """What the report is about."""
    one: Estimate
    """Of that method."""
    shown: list[MemberRecord]
    """(S,) the best members by score, at most ``MOST_SHOWN``, best first."""
    scores: np.ndarray
    """(S,)"""
    similarity: Similarity
    similarities: np.ndarray
    """(S, S)"""
    chosen: set[str]
    """Names of the ensemble's members."""
    curves: list[Curve]
    calibrations: dict[str, Calibration]
    """By method; empty for a regression."""
    theories: dict[str, Theory]
    """By method."""
    test: dict[str, float] | None
    """By method: the score on the labelled test split, if it was asked for."""

    @property
    def task(self) -> str:
        return self.comparison.task_pool.name

    @property
    def score_name(self) -> str:
        return score_name(self.comparison.kind)

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


def gather(comparison: Comparison, method: str, *, test: dict[str, float] | None = None) -> Facts:
    """The facts of a comparison that kept its probabilities. Raises ``UserError`` as ``features`` does."""
    task_pool, found, dev = comparison.task_pool, comparison.estimates, comparison.dev
    names, scores = list(found.scores), np.array(list(found.scores.values()))
    order = ranked(scores, names)[:MOST_SHOWN]
    shown = [task_pool.record(names[i]) for i in order]
    asked = [comparison.methods[m].get_params().get("similarity") for m in (method, "dicor") if m in comparison.methods]
    similarity = next((s for s in asked if s), DEFAULT_SIMILARITY[task_pool.kind])
    compared_by = features(
        np.stack([_logits(dev, r.name) for r in shown]),
        kind=task_pool.kind,
        similarity=similarity,
        labels=dev.labels,
    )
    told = [m for m in dict.fromkeys(("best", "omni", "dicor", method)) if m in found.of]
    labels = found.candidates.labels
    return Facts(
        comparison=comparison,
        method=method,
        one=found.of[method],
        shown=shown,
        scores=scores[order],
        similarity=similarity,
        similarities=pairwise(compared_by, similarity=similarity),
        chosen=set(found.of[method].names),
        curves=curves(comparison, [m for m in ("dicor", method) if m in comparison.methods]),
        calibrations={
            m: calibration(p, labels, task_pool.kind)
            for m in dict.fromkeys(("best", "omni", method))
            if (p := found.of[m].probabilities) is not None
        },
        theories={m: _theory(comparison, found.of[m].names) for m in told if m != "best"},
        test=test,
    )


def _logits(dev: Dev, name: str) -> np.ndarray:
    """(N, C) of a member, whose file was checked when it was compared."""
    return dev.logits_of(bisect_left(dev.names, name))  # they are sorted


def _theory(comparison: Comparison, names: Sequence[str]) -> Theory:
    task_pool, dev = comparison.task_pool, comparison.dev
    return theory(
        (_logits(dev, name) for name in names),
        dev.labels,
        task_pool.kind,
        outputs=len(task_pool.labels),
        ranks=[task_pool.record(name).rank for name in names],
        scores=np.array([comparison.estimates.scores[name] for name in names]),
        names=list(names),
    )
