"""Offsets of the classes, of two classes a threshold, under which an ensemble's decisions have the best score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_ensemble.dicor.choose.combine import Choice, log_probabilities, mean_votes, of_labels
from lora_ensemble.dicor.choose.weights import PULL
from lora_ensemble.dicor.members import DECIMALS, Members
from lora_ensemble.scores import scored
from lora_ensemble.tasks import SCORES, Kind, ScoreName

MOVES = np.array(sorted(np.arange(-24, 25) / 4, key=abs))  # of a class's offset, in nats; the least first
ROUNDS = 3  # over all classes; seldom more than two change anything


def for_score(members: Members, choice: Choice) -> Choice:
    """The choice with the offsets that its score wants, from log-probabilities as ``combine.vector_scaled`` has them.

    Where the score is one of decisions, accuracy excepted, whose offsets are those of the least log-loss; not for a
    majority, whose votes are no probabilities. Each class's offset in turn is moved, along ``MOVES`` from where the
    choice had it, to where this is highest: the score there, a half, and at both neighbours, a quarter each, so that a
    lone peak or a plateau's edge does not win against its middle; less ``PULL`` / (2 N) times the squared move, which
    holds what a small dev set wants close to what was there, and of a plateau takes the nearest part. Of equals the
    least move is taken.

    Of several labels each has its own, found by its own F1, where the score is a mean of these; micro F1, whose best
    thresholds are one and the same where probabilities are right, has one for all.
    """
    name, width = members.scored_by, members.width
    if not SCORES[name].offsets or choice.strategy == "majority":
        return choice
    chosen = members.take(choice.members)
    logs = choice.scale * log_probabilities(mean_votes(chosen, choice), chosen.kind)  # (N, K)
    start = np.zeros((width, logs.shape[1])) if choice.offsets is None else choice.offsets.reshape(width, -1)
    each = 1 if name == "f1_micro" else width  # micro F1 of several labels is the F1 of all rows
    by = "f1" if width > 1 else name
    parts = [(logs[i::each], chosen.labels[i::each], start[i]) for i in range(each)]
    found = [_searched(*part, chosen.kind, by) for part in parts]
    if all((one == start[i]).all() for i, one in enumerate(found)):
        return choice
    moves = [one[1] - one[0] for one in found]
    offsets = of_labels(np.resize(moves, width)) if width > 1 else found[0] - found[0].mean()
    return replace(choice, offsets=offsets)


def _searched(logs: np.ndarray, labels: np.ndarray, start: np.ndarray, kind: Kind, name: ScoreName) -> np.ndarray:
    """The offsets (K,) for log-probabilities (N, K), moved from ``start`` (K,)."""
    n, k = logs.shape
    offsets, steps = start.copy(), np.argsort(MOVES)
    for _ in range(ROUNDS):
        before = offsets.copy()
        for c in (1,) if k == 2 else range(k):
            others = logs + offsets
            others[:, c] = -np.inf
            best, own = others.argmax(axis=1), (logs[:, c] + start[c] + MOVES[:, None])  # (N,), (moves, N)
            decided = np.where((own > others.max(axis=1)) | ((own == others.max(axis=1)) & (c < best)), c, best)
            value = np.nan_to_num(scored(decided, labels, kind, name))[steps]
            smooth = np.convolve(np.pad(value, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")[np.argsort(steps)]
            worth = np.round(smooth - PULL / (2 * n) * np.square(MOVES), DECIMALS)
            offsets[c] = start[c] + MOVES[np.argmax(worth)]
        if (offsets == before).all():
            break
    return offsets
