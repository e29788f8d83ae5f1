"""Callbacks that ``lora-ensemble fit`` takes with ``--trainer.callbacks+=``: they write down what the clock said.

The command must find this folder: ``PYTHONPATH=benchmarks``.
"""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as pl
import torch


class WindowClock(pl.Callback):
    """Writes the seconds from the end of step ``first`` to the end of step ``last`` (counted from 1) to ``file``."""

    def __init__(self, file: str, first: int, last: int) -> None:
        self._file, self._first, self._last, self._start = Path(file), first, last, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        """Look at the clock."""
        if trainer.global_step not in (self._first, self._last):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        if trainer.global_step == self._first:
            self._start = time.perf_counter()
        else:
            self._file.write_text(str(time.perf_counter() - self._start))


class FirstStep(pl.Callback):
    """Writes the time of day at which the first step ended to ``file``, in seconds since 1970."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        """Look at the clock, once."""
        if trainer.global_step == 1:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self._file.write_text(str(time.time()))
