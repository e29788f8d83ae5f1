"""What a method chose, and what the chosen members decide together.

Axes: M members, N examples of a split, C outputs of a head, k members of the ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_ensemble.dicor.choose.combine import combine, of_voices, shares, vector_scaled, voices
from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.dicor.choose.view import View
from lora_ensemble.dicor.choose.weights import convex_weights, scale_and_offsets, temperatures
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions
from lora_ensemble.tasks import Kind


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which members, and how they decide together."""

    members: list[int]
    """Indices into the view, in the order of choice; none twice."""
    strategy: Strategy
    weights: np.ndarray | None = None
    """(k,) convex, in the order of ``members``; for the strategy ``weighted`` only."""
    temperatures: np.ndarray | None = None
    """(k,), if the members' logits are divided by them before probabilities are taken."""
    scale: float = 1.0
    """What the logarithm of the weighted mean's probabilities is multiplied by, where there are ``offsets``."""
    offsets: np.ndarray | None = None
    """(classes,) of sum 0, added to it after that, for a classifier; see ``combine.vector_scaled``."""
    similarities: list[list[float]] = field(default_factory=list)
    """For each chosen member its similarity to each one chosen before it, if the method looked at it."""
    trace: list[float] = field(default_factory=list)
    """How good the ensemble was, by the method's criterion, after each step."""


def decide(
    logits: np.ndarray,
    choice: Choice,
    *,
    kind: Kind,
    ranks: Sequence[int | None],
    scores: np.ndarray,
    names: Sequence[str],
) -> np.ndarray:
    """What the chosen members decide: their logits (k, N, C), ranks, scores and names in the order of choice; (N,)."""
    return combine(
        logits,
        kind=kind,
        strategy=choice.strategy,
        ranks=ranks,
        scores=scores,
        names=names,
        weights=choice.weights,
        temperatures=choice.temperatures,
        scale=choice.scale,
        offsets=choice.offsets,
    )


def probabilities(logits: np.ndarray, choice: Choice, *, kind: Kind) -> np.ndarray:
    """Probabilities (N, classes) that the chosen members give, from their logits (k, N, C).

    mean: those of the mean of logits; mean-probability and weighted: their mean, scaled and offset where
    the choice says so; majority: the shares of the votes.
    """
    if kind == "regression":
        raise UserError("predict_proba: a regression has values, not probabilities; use predict")
    classes = 2 if kind == "binary" else logits.shape[-1]
    if choice.strategy == "majority":
        return shares(decisions(logits, kind), classes)
    if choice.strategy == "mean":
        voice = voices(logits.mean(axis=0, dtype=np.float64), kind)
    else:
        voice = np.average(voices(logits, kind, choice.temperatures), axis=0, weights=choice.weights)
        if choice.offsets is not None:
            voice = voices(vector_scaled(voice, kind, choice.scale, choice.offsets), kind)
    return of_voices(voice, kind)


def combined(
    view: View,
    members: list[int],
    strategy: Strategy,
    *,
    weights: np.ndarray | None = None,
    temperature: bool = False,
    offset: bool = False,
    similarities: list[list[float]] | None = None,
    trace: list[float] | None = None,
) -> Choice:
    """A ``Choice`` with the weights that the strategy ``weighted`` needs, if there are none, and the temperatures.

    ``offset``: and with scale and offsets, where weights were found here for a classifier.
    """
    degrees, scale, offsets = None, 1.0, None
    if temperature:
        if view.kind == "regression" or strategy in ("mean", "majority"):
            raise UserError(
                "--temperature: only a classifier's probabilities have one; use --strategy mean-probability"
            )
        degrees = temperatures(view.logits[members], view.labels, view.kind)
    if strategy == "weighted" and weights is None:
        scaled = View(
            view.logits[members] if degrees is None else view.logits[members] / degrees[:, None, None],
            view.labels,
            kind=view.kind,
            names=[view.names[m] for m in members],
            ranks=[view.ranks[m] for m in members],
            scores=view.scores[members],
        )
        true = None if view.kind == "regression" else scaled.true_probabilities
        weights = convex_weights(scaled.voices, view.labels, view.kind, true_probabilities=true)
        if offset and view.kind != "regression":
            scale, offsets = scale_and_offsets(np.tensordot(weights, scaled.voices, axes=1), view.labels, view.kind)
        kept = [i for i in range(len(members)) if weights[i] > 0]
        if len(kept) < len(members):  # a member without weight is no member
            members, weights = [members[i] for i in kept], weights[kept]
            degrees = None if degrees is None else degrees[kept]
            similarities = None
    return Choice(
        members=members,
        strategy=strategy,
        weights=weights,
        temperatures=degrees,
        scale=scale,
        offsets=offsets,
        similarities=similarities or [],
        trace=trace or [],
    )
