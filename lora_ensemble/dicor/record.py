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

from lora_ensemble import __version__
from lora_ensemble.dicor.compare import Comparison
from lora_ensemble.dicor.settings import Settings, Similarity, Strategy
from lora_ensemble.errors import UserError
from lora_ensemble.pool import TaskPool, check_name, logits_file
from lora_ensemble.tasks import Kind

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """One member of the ensemble."""

    name: str
    rank: int | None
    scaling: float | None
    targets: str | None
    score: float
    """On dev, recomputed from its logits."""
    mean_similarity: float | None
    """To the members before it; None for the first."""
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
    strategy: Strategy
    similarity: Similarity
    size: int
    top_k: int
    members: list[Chosen]
    """In the order of choice."""
    score: float | None
    """Dev score of the ensemble; like the next two in-sample, and None where undefined."""
    best: dict[str, Any]
    """The single best member: its name and dev score."""
    omni: dict[str, Any]
    """All members considered, combined with the same strategy: their number and dev score."""
    considered: int
    """M: the finished members of the pool."""
    left_out: dict[str, str]
    """Name to reason of members that were not considered."""
    examples: str
    """Fingerprint of the dev examples."""
    pool: str
    """Path of the pool, relative to the folder of this file."""

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1, allow_nan=False) + "\n"


def make(task_pool: TaskPool, comparison: Comparison, settings: Settings, *, folder: Path) -> Ensemble:
    """The record of a selection from ``task_pool``, for a file in ``folder``."""
    selection, records = comparison.selection, task_pool.members
    chosen = [
        Chosen(
            name=records[m].name,
            rank=records[m].rank,
            scaling=records[m].scaling,
            targets=records[m].targets,
            score=float(selection.scores[m]),
            mean_similarity=mean_similarity,
            similarities=similarities,
            dev_logits=records[m].files[logits_file("dev")],
        )
        for m, mean_similarity, similarities in zip(
            selection.chosen, selection.mean_similarity, selection.similarities, strict=True
        )
    ]
    scores = {system: None if math.isnan(s) else s for system, s in comparison.scores.items()}
    return Ensemble(
        version=__version__,
        task=task_pool.name,
        kind=task_pool.kind,
        labels=task_pool.labels,
        strategy=settings.strategy,
        similarity=settings.similarity,
        size=settings.size,
        top_k=settings.top_k,
        members=chosen,
        score=scores["DiCor"],
        best={"name": records[comparison.best].name, "score": scores["single best"]},
        omni={"members": len(records), "score": scores["Omni"]},
        considered=len(records),
        left_out=task_pool.left_out,
        examples=records[0].examples["dev"],
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
        ensemble = Ensemble(**{**raw, "members": [Chosen(**m) for m in raw["members"]]})
        _check(ensemble)
    except (TypeError, KeyError, ValueError) as e:
        why = f"lacks {e}" if isinstance(e, KeyError) else str(e).replace("__init__()", "record")
        raise UserError(f"{path}: not a whole record of dicor select ({why}); select again") from e
    return ensemble


def _check(ensemble: Ensemble) -> None:
    """``ValueError`` where a value that ``apply`` relies on cannot be right."""
    for key, choices in (("kind", Kind), ("strategy", Strategy), ("similarity", Similarity)):
        if getattr(ensemble, key) not in get_args(choices):
            raise ValueError(f"{key} is {getattr(ensemble, key)!r}; expected one of {', '.join(get_args(choices))}")
    for key in ("task", "pool", "examples"):
        if not isinstance(getattr(ensemble, key), str):
            raise ValueError(f"{key} is {getattr(ensemble, key)!r}; expected text")
    labels = ensemble.labels
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels is {labels!r}; expected a list of texts")
    if ensemble.kind == "multiclass" and len(labels) < 2:
        raise ValueError(f"labels is {labels!r}; multiclass needs them all")
    if not ensemble.members or ensemble.size != len(ensemble.members):
        raise ValueError(f"size is {ensemble.size!r}, but there are {len(ensemble.members)} members")
    if len({member.name for member in ensemble.members}) < ensemble.size:
        raise ValueError("a member is there twice")
    for member in ensemble.members:
        try:
            check_name(member.name)
        except UserError as e:
            raise ValueError(str(e)) from e
        if not isinstance(member.score, int | float) or not isinstance(member.rank, int | None):
            raise ValueError(f"member {member.name}: score is {member.score!r}, rank is {member.rank!r}")


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
