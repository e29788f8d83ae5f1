"""Callbacks that ``lora-ensemble fit`` takes with ``--trainer.callbacks+=``: they write down what the clock said.

The command must find this folder: ``PYTHONPATH=benchmarks``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch


class ComputeClock(pl.Callback):
    """Adds up what training and evaluation themselves take: optimiser steps with their forward and backward passes,
    passes over dev, and scores. ``started``, ``seconds``: (wall clock, processor) of this process's last run.
    """

    started = (0.0, 0.0)
    seconds = (0.0, 0.0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The run begins."""
        ComputeClock.started, ComputeClock.seconds = now(), (0.0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to what computes."""
        for holder, name in (
            (trainer.optimizers[0], "step"),
            (pl_module, "validation_step"),
            (pl_module, "on_test_epoch_end"),
        ):
            setattr(holder, name, self._timed(getattr(holder, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kw: Any) -> Any:
            before = now()
            try:
                return call(*args, **kw)
            finally:
                wall, processor = now()
                total = ComputeClock.seconds
                ComputeClock.seconds = total[0] + wall - before[0], total[1] + processor - before[1]

        return timed


def now() -> tuple[float, float]:
    """Seconds on the wall clock, and of this process on all processors."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


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
