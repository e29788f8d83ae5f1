"""The callbacks between a Trainer and the pool: one has members that improved written, one uses what is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lora_ensemble import pool
from lora_ensemble.bank.base_model import hub_id
from lora_ensemble.bank.member_files import restore_members
from lora_ensemble.errors import Interrupted
from lora_ensemble.train import restart
from lora_ensemble.train.evaluation import History
from lora_ensemble.train.notices import say, table, tell_members
from lora_ensemble.train.records import PoolOptions, PoolRecords, add_logits

_EACH_EPOCH = -1
"""Steps before the last evaluation, as a checkpoint of an earlier version has it: it was at the end of the epoch."""


class PoolWriter(pl.Callback):
    """Puts a member that improved on dev into the pool, on a ``BankTrainer``: ``history`` decides, ``records`` write.

    ``summarise``: whether to print the table at the end; not for one bank of several.
    """

    def __init__(self, records: PoolRecords, *, summarise: bool = True) -> None:
        self.records, self._summarise = records, summarise
        self.history = History([], [])
        self.goes_on = " with --ckpt_path last"  # what has to be added to the command after an interruption
        self.paused = False  # whether the bank stops before its end, to go on with fewer members
        self.ended: list[int] = []  # those of a paused bank that are out of patience, and so finished
        self.finished = False  # whether training has reached its planned end, and its members were evaluated there
        self._evaluated = self._tried = 0  # optimiser steps before the last evaluation, and before the last in part

    def state_dict(self) -> dict[str, Any]:
        """Best scores and epochs, and the dev logits of every epoch."""
        return {**self.history.state_dict(), "evaluated": self._evaluated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.history.load_state_dict(state)
        self._evaluated = int(state.get("evaluated", _EACH_EPOCH))

    # Before

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Check the pool before an hour is spent."""
        self.history = History([m.name for m in pl_module.members], pl_module.tasks)
        if trainer.fast_dev_run:
            return
        there = self.records.existing(trainer.datamodule, pl_module, resumed=self.records.resumed)
        self.records.check_unfinished(record for record, _ in there.values())
        if trainer.is_global_zero and not pool.can_lock(self.records.dir):
            say(f"note: {self.records.dir}: its file system has no locks; let one program at a time write there")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Where the run goes on from a checkpoint, hold the pool against it."""
        trainer.evaluates_the_rest = self._is_to_be_evaluated
        goes_on = self.records.resumed and not trainer.fast_dev_run
        if goes_on and (anew := self.records.agree_with(self.history, writes=trainer.is_global_zero)):
            say(
                f"{self.records.dir}: has not the best epoch of {len(anew)} members ({', '.join(anew[:3])}"
                f"{', ...' * (len(anew) > 3)}) that the checkpoint speaks of; they are offered anew from now on"
            )

    # During

    def _is_to_be_evaluated(self, trainer: pl.Trainer) -> bool:
        """At the end of training: whether there were steps since the last evaluation."""
        return (
            trainer.global_step not in (self._evaluated, self._tried)
            and self._evaluated != _EACH_EPOCH
            and not (trainer.fast_dev_run or self.paused or self.history.all_diverged)
            and trainer.enable_validation
        )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep this epoch's dev logits, and write the members that improved."""
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        self._tried = trainer.global_step
        evaluations = pl_module.evaluations
        if not all(e.complete for of_split in evaluations.values() for e in of_split.values()):
            say(f"dev was evaluated in part only ({restart.limit_on_dev(trainer)}), so nothing goes into the pool")
            return
        self._evaluated = trainer.global_step
        improved, diverged = self.history.add(evaluations[pl_module.folds.decides], pl_module.alive())
        for index in diverged:
            say(
                f"{self.history.members[index]} has diverged (NaN or infinity) by epoch {len(self.history)}: frozen, "
                "and left out of the selection"
            )
        if trainer.is_global_zero:
            # An evaluation that is only made because training ends here is undone where it goes on.
            at_a_cut = trainer.evaluates_now or (trainer.should_stop and not restart.evaluation_is_due(trainer))
            self.records.write(pl_module, self.history, improved, at_a_cut=at_a_cut)
        if self.history.all_diverged:
            trainer.should_stop = True

    # After

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Say what became of the members, in their records too. Not reached after an interruption."""
        if trainer.fast_dev_run:
            return
        if self.paused:
            if trainer.is_global_zero:
                self._write_results(self.ended, finished=True)
            return
        evaluated = len(self.history) > 0
        up_to_date = evaluated and self._evaluated in (_EACH_EPOCH, trainer.global_step)
        self.finished = up_to_date and restart.planned_end(trainer)
        if not trainer.is_global_zero:
            return
        self._write_results(range(len(self.history.members)), finished=self.finished)
        missing = restart.what_is_missing(
            trainer, evaluated=evaluated, up_to_date=up_to_date, finished=self.finished, goes_on=self.goes_on
        )
        if missing and not self.history.all_diverged:
            say(missing)
        if self._summarise:
            rows, printed = self.history.summary(), evaluated and not self.history.all_diverged
            tell_members(rows, pl_module, self.records.dir, trainer.loggers, printed=printed)

    def _write_results(self, members: Sequence[int], *, finished: bool) -> None:
        for gone in self.records.write_results(self.history, members, finished=finished):
            say(f"{gone.task}: {gone.name} is not in the pool: deleted, or written by another run meanwhile")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Say how an interrupted run goes on."""
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException | Interrupted) or trainer.state.fn != "fit":
            return
        saved = next((c.saved for c in trainer.callbacks if isinstance(c, restart.RunCheckpoint)), "")
        if not saved and self.records.resumed:
            saved = "the checkpoint that this run began with"
        if not saved:
            say("\ninterrupted: nothing was saved, so the same command begins anew; what the pool holds is whole")
            return
        rest = 0 if self._evaluated == _EACH_EPOCH else trainer.global_step - self._evaluated
        since = f", but for {rest} step{'s' * (rest != 1)} since the last dev evaluation" if rest else ""
        say(f"\ninterrupted: the same command{self.goes_on} goes on from {saved}; what the pool holds is whole{since}")


class PoolUser(pl.Callback):
    """For validate, test and predict: the members' best weights, or what the Trainer restores, and their scores."""

    def __init__(self, options: PoolOptions, *, from_checkpoint: bool) -> None:
        self.dir, self.any_base, self.from_checkpoint = Path(options.dir), options.any_base, from_checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Restore the members where nothing else was asked for."""
        if not self.from_checkpoint:
            here = None if self.any_base else pl_module.base_fingerprint(trainer.datamodule)
            restore_members(pl_module.bank, self.dir, base_model=hub_id(pl_module.base_model), fingerprint=here)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Print the scores."""
        header, rows = ["member"], [list[Any]([m.name]) for m in pl_module.members]
        ((split, evaluations),) = pl_module.evaluations.items()
        for task in pl_module.tasks:
            e = evaluations[task.name]
            for name, values in ((task.score_name, e.scores), *e.metrics.items()):
                header.append(f"{task.name} {split} ({name})")
                for row, value in zip(rows, values or [math.nan] * len(rows), strict=True):
                    row.append(value)
        say(table(header, rows))

    on_test_end = on_validation_end

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Add the split's logits to the pool, where they are the pool's own members'."""
        ((split, evaluations),) = pl_module.evaluations.items()
        if self.from_checkpoint:
            say("predictions of --ckpt_path are not the pool's best weights, so they were not added to the pool")
        elif not all(e.complete for e in evaluations.values()):
            say(f"{split} was predicted in part only (trainer.limit_predict_batches): nothing was added to the pool")
        elif trainer.is_global_zero:
            for task in pl_module.tasks:
                examples, logits = trainer.datamodule.splits[split][task.name], evaluations[task.name].logits
                add_logits(self.dir, task.name, split, examples, [m.name for m in pl_module.members], logits)
                say(f"{task.name}: {split} logits of {len(logits)} members added to {self.dir / task.name}")
