"""From logits to what is answered.

Axes: M members, N texts of a question, C outputs of a head.
"""

from __future__ import annotations

import numpy as np

from lora_ensemble.dicor.choose.probabilities import class_probabilities, soft_votes
from lora_ensemble.ensemble.restored import Ensemble
from lora_ensemble.ensemble.serve.messages import Class, Classes, MemberClass, MemberValue, Value, Values
from lora_ensemble.scores import decisions


def answers(ensemble: Ensemble, logits: np.ndarray, *, members: bool) -> Classes | Values:
    """What the ensemble, and with ``members`` each of its members, says by these logits (M, N, C)."""
    record = ensemble.record
    decided = ensemble.named(record.decide(logits)).tolist()
    asked = range(record.size if members else 0)
    names = ensemble.members
    alone = [ensemble.named(decisions(logits[m], record.kind)).tolist() for m in asked]
    if record.kind == "regression":
        return Values(
            answers=[
                Value(decision=value, members=[MemberValue(name=names[m], decision=alone[m][n]) for m in asked] or None)
                for n, value in enumerate(decided)
            ]
        )
    together = _by_label(ensemble, ensemble.probabilities(logits))
    # As they enter the ensemble's: at the member's temperature, where it has one.
    votes = soft_votes(logits, record.kind, record.choice.temperatures)
    sure = [_by_label(ensemble, class_probabilities(votes[m], record.kind)) for m in asked]
    return Classes(
        answers=[
            Class(
                decision=label,
                probabilities=together[n],
                members=[MemberClass(name=names[m], decision=alone[m][n], probabilities=sure[m][n]) for m in asked]
                or None,
            )
            for n, label in enumerate(decided)
        ]
    )


def _by_label(ensemble: Ensemble, probabilities: np.ndarray) -> list[dict[str, float]]:
    """(N, classes) as a mapping for each text."""
    # Clipped, for rounding may leave one beyond what is promised.
    return [dict(zip(ensemble.labels, row, strict=True)) for row in probabilities.clip(0, 1).tolist()]
