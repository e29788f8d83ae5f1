"""Memory: what the probe foretells against what a run takes; a plan that must fit; and memory that runs out in mid-run.

A CPU has no memory that can be limited for a test: there ``peak_bytes`` counts what torch allocates, the limit is only
said to the plan, and the failure is an error raised where memory would run out.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import torch

from gpu.exact import row
from gpu.setting import Setting
from lora_ensemble import pool
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.pool_writer import PoolWriter
from lora_ensemble.train.records import PoolOptions, PoolRecords
from lora_ensemble.train.restart import BankTrainer, RunCheckpoint
from lora_ensemble.train.runs import memory, probe
from lora_ensemble.train.runs.banks import BankRun
from lora_ensemble.train.runs.memory import Need, peak_bytes, usable_memory
from lora_ensemble.train.runs.plan import FILE as PLAN
from sides import OUR_PRECISION
from workload import Workload

_USED = 0.9
"""Share of a GPU's free memory that a plan uses (``memory.py``)."""
_LEAST = 0.5
"""What a run takes may be so little of what was foretold: the probe looks at the largest batches alone."""


def foretold(setting: Setting) -> list[dict[str, Any]]:
    """A trial of one member and of two, and what a bank of many then takes in the Trainer, validation included."""
    members, steps = setting.size(64, 3), setting.size(20, 4)
    work = setting.workload("random:bert-base", steps=steps)
    torch.set_num_threads(work.threads)
    data, module = work.data(), work.module(work.members(members))
    trainer = pl.Trainer(**_settings(work), callbacks=[], enable_checkpointing=False)
    need, device = _need(module, data, trainer), trainer.strategy.root_device
    usable = usable_memory(device)
    # On a CPU the weights are there before the run is measured.
    there = module.bank.weights.nbytes if work.device == "cpu" else 0
    taken = there + peak_bytes(lambda: trainer.fit(module, datamodule=data), device)
    found = {"members": members, "each": need.each, "shared": need.shared, "usable": usable}
    said = {"foretold": need.of(members), "taken": taken}
    return [{**found, **said, "agrees": _LEAST * said["foretold"] <= taken <= said["foretold"] / _USED}]


def _need(module: BankModule, data: BankData, trainer: pl.Trainer) -> Need:
    """The line through trials of two members and of three, as the plan draws it, of training or evaluation."""
    data.trainer = trainer
    trial = probe.Trial(module, data, trainer)
    points = [trial.peaks(list(range(count))) for count in (2, 3)]
    needs = [Need.through([(2, points[0][phase]), (3, points[1][phase])]) for phase in points[0]]
    return max(needs, key=lambda need: need.of(len(module.members)))


def planned(setting: Setting) -> list[dict[str, Any]]:
    """With memory for half of the members: the plan has several banks, and none of them runs out of it."""
    members = setting.size(32, 4)
    work = setting.workload("random:minilm", steps=setting.size(20, 4))
    torch.set_num_threads(work.threads)
    data, module = work.data(), work.module(work.members(members))
    need = _need(module, data, pl.Trainer(**_settings(work), callbacks=[], enable_checkpointing=False))
    free = need.of(members // 2 + 1) / _USED
    run = _Run(setting, work, data, module, "planned")
    with _limited(work.device, free):
        found = run.fit("auto", free=int(_USED * free))
    sizes = [len(bank["members"]) for bank in found["banks"]]
    whole = len(sizes) > 1 and not found["splits"] and len(run.logits()) == members
    return [{"members": members, "free": free, "banks": sizes, "splits": found["splits"], "agrees": whole}]


@contextlib.contextmanager
def _limited(device: str, free: float) -> Iterator[None]:
    """Torch gets no more than so many bytes beyond what it holds."""
    if device != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + free) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def failure(setting: Setting) -> list[dict[str, Any]]:
    """Memory that runs out in the second epoch: the bank is split, all members are trained to the end, and say what
    they say without the failure. Dropout is off, for its masks are drawn for a bank as a whole."""
    members, steps = setting.size(8, 4), setting.size(12, 4)
    common: dict[str, Any] = {"precision": "32", "head_dropout": 0.0, "encoder_dropout": 0.0, "lr": 1e-3}
    work = setting.workload("random:minilm", steps=steps, **common)
    torch.set_num_threads(work.threads)
    said, found = [], {}
    for name, at in (("undisturbed", None), ("disturbed", (1, steps // 2))):
        run = _Run(setting, work, work.data(), work.module(work.members(members)), name, at)
        found = run.fit(None)
        said.append(run.logits())
    same = sorted(said[0]) == sorted(said[1]) and len(said[0]) == members
    a, b = (np.stack([x[name] for name in sorted(said[0])]) if same else np.full((2, 1), math.nan) for x in said)
    largest = float(np.abs(a).max())
    check = row(
        "",
        "32",
        float(np.abs(b - a).max()),
        1e-3 * largest,
        "0.001 of the largest",
        float(np.abs(np.roll(a, 1, 0) - a).max()),
    )
    sizes = [len(bank["members"]) for bank in found["banks"]]
    split = len(sizes) > 1 and bool(found["splits"]) and all(bank["finished"] for bank in found["banks"])
    return [
        {
            **check,
            "members": members,
            "banks": sizes,
            "splits": found["splits"],
            "real": work.device == "cuda",
            "agrees": check["agrees"] and split,
        }
    ]


class _RunsOut(pl.Callback):
    """Lets memory run out once, in the step ``at`` (epoch, batch); afterwards there is as much as before."""

    def __init__(self, at: tuple[int, int] | None) -> None:
        self._at = at

    def _due(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        return (trainer.current_epoch, batch_idx) == self._at

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on torch gets no byte that it does not hold."""
        self._batch = batch_idx
        if self._due(trainer, batch_idx) and trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: torch.Tensor) -> None:
        """On a CPU, the error itself."""
        if self._due(trainer, self._batch) and trainer.strategy.root_device.type == "cpu":
            self._at = None
            raise torch.OutOfMemoryError("out of memory, injected")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """It is given back."""
        self._at = None
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)


class _Run:
    """A :class:`BankRun` as the command line makes one, but for loggers."""

    def __init__(
        self,
        setting: Setting,
        work: Workload,
        data: BankData,
        module: BankModule,
        name: str,
        fails: tuple[int, int] | None = None,
    ) -> None:
        self.work, self.data, self.module = work, data, module
        self.folder = setting.folder / name
        self._fails = _RunsOut(fails)

    def _trainer(self, folder: Path, resumed: bool) -> pl.Trainer:
        options = PoolOptions(str(self.folder / "pool"))
        writer = PoolWriter(PoolRecords(options, self.folder.name, resumed=resumed), summarise=False)
        return BankTrainer(**_settings(self.work, epochs=2), callbacks=[writer, self._fails, RunCheckpoint(folder)])

    def fit(self, size: Any, *, free: int | None = None) -> dict[str, Any]:
        """Train; returns the plan as it is at the end. ``free``: what the plan is told that it may use."""
        folder = self.folder / "checkpoint"
        run = BankRun(
            self.module,
            self.data,
            self._trainer(folder, False),
            self._trainer,
            run_dir=self.folder,
            size=size,
            keep=True,
        )
        told = patch.object(memory, "usable_memory", lambda device: free) if free else contextlib.nullcontext()
        with told:
            run.fit(None, True)
        plan: dict[str, Any] = json.loads((self.folder / PLAN).read_text())
        return plan

    def logits(self) -> dict[str, np.ndarray]:
        """What the finished members say of dev, by name."""
        found = pool.TaskPool(self.folder / "pool", self.work.task.name)
        return {r.name: found.logits(r.name) for r in found.members if r.finished}


def _settings(work: Workload, epochs: int = 1) -> dict[str, Any]:
    return {
        "max_epochs": epochs,
        "accelerator": "gpu" if work.device == "cuda" else "cpu",
        "devices": 1,
        "precision": OUR_PRECISION[work.precision],
        "default_root_dir": work.root,
        "logger": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
