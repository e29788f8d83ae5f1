"""Two minutes of Tolkunov's SST grid: 80 members in one bank by the Lightning Trainer, and how long all of it takes."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

import workload
from gpu.record import REPOSITORY
from gpu.setting import Setting
from lora_ensemble.bank.lora import Member
from lora_ensemble.tasks import PRESETS, Task
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule
from machine import PeakMemory, synchronize
from sides import KeepLosses

_SECONDS = 120.0
_TRAIN, _DEV = 8544, 1101  # SST's examples
_RESERVE = 10.0
"""Seconds of a row that are left to the validation after the last step."""


class _Clock(pl.Callback):
    """Stops training after so many seconds; steps and validations are timed apart."""

    def __init__(self, device: str, seconds: float, warmup: int) -> None:
        self._device, self._left, self._warmup = device, seconds, warmup
        self._done, self._since, self._began = 0, 0.0, time.perf_counter()
        self.steps, self.seconds, self.validations = 0, 0.0, list[float]()
        self.best: list[float] = []
        """The best member's dev score, at each validation."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """The first steps choose kernels, and do not count."""
        self._done += 1
        if self._done == self._warmup:
            synchronize(self._device)
            self._since = time.perf_counter()
        elif self._done > self._warmup:
            self.steps += 1
        if time.perf_counter() - self._began > self._left and self.steps:
            trainer.should_stop = True

    def _pause(self) -> None:
        synchronize(self._device)
        if self._since:
            self.seconds += time.perf_counter() - self._since
        self._since = 0.0

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Steps stand still."""
        self._pause()
        self._validation = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """And go on."""
        assert isinstance(module, BankModule)
        synchronize(self._device)
        self.validations.append(time.perf_counter() - self._validation)
        (found,) = module.evaluations["dev"].values()
        self.best.append(max(found.scores or [math.nan]))
        self._since = time.perf_counter() if self._done >= self._warmup else 0.0

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The end; where the last steps were followed by no validation, they count too."""
        self._pause()


def grid(setting: Setting) -> dict[str, Any]:
    """Train until the time is over."""
    began = time.perf_counter()
    torch.set_num_threads(setting.threads)
    config = yaml.safe_load((REPOSITORY / "configs/tolkunov/sst.yaml").read_text(encoding="utf-8"))
    entries = tuple(Member(**entry) for entry in config["model"]["members"])
    if setting.tiny:
        entries = (Member(rank=[1, 2], scaling=[1.0, 5.0]),)
    base = str(setting.minilm or setting.model("random:minilm"))
    root, task = _data(setting, base)
    data = BankData(base_model=base, root=str(root), tasks=(task,))
    data.setup("fit")
    peak = PeakMemory(setting.device)
    module = BankModule([task], base, entries)
    wanted = min(setting.size(_SECONDS, 3.0), setting.left - (time.perf_counter() - began) - _RESERVE)
    clock, losses = _Clock(setting.device, wanted, setting.size(20, 1)), KeepLosses()
    trainer = pl.Trainer(
        max_epochs=config["trainer"]["max_epochs"],
        accelerator="gpu" if setting.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        default_root_dir=setting.folder,
        logger=losses,
        log_every_n_steps=setting.size(20, 1),
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[clock],
    )
    trainer.fit(module, datamodule=data)
    curves = [curve for curve in losses.curves.values() if curve]
    steps, validation = len(data.train_dataloader()), sum(clock.validations) / max(1, len(clock.validations))
    step = clock.seconds / clock.steps
    return {
        "members": len(module.members),
        "encoder": "all-MiniLM-L6-v2" if setting.minilm else f"random weights of {Path(base).name}'s shape",
        "examples": "SST" if setting.root and setting.minilm else "made-up sentences as long as SST's",
        "train": len(data.splits["train"][task.name]),
        "dev": len(data.splits["dev"][task.name]),
        "steps": clock.steps,
        "step_s": step,
        "validation_s": validation,
        "peak_bytes": peak.bytes(),
        "first_loss": sum(c[0] for c in curves) / len(curves),
        "last_loss": sum(c[-1] for c in curves) / len(curves),
        "best_dev": clock.best[-1] if clock.best else math.nan,
        "epochs": trainer.max_epochs,
        "projected_s": (trainer.max_epochs or 1) * (steps * step + validation),
    }


def _data(setting: Setting, base: str) -> tuple[Path, Task]:
    """SST's files where they and its tokeniser are there, made-up ones of the same size elsewhere."""
    if setting.root and setting.minilm and not setting.tiny:
        return setting.root, PRESETS["sst"]
    folder = setting.folder / "grid"
    lengths = workload.sst_lengths(setting.size(_TRAIN, 64))
    return folder, workload.write_sentences(folder, base, lengths, dev=setting.size(_DEV, 16))
