"""How far a sweep is: a table of its banks after each dev evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from lora_ensemble.scores import overall
from lora_ensemble.tasks import Task
from lora_ensemble.train.notices import table
from lora_ensemble.train.pool_writer import PoolWriter
from lora_ensemble.train.runs.plan import Plan, PlannedBank

MOST_ROWS = 8
"""Banks that the table shows: the ones around the one that trains."""


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def best_of(rows: Sequence[Sequence[Any]], tasks: Sequence[Task]) -> tuple[float, str]:
    """Overall score and name of the best row of ``PoolWriter.summary``; minus infinity where none has a score."""
    found = (-math.inf, "")
    for name, _, *scores in rows:
        if all(isinstance(s, float) and math.isfinite(s) for s in scores):
            each = {t.name: (s, t.kind) for t, s in zip(tasks, scores, strict=True)}
            found = max(found, (overall(each), name), key=lambda one: one[0])
    return found


class SweepProgress(pl.Callback):
    """Says after each dev evaluation which banks are done, the best so far, and about how long the rest will take."""

    def __init__(self, plan: Plan, bank: PlannedBank, writer: PoolWriter, tasks: Sequence[Task]) -> None:
        self._plan, self._bank, self._writer, self._tasks = plan, bank, writer, tasks
        self._since, self._from = time.monotonic(), 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock starts; a resumed bank has some epochs behind it."""
        self._since, self._from = time.monotonic(), _epochs(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table; the pool's writer has its scores already."""
        if not trainer.sanity_checking:
            self._print(trainer, pl_module)

    @rank_zero_only
    def _print(self, trainer: pl.Trainer, module: Any) -> None:
        most, done = max(trainer.max_epochs or 0, 0), _epochs(trainer)
        limit = f"/{most}" if most else ""
        rows, best, finished = [], (-math.inf, ""), len(self._plan.kept)
        at = self._plan.banks.index(self._bank)
        for number, bank in enumerate(self._plan.banks):
            here, epoch = (-math.inf, ""), "waits"
            if bank is self._bank:
                here, epoch = best_of(self._writer.summary(module)[1], self._tasks), f"{done:g}{limit}"
            elif bank.finished:
                here, epoch = best_of(bank.finished.rows, self._tasks), "done"
                finished += len(bank.members)
            best = max(best, here, key=lambda one: one[0])
            if at - MOST_ROWS // 2 < number <= at + MOST_ROWS // 2:
                rows.append([str(number + 1), str(len(bank.members)), epoch, here[1], here[0] if here[1] else ""])
        text = table(["bank", "members", "epoch", "best member", "dev"], rows)
        gone = time.monotonic() - self._since
        rest = ""
        if limit and done > self._from:
            waiting = sum(len(b.members) for b in self._plan.banks if not b.finished and b is not self._bank)
            left = (most - done) * len(self._bank.members) + most * waiting
            rest = f", about {duration(gone / ((done - self._from) * len(self._bank.members)) * left)} left"
        best_ = f"; best so far {best[1]} {best[0]:.4f}" if best[1] else ""
        total = len(self._plan.members)
        print(f"{text}\n{finished} of {total} members finished{best_}; {duration(gone)} in this bank{rest}", flush=True)


def _epochs(trainer: pl.Trainer) -> float:
    """Epochs done, a validation in mid-epoch counting its part."""
    batches, inside = trainer.num_training_batches, trainer.fit_loop.epoch_loop.batch_progress.current.ready
    part = inside / batches if isinstance(batches, int) and batches and inside else 0.0
    return round(trainer.current_epoch + part, 2)
