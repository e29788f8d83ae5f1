"""The single best member, all members (Omni) and DiCor, side by side on dev (Tolkunov, section 5).

Axes: M members, N examples of a split, C outputs of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.combine import combine
from lora_ensemble.dicor.select import Selection, dicor
from lora_ensemble.dicor.settings import Settings
from lora_ensemble.tasks import PRESETS, Kind, overall_score, score_decisions

SYSTEMS = ("single best", "Omni", "DiCor")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The three systems on the dev set that they were chosen on."""

    kind: Kind
    selection: Selection
    members: dict[str, int]
    """System to its number of members."""
    scores: dict[str, float]
    """System to its dev score; NaN where the Pearson r of an ensemble is undefined."""

    @property
    def best(self) -> int:
        """Index of the single best member."""
        return self.selection.ranking[0]


def compare(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    kind: Kind,
    names: Sequence[str],
    ranks: Sequence[int | None],
    settings: Settings,
) -> Comparison:
    """Select from dev logits (M, N, C) and labels (N,) and score the three systems on them.

    Omni and DiCor are combined with the same strategy. Raises ``UserError`` as ``select.dicor`` and
    ``combine.combine`` do.
    """
    selection = dicor(
        logits,
        labels,
        kind=kind,
        names=names,
        size=settings.size,
        top_k=settings.top_k,
        similarity=settings.similarity,
    )
    scores = {"single best": float(selection.scores[selection.ranking[0]])}
    for system, members in (("Omni", selection.ranking), ("DiCor", selection.chosen)):
        decided = combine(
            logits[members],
            kind=kind,
            strategy=settings.strategy,
            ranks=[ranks[m] for m in members],
            scores=selection.scores[members],
            names=[names[m] for m in members],
        )
        scores[system] = score_decisions(decided, labels, kind)
    return Comparison(
        kind=kind,
        selection=selection,
        members={"single best": 1, "Omni": len(names), "DiCor": settings.size},
        scores=scores,
    )


def overall(comparisons: Mapping[str, Comparison]) -> dict[str, float] | None:
    """System to the overall score of the three presets (Oyeniyi, section 5.2); None where they are not all there."""
    if not all(name in comparisons and comparisons[name].kind == task.kind for name, task in PRESETS.items()):
        return None
    three = {name: comparisons[name] for name in PRESETS}
    return {system: overall_score({n: (c.scores[system], c.kind) for n, c in three.items()}) for system in SYSTEMS}
