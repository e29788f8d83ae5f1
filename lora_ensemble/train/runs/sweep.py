"""A sweep: a run of banks that is begun again with the same command, whatever happened to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lora_ensemble import pool
from lora_ensemble.errors import UserError
from lora_ensemble.scores import overall
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import say
from lora_ensemble.train.runs.banks import BankRun, banks_of, writer_of
from lora_ensemble.train.runs.halving import EarlyExit, Gate
from lora_ensemble.train.runs.plan import Plan, PlannedBank, read_plan, write_plan
from lora_ensemble.train.runs.progress import SweepProgress, duration

Train = Callable[[Plan, list[int], Callable[[PlannedBank], Path]], None]
"""From a plan, the numbers of the banks to train and a bank's folder to nothing: has others train them, or only says
what there is to train."""
_WAIT = 60.0
"""Seconds to wait for a process that is about to die with its node."""


class Sweep(BankRun):
    """A ``BankRun`` that goes on by itself where it stopped, and trains no member that the pool has finished.

    What is finished is read from the pool: the same settings, the same data, and ``finished``. The plan of banks is
    written first and used again.
    """

    _early_exit: EarlyExit | None = None
    _gate: Gate | None = None
    _own: Path | None = None
    """Where the plan of one bank alone is."""
    _everyone: Plan | None = None
    """The whole plan, where one bank of it is trained."""

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
            plan = self._one(bank)
            self._report(plan, time.monotonic() - started, of=plan.members)
            return
        tasks = [t.name for t in self.module.tasks]
        with pool.sole_sweep(self._pool, tasks) if rank_zero_only.rank == 0 else contextlib.nullcontext():
            plan = self._plan(resumed=True)
            if train is not None:
                train(plan, [n for n, b in enumerate(plan.banks, 1) if not self._is_done(plan, b)], self._folder)
                plan = self._with_their_own(plan)
                self._write(plan)
                if any(not self._is_done(plan, b) for b in plan.banks):
                    return
            plan = self._through(plan, "last", True)
        self._report(plan, time.monotonic() - started)

    def _one(self, number: int) -> Plan:
        """Train one bank of the plan, which is not written; what became of the bank is a plan of its own."""
        plan = read_plan(self.run_dir, [m.name for m in self.module.members])
        if plan is None:
            raise UserError(f"--bank {number}: there is no plan in {self.run_dir} yet; run it with --plan_only true")
        if not 1 <= number <= len(plan.banks):
            raise UserError(f"--bank {number}: the plan has {len(plan.banks)} banks")
        bank = plan.banks[number - 1]
        self._everyone, self._own = plan, self._folder(bank)
        own = read_plan(self._own, bank.members) or Plan(banks=[bank])
        return self._through(own, "last", True)

    def _with_their_own(self, plan: Plan) -> Plan:
        """The plan, with what became of banks that were trained by processes of their own."""
        for bank in plan.banks:
            own = read_plan(self._folder(bank), bank.members) if not self._is_done(plan, bank) else None
            if own is not None:
                plan = replace(
                    plan.replaced(bank, own.banks), splits=[*plan.splits, *own.splits], left={**plan.left, **own.left}
                )
        return plan

    def _write(self, plan: Plan) -> None:
        if self.keep and rank_zero_only.rank == 0:
            write_plan(self._own or self.run_dir, plan)

    def _train(self, plan: Plan, bank: PlannedBank, ckpt_path: str | None, weights_only: bool | None) -> Plan:
        if rank_zero_only.rank != 0 or not self.keep:
            return super()._train(plan, bank, ckpt_path, weights_only)
        with pool.sole_process(self._folder(bank), "trains this bank", wait=_WAIT):
            return super()._train(plan, bank, ckpt_path, weights_only)

    # The plan

    def _plan(self, *, resumed: bool) -> Plan:
        names = [m.name for m in self.module.members]
        saved = read_plan(self.run_dir, names) if self.keep else None
        if rank_zero_only.rank != 0 and saved is not None:
            return saved  # the first process launches the others when it has written it
        assert self._whole is not None
        self.data.trainer = self._whole
        self.data.setup("fit")
        there = writer_of(self._whole).records.existing(self._whole, self.data, self.module, resumed=saved is not None)
        finished = {name for name, (record, whole) in there.items() if whole and self._long_enough(record)}
        if saved is None:
            todo = [name for name in names if name not in finished]
            plan = Plan(banks=[], kept=[name for name in names if name in finished])
            if todo:
                plan = self._with_banks(plan, todo)
        else:
            plan = self._checked(self._with_their_own(saved), finished, set(there))
        if finished:
            say(f"{len(finished)} of {len(names)} members are finished in {self._pool} and not trained again")
        if plan.banks:
            say(plan.describe())
        self._write(plan)
        return plan

    def _long_enough(self, record: pool.MemberRecord) -> bool:
        return all(record.settings.get(key) == value for key, value in self._limits.items())

    def _with_banks(self, plan: Plan, names: Sequence[str]) -> Plan:
        """The plan with further banks for these members."""
        assert self._whole is not None
        size, why = self._size(self._whole)
        banks = [PlannedBank(members=some) for some in banks_of(self.module, names, size)]
        for bank in banks:
            self._forget(bank)
        return replace(plan, banks=[*plan.banks, *banks], why=why or plan.why)

    def _checked(self, plan: Plan, finished: set[str], there: set[str]) -> Plan:
        """A saved plan held against the pool: what it calls finished and the pool has not is to be trained again.

        ``there``: names of all members that the pool has, finished or not.
        """
        again = [name for name in plan.kept if name not in finished]
        if self._early_exit is None:
            again += plan.left
        banks = []
        for bank in plan.banks:
            if bank.finished is None or not self._same_end(bank.finished):
                if self._scored(bank) - there:
                    self._forget(bank)
                banks.append(bank)
                continue
            # One that diverged or whose score was never defined is not in the pool, and would not be another time.
            lost = [row[0] for row in bank.finished.rows if isinstance(row[1], int) and row[0] not in finished]
            again += lost
            if stay := [name for name in bank.members if name not in lost]:
                banks.append(bank if not lost else PlannedBank(members=stay, finished=bank.finished))
        plan = replace(
            plan,
            banks=banks,
            kept=[name for name in plan.kept if name not in again],
            left={name: epochs for name, epochs in plan.left.items() if name not in again},
        )
        if isinstance(self.size, int):
            plan = self._smaller(plan, self.size)
        return self._with_banks(plan, again) if again else plan

    def _scored(self, bank: PlannedBank) -> set[str]:
        """Members that were put into the pool, by the bank's checkpoint."""
        last = self._folder(bank) / "last.ckpt"
        if not last.is_file():
            return set()
        content = torch.load(last, map_location="cpu", weights_only=True)
        names = [m["name"] for m in content["bank"]["members"]]
        return {n for n, epoch in zip(names, content["callbacks"]["PoolWriter"]["best_epoch"], strict=True) if epoch}

    # One bank

    def _is_done(self, plan: Plan, bank: PlannedBank) -> bool:
        return bank.finished is not None and self._same_end(bank.finished)

    def _is_all(self, plan: Plan) -> bool:
        return super()._is_all(self._everyone or plan)

    def _checkpoint_of_all(self, ckpt_path: str | None) -> str | None:
        last = self.run_dir / "checkpoint" / "last.ckpt"
        return str(last) if last.is_file() else None

    def _watch(self, plan: Plan, bank: PlannedBank, trainer: pl.Trainer) -> None:
        writer = writer_of(trainer)
        writer.goes_on = ""
        self._gate = None
        if self._early_exit is not None:
            self._gate = Gate(
                self._early_exit, writer, rung=bank.rung, others=lambda rung: self._scores_at(plan, bank, rung)
            )
            trainer.callbacks.insert(0, self._gate)
        # After the pool's writer, whose scores it shows.
        progress = SweepProgress(plan, bank, writer, self.module.tasks)
        trainer.callbacks.insert(trainer.callbacks.index(writer) + 1, progress)

    def _scores_at(self, plan: Plan, bank: PlannedBank, rung: int) -> list[float]:
        """Scores that the members which are not in ``bank`` had after so many dev evaluations."""
        scores = []
        for name in (self._everyone or plan).members:
            if name in bank.members:
                continue
            records = [pool.read_record(self._pool, t.name, name) for t in self.module.tasks]
            there = [r for r in records if r is not None and len(r.epoch_scores) >= rung]
            at = {r.task: (s, r.kind) for r in there if (s := r.epoch_scores[rung - 1]) is not None}
            if len(at) == len(records):
                scores.append(overall(at))
        return scores

    def _stopped(self, plan: Plan, bank: PlannedBank, module: BankModule) -> Plan | None:
        gate = self._gate
        if gate is None or gate.stayed is None:
            return None
        stay = [module.members[i].name for i in gate.stayed]
        left = {m.name: gate.epochs for m in module.members if m.name not in stay}
        smaller = PlannedBank(members=stay, rung=gate.rung)
        last = self._folder(bank) / "last.ckpt"
        self._cut(torch.load(last, map_location="cpu", weights_only=True), module, [smaller])
        say(f"early exit after epoch {gate.epochs}: {len(left)} of {len(bank.members)} members leave the bank")
        plan = plan.replaced(bank, [smaller])
        return replace(plan, left={**plan.left, **left})

    # What was done

    def _report(self, plan: Plan, seconds: float, of: Sequence[str] | None = None) -> None:
        """A table of all members, or of some, and what was saved."""
        rows = self._summary(plan, of)
        most = self._limits["max_epochs"]
        if plan.left and most:
            saved = sum(most - epochs for epochs in plan.left.values()) / (most * len(rows))
            say(f"early exit: {len(plan.left)} of {len(rows)} members left; {saved:.0%} of the member epochs saved")
        say(f"swept in {duration(seconds)} (this start)")
