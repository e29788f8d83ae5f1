"""``dicor.json``: which members make an ensemble, how they are combined, and what they were chosen from."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lora_ensemble import __version__
from lora_ensemble.dicor.choose.combine import Choice, decide, of_labels, probabilities, said
from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.dicor.compare import Comparison
from lora_ensemble.dicor.estimate.honest import Estimate
from lora_ensemble.dicor.estimate.interval import LEVEL, Interval
from lora_ensemble.dicor.members import Members
from lora_ensemble.errors import UserError
from lora_ensemble.pool import MemberRecord, check_name, logits_file
from lora_ensemble.scores import by_example, scored
from lora_ensemble.tasks import OOF, SCORES, Kind, ScoreName, Task, check_score, check_task_name

SCHEMA = 2
_KEYS = [
    *("version", "task", "kind", "labels", "method", "settings", "strategy", "size", "members", "estimate", "best"),
    *("omni", "folds", "repeats", "considered", "left_out", "notices", "examples", "pool", "scale", "offsets", "score"),
    "chosen_on",
]
"""Of the file after its schema, in this order; old files have neither scale nor offsets, nor a score's name, nor say
what was chosen on: it was dev."""


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The content of ``dicor.json``."""

    version: str  # of the program that wrote it
    task: str
    kind: Kind
    score: ScoreName  # by which it was chosen
    labels: list[str]
    method: str
    settings: dict[str, Any]  # the method's parameters
    members: list[MemberRecord]
    """In the order of choice, as they were then; the score is that on what was chosen on. Of members that were read
    only what the file says is known: see ``rows``."""
    choice: Choice  # how they decide together; it counts them as they stand in ``members``
    estimate: dict[str, Any]  # of the ensemble: see ``figures``
    best: dict[str, Any]  # the single best member: its name and figures
    omni: dict[str, Any]  # all members considered: their number, how they are combined, and figures
    folds: int
    repeats: int  # how the estimates were made; 0 repeats: too few examples for one
    considered: int  # M: the finished members of the pool that have a score, each once
    left_out: dict[str, str]  # name to reason of members that were not considered because they are not finished
    notices: list[str]  # what else was left out, or is to be known of the members
    examples: str  # fingerprint of the examples that were chosen on
    chosen_on: str  # their split: dev, or oof
    pool: str  # path of the pool, relative to the folder of this file

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def strategy(self) -> Strategy:
        return self.choice.strategy

    @property
    def scale(self) -> float:
        return self.choice.scale

    @property
    def offsets(self) -> list[float] | None:
        return self.choice.moves

    def rows(self) -> list[dict[str, Any]]:
        """What the file says of each member and of its part in the choice.

        ``weight``: its part in the mean, of sum 1, or of the votes. ``temperature``: what its logits are divided by
        first, or None. ``similarities``: to each member before it, where the method looks at them. ``dev_logits``, or
        ``oof_logits``: the checksum of what it was chosen by; another one means that it was trained again since.
        """
        k, choice = self.size, self.choice
        weights = [1 / k] * k if choice.weights is None else choice.weights.tolist()
        temperatures = [None] * k if choice.temperatures is None else choice.temperatures.tolist()
        similarities = choice.similarities or [[]] * k
        return [
            {
                **{key: getattr(member, key) for key in ("name", "rank", "scaling", "targets", "score")},
                "weight": weights[i],
                "temperature": temperatures[i],
                "mean_similarity": float(np.mean(similarities[i])) if similarities[i] else None,
                "similarities": similarities[i],
                f"{self.chosen_on}_logits": member.files[logits_file(self.chosen_on)],
            }
            for i, member in enumerate(self.members)
        ]

    def described(self, text: list[str]) -> Task:
        """The task that it is of, read from these columns."""
        of_task: dict[str, Any] = {"name": self.task, "kind": self.kind, "score": self.score}
        return Task(**of_task, text=text or ["text"], label_names=self.labels)

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """What logits (M, N, C) of its members, in their order, decide together, as ``scores.decisions``."""
        chosen = self._saying(logits)
        return by_example(decide(chosen, self.choice), chosen.width)

    def probabilities(self, logits: np.ndarray, choice: Choice | None = None) -> np.ndarray:
        """Probabilities (N, classes) by logits (M, N, C), or of each label (N, L); ``choice``: to combine otherwise."""
        chosen = self._saying(logits)
        p = probabilities(chosen.logits, choice or self.choice, kind=chosen.kind)
        return by_example(p[:, 1], chosen.width) if chosen.width > 1 else p

    def scored(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """The score, on labels as examples have them, of what logits (M, N, C) say together; NaN where undefined."""
        chosen = self._saying(logits)
        one = said(chosen, self.choice)
        return float(scored(one, labels.reshape(-1), chosen.kind, self.score, width=chosen.width))

    def _saying(self, logits: np.ndarray) -> Members:
        names, ranks = [m.name for m in self.members], [m.rank for m in self.members]
        worth = SCORES[self.score].sign * np.array([m.score for m in self.members])
        return Members.of(logits, self.kind, names, ranks, worth, self.score)

    def to_json(self) -> str:
        """JSON text."""
        content = {key: self.rows() if key == "members" else getattr(self, key) for key in _KEYS}
        return json.dumps({"schema": SCHEMA, **content}, indent=1, allow_nan=False) + "\n"


def figures(estimate: Estimate) -> dict[str, Any]:
    """What is known of one method's choice; a number is None where it is undefined or cannot be estimated.

    ``in_sample`` score on dev; ``honest`` score and its interval from ``low`` to ``high`` at ``level``; ``at_part``:
    the score on what was held out, before it is corrected for choosing on a part; ``optimism``;
    ``to_best`` and ``to_omni``: the honest gain, its interval, and whether it is ``beyond_noise``. Of a score of which
    lower is better a gain and the optimism are above 0 where the score is below.
    """

    def difference(interval: Interval | None) -> dict[str, Any] | None:
        return None if interval is None else {**vars(interval), "beyond_noise": interval.beyond_noise}

    undefined = math.isnan(estimate.in_sample)
    return {
        "in_sample": None if undefined else estimate.in_sample,
        "honest": None if estimate.honest is None else vars(estimate.honest),
        "level": LEVEL,
        "at_part": estimate.at_part,
        "optimism": None if undefined else estimate.optimism,
        "to_best": difference(estimate.against_best),
        "to_omni": difference(estimate.against_omni),
    }


def make(comparison: Comparison, method: str, *, folder: Path) -> Ensemble:
    """The record of what ``method`` chose, for a file in ``folder``."""
    task_pool, estimates = comparison.task_pool, comparison.estimates
    chosen, best, omni = (estimates.of[name] for name in (method, "best", "omni"))
    return Ensemble(
        version=__version__,
        task=task_pool.name,
        kind=task_pool.kind,
        score=comparison.dev.scored_by,
        labels=task_pool.labels,
        method=method,
        settings=comparison.methods[method].get_params(),
        members=[replace(task_pool.record(name), score=estimates.scores[name]) for name in chosen.names],
        choice=replace(chosen.choice, members=list(range(len(chosen.names)))),
        estimate=figures(chosen),
        best={"name": best.names[0], **figures(best)},
        omni={"members": len(omni.names), "strategy": omni.choice.strategy, **figures(omni)},
        folds=estimates.folds,
        repeats=estimates.repeats,
        considered=len(omni.names),
        left_out=task_pool.left_out,
        notices=estimates.notices,
        examples=task_pool.members[0].examples[task_pool.split],
        chosen_on=task_pool.split,
        pool=os.path.relpath(task_pool.pool.resolve(), folder.resolve()),
    )


def read(path: Path) -> Ensemble:
    """Read ``dicor.json``; ``UserError`` where it is missing, not JSON, of another schema, or not a whole record."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        what = e.strerror if isinstance(e, OSError) else f"not JSON ({e})"
        raise UserError(f"{path}: {what}; expected the file that dicor select --output wrote") from e
    if not isinstance(raw, dict) or "schema" not in raw:
        raise UserError(f"{path}: not a record of dicor select: it has no schema; select again")
    if (schema := raw.pop("schema")) != SCHEMA:
        raise UserError(f"{path}: schema {schema!r}; this version reads schema {SCHEMA}; select again")
    try:
        raw = {"scale": 1.0, "offsets": None, "score": None, "chosen_on": "dev", **raw}
        _check(raw)
        return _ensemble_of(raw)
    except (TypeError, KeyError, ValueError, UserError) as e:
        why = f"lacks {e}" if isinstance(e, KeyError) else str(e).replace("__init__()", "record")
        raise UserError(f"{path}: not a whole record of dicor select ({why}); select again") from e


def _ensemble_of(raw: dict[str, Any]) -> Ensemble:
    """The ensemble of a file's content, which ``_check`` has seen."""
    rows, strategy, moves, split = raw.pop("members"), raw.pop("strategy"), raw.pop("offsets"), raw["chosen_on"]
    offsets = None if moves is None else np.array(moves)
    weights, degrees, similarities, checksums, _ = (
        [row.pop(key) for row in rows]
        for key in ("weight", "temperature", "similarities", f"{split}_logits", "mean_similarity")
    )
    choice = Choice(
        members=list(range(raw.pop("size"))),
        strategy=strategy,
        weights=np.array(weights) if strategy == "weighted" else None,
        temperatures=np.array([degree or 1.0 for degree in degrees]) if any(degrees) else None,
        scale=raw.pop("scale"),
        offsets=of_labels(offsets) if offsets is not None and raw["kind"] == "multilabel" else offsets,
        similarities=similarities,
    )
    task = {"task": raw["task"], "kind": raw["kind"], "labels": raw["labels"], "examples": {split: raw["examples"]}}
    members = [
        MemberRecord(**row, **task, finished=True, files={logits_file(split): checksum})
        for row, checksum in zip(rows, checksums, strict=True)
    ]
    return Ensemble(**raw, members=members, choice=choice)


def _check(raw: dict[str, Any]) -> None:
    """``ValueError``, ``KeyError`` or ``UserError`` where a value that ``apply`` relies on cannot be right."""

    def expect(right: Any, where: dict[str, Any], key: str, expected: str) -> None:
        if not right:
            who = f"member {where['name']}: " if where is not raw else ""
            raise ValueError(f"{who}{key} is {where[key]!r}; expected {expected}")

    kind, strategy, labels, offsets, rows = (raw[k] for k in ("kind", "strategy", "labels", "offsets", "members"))
    expect(kind in get_args(Kind), raw, "kind", f"one of {', '.join(get_args(Kind))}")
    expect(strategy in get_args(Strategy), raw, "strategy", f"one of {', '.join(get_args(Strategy))}")
    expect(raw["chosen_on"] in ("dev", OOF), raw, "chosen_on", f"dev or {OOF}")
    for key in ("task", "pool", "examples"):
        expect(isinstance(raw[key], str), raw, key, "text")
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    few = kind in ("multiclass", "multilabel") and len(labels) < 2
    expect(texts and not few, raw, "labels", f"texts; {kind} needs them all")
    raw["score"] = check_score(raw["score"], kind)
    expect(_is_number(raw["scale"]), raw, "scale", "a number")
    if offsets is not None:
        may_be = kind != "regression" and strategy != "majority"
        expect(may_be, raw, "offsets", "null: offsets are for a classifier's mean, not for a regression or a majority")
        classes = 2 if kind == "binary" else len(labels)
        numbers = isinstance(offsets, list) and len(offsets) == classes and all(_is_number(b) for b in offsets)
        expect(numbers, raw, "offsets", f"{classes} numbers, one for each class")
    expect(rows and raw["size"] == len(rows), raw, "size", f"the number of members, {len(rows)}")
    check_task_name(raw["task"])
    for name in (raw["examples"], *(row["name"] for row in rows)):
        check_name(name)
    if len({row["name"] for row in rows}) < len(rows):
        raise ValueError("a member is there twice")
    for row in rows:
        expect(_is_number(row["score"]), row, "score", "a number")
        expect(isinstance(row["rank"], int | None), row, "rank", "a whole number or null")
        expect(_is_number(row["weight"]) and row["weight"] > 0, row, "weight", "a number above 0")
        degree = row["temperature"]
        expect(degree is None or (_is_number(degree) and degree > 0), row, "temperature", "a number above 0, or null")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
