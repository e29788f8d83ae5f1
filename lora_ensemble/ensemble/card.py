"""The model card of what is exported: what it is, how good it honestly is, what it is made of and not meant for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_ensemble import __version__
from lora_ensemble.dicor import record
from lora_ensemble.dicor.table import decides, offsets
from lora_ensemble.ensemble.sources import Base
from lora_ensemble.pool import MemberRecord
from lora_ensemble.tasks import Task

CARD = "README.md"
SIGNED = "lora-ensemble export"
"""Stands in every card: a folder whose card lacks it is never overwritten."""
_HUB = {
    "ensemble": ("lora-ensemble", ["lora", "ensemble", "peft"]),
    "peft": ("peft", ["lora", "lora-ensemble"]),
    "merged": ("transformers", ["lora", "lora-ensemble"]),
}
"""The hub's name for the library that loads it, and its tags."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in an exported folder."""

    form: Literal["ensemble", "peft", "merged"]
    task: Task
    columns: list[str]  # what it reads; empty where that is not known
    bases: list[Base]
    members: list[MemberRecord]
    max_length: int  # tokens after which it cuts a text
    ensemble: record.Ensemble | None = None  # that of the members, in their order; None: there is one member
    with_base: bool = False
    with_examples: bool = False


def write_card(folder: Path, name: str, contents: Contents) -> None:
    """Write the card of what is in ``folder``, which will be called ``name``."""
    from huggingface_hub import ModelCard, ModelCardData

    library, tags = _HUB[contents.form]
    ensemble, members = contents.ensemble, contents.members
    results = _results(contents)
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-classification",
        tags=tags,
        base_model=[base.name for base in contents.bases if base.on_hub] or None,  # the hub takes its own names only
        model_name=name if results else None,
        eval_results=results,
    )
    versions = {", ".join(f"{k} {v}" for k, v in sorted(r.versions.items())) for r in members if r.versions}
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        **vars(contents),
        name=name,
        rows=ensemble.rows() if ensemble else [],
        score=contents.task.score_name,
        decides=decides,
        offsets=offsets,
        train=sorted({r.train_fingerprint for r in members if r.train_fingerprint}),
        trained_with=sorted(versions),
        signed=SIGNED,
        version=__version__,
    )
    (folder / CARD).write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def _results(contents: Contents) -> list[Any] | None:
    """The honest estimate as the hub lists it; in-sample figures flatter, and are for the page alone."""
    from huggingface_hub import EvalResult

    task, estimate = contents.task, contents.ensemble.estimate if contents.ensemble else {}
    if (honest := estimate.get("honest")) is None:
        return None
    interval = f"{estimate['level']:.0%} interval {honest['low']:.4f} to {honest['high']:.4f}"
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=task.name,
            dataset_name=task.name,
            dataset_split="dev",
            metric_type="pearsonr" if task.kind == "regression" else "accuracy",
            metric_name=f"{task.score_name}, honest estimate ({interval})",
            metric_value=round(honest["value"], 4),
        )
    ]
