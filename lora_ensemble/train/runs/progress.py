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

MOST_ROWS = 8  # banks that the table shows: the ones around the one that trains
_NONE = (-math.inf, "")  # score and name of the best member where none has a score


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def best_of(rows: Sequence[Sequence[Any]], tasks: Sequence[Task]) -> tuple[float, str]:
    """Overall score and name of the best row of ``History.summary``; minus infinity where none has a score.

    As ``scores.overall``: the higher the better.
    """
    best = _NONE
    for name, _, *scores in rows:
        if all(isinstance(s, float) and math.isfinite(s) for s in scores):
            value = overall(scores, tasks)
            best = max(best, (value, name), key=lambda scored: scored[0])
    return best


class SweepProgress(pl.Callback):
    """Says after each evaluation which banks are done, the best so far, and about how long the rest will take.

    ``split``: the one that decides.
    """

    def __init__(
        self, plan: Plan, bank: PlannedBank, writer: PoolWriter, tasks: Sequence[Task], split: str = "dev"
    ) -> None:
        self._plan, self._bank, self._writer, self._tasks, self._split = plan, bank, writer, tasks, split
        self._since, self._from = time.monotonic(), 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock starts; a resumed bank has some epochs behind it."""
        self._since, self._from = time.monotonic(), _epochs(trainer)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table; the pool's writer has its scores already."""
        if trainer.sanity_checking:
            return
        plan, own = self._plan, self._bank
        most, done, gone = max(trainer.max_epochs or 0, 0), _epochs(trainer), time.monotonic() - self._since
        states: list[list[Any]] = []
        one = self._tasks[0] if len(self._tasks) == 1 else None
        sign, what = (one.sign, one.score_name) if one else (1, "overall")
        best = _NONE
        for bank in plan.banks:
            scored, epoch = _NONE, "waits"
            if bank is own:
                scored = best_of(self._writer.history.summary(), self._tasks)
                epoch = f"{done:g}/{most}" if most else f"{done:g}"
            elif bank.finished:
                scored, epoch = best_of(bank.finished.rows, self._tasks), "done"
            best = max(best, scored, key=lambda scored: scored[0])
            score, name = scored
            states.append([str(len(states) + 1), str(len(bank.members)), epoch, name, sign * score if name else ""])
        others = [bank for bank in plan.banks if bank is not own]
        finished = len(plan.kept) + sum(len(bank.members) for bank in others if bank.finished)
        words = f"{finished} of {len(plan.members)} members finished"
        words += f"; best so far {best[1]} {sign * best[0]:.4f}" if best[1] else ""
        words += f"; {duration(gone)} in this bank"
        if most and done > self._from:
            waiting = sum(len(bank.members) for bank in others if not bank.finished)
            left = (most - done) * len(own.members) + most * waiting
            words += f", about {duration(gone / ((done - self._from) * len(own.members)) * left)} left"
        first = max(plan.banks.index(own) + 1 - MOST_ROWS // 2, 0)
        shown = states[first : plan.banks.index(own) + 1 + MOST_ROWS // 2]
        header = ["bank", "members", "epoch", "best member", f"{self._split} ({what})"]
        print(f"{table(header, shown)}\n{words}", flush=True)


def _epochs(trainer: pl.Trainer) -> float:
    """Epochs done, a validation in mid-epoch counting its part."""
    batches, inside = trainer.num_training_batches, trainer.fit_loop.epoch_loop.batch_progress.current.ready
    part = inside / batches if isinstance(batches, int) and batches and inside else 0.0
    return round(trainer.current_epoch + part, 2)
