"""How an ensemble decides: by a mean of its members' logits or probabilities, or by the majority of their decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_ensemble.dicor.choose.probabilities import class_probabilities, soft_votes
from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.dicor.members import Members, ranked
from lora_ensemble.errors import UserError
from lora_ensemble.scores import LEAST_PROBABILITY, decisions
from lora_ensemble.tasks import SCORES, Kind


def of_labels(moves: np.ndarray) -> np.ndarray:
    """Offsets (L, 2) by which each label's log-odds move by ``moves`` (L,)."""
    return np.outer(moves, (-0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which members, and how they decide together."""

    members: list[int]  # indices into the members that were chosen from, in the order of choice; none twice
    strategy: Strategy
    weights: np.ndarray | None = None  # (k,) convex, in the order of ``members``, for ``weighted`` only
    temperatures: np.ndarray | None = None  # (k,) by which logits are divided before probabilities are taken
    scale: float = 1.0  # of the logarithm of the mean's probabilities, where there are ``offsets``
    offsets: np.ndarray | None = None
    """(classes,) of sum 0, added after that, or of each of several labels, (L, 2); see ``vector_scaled``."""
    similarities: list[list[float]] = field(default_factory=list)
    """For each chosen member its similarity to each one chosen before it, if the method looked at it."""

    @property
    def moves(self) -> list[float] | None:
        """The offsets of the classes as they are told; of several labels, by how much each one's log-odds move."""
        if self.offsets is None:
            return None
        return (self.offsets if self.offsets.ndim == 1 else self.offsets[:, 1] - self.offsets[:, 0]).tolist()


def decide(chosen: Members, choice: Choice) -> np.ndarray:
    """What the chosen members, in the order of choice, decide: (N,), as ``scores.decisions``.

    mean: of the logits (Tolkunov, section 4.3, for STS). mean-probability: of the probabilities (for regression, the
    values). weighted: the same with weights. majority: of the decisions. ``UserError`` for that of a regression and for
    missing weights.
    """
    kind = chosen.kind
    if choice.strategy == "majority":
        if kind == "regression":
            raise UserError("strategy majority: a regression has values, not classes to vote for; use the mean")
        order = tie_order(chosen.ranks, chosen.scores, chosen.names)
        return majority(decisions(chosen.logits, kind), order, 2 if kind == "binary" else chosen.logits.shape[-1])
    if choice.offsets is not None:
        return decisions(vector_scaled(mean_votes(chosen, choice), kind, choice.scale, choice.offsets), kind)
    if choice.strategy == "mean":
        return decisions(_mean_logits(chosen), kind)
    return decisions(mean_votes(chosen, choice), kind)


def mean_votes(chosen: Members, choice: Choice) -> np.ndarray:
    """The soft votes (N, C) of the chosen members' mean, of whatever the strategy is the mean of; not of a majority."""
    if choice.strategy == "mean":
        return soft_votes(_mean_logits(chosen), chosen.kind)
    order = ranked(chosen.scores, chosen.names)
    temperatures = None if choice.temperatures is None else choice.temperatures[order]
    votes = soft_votes(chosen.logits[order], chosen.kind, temperatures)
    if choice.strategy == "mean-probability":
        return np.asarray(votes.mean(axis=0))
    if choice.weights is None:
        raise UserError("strategy weighted: there are no weights; select again")
    return np.tensordot(choice.weights[order], votes, axes=1)


def _mean_logits(chosen: Members) -> np.ndarray:
    # Summed in one order: in another the last bit could be another.
    return np.asarray(chosen.logits[ranked(chosen.scores, chosen.names)].mean(axis=0, dtype=np.float64))


def said(chosen: Members, choice: Choice) -> np.ndarray:
    """What the score is of, as ``scores.said_of``: the ensemble's decisions (N,), or probabilities (N, classes)."""
    if SCORES[chosen.scored_by].of == "probabilities":
        return probabilities(chosen.logits, choice, kind=chosen.kind)
    return decide(chosen, choice)


def probabilities(logits: np.ndarray, choice: Choice, *, kind: Kind) -> np.ndarray:
    """Probabilities (N, classes) that the chosen members give, from their logits (k, N, C).

    mean: of the mean of logits; mean-probability, weighted: their mean; majority: the shares of the votes. Scaled and
    offset where the choice says so: the decision is always for the most probable. ``UserError`` for a regression.
    """
    if kind == "regression":
        raise UserError("predict_proba: a regression has values, not probabilities; use predict")
    if choice.strategy == "majority":
        return shares(decisions(logits, kind), 2 if kind == "binary" else logits.shape[-1])
    if choice.strategy == "mean":
        mean = soft_votes(logits.mean(axis=0, dtype=np.float64), kind)
    else:
        mean = np.average(soft_votes(logits, kind, choice.temperatures), axis=0, weights=choice.weights)
    if choice.offsets is not None:
        mean = soft_votes(vector_scaled(mean, kind, choice.scale, choice.offsets), kind)
    return class_probabilities(mean, kind)


def log_probabilities(votes: np.ndarray, kind: Kind) -> np.ndarray:
    """Logarithms of the probabilities (N, classes) of a mean of soft votes (N, C)."""
    return np.log(np.maximum(class_probabilities(votes, kind), LEAST_PROBABILITY))


def vector_scaled(votes: np.ndarray, kind: Kind, scale: float, offsets: np.ndarray) -> np.ndarray:
    """Logits (N, C), as a head's, of a mean of soft votes (N, C) whose probabilities p become softmax(a log p + b).

    ``scale`` a, ``offsets`` b (classes,). Vector scaling (Guo et al. 2017, section 4.2) with one scale for all classes.
    Of several labels b is (L, 2), for the L rows of each example.
    """
    z = scale * log_probabilities(votes, kind)
    z = (z.reshape(-1, *np.atleast_2d(offsets).shape) + offsets).reshape(z.shape)
    return z[:, 1:] - z[:, :1] if kind == "binary" else z


def shares(decided: np.ndarray, num_classes: int) -> np.ndarray:
    """The share of the votes that each class has: class numbers (M, N) to (N, num_classes)."""
    return np.stack([(decided == c).mean(axis=0) for c in range(num_classes)], axis=1)


def tie_order(ranks: Sequence[int | None], scores: np.ndarray, names: Sequence[str]) -> list[int]:
    """Indices of members (M,), who has the most say where votes tie first: the highest rank (Tolkunov, section 4.3).

    A member without a rank comes last; members of the same rank go by dev score, then by name.
    """
    # sorted() is stable, also in reverse.
    return sorted(ranked(scores, names), key=lambda m: -1 if (r := ranks[m]) is None else r, reverse=True)


def majority(decided: np.ndarray, order: Sequence[int], num_classes: int) -> np.ndarray:
    """The class that most of the members in ``order`` decided for: class numbers (M, N) to (N,) int64.

    Of tied classes it is that of the first in ``order``, see ``tie_order``, who voted for one of them.
    """
    votes = decided[order]
    counts = np.stack([np.count_nonzero(votes == c, axis=0) for c in range(num_classes)], axis=1)
    leading = counts == counts.max(axis=1, keepdims=True)  # (N, num_classes)
    winner, tied = np.argmax(leading, axis=1), np.flatnonzero(leading.sum(axis=1) > 1)
    for vote in votes:
        settled = leading[tied, vote[tied]]
        winner[tied[settled]] = vote[tied[settled]]
        tied = tied[~settled]
        if not len(tied):
            break
    return winner
