"""A sweep: a run of banks that is begun again with the same command, whatever happened to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lora_ensemble import pool
from lora_ensemble.errors import UserError
from lora_ensemble.files import sole_process
from lora_ensemble.train.notices import say
from lora_ensemble.train.runs.banks import BankRun, writer_of
from lora_ensemble.train.runs.halving import EarlyExit
from lora_ensemble.train.runs.plan import Plan, PlannedBank, read_plan
from lora_ensemble.train.runs.progress import SweepProgress, duration

Train = Callable[[Plan, list[int], Callable[[PlannedBank], Path]], None]
"""From a plan, the numbers of the banks to train and a bank's folder to nothing: has others train them, or only says
what there is to train."""
_WAIT = 60.0  # seconds to wait for a process that is about to die with its node


def _was_patient(record: pool.MemberRecord) -> bool:
    """Whether a finished member ended by its patience, so that no later end would let it go on."""
    return bool(record.patience) and (record.epochs_done or 0) - (record.best_epoch or 0) >= (record.patience or 0)


@dataclass(eq=False)
class Sweep(BankRun):
    """A ``BankRun`` that goes on by itself where it stopped, and trains no member that the pool has finished.

    That is: the same settings, the same data, and ``finished``. The plan of banks is written first and used again.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._resumes = True

    def sweep(
        self, early_exit: EarlyExit | None = None, *, bank: int | None = None, train: Train | None = None
    ) -> None:
        """Train what is not finished. The first process holds the pool's lock.

        ``bank``: train this bank of the plan alone, counted from 1; the plan is there, and somebody else holds the
        lock. ``train``: is given the plan, has such processes train its banks, here or elsewhere, and returns.
        ``UserError`` where another sweep is at work on the pool or the bank, and as ``BankRun.fit``.
        """
        self._early_exit, started = early_exit, time.monotonic()
        if bank is not None:
            self.plan = self._plan_of(bank)
            self._train_all()
            self._report([n for n in self._names if n in self.plan.members], time.monotonic() - started)
            return
        tasks = [t.name for t in self.module.tasks]
        with pool.sole_sweep(self._pool, tasks) if rank_zero_only.rank == 0 else contextlib.nullcontext():
            self.plan = self._made_plan()
            if train is not None:
                numbers = [n for n, b in enumerate(self.plan.banks, 1) if not self._is_done(b)]
                train(self.plan, numbers, self._folder)
                self.plan = self._with_plans_of_banks(self.plan)
                self._write()
                if not all(self._is_done(b) for b in self.plan.banks):
                    return
            self._train_all()
        self._report(self._names, time.monotonic() - started)

    # The plan

    def _plan_of(self, number: int) -> Plan:
        """The plan of one bank of the run's, in the bank's folder: what became of the bank while it was trained."""
        plan = read_plan(self.run_dir, self._names)
        if plan is None:
            raise UserError(f"--bank {number}: there is no plan in {self.run_dir} yet; run it with --plan_only true")
        if not 1 <= number <= len(plan.banks):
            raise UserError(f"--bank {number}: the plan has {len(plan.banks)} banks")
        self._all_banks, bank = plan, plan.banks[number - 1]
        self._plan_folder = self._folder(bank)
        return read_plan(self._plan_folder, bank.members) or Plan(banks=[bank])

    def _with_plans_of_banks(self, plan: Plan) -> Plan:
        """The plan, with what became of banks that were trained by processes of their own."""
        for bank in plan.banks:
            own = None if self._is_done(bank) else read_plan(self._folder(bank), bank.members)
            if own is not None:
                left = {**plan.left, **own.left}
                plan = replace(plan.replaced(bank, own.banks), splits=[*plan.splits, *own.splits], left=left)
        return plan

    def _made_plan(self) -> Plan:
        saved = read_plan(self.run_dir, self._names) if self.keep else None
        if rank_zero_only.rank != 0 and saved is not None:
            return saved  # the first process launches the others when it has written it
        assert self.trainer is not None
        self.data.trainer = self.trainer
        self.data.setup("fit")
        there = writer_of(self.trainer).records.existing(self.data, self.module, resumed=saved is not None)
        ends = {name: {key: record.settings.get(key) for key in self._limits} for name, (record, _) in there.items()}
        long_enough = {name for name, (r, _) in there.items() if ends[name] == self._limits or _was_patient(r)}
        finished = {name for name, (_, whole) in there.items() if whole and name in long_enough}
        if saved is not None:
            plan = self._checked(self._with_plans_of_banks(saved), finished, set(there))
        else:
            plan = Plan(kept=[name for name in self._names if name in finished])
            plan = self._with_banks(plan, [name for name in self._names if name not in finished])
        if finished:
            say(f"{len(finished)} of {len(self._names)} members are finished in {self._pool} and not trained again")
        if plan.banks:
            say(plan.describe())
        self._write(plan)
        return plan

    def _with_banks(self, plan: Plan, names: Sequence[str]) -> Plan:
        if not names:
            return plan
        larger = super()._with_banks(plan, names)
        for bank in larger.banks[len(plan.banks) :]:
            self._forget(bank)
        return larger

    def _checked(self, plan: Plan, finished: set[str], there: set[str]) -> Plan:
        """A saved plan held against the pool: what it calls finished and the pool has not is to be trained again.

        ``there``: names of all members that the pool has, finished or not.
        """
        again = [name for name in plan.kept if name not in finished]
        if self._early_exit is None:
            again += plan.left
        banks = []
        for bank in plan.banks:
            if bank.finished is None or not self._is_done(bank):
                if self._scored(bank) - there:
                    self._forget(bank)
                banks.append(bank)
                continue
            # One that diverged or whose score was never defined is not in the pool, and would not be another time.
            lost = [row[0] for row in bank.finished.rows if isinstance(row[1], int) and row[0] not in finished]
            again += lost
            if stay := [name for name in bank.members if name not in lost]:
                banks.append(bank if not lost else PlannedBank(members=stay, finished=bank.finished))
        kept = [name for name in plan.kept if name not in again]
        left = {name: epochs for name, epochs in plan.left.items() if name not in again}
        return self._with_banks(self._with_smaller_banks(replace(plan, banks=banks, kept=kept, left=left)), again)

    def _scored(self, bank: PlannedBank) -> set[str]:
        """Members that were put into the pool, by the bank's checkpoint."""
        if not self._last(bank).is_file():
            return set()
        content = torch.load(self._last(bank), map_location="cpu", weights_only=True)
        best_epochs = content["callbacks"]["PoolWriter"]["best_epoch"]
        return {m["name"] for m, best in zip(content["bank"]["members"], best_epochs, strict=True) if best}

    # One bank

    def _train(self, bank: PlannedBank) -> None:
        locks = self.keep and rank_zero_only.rank == 0
        with sole_process(self._folder(bank), "trains this bank", wait=_WAIT) if locks else contextlib.nullcontext():
            super()._train(bank)

    def _is_done(self, bank: PlannedBank) -> bool:
        return self._is_finished(bank)

    def _watch(self, bank: PlannedBank, trainer: pl.Trainer) -> None:
        super()._watch(bank, trainer)
        writer = writer_of(trainer)
        writer.goes_on = ""
        # After the pool's writer, whose scores it shows.
        progress = SweepProgress(self.plan, bank, writer, self.module.tasks, self.module.folds.decides)
        trainer.callbacks.insert(trainer.callbacks.index(writer) + 1, progress)

    # What was done

    def _report(self, names: Sequence[str], seconds: float) -> None:
        """A table of these members, and what was saved."""
        rows, left, most = self._summary(names), self.plan.left, self._limits["max_epochs"]
        if left and most:
            saved = sum(most - epochs for epochs in left.values()) / (most * len(rows))
            say(f"early exit: {len(left)} of {len(rows)} members left; {saved:.0%} of the member epochs saved")
        say(f"swept in {duration(seconds)} (this start)")
