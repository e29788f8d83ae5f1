"""What a part will train, read from its configuration files without starting anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_ensemble.errors import UserError
from lora_ensemble.studies.reproduce.papers import Part, Scale


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much a part trains."""

    members: int
    heads_only: int
    """Members of these whose encoder stays as it is, and is run once."""
    full: bool
    """Whether the whole encoder is trained."""
    epochs: int
    steps_per_epoch: int | None
    """None: as many as the longest task takes."""
    learning_rates: list[float]


def config_folder() -> Path:
    """The folder ``configs``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "oyeniyi.yaml").is_file():
            return folder
    raise UserError(f"{package.parent / 'configs'}: the configurations are missing; install lora-ensemble again")


def config_files(part: Part, scale: Scale) -> list[Path]:
    """The files of a part, later ones win."""
    folder = config_folder()
    return [folder / part.config, *([folder / part.small] if scale == "small" else [])]


def work_of(part: Part, scale: Scale) -> Work:
    """What a part trains."""
    merged: dict[str, dict[str, Any]] = {"data": {}, "model": {}, "trainer": {}}
    for file in config_files(part, scale):
        for section, values in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            merged[section].update(values)
    entries = merged["model"]["members"]
    counts = [math.prod(len(v) for v in entry.values() if isinstance(v, list)) for entry in entries]
    rates = [entry["lr"] for entry in entries]
    return Work(
        members=sum(counts),
        heads_only=sum(
            n for n, entry in zip(counts, entries, strict=True) if entry.get("targets") in ("none", "pooler")
        ),
        full=merged["model"].get("finetune") == "full",
        epochs=merged["trainer"]["max_epochs"],
        steps_per_epoch=merged["data"].get("steps_per_epoch"),
        learning_rates=sorted({float(rate) for rate in rates}),
    )
