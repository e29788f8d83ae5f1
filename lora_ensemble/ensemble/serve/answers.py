"""From logits to what is answered.

Axes: M members, N texts of a question, C outputs of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_ensemble.dicor.choose.probabilities import class_probabilities, soft_votes
from lora_ensemble.ensemble.restored import Ensemble
from lora_ensemble.scores import decisions


def answers(ensemble: Ensemble, logits: np.ndarray, *, members: bool) -> dict[str, Any]:
    """What the ensemble, and with ``members`` each of its members, says by these logits (M, N, C).

    In the form of ``messages.Answers``.
    """
    record = ensemble.record
    valued = record.kind == "regression"
    rows = _rows(ensemble, record.decide(logits), None if valued else ensemble.probabilities(logits))
    if members:
        # As they enter the ensemble's: at the member's temperature, where it has one.
        votes = soft_votes(logits, record.kind, record.choice.temperatures)
        for name, own, decided in zip(ensemble.members, votes, decisions(logits, record.kind), strict=True):
            probabilities = None if valued else class_probabilities(own, record.kind)
            for row, said in zip(rows, _rows(ensemble, decided, probabilities), strict=True):
                row.setdefault("members", []).append({"name": name, **said})
    return {"answers": rows}


def _rows(ensemble: Ensemble, decided: np.ndarray, probabilities: np.ndarray | None) -> list[dict[str, Any]]:
    """Decisions (N,) and, of a classifier, probabilities (N, classes), for each text."""
    rows: list[dict[str, Any]] = [{"decision": decision} for decision in ensemble.named(decided).tolist()]
    if probabilities is not None:
        # Clipped, for rounding may leave one beyond what is promised.
        for row, p in zip(rows, probabilities.clip(0, 1).tolist(), strict=True):
            row["probabilities"] = dict(zip(ensemble.labels, p, strict=True))
    return rows
