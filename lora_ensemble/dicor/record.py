"""``dicor.json``: which members make an ensemble, how they are combined, and what they were chosen from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, get_args

import numpy as np

from lora_ensemble import __version__
from lora_ensemble.dicor.choose.combine import Choice, decide
from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.dicor.compare import Comparison
from lora_ensemble.dicor.estimate.honest import Estimate
from lora_ensemble.dicor.estimate.interval import LEVEL, Interval
from lora_ensemble.dicor.members import Members
from lora_ensemble.errors import UserError
from lora_ensemble.pool import check_name, logits_file
from lora_ensemble.tasks import Kind, check_task_name

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """One member of the ensemble."""

    name: str
    rank: int | None
    scaling: float | None
    targets: str | None
    score: float
    """On dev, recomputed from its logits."""
    weight: float
    """Its part in the mean, of sum 1; a vote for the majority."""
    temperature: float | None
    """What its logits are divided by before probabilities are taken; None: they are not."""
    mean_similarity: float | None
    """To the members before it; None for the first, and where the method does not look at similarities."""
    similarities: list[float]
    """To each member before it."""
    dev_logits: str
    """Checksum of the dev.logits.npy that it was chosen by; another one means that it was trained again since."""


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The content of ``dicor.json``, keys in this order."""

    version: str
    """Of the program that wrote it."""
    task: str
    kind: Kind
    labels: list[str]
    method: str
    settings: dict[str, Any]
    """The method's parameters."""
    strategy: Strategy
    size: int
    members: list[Chosen]
    """In the order of choice."""
    estimate: dict[str, Any]
    """Of the ensemble: see ``figures``."""
    best: dict[str, Any]
    """The single best member: its name and figures."""
    omni: dict[str, Any]
    """All members considered: their number, how they are combined, and figures."""
    folds: int
    repeats: int
    """How the estimates were made; 0 repeats: too few examples for one."""
    considered: int
    """M: the finished members of the pool that have a score, each once."""
    left_out: dict[str, str]
    """Name to reason of members that were not considered because they are not finished."""
    notices: list[str]
    """What else was left out, or is to be known of the members."""
    examples: str
    """Fingerprint of the dev examples."""
    pool: str
    """Path of the pool, relative to the folder of this file."""
    scale: float = 1.0
    """Of the logarithm of the weighted mean's probabilities, where there are ``offsets``; old records have neither."""
    offsets: list[float] | None = None
    """Of the classes, added to it after that; None: the mean decides as it is."""

    @property
    def choice(self) -> Choice:
        """What was chosen, members counted as they stand in ``members``."""
        degrees = [m.temperature for m in self.members]
        return Choice(
            members=list(range(self.size)),
            strategy=self.strategy,
            weights=np.array([m.weight for m in self.members]) if self.strategy == "weighted" else None,
            temperatures=None if all(t is None for t in degrees) else np.array([t or 1.0 for t in degrees]),
            scale=self.scale,
            offsets=None if self.offsets is None else np.array(self.offsets),
        )

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """What its members' logits (M, N, C), in the order of ``members``, decide together: (N,), as
        ``tasks.decisions``."""
        names, ranks = [m.name for m in self.members], [m.rank for m in self.members]
        return decide(Members(logits, self.kind, names, ranks, np.array([m.score for m in self.members])), self.choice)

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1, allow_nan=False) + "\n"


def figures(one: Estimate) -> dict[str, Any]:
    """What is known of one method's choice; a number is None where it is undefined or cannot be estimated.

    ``in_sample`` score on dev; ``honest`` score and its interval from ``low`` to ``high`` at ``level``; ``at_part``:
    the score on what was held out, before it is corrected for choosing on a part; ``optimism``;
    ``to_best`` and ``to_omni``: the honest difference, its interval, and whether it is ``beyond_noise``.
    """

    def span(interval: Interval | None) -> dict[str, Any] | None:
        if interval is None:
            return None
        return {"value": interval.value, "low": interval.low, "high": interval.high}

    def difference(interval: Interval | None) -> dict[str, Any] | None:
        found = span(interval)
        return None if found is None or interval is None else {**found, "beyond_noise": interval.beyond_noise}

    undefined = math.isnan(one.in_sample)
    return {
        "in_sample": None if undefined else one.in_sample,
        "honest": span(one.honest),
        "level": LEVEL,
        "at_part": one.at_part,
        "optimism": None if undefined else one.optimism,
        "to_best": difference(one.against_best),
        "to_omni": difference(one.against_omni),
    }


def make(comparison: Comparison, method: str, *, folder: Path) -> Ensemble:
    """The record of what ``method`` chose, for a file in ``folder``."""
    task_pool, found = comparison.task_pool, comparison.estimates
    one = found.of[method]
    size = len(one.names)
    weights = [1 / size] * size if one.choice.weights is None else one.choice.weights.tolist()
    temperatures = [None] * size if one.choice.temperatures is None else one.choice.temperatures.tolist()
    chosen = []
    for i, name in enumerate(one.names):
        record = task_pool.record(name)
        similarities = one.choice.similarities[i] if one.choice.similarities else []
        chosen.append(
            Chosen(
                name=name,
                rank=record.rank,
                scaling=record.scaling,
                targets=record.targets,
                score=found.scores[name],
                weight=weights[i],
                temperature=temperatures[i],
                mean_similarity=float(np.mean(similarities)) if similarities else None,
                similarities=similarities,
                dev_logits=record.files[logits_file("dev")],
            )
        )
    omni = found.of["omni"]
    return Ensemble(
        version=__version__,
        task=task_pool.name,
        kind=task_pool.kind,
        labels=task_pool.labels,
        method=method,
        settings=comparison.methods[method].get_params(),
        strategy=one.choice.strategy,
        size=size,
        members=chosen,
        estimate=figures(one),
        best={"name": found.of["best"].names[0], **figures(found.of["best"])},
        omni={"members": len(omni.names), "strategy": omni.choice.strategy, **figures(omni)},
        folds=found.folds,
        repeats=found.repeats,
        considered=len(omni.names),
        left_out=task_pool.left_out,
        notices=found.notices,
        examples=task_pool.members[0].examples["dev"],
        pool=os.path.relpath(task_pool.pool.resolve(), folder.resolve()),
        scale=one.choice.scale,
        offsets=None if one.choice.offsets is None else one.choice.offsets.tolist(),
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
        ensemble = Ensemble(**{**raw, "members": [Chosen(**m) for m in raw["members"]]})
        _check(ensemble)
    except (TypeError, KeyError, ValueError) as e:
        why = f"lacks {e}" if isinstance(e, KeyError) else str(e).replace("__init__()", "record")
        raise UserError(f"{path}: not a whole record of dicor select ({why}); select again") from e
    return ensemble


def _check(ensemble: Ensemble) -> None:
    """``ValueError`` where a value that ``apply`` relies on cannot be right."""
    for key, choices in (("kind", Kind), ("strategy", Strategy)):
        if getattr(ensemble, key) not in get_args(choices):
            raise ValueError(f"{key} is {getattr(ensemble, key)!r}; expected one of {', '.join(get_args(choices))}")
    for key in ("task", "pool", "examples"):
        if not isinstance(getattr(ensemble, key), str):
            raise ValueError(f"{key} is {getattr(ensemble, key)!r}; expected text")
    try:
        check_task_name(ensemble.task)
        for name in (ensemble.examples, *(member.name for member in ensemble.members)):
            check_name(name)
    except UserError as e:
        raise ValueError(str(e)) from e
    labels = ensemble.labels
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels is {labels!r}; expected a list of texts")
    if ensemble.kind == "multiclass" and len(labels) < 2:
        raise ValueError(f"labels is {labels!r}; multiclass needs them all")
    if not _finite(ensemble.scale):
        raise ValueError(f"scale is {ensemble.scale!r}; expected a number")
    if (offsets := ensemble.offsets) is not None:
        if ensemble.kind == "regression" or ensemble.strategy != "weighted":
            raise ValueError("offsets are for a classifier of strategy weighted")
        classes = 2 if ensemble.kind == "binary" else len(labels)
        if not isinstance(offsets, list) or len(offsets) != classes or not all(_finite(b) for b in offsets):
            raise ValueError(f"offsets is {offsets!r}; expected {classes} numbers, one for each class")
    if not ensemble.members or ensemble.size != len(ensemble.members):
        raise ValueError(f"size is {ensemble.size!r}, but there are {len(ensemble.members)} members")
    if len({member.name for member in ensemble.members}) < ensemble.size:
        raise ValueError("a member is there twice")
    for member in ensemble.members:
        if not isinstance(member.score, int | float) or not isinstance(member.rank, int | None):
            raise ValueError(f"member {member.name}: score is {member.score!r}, rank is {member.rank!r}")
        for key, value in (("weight", member.weight), ("temperature", member.temperature)):
            right = (value is None and key == "temperature") or (isinstance(value, int | float) and value > 0)
            if not right:
                raise ValueError(f"member {member.name}: {key} is {value!r}; expected a number above 0")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[TextIO]:
    """Open a file for writing that appears under its name only when all went well.

    Opened before the work, it tells at once that a path cannot be written (``UserError``) and not after it.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    special = path.exists() and not path.is_file()  # /dev/stdout, a pipe: nothing to replace
    target = path if special else path.resolve()  # what a symbolic link points to is replaced, not the link
    beside = target if special else target.parent / f".{target.name}.{os.getpid()}"
    if not special and target.exists() and not os.access(target, os.W_OK):
        raise UserError(f"{path}: cannot be written: the file is there and read-only")
    try:
        f = open(beside, "w", encoding="utf-8", newline="\n")  # noqa: SIM115  (closed below)
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}; give a file in a folder that exists") from e
    try:
        with f:
            yield f
        if not special:
            os.replace(beside, target)
    finally:
        if not special:
            beside.unlink(missing_ok=True)
