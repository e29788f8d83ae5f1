"""The callback between training and the pool: it writes members as they improve, and says what became of them.

Axes: M members, N examples of a split, C outputs of a head, E epochs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lora_ensemble import pool
from lora_ensemble.bank.base_model import hub_id
from lora_ensemble.bank.member_files import weight_files
from lora_ensemble.errors import Interrupted, UserError
from lora_ensemble.scores import overall
from lora_ensemble.tasks import Task
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import print_summary, say
from lora_ensemble.train.records import described, difference
from lora_ensemble.train.restart import (
    BankTrainer,
    RunCheckpoint,
    evaluation_is_due,
    limit_on_dev,
    planned_end,
    what_is_missing,
)

_EACH_EPOCH = -1
"""Steps before the last evaluation, as a checkpoint of an earlier version has it: it was at the end of the epoch."""
_WAY_OUT = "choose another --pool.dir, give the member another name, or set --pool.overwrite true"


class PoolWriter(pl.Callback):
    """Puts a member that improved on dev into the pool."""

    def __init__(self, dir: str = "checkpoints/pool", overwrite: bool = False, any_base: bool = False) -> None:
        """
        Args:
            dir: The pool's folder.
            overwrite: Replace members that are already there, finished or of other settings.
            any_base: Use members and checkpoints although the base model is no longer the one they were trained over.
        """
        self.dir, self.overwrite, self.any_base = Path(dir), overwrite, any_base
        self.run = ""
        """Name of the run, set by the command line; it ties one member's folders in several tasks."""
        self.replaced: Path | None = None
        """Where members go that an evaluation at a cut replaces, set by the command line where a run can go on."""
        self.resumed = False
        """Whether the run uses a checkpoint, set by the command line: the Trainer knows too late."""
        self.goes_on = " with --ckpt_path last"
        """What has to be added to the command after an interruption."""
        self.summarise = True
        """Whether to print the table at the end; not for one bank of several."""
        self.paused = False
        """Set where a bank stops before its end, to go on with fewer members: nobody is finished yet."""
        self.finished = False
        """Whether training has reached its planned end, and its members were evaluated there."""
        self._best: list[float] = []
        self._best_epoch: list[int] = []
        self._epochs: dict[str, list[np.ndarray]] = {}  # task -> E arrays (M, N, C) float16
        self._scores: dict[str, list[list[float]]] = {}  # task -> E lists of M scores
        self._evaluated = self._tried = 0  # optimiser steps before the last evaluation, and before the last in part
        self._dead: list[bool] = []
        self._tasks: list[Task] = []
        self._described: dict[str, list[pool.MemberRecord]] = {}
        self._seen: dict[Path, dict[str, str]] = {}  # members that were there at the start: folder -> files

    # What Lightning's checkpoint keeps of it: plain tensors and numbers, so that weights_only=True can load it.

    def state_dict(self) -> dict[str, Any]:
        """Best scores and epochs, and the dev logits of every epoch."""
        return {
            "best": list(self._best),
            "best_epoch": list(self._best_epoch),
            "epochs": {t: [torch.from_numpy(a) for a in arrays] for t, arrays in self._epochs.items()},
            "scores": self._scores,
            "evaluated": self._evaluated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self._best, self._best_epoch = list(state["best"]), list(state["best_epoch"])
        self._epochs = {t: [a.numpy() for a in arrays] for t, arrays in state["epochs"].items()}
        self._scores = {t: [list(s) for s in scores] for t, scores in state["scores"].items()}
        self._evaluated = int(state.get("evaluated", _EACH_EPOCH))

    # Before

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the pool before an hour is spent."""
        assert isinstance(pl_module, BankModule)
        self._tasks, pl_module.any_base = pl_module.tasks, self.any_base
        if not trainer.fast_dev_run:
            self._check_pool(trainer, trainer.datamodule, pl_module)

    def _check_pool(self, trainer: pl.Trainer, data: BankData, module: BankModule) -> None:
        for name, (record, _) in self.found(trainer, data, module, resumed=self.resumed).items():
            if record.finished and not (self.resumed and record.run == self.run):
                where = pool.member_folder(self.dir, record.task, name)
                raise UserError(
                    f"{where}: already trained with these very settings and finished; use it, or {_WAY_OUT}"
                )
        if trainer.is_global_zero and not pool.can_lock(self.dir):
            say(f"note: {self.dir}: its file system has no locks; let one program at a time write there")

    def found(
        self, trainer: pl.Trainer, data: BankData, module: BankModule, *, resumed: bool
    ) -> dict[str, tuple[pool.MemberRecord, bool]]:
        """The module's members that the pool has: name to record, and whether all tasks have it finished.

        With settings and data as they are now: ``UserError`` where a member of that name has others; only how long it
        trains may differ where this run is ``resumed``. Where members may be replaced (``overwrite``), none is there.
        """
        self.dir.mkdir(parents=True, exist_ok=True)
        there: dict[str, tuple[pool.MemberRecord, bool]] = {}
        self._described = described(trainer, data, module, run=self.run)
        if self.overwrite:
            return there
        number: Counter[str] = Counter()
        for task, records in self._described.items():
            expected = {record.name: record for record in records}
            for found in pool.read_records(self.dir, task, list(expected)):
                where, wanted = pool.member_folder(self.dir, task, found.name), expected[found.name]
                longer = resumed and found.run == self.run
                if differs := difference(found, wanted, resumed=longer, any_base=self.any_base):
                    raise UserError(f"{where}: holds a member of this name with other settings ({differs}); {_WAY_OUT}")
                self._seen[where] = found.files
                number[found.name] += found.finished
                there[found.name] = found, number[found.name] == len(module.tasks)
        return there

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the count, or go on with it."""
        assert isinstance(pl_module, BankModule)
        m = len(pl_module.members)
        if not self._best:
            self._best, self._best_epoch = [-math.inf] * m, [0] * m
        self._dead = [False] * m
        if isinstance(trainer, BankTrainer):
            trainer.evaluates_the_rest = self._is_to_be_evaluated
        if self.resumed and not trainer.fast_dev_run:
            self._agree_with_the_pool(pl_module)

    def _agree_with_the_pool(self, module: BankModule) -> None:
        """Undo what the pool has from after the checkpoint, and offer anew what it has not."""
        names = [m.name for m in module.members]
        there = {(r.task, r.name): r for t in module.tasks for r in pool.read_records(self.dir, t.name, names)}
        back: list[pool.NewMember] = []
        anew = []
        for index, name in enumerate(names):
            best, records = self._best_epoch[index], [there.get((t.name, name)) for t in module.tasks]
            ours = [r.best_epoch or 0 for r in records if r is not None and r.run == self.run]
            if not best or (len(ours) == len(records) and set(ours) == {best}):
                continue
            if kept := self._kept(module.tasks, name, best):
                back += kept
            elif len(ours) < len(records) or min(ours) < best:
                self._best[index], self._best_epoch[index] = -math.inf, 0
                anew.append(name)
            # Else a kill came between the pool and the checkpoint: the same evaluation comes again.
        if anew:
            say(
                f"{self.dir}: has not the best epoch of {len(anew)} members ({', '.join(anew[:3])}"
                f"{', ...' * (len(anew) > 3)}) that the checkpoint speaks of; they are offered anew from now on"
            )
        if rank_zero_only.rank == 0:
            if back:
                pool.write_members(self.dir, back)
            if self.replaced is not None:
                for task, name in itertools.product(module.tasks, names):
                    shutil.rmtree(pool.member_folder(self.replaced, task.name, name), ignore_errors=True)

    def _kept(self, tasks: Sequence[Task], name: str, best: int) -> list[pool.NewMember]:
        """A member as it was before the evaluation at a cut replaced it, if that is of the epoch ``best``."""
        if self.replaced is None:
            return []
        records = [r for t in tasks for r in pool.read_records(self.replaced, t.name, [name])]
        if len(records) < len(tasks) or any(r.best_epoch != best or r.run != self.run for r in records):
            return []
        folders = [pool.member_folder(self.replaced, r.task, name) for r in records]
        return [
            pool.NewMember(record=r, files={f: folder / f for f in r.files})
            for r, folder in zip(records, folders, strict=True)
        ]

    # During

    def _is_to_be_evaluated(self, trainer: pl.Trainer) -> bool:
        """At the end of training: whether there were steps since the last evaluation."""
        return (
            trainer.global_step not in (self._evaluated, self._tried)
            and self._evaluated != _EACH_EPOCH
            and not (trainer.fast_dev_run or self.paused or self.all_diverged)
            and trainer.enable_validation
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep this epoch's dev logits, and write the members that improved."""
        assert isinstance(pl_module, BankModule)
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        evaluations, self._tried = pl_module.evaluations, trainer.global_step
        if not all(e.complete for e in evaluations.values()):
            say(f"dev was evaluated in part only ({limit_on_dev(trainer)}), so nothing goes into the pool")
            return
        self._evaluated = trainer.global_step
        for name, e in evaluations.items():
            # Half precision holds a logit to three digits; beyond its range it would turn into infinity.
            self._epochs.setdefault(name, []).append(np.clip(e.logits, -65504, 65504).astype(np.float16))
            self._scores.setdefault(name, []).append(list(e.scores or []))
        kinds = {t.name: t.kind for t in pl_module.tasks}
        epoch = len(self._scores[pl_module.tasks[0].name])
        alive, improved = pl_module.alive(), []
        for index in range(len(pl_module.members)):
            finite = all(np.isfinite(e.logits[index]).all() for e in evaluations.values())
            if not (alive[index] and finite):
                self._report_dead(pl_module, index, epoch)
                continue
            value = overall({n: ((e.scores or [])[index], kinds[n]) for n, e in evaluations.items()})
            if value > self._best[index]:  # never for NaN: an undefined score is no improvement
                self._best[index], self._best_epoch[index] = value, epoch
                improved.append(index)
        # An evaluation that is only made because training ends here is undone where it goes on.
        at_a_cut = getattr(trainer, "evaluates_now", False) or (trainer.should_stop and not evaluation_is_due(trainer))
        self._write(trainer, pl_module, improved, replaced=self.replaced if at_a_cut else None)
        if self.all_diverged:
            trainer.should_stop = True

    def _report_dead(self, module: BankModule, index: int, epoch: int) -> None:
        if not self._dead[index]:
            self._dead[index] = True
            name = module.members[index].name
            say(f"{name} has diverged (NaN or infinity) by epoch {epoch}: frozen, and left out of the selection")

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, module: BankModule, members: Sequence[int], *, replaced: Path | None) -> None:
        new = []
        for task in module.tasks:
            data = trainer.datamodule.splits["dev"][task.name]
            if members:
                pool.write_examples(self.dir, task.name, "dev", data.ids, data.labels)
            for index in members:
                record = self._described[task.name][index]
                files: dict[str, Any] = {
                    pool.logits_file("dev"): module.evaluations[task.name].logits[index],
                    pool.EPOCHS: np.stack([e[index] for e in self._epochs[task.name]]),
                    **weight_files(
                        module.bank, index, task, base_model=hub_id(module.base_model), revision=record.revision
                    ),
                }
                aside = None if replaced is None else pool.member_folder(replaced, task.name, record.name)
                new.append(
                    pool.NewMember(record=self._with_results(record, task, index), files=files, replaced_to=aside)
                )
        pool.write_members(self.dir, new, check=None if self.overwrite else self._check_replaced)

    def _check_replaced(self, there: pool.MemberRecord) -> None:
        """``UserError`` where another run has written a member since this one began."""
        ours = there.run == self.run and (self.resumed or not there.finished)
        folder = pool.member_folder(self.dir, there.task, there.name)
        if not (ours or (not there.finished and self._seen.get(folder) == there.files)):
            raise UserError(
                f"{folder}: written meanwhile by another run ({there.run}); two runs cannot fill one pool with members "
                f"of the same names: {_WAY_OUT}"
            )

    def _with_results(self, record: pool.MemberRecord, task: Task, index: int) -> pool.MemberRecord:
        scores = [s[index] for s in self._scores[task.name]]
        best = self._best_epoch[index]
        return dataclasses.replace(
            record,
            score=scores[best - 1],
            best_epoch=best,
            epochs_done=len(scores),
            epoch_scores=[None if math.isnan(s) else s for s in scores],
            diverged=self._dead[index],
        )

    # After

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what became of the members, in their records too. Not reached after an interruption."""
        assert isinstance(pl_module, BankModule)
        if trainer.fast_dev_run or self.paused:
            return
        up_to_date = bool(self._epochs) and self._evaluated in (_EACH_EPOCH, trainer.global_step)
        self.finished = up_to_date and planned_end(trainer)
        if trainer.is_global_zero:
            self._write_results(trainer, pl_module)
            missing = what_is_missing(
                trainer,
                evaluated=bool(self._epochs),
                up_to_date=up_to_date,
                finished=self.finished,
                goes_on=self.goes_on,
            )
            if missing and not self.all_diverged:
                say(missing)
        if self.summarise and self._epochs and not self.all_diverged:
            print_summary(*self.summary(pl_module), folder=self.dir, tasks=[t.name for t in pl_module.tasks])

    def _write_results(self, trainer: pl.Trainer, module: BankModule) -> None:
        """The last word on each member that is in the pool, and the dev logits of every epoch."""
        names, new = [m.name for m in module.members], []
        for task in module.tasks if self._epochs else []:
            there = {r.name: r for r in pool.read_records(self.dir, task.name, names)}
            for index, record in enumerate(self._described[task.name]):
                found = there.get(record.name)
                if not self._best_epoch[index]:
                    continue  # its score is undefined, or it diverged at once
                if found is None or found.run != self.run or found.best_epoch != self._best_epoch[index]:
                    say(f"{task.name}: {record.name} is not in the pool: deleted, or written by another run meanwhile")
                    continue
                record = dataclasses.replace(
                    self._with_results(record, task, index),
                    finished=self.finished and not self._dead[index],
                    examples=found.examples,
                )
                files = {}
                # One that improved in the last evaluation has them all.
                has_all = record.best_epoch == record.epochs_done == found.epochs_done
                if not (self._dead[index] or has_all):
                    files[pool.EPOCHS] = np.stack([e[index] for e in self._epochs[task.name]])
                new.append(pool.NewMember(record=record, files=files, keep=found))
        pool.write_members(self.dir, new)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say how an interrupted run goes on."""
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException | Interrupted) or trainer.state.fn != "fit":
            return
        saved = next((c.saved for c in trainer.callbacks if isinstance(c, RunCheckpoint)), "")
        if not saved and self.resumed:
            saved = "the checkpoint that this run began with"
        if not saved:
            say("\ninterrupted: nothing was saved, so the same command begins anew; what the pool holds is whole")
            return
        rest = 0 if self._evaluated == _EACH_EPOCH else trainer.global_step - self._evaluated
        since = f", but for {rest} step{'s' * (rest != 1)} since the last dev evaluation" if rest else ""
        say(f"\ninterrupted: the same command{self.goes_on} goes on from {saved}; what the pool holds is whole{since}")

    @property
    def all_diverged(self) -> bool:
        """Whether no member of the bank is left to train."""
        return bool(self._dead) and all(self._dead)

    def summary(self, module: BankModule) -> tuple[list[str], list[list[Any]]]:
        """Header and a row per member: name, best epoch, and dev score of each task at that epoch."""
        rows = []
        for index, member in enumerate(module.members):
            best = self._best_epoch[index]
            scores = [self._scores[t.name][best - 1][index] if best else math.nan for t in module.tasks]
            rows.append([member.name, "diverged" if self._dead[index] else best or "-", *scores])
        return ["member", "best epoch", *(f"{t.name} dev ({t.score_name})" for t in module.tasks)], rows

    @property
    def evaluations(self) -> int:
        """How many dev evaluations there were."""
        return len(next(iter(self._scores.values()), []))

    def at(self, evaluation: int) -> tuple[list[float], dict[str, np.ndarray]]:
        """Each member's overall score (M,) at a dev evaluation, counted from 1, and dev logits by task (M, N, C)."""
        kinds = {t.name: t.kind for t in self._tasks}
        scores = [
            overall({n: (s[evaluation - 1][i], kinds[n]) for n, s in self._scores.items()})
            for i in range(len(self._best))
        ]
        return scores, {name: each[evaluation - 1] for name, each in self._epochs.items()}
