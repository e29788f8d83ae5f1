"""Offsets of the classes, of two classes a threshold, under which an ensemble's decisions have the best score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_ensemble.dicor.choose.combine import Choice, log_probabilities, mean_votes
from lora_ensemble.dicor.choose.weights import PULL
from lora_ensemble.dicor.members import DECIMALS, Members
from lora_ensemble.scores import scored
from lora_ensemble.tasks import SCORES

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
    """
    if not SCORES[members.scored_by].offsets or choice.strategy == "majority":
        return choice
    chosen = members.take(choice.members)
    logs = choice.scale * log_probabilities(mean_votes(chosen, choice), chosen.kind)  # (N, K)
    n, k = logs.shape
    start = np.zeros(k) if choice.offsets is None else choice.offsets
    offsets, steps = start.copy(), np.argsort(MOVES)
    for _ in range(ROUNDS):
        before = offsets.copy()
        for c in (1,) if k == 2 else range(k):
            others = logs + offsets
            others[:, c] = -np.inf
            best, own = others.argmax(axis=1), (logs[:, c] + start[c] + MOVES[:, None])  # (N,), (moves, N)
            decided = np.where((own > others.max(axis=1)) | ((own == others.max(axis=1)) & (c < best)), c, best)
            value = np.nan_to_num(scored(decided, chosen.labels, chosen.kind, chosen.scored_by))[steps]
            smooth = np.convolve(np.pad(value, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")[np.argsort(steps)]
            worth = np.round(smooth - PULL / (2 * n) * np.square(MOVES), DECIMALS)
            offsets[c] = start[c] + MOVES[np.argmax(worth)]
        if (offsets == before).all():
            break
    return choice if (offsets == start).all() else replace(choice, offsets=offsets - offsets.mean())
