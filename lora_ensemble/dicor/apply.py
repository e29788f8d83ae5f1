"""A chosen ensemble on a split: its decisions, and the file of them. Axis: N examples of the split."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TextIO

import numpy as np

from lora_ensemble.dicor.located import chosen_records
from lora_ensemble.dicor.record import Ensemble
from lora_ensemble.errors import UserError
from lora_ensemble.pool import Examples, logits_file, member_folder, read_array, read_examples
from lora_ensemble.tasks import PRESETS, outputs_of


def predict(ensemble: Ensemble, pool: Path, split: str) -> tuple[Examples, np.ndarray, float | None]:
    """A split's examples, what the ensemble decides on them, (N,) or (N, L), and the score; None: labels are unknown.

    Only its own members are looked at. ``UserError`` naming the member that is missing, that was trained again since
    the selection, that has no logits for the split, or whose logits were damaged or belong to other examples.
    """
    records, file = chosen_records(ensemble, pool), logits_file(split)
    folders = [member_folder(pool, ensemble.task, r.name) for r in records]
    lacking = [f for f, r in zip(folders, records, strict=True) if split not in r.examples or file not in r.files]
    if lacking:
        raise UserError(
            f"{lacking[0]}: no logits for the {split} split ({len(lacking)} of {len(records)} members of the ensemble "
            f"lack them); run lora-ensemble predict first, or dicor import --split {split} for one that was imported"
        )
    fingerprint = records[0].examples[split]
    examples = read_examples(pool, ensemble.task, split, fingerprint)
    shape = (len(examples.ids), outputs_of(ensemble.kind, ensemble.labels))
    logits = []
    for folder, r in zip(folders, records, strict=True):
        if r.examples[split] != fingerprint:
            both = f"{folder} and {records[0].name} have predicted other {split} examples"
            raise UserError(f"{both}; run lora-ensemble predict for both")
        logits.append(read_array(pool, r, file))
        if logits[-1].shape != shape:
            expected = f"{shape}: the examples by the outputs of the task"
            raise UserError(f"{folder / file}: shape {logits[-1].shape}; expected {expected}")
    said = np.stack(logits)
    score = None if examples.labels is None else ensemble.scored(said, examples.labels)
    return examples, ensemble.decide(said), score


def write_predictions(f: TextIO, ensemble: Ensemble, ids: np.ndarray, decided: np.ndarray) -> None:
    """Decisions (N,) on examples ``ids`` (N,): the course's leaderboard file for its tasks, plain CSV for others.

    The former to the letter, blanks at the line's end included, a binary decision as 1.0 or 0.0. The latter has the
    task's labels. A regression's decision is its value. Of several labels, (N, L), each has a column.
    """
    if ensemble.kind == "multilabel":
        table = [[i, *row] for i, row in zip(ids.tolist(), decided.tolist(), strict=True)]
        csv.writer(f, lineterminator="\n").writerows([["id", *ensemble.labels], *table])
        return
    names = ensemble.labels or ["0", "1"]
    rows = zip(ids.tolist(), (v if ensemble.kind == "regression" else names[v] for v in decided.tolist()), strict=True)
    preset = PRESETS.get(ensemble.task)
    if preset is None or (preset.kind, preset.labels) != (ensemble.kind, ensemble.labels or preset.labels):
        csv.writer(f, lineterminator="\n").writerows([("id", "prediction"), *rows])
        return
    f.write(f"id \t {preset.leaderboard_column} \n")
    f.writelines(f"{i} , {float(v) if ensemble.kind == 'binary' else v} \n" for i, v in rows)
