"""What an ensemble loses by being merged into one model, measured on examples.

Axes: N examples, C outputs of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_ensemble.dicor.interval import Interval, of_differences
from lora_ensemble.ensemble.restored import Ensemble
from lora_ensemble.ensemble.single import Single, known_columns
from lora_ensemble.errors import UserError
from lora_ensemble.families import accepts_token_types
from lora_ensemble.readers import read_split
from lora_ensemble.tasks import PRESETS, Kind, Task, decisions, pearson, score_decisions

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One model beside the ensemble that it was made of, on the same N examples."""

    file: str
    """Its name, without folders."""
    examples: int
    kind: Kind
    agreement: float
    """Share of equal decisions; of a regression, Pearson r of the two models' values; NaN where it is undefined."""
    distance: float | None
    """Mean absolute difference of the values of a regression."""
    scores: tuple[float, float] | None
    """The task's score of the ensemble and of the one model, where there are labels."""
    difference: Interval | None
    """The one model's score less the ensemble's, with its 90 % interval (paired bootstrap over examples)."""

    def sentences(self) -> list[str]:
        """The same in words."""
        n = f"on {self.examples} examples of {self.file}"
        if self.kind == "regression":
            r = "undefined" if math.isnan(self.agreement) else f"{self.agreement:.4f}"
            said = [f"{n}, Pearson r with the ensemble's values: {r}; mean absolute difference: {self.distance:.4f}"]
        else:
            said = [f"{n}, it decides as the ensemble does in {self.agreement:.2%}"]
        if self.scores is None:
            return [*said, "no labels in that file: what the differences cost was not measured"]
        name = "Pearson r" if self.kind == "regression" else "accuracy"
        line = f"{name} there: {self.scores[1]:.4f}, the ensemble's {self.scores[0]:.4f}"
        if self.difference is not None:
            d = self.difference
            line += f"; difference {d.value:+.4f} (90% interval {d.low:+.4f} to {d.high:+.4f}), "
            line += "beyond noise" if d.beyond_noise else "within noise"
        return [*said, line]


def measure(model: Any, single: Single, ensemble: Ensemble, file: Path, *, text: list[str], label: str | None) -> Loss:
    """``model`` (``plain_model(single)``) beside ``ensemble`` on the rows of a file.

    ``text``: its text columns; empty: those that the members name, or the preset's. ``label``: its label column, None
    for the preset's or "label"; a file without it has no labels. ``UserError`` where the file cannot be read so.
    """
    task = _task(ensemble, file, text=text, label=label)
    split = read_split(task, "dev", None, need_labels=False)
    texts = list(zip(*split.texts, strict=True))
    ours = decisions(plain_logits(model, single.tokenizer, split.texts, max_length=single.max_length), task.kind)
    theirs = ensemble.decision(texts)
    regression = task.kind == "regression"
    scores, difference = None, None
    if split.labels is not None:
        score = [score_decisions(decided, split.labels, task.kind) for decided in (theirs, ours)]
        if not np.isnan(score).any():
            scores = (score[0], score[1])
            held = {"one": ours[None], "ensemble": theirs[None]}
            difference = of_differences(held, [("one", "ensemble")], split.labels, task.kind)["one", "ensemble"]
    return Loss(
        file=file.name,
        examples=len(split),
        kind=task.kind,
        agreement=pearson(ours, theirs) if regression else float(np.mean(ours == theirs)),
        distance=float(np.mean(np.abs(ours - theirs))) if regression else None,
        scores=scores,
        difference=difference,
    )


def _task(ensemble: Ensemble, file: Path, *, text: list[str], label: str | None) -> Task:
    chosen = ensemble.record
    columns = text or known_columns(chosen.task, chosen.kind, ensemble.text)
    if not columns:
        raise UserError(f"{file}: the members do not say which columns they read; name them with --text")
    return Task(
        name=chosen.task,
        kind=chosen.kind,
        text=columns,
        label=label or (PRESETS[chosen.task].label if chosen.task in PRESETS else "label"),
        label_names=chosen.labels,
        dev=str(file.resolve()),
    )


@torch.inference_mode()
def plain_logits(model: Any, tokenizer: Any, columns: Sequence[Sequence[str]], *, max_length: int) -> np.ndarray:
    """(N, C) float32 logits of a transformers model on one list of N strings for each text column."""
    lengths = np.array([sum(map(len, row)) for row in zip(*columns, strict=True)])
    order = np.argsort(lengths, kind="stable")
    rows: dict[int, np.ndarray] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH].tolist()
        tokens = tokenizer(
            *([column[i] for i in batch] for column in columns),
            truncation="longest_first",
            max_length=max_length,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=accepts_token_types(model.base_model),
        )
        rows.update(zip(batch, model(**tokens).logits.float().numpy(), strict=True))
    return np.stack([rows[i] for i in range(len(order))])
