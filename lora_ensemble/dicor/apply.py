"""A chosen ensemble on a split: its decisions, and the file of them.

Axes: N examples of a split, C outputs of a head, and M members of the ensemble.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from lora_ensemble.dicor.located import chosen_records
from lora_ensemble.dicor.record import Ensemble
from lora_ensemble.errors import UserError
from lora_ensemble.pool import Examples, logits_file, member_folder, read_array, read_examples
from lora_ensemble.scores import score_decisions
from lora_ensemble.tasks import PRESETS


@dataclass(frozen=True)
class Prediction:
    """Decisions (N,) of an ensemble on a split's examples; score is None where the labels are unknown."""

    examples: Examples
    decided: np.ndarray
    score: float | None


def predict(ensemble: Ensemble, pool: Path, split: str) -> Prediction:
    """What the ensemble decides on a split, from the logits in the pool.

    Only its own members are looked at. Raises ``UserError`` naming the member that is missing, that was trained again
    since the selection, that has no logits for the split, or whose logits were damaged or belong to other examples.
    """
    records = chosen_records(ensemble, pool)
    missing = [r.name for r in records if split not in r.examples or logits_file(split) not in r.files]
    if missing:
        raise UserError(
            f"{member_folder(pool, ensemble.task, missing[0])}: no logits for the {split} split ({len(missing)} of "
            f"{len(records)} members of the ensemble lack them); run lora-ensemble predict first, or dicor import "
            f"--split {split} for one that was imported"
        )
    fingerprint = records[0].examples[split]
    for r in records:
        if r.examples[split] != fingerprint:
            raise UserError(
                f"{member_folder(pool, ensemble.task, r.name)} and {records[0].name} have predicted other {split} "
                "examples; run lora-ensemble predict for both"
            )
    examples = read_examples(pool, ensemble.task, split, fingerprint)
    shape = (len(examples.ids), len(ensemble.labels) if ensemble.kind == "multiclass" else 1)
    logits = []
    for r in records:
        one = read_array(pool, r, logits_file(split))
        if one.shape != shape:
            path = member_folder(pool, ensemble.task, r.name) / logits_file(split)
            raise UserError(f"{path}: shape {one.shape}; expected {shape}: the examples by the outputs of the task")
        logits.append(one)
    decided = ensemble.decide(np.stack(logits))
    score = None if examples.labels is None else score_decisions(decided, examples.labels, ensemble.kind)
    return Prediction(examples, decided, score)


def write_predictions(f: TextIO, ensemble: Ensemble, ids: np.ndarray, decided: np.ndarray) -> None:
    """Decisions (N,) on examples ``ids`` (N,): the course's leaderboard file for its tasks, plain CSV for others.

    The former to the letter, blanks at the line's end included, a binary decision as 1.0 or 0.0. The latter has the
    task's labels. A regression's decision is its value.
    """
    names = ensemble.labels or ["0", "1"]
    rows = zip(ids.tolist(), (v if ensemble.kind == "regression" else names[v] for v in decided.tolist()), strict=True)
    preset = PRESETS.get(ensemble.task)
    if preset is None or (preset.kind, preset.labels) != (ensemble.kind, ensemble.labels or preset.labels):
        csv.writer(f, lineterminator="\n").writerows([("id", "prediction"), *rows])
        return
    f.write(f"id \t {preset.leaderboard_column} \n")
    f.writelines(f"{i} , {float(v) if ensemble.kind == 'binary' else v} \n" for i, v in rows)
