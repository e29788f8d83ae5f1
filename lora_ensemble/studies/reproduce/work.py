"""What a part will train, read from its configuration files, and about how long that takes here.

A few steps are timed, the rest is counting. torch is loaded by ``measure`` alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_ensemble.errors import UserError
from lora_ensemble.studies.reproduce.papers import Part, Scale

if TYPE_CHECKING:
    from lora_ensemble.train.data import BankData

BATCH = 8
MOST = 20
"""Times the configured epochs that a member with patience may take."""
_MEMBERS, _STEPS, _SAMPLE = 4, 3, 512
_FULL = 2.5
"""Times a LoRA member's: gradients and AdamW for all weights, which no other member shares. About, on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much a part trains."""

    members: int
    heads_only: int  # members of these whose encoder stays as it is, and is run once
    full: bool  # whether the whole encoder is trained
    epochs: int
    steps_per_epoch: int | None  # None: as many as the longest task takes
    learning_rates: list[float]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast this machine is, and how long the examples are."""

    device: str
    seconds: float  # of training one member on one token
    tokens: dict[str, float]  # task to mean tokens of an example


def config_folder() -> Path:
    """The folder ``configs``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "oyeniyi.yaml").is_file():
            return folder
    raise UserError(f"{package.parent / 'configs'}: the configurations are missing; install lora-ensemble again")


def config_files(part: Part, scale: Scale) -> list[Path]:
    """The files of a part, later ones win."""
    return [config_folder() / name for name in (part.config, part.small)[: 1 + (scale == "small")]]


def settings_of(part: Part, scale: Scale, patience: int | None = None) -> dict[str, dict[str, Any]]:
    """A part's sections ``data``, ``model`` and ``trainer``, one file on top of the other.

    With ``patience`` each member has it, and MOST times as many epochs to stop improving in.
    """
    merged: dict[str, dict[str, Any]] = {"data": {}, "model": {}, "trainer": {}}
    for file in config_files(part, scale):
        for section, values in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            merged[section].update(values)
    model, trainer = merged["model"], merged["trainer"]
    model["members"] = [{**entry, "lr": float(entry["lr"])} for entry in model["members"]]  # PyYAML reads 1e-5 as text
    if patience:
        model["members"] = [{**entry, "patience": patience} for entry in model["members"]]
        trainer["max_epochs"] *= MOST
    return merged


def work_of(part: Part, scale: Scale, patience: int | None = None) -> Work:
    """What a part trains, at most where members have patience."""
    merged = settings_of(part, scale, patience)
    entries = merged["model"]["members"]
    counts = [math.prod(len(v) for v in entry.values() if isinstance(v, list)) for entry in entries]
    heads = [entry.get("targets") in ("none", "pooler") for entry in entries]
    return Work(
        members=sum(counts),
        heads_only=sum(n for n, head in zip(counts, heads, strict=True) if head),
        full=merged["model"].get("finetune") == "full",
        epochs=merged["trainer"]["max_epochs"],
        steps_per_epoch=merged["data"].get("steps_per_epoch"),
        learning_rates=sorted({entry["lr"] for entry in entries}),
    )


def measure(data: BankData, *, precision: str, device: str) -> Speed:
    """Train a small bank for a few steps on data that were read."""
    import torch
    from lightning.fabric.utilities import move_data_to_device

    from lora_ensemble.bank.lora import Member
    from lora_ensemble.bank.optim import BankAdamW
    from lora_ensemble.train.module import BankModule
    from lora_ensemble.train.runs.probe import train_step

    module = BankModule(data.tasks, data.base_model, members=(Member(rank=8, seed=list(range(_MEMBERS))),)).to(device)
    optimizer = BankAdamW(module.bank.weights, module.bank.rates)
    train, times = data.splits["train"], []
    for _, batch in zip(range(_STEPS + 1), data.train_dataloader(), strict=False):
        on_device = move_data_to_device(batch, device)
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled="bf16" in precision):
            train_step(module, optimizer, on_device)
        if device == "cuda":
            torch.cuda.synchronize()
        tokens = sum(int(train[n].lengths[b["rows"]].sum()) for n, b in batch.items())
        times.append((time.perf_counter() - started) / (tokens * _MEMBERS))
    return Speed(
        device=torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
        seconds=min(times[1:]),  # the first one pays for what later ones find done
        tokens={n: float(train[n].lengths[:_SAMPLE].mean()) for n in train},
    )


def steps(work: Work, tasks: tuple[str, ...], examples: Mapping[str, tuple[int, int]]) -> int:
    """Training steps of a part."""
    return work.epochs * (work.steps_per_epoch or max(-(-examples[t][0] // BATCH) for t in tasks))


def seconds(work: Work, tasks: tuple[str, ...], examples: Mapping[str, tuple[int, int]], speed: Speed) -> float:
    """About how long a part takes: training, and a dev evaluation after each epoch at a third of its price a token.

    ``examples``: task to how many train and dev have.
    """
    trained = steps(work, tasks, examples) * BATCH * sum(speed.tokens[t] for t in tasks)
    dev = sum(examples[t][1] * speed.tokens[t] for t in tasks)
    cost = (work.members - work.heads_only) * (trained * (_FULL if work.full else 1) + work.epochs * dev / 3)
    if work.heads_only:  # the encoder runs once over all of it
        cost += sum(sum(examples[t]) * speed.tokens[t] for t in tasks) / 3
    return cost * speed.seconds
