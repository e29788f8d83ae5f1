"""A run of several banks: train them one after another, split one that runs out of memory, go on after a restart."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lora_ensemble import pool
from lora_ensemble.errors import UserError
from lora_ensemble.scores import overall
from lora_ensemble.train.data import BankData
from lora_ensemble.train.evaluation import summary_header
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import say, tell_members
from lora_ensemble.train.pool_writer import PoolWriter
from lora_ensemble.train.restart import RunCheckpoint, write_checkpoint
from lora_ensemble.train.runs.halving import EarlyExit, Gate
from lora_ensemble.train.runs.memory import is_out_of_memory
from lora_ensemble.train.runs.plan import FILE, BankSize, Finished, Plan, PlannedBank, banks_of, read_plan, write_plan
from lora_ensemble.train.runs.probe import TOO_LARGE, bank_size, launched_by_us
from lora_ensemble.train.runs.subset import subset_of_checkpoint

_ALL_DIVERGED = "every member has diverged (NaN or infinity); try lower learning rates or scalings"

MakeTrainer = Callable[[Path, bool], pl.Trainer]
"""From a checkpoint's folder, and whether its bank goes on from one, to a new Trainer with a PoolWriter."""


def writer_of(trainer: pl.Trainer) -> PoolWriter:
    """A Trainer's callback that writes the pool."""
    return next(c for c in trainer.callbacks if isinstance(c, PoolWriter))


@dataclass(eq=False)
class BankRun:
    """Trains a run's members in banks that fit, one bank after another."""

    module: BankModule  # of all members; consumed, like ``trainer``: both are used if one bank holds them all
    data: BankData
    trainer: pl.Trainer | None
    make_trainer: MakeTrainer
    _: KW_ONLY
    run_dir: Path
    size: BankSize
    keep: bool  # whether anything is written to ``run_dir``

    def __post_init__(self) -> None:
        assert self.trainer is not None
        self.plan = Plan()
        self._names = [m.name for m in self.module.members]
        self._limits: dict[str, Any] = {"max_epochs": self.trainer.max_epochs, "max_steps": self.trainer.max_steps}
        self._loggers, self._pool = list(self.trainer.loggers), writer_of(self.trainer).records.dir
        self._resumes, self._checkpoint_given = False, ""
        self._weights_only: bool | None = True
        self._all_banks: Plan | None = None  # the run's plan, where ``plan`` is that of one bank trained by itself
        self._plan_folder = self.run_dir
        self._made: set[str] = set()  # keys of banks whose checkpoint was made in this process
        self._early_exit: EarlyExit | None = None
        self._gate: Gate | None = None  # of the bank that trains

    def fit(self, ckpt_path: str | None, weights_only: bool | None) -> None:
        """Train every bank to its end. ``ckpt_path``: ``last`` goes on where a run of several banks stopped.

        ``UserError`` where memory runs out and nothing can be split, or every member has diverged.
        """
        self._resumes, self._weights_only = ckpt_path is not None, weights_only
        self.plan = self._made_plan()
        banks, given = self.plan.banks, "" if ckpt_path in (None, "last") else str(ckpt_path)
        if given and len(banks) > 1:
            what = f"--ckpt_path: {given} with {len(banks)} banks"
            raise UserError(f"{what}; give last, which goes on with each bank from its own checkpoint")
        if ckpt_path == "last" and len(banks) == 1 and not self._last(banks[0]).is_file():
            say(f"--ckpt_path last: {self._last(banks[0])}: not there yet, so the run begins anew")
        self._checkpoint_given = given
        self._train_all()
        if len(self.plan.banks) > 1 and all(row[1] == "diverged" for row in self._summary(self._names)):
            raise UserError(_ALL_DIVERGED)

    def _train_all(self) -> None:
        """Train all banks of the plan that are not done."""
        at = 0
        while at < len(self.plan.banks):
            bank, banks = self.plan.banks[at], len(self.plan.banks)
            if not self._is_done(bank):
                if banks > 1:
                    say(f"bank {at + 1} of {banks}: {', '.join(bank.members)}")
                self._train(bank)
                self._write()
            # Where it was split, or members left it, others stand in its place, and are next.
            at += self.plan.banks[at].members == bank.members

    # What a sweep does otherwise

    def _is_done(self, bank: PlannedBank) -> bool:
        """Whether a bank need not be trained again. One bank alone is Lightning's to go on with, or to do nothing."""
        return len(self.plan.banks) > 1 and self._is_finished(bank)

    def _watch(self, bank: PlannedBank, trainer: pl.Trainer) -> None:
        """Before a bank's training starts: see to it that members leave it when it is time."""
        patience = {m.name: m.patience for m in self.module.members}
        own, others = [patience[name] for name in bank.members], partial(self._scores_at, self._others(bank))
        self._gate = None
        if self.keep and (self._early_exit is not None or any(own)):
            if not any(isinstance(c, RunCheckpoint) for c in trainer.callbacks):
                raise UserError(
                    "model.members: a member with patience leaves its bank through the bank's checkpoint; leave "
                    "--trainer.enable_checkpointing on, or patience out"
                )
            self._gate = Gate(self._early_exit, own, writer_of(trainer), rung=bank.rung, others=others)
            trainer.callbacks.insert(0, self._gate)

    # The plan

    def _is_finished(self, bank: PlannedBank) -> bool:
        end = bank.finished
        limits = end and {"max_epochs": end.max_epochs, "max_steps": end.max_steps}
        return end is not None and (end.early or limits == self._limits)

    def _made_plan(self) -> Plan:
        """The plan of this run: read where there is one to go on with, else made, and written."""
        assert self.trainer is not None
        follows = launched_by_us(self.trainer) and rank_zero_only.rank != 0
        saved = read_plan(self.run_dir, self._names) if self.keep and (self._resumes or follows) else None
        if saved is not None and follows:
            return saved
        plan = self._with_banks(Plan(), self._names) if saved is None else self._with_smaller_banks(saved)
        if len(self._names) > 1:
            say(plan.describe())
        self._write(plan)
        return plan

    def _write(self, plan: Plan | None = None) -> None:
        if self.keep and rank_zero_only.rank == 0:
            write_plan(self._plan_folder, plan or self.plan)

    def _with_banks(self, plan: Plan, names: Sequence[str]) -> Plan:
        """The plan with further banks for these members."""
        assert self.trainer is not None
        size, why = bank_size(self.size, self.module, self.data, self.trainer, follows=self.keep)
        return replace(plan, banks=[*plan.banks, *banks_of(self.module, names, size)], why=why or plan.why)

    def _with_smaller_banks(self, plan: Plan) -> Plan:
        """A plan that was begun, with banks cut to a smaller size, and their checkpoints too."""
        for bank in plan.banks:
            if isinstance(self.size, int) and len(bank.members) > self.size and not self._is_finished(bank):
                smaller = banks_of(self.module, bank.members, self.size)
                if self._last(bank).is_file():
                    self._split_checkpoint(self._last(bank), self.module, smaller)
                plan = plan.replaced(bank, smaller, f"{len(bank.members)} members: --bank_size {self.size}")
        return plan

    def _folder(self, bank: PlannedBank) -> Path:
        whole = self.run_dir / "checkpoint"
        return whole if len(bank.members) == len(self._names) else whole / bank.key

    def _last(self, bank: PlannedBank) -> Path:
        return self._folder(bank) / "last.ckpt"

    def _split_checkpoint(self, file: Path, module: BankModule, banks: Sequence[PlannedBank]) -> None:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        for bank in banks:
            write_checkpoint(self._folder(bank), subset_of_checkpoint(checkpoint, module.bank, bank.members))
            self._made.add(bank.key)

    def _forget(self, bank: PlannedBank) -> None:
        """Let a bank start anew: what it left knows scores of members that the pool no longer has."""
        for name in ("last.ckpt", FILE):  # the checkpoint, and the plan of a bank that was trained by itself
            (self._folder(bank) / name).unlink(missing_ok=True)

    # One bank

    def _train(self, bank: PlannedBank) -> None:
        """The bank is finished in the plan afterwards; or, when memory ran out, its halves stand in its place."""
        last, whole, trainer, self.trainer = self._last(bank), len(bank.members) == len(self._names), self.trainer, None
        begun = last.is_file() and (self._resumes or bank.key in self._made)
        module = self.module
        if not whole or trainer is None:
            module.release()
            module = module.with_members([m for m in module.members if m.name in bank.members])
            trainer = self.make_trainer(last.parent, begun)
        checkpoint = (self._checkpoint_given if whole else "") or (str(last) if begun else None)
        writer, failed = writer_of(trainer), False
        self._watch(bank, trainer)
        try:
            trainer.fit(module, datamodule=self.data, ckpt_path=checkpoint, weights_only=self._weights_only)
        except Exception as e:
            if isinstance(e, torch.AcceleratorError) and not is_out_of_memory(e):
                raise UserError(
                    f"the device failed ({str(e).splitlines()[0]}); the same command{writer.goes_on} goes on from "
                    "the last checkpoint; what the pool holds is whole"
                ) from e
            if not is_out_of_memory(e):
                raise
            traceback.clear_frames(e.__traceback__)  # they hold the step's activations
            failed = True
        finally:
            self.data.trainer = None  # or it would keep this bank's state while the next one trains
        if failed:
            halves = self._halves(bank, module, trainer, checkpoint)
            self.plan = self.plan.replaced(bank, halves, f"{len(bank.members)} members: out of memory")
            return
        if (nobody_left := writer.history.all_diverged) and len((self._all_banks or self.plan).banks) == 1:
            raise UserError(_ALL_DIVERGED)
        if nobody_left:
            say("every member of this bank has diverged (NaN or infinity)")
        if (gate := self._gate) is not None and gate.stayed is not None:
            self._cut(bank, module, gate, writer)
        elif writer.finished or nobody_left:
            self.plan = self.plan.replaced(bank, [self._finished(bank.members, writer)])

    def _finished(self, members: Sequence[str], writer: PoolWriter) -> PlannedBank:
        """A bank of these members of the writer's, trained to their end."""
        rows = [[None if cell != cell else cell for cell in row] for row in writer.history.summary()]
        rows = [row for row in rows if row[0] in members]
        header = summary_header(self.module.tasks, self.module.folds.decides)
        end = Finished(header=header, rows=rows, early=bool(writer.ended), **self._limits)
        return PlannedBank(members=list(members), finished=end)

    def _cut(self, bank: PlannedBank, module: BankModule, gate: Gate, writer: PoolWriter) -> None:
        """A smaller bank in the place of one that members left, and one of those that are finished."""
        stay, ended = ([module.members[i].name for i in indices] for indices in (gate.stayed or [], writer.ended))
        left = {name: gate.epochs for name in bank.members if name not in stay and name not in ended}
        smaller = [PlannedBank(members=stay, rung=gate.rung)] if stay else []
        self._split_checkpoint(self._last(bank), module, smaller)
        for names, why in ((left, "early exit"), (ended, "out of patience, and finished")):
            if names:
                say(f"{why} after epoch {gate.epochs}: {len(names)} of {len(bank.members)} members leave the bank")
        banks = [*([self._finished(ended, writer)] if ended else []), *smaller]
        self.plan = replace(self.plan.replaced(bank, banks), left={**self.plan.left, **left})

    def _others(self, bank: PlannedBank) -> list[str]:
        """All members of the run that are not in this bank."""
        return [name for name in (self._all_banks or self.plan).members if name not in bank.members]

    def _scores_at(self, names: Sequence[str], rung: int) -> list[float]:
        """Overall scores that these members had after so many dev evaluations; not of those that have none."""
        scores = []
        for records in self._records(names).values():
            known = [r for r in records if r is not None and len(r.epoch_scores) >= rung]
            at_rung = [s for r in known if (s := r.epoch_scores[rung - 1]) is not None]
            if len(at_rung) == len(records):
                scores.append(overall(at_rung, self.module.tasks))
        return scores

    def _halves(
        self, bank: PlannedBank, module: BankModule, trainer: pl.Trainer, checkpoint: str | None
    ) -> list[PlannedBank]:
        """Two in the place of one that ran out of memory: from its last checkpoint, or from where it began."""
        m, epoch = len(bank.members), trainer.current_epoch + 1
        if m == 1:
            raise UserError(f"out of memory with a single member ({bank.members[0]}) in epoch {epoch}; {TOO_LARGE}")
        if trainer.world_size > 1:
            raise UserError(
                f"out of memory in epoch {epoch} with {m} members on {trainer.world_size} devices; there a bank is not "
                f"split by itself: go on with --ckpt_path last --bank_size {math.ceil(m / 2)}"
            )
        halves = banks_of(module, bank.members, math.ceil(m / 2))
        saved = [str(c.file) for c in trainer.callbacks if isinstance(c, RunCheckpoint) and c.saved]
        if last := saved[0] if saved else checkpoint:
            self._split_checkpoint(Path(last), module, halves)
        else:
            for half in halves:
                self._forget(half)
        where = "go on from the last checkpoint" if last else "start anew"
        sizes = " and ".join(str(len(half.members)) for half in halves)
        say(f"out of memory in epoch {epoch}: the bank of {m} members is split into banks of {sizes}, which {where}")
        # Lightning's command line keeps the first Trainer; not with all that it holds.
        trainer.strategy.optimizers = []
        trainer.strategy.lr_scheduler_configs = []
        module.release()
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.empty_cache()
        return halves

    def _records(self, names: Sequence[str]) -> dict[str, list[pool.MemberRecord | None]]:
        """Each member's records in the pool, one for each task."""
        by_task = [{r.name: r for r in pool.read_records(self._pool, t.name, names)} for t in self.module.tasks]
        return {name: [records.get(name) for records in by_task] for name in names}

    def _summary(self, names: Sequence[str]) -> list[list[Any]]:
        """A row for each of these members: what became of it, and its dev scores, from the pool; printed, logged."""
        states = {row[0]: row[1] for bank in self.plan.banks if bank.finished for row in bank.finished.rows}
        states |= {name: f"left after {epochs}" for name, epochs in self.plan.left.items()}
        rows: list[list[Any]] = []
        for name, records in self._records(names).items():
            scores = [math.nan if r is None or r.score is None else r.score for r in records]
            rows.append([name, states.get(name, "-" if records[0] is None else records[0].best_epoch), *scores])
        if self.keep and rank_zero_only.rank == 0:
            tell_members(rows, self.module, self._pool, self._loggers, printed=True)
        return rows
