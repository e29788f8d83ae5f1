"""About how long a reproduction takes here: a few steps are timed, the rest is counting."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device

from lora_ensemble.bank.lora import Member
from lora_ensemble.bank.optim import BankAdamW
from lora_ensemble.studies.reproduce.grids import Work
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.runs.probe import train_step

_MEMBERS, _STEPS, _SAMPLE = 4, 3, 512
_FULL = 2.5
"""Times a LoRA member's: gradients and AdamW for all weights, which no other member shares. About, on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast this machine is, and how long the examples are."""

    device: str
    seconds: float
    """Of training one member on one token."""
    tokens: dict[str, float]
    """Task to mean tokens of an example."""
    examples: dict[str, tuple[int, int]]
    """Task to examples of train and dev."""


def measure(root: Path, tasks: tuple[str, ...], base_model: str, *, precision: str, device: str) -> Speed:
    """Read the data, and train a small bank for a few steps.

    ``UserError`` where data are missing or wrong, with the file and what to do.
    """
    data = BankData(base_model=base_model, root=str(root), tasks=tasks)
    data.setup("fit")
    module = BankModule(data.tasks, base_model, members=(Member(rank=8, seed=list(range(_MEMBERS))),))
    module.to(device)
    optimizer = BankAdamW(module.bank.weights, module.bank.rates)
    times, batches = [], data.train_dataloader()
    for step, batch in zip(range(_STEPS + 1), batches, strict=False):
        here = move_data_to_device(batch, device)
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled="bf16" in precision):
            train_step(module, optimizer, here)
        if device == "cuda":
            torch.cuda.synchronize()
        tokens = sum(int(data.splits["train"][n].lengths[b["rows"]].sum()) for n, b in batch.items())
        if step:  # the first one pays for what later ones find done
            times.append((time.perf_counter() - started) / (tokens * _MEMBERS))
    train, dev = data.splits["train"], data.splits["dev"]
    return Speed(
        device=torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
        seconds=min(times),
        tokens={n: float(train[n].lengths[:_SAMPLE].mean()) for n in train},
        examples={n: (len(train[n]), len(dev[n])) for n in train},
    )


def steps(work: Work, tasks: tuple[str, ...], examples: Mapping[str, tuple[int, int]], *, batch: int = 8) -> int:
    """Training steps of a part."""
    longest = max(-(-examples[t][0] // batch) for t in tasks)
    return work.epochs * (work.steps_per_epoch or longest)


def seconds(work: Work, tasks: tuple[str, ...], speed: Speed, *, batch: int = 8) -> float:
    """About how long a part takes: training, and a dev evaluation after each epoch at a third of its price a token."""
    trained = steps(work, tasks, speed.examples, batch=batch) * batch * sum(speed.tokens[t] for t in tasks)
    dev = sum(speed.examples[t][1] * speed.tokens[t] for t in tasks)
    deep = work.members - work.heads_only
    cost = deep * (trained * (_FULL if work.full else 1) + work.epochs * dev / 3)
    if work.heads_only:  # the encoder runs once over all of it
        cost += sum(sum(speed.examples[t]) * speed.tokens[t] for t in tasks) / 3
    return cost * speed.seconds
