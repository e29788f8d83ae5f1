"""A run of several banks: train them one after another, split one that runs out of memory, go on after a restart."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from lora_ensemble import pool
from lora_ensemble.bank.model import row_width
from lora_ensemble.errors import UserError
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import log_member_table, print_summary, say
from lora_ensemble.train.pool_writer import PoolWriter
from lora_ensemble.train.records import with_metrics
from lora_ensemble.train.restart import RunCheckpoint, write_checkpoint
from lora_ensemble.train.runs.halves import is_out_of_memory, split_checkpoint
from lora_ensemble.train.runs.memory import measurable
from lora_ensemble.train.runs.plan import FILE, Finished, Plan, PlannedBank, arrange, read_plan, write_plan
from lora_ensemble.train.runs.probe import members_that_fit

BankSize = int | Literal["auto"] | None

_ALL_DIVERGED = "every member has diverged (NaN or infinity); try lower learning rates or scalings"

MakeTrainer = Callable[[Path, bool], pl.Trainer]
"""From a checkpoint's folder, and whether its bank goes on from one, to a new Trainer with a PoolWriter."""


def check_bank_size(size: BankSize) -> None:
    """``UserError`` for a bank of none."""
    if isinstance(size, int) and size < 1:
        raise UserError(f"--bank_size: {size}; expected auto, null, or a number of members of at least 1")


def banks_of(module: BankModule, names: Sequence[str], size: int) -> list[list[str]]:
    """Some of the module's members in banks of at most ``size``, put together so that little is padded."""
    bank, members = module.bank, module.members
    rows = [i for i, m in enumerate(members) if m.name in names]
    by_targets = sorted(rows, key=lambda i: (len(bank.paths[i]), bank.paths[i], members[i].rank or 0))
    by_rank = sorted(rows, key=lambda i: (members[i].rank or 0, len(bank.paths[i]), bank.paths[i]))
    orders = [rows, by_targets, by_rank, by_targets[::-1], by_rank[::-1]]
    cut = arrange(orders, size, width=lambda some: row_width(bank.row_shapes(some)))
    return [[members[i].name for i in some] for some in cut]


class BankRun:
    """Trains a run's members in banks that fit, one bank after another.

    ``module`` and ``trainer`` hold all members in one bank, and are used if that fits; both are consumed. ``keep``:
    whether anything is written to ``run_dir``.
    """

    def __init__(
        self,
        module: BankModule,
        data: BankData,
        trainer: pl.Trainer,
        make_trainer: MakeTrainer,
        *,
        run_dir: Path,
        size: BankSize,
        keep: bool,
    ) -> None:
        self.module, self.data, self.make_trainer = module, data, make_trainer
        self.run_dir, self.size, self.keep = run_dir, size, keep
        self._limits: dict[str, Any] = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
        self._loggers, self._pool = list(trainer.loggers), writer_of(trainer).dir
        self._whole: pl.Trainer | None = trainer
        self._made: set[str] = set()
        """Keys of banks whose checkpoint was made in this process."""

    def fit(self, ckpt_path: str | None, weights_only: bool | None) -> None:
        """Train every bank to its end. ``ckpt_path``: ``last`` goes on where a run of several banks stopped.

        ``UserError`` where memory runs out and nothing can be split, or every member has diverged.
        """
        plan = self._plan(resumed=ckpt_path is not None)
        if len(plan.banks) > 1 and ckpt_path not in (None, "last"):
            raise UserError(
                f"--ckpt_path: {ckpt_path} with {len(plan.banks)} banks; give last, which goes on with each bank from "
                "its own checkpoint"
            )
        plan = self._through(plan, ckpt_path, weights_only)
        if len(plan.banks) > 1 and all(row[1] == "diverged" for row in self._summary(plan)):
            raise UserError(_ALL_DIVERGED)

    def _through(self, plan: Plan, ckpt_path: str | None, weights_only: bool | None) -> Plan:
        """Train all banks of the plan that are not finished; returns the plan as it then is."""
        at = 0
        while at < len(plan.banks):
            bank, several = plan.banks[at], len(plan.banks) > 1
            if ckpt_path and self._is_done(plan, bank):
                at += 1
                continue
            if several:
                say(f"bank {at + 1} of {len(plan.banks)}: {', '.join(bank.members)}")
            plan = self._train(plan, bank, ckpt_path, weights_only)
            self._write(plan)
            # Where it was split, or members left it, others stand in its place, and are next.
            at += plan.banks[at].members == bank.members
        return plan

    # What a sweep does otherwise

    def _checkpoint_of_all(self, ckpt_path: str | None) -> str | None:
        """What the bank of all members goes on from: ``last``, where there is none, is from the start."""
        if ckpt_path != "last":
            return ckpt_path
        last = self.run_dir / "checkpoint" / "last.ckpt"
        if last.is_file():
            return str(last)
        say(f"--ckpt_path last: {last}: not there yet, so the run begins anew")
        return None

    def _is_done(self, plan: Plan, bank: PlannedBank) -> bool:
        """Whether a bank need not be trained again. One bank alone is Lightning's to go on with, or to do nothing."""
        return len(plan.banks) > 1 and bank.finished is not None and self._same_end(bank.finished)

    def _is_all(self, plan: Plan) -> bool:
        """Whether the plan is of one bank, and that is the whole run."""
        return len(plan.banks) == 1

    def _watch(self, plan: Plan, bank: PlannedBank, trainer: pl.Trainer) -> None:
        """Before a bank's training starts."""

    def _stopped(self, plan: Plan, bank: PlannedBank, module: BankModule) -> Plan | None:
        """After it: the new plan where the bank was stopped before its end."""
        return None

    def _same_end(self, finished: Finished) -> bool:
        return {"max_epochs": finished.max_epochs, "max_steps": finished.max_steps} == self._limits

    # The plan

    def _plan(self, *, resumed: bool) -> Plan:
        trainer, names = self._whole, [m.name for m in self.module.members]
        assert trainer is not None
        follows = self.keep and _launched_by_us(trainer) and rank_zero_only.rank != 0
        plan = read_plan(self.run_dir, names) if self.keep and (resumed or follows) else None
        if follows and plan is not None:
            return plan
        if plan is None:
            size, why = self._size(trainer)
            banks = [PlannedBank(members=some) for some in banks_of(self.module, names, size)]
            plan = Plan(banks=banks, why=why)
        elif isinstance(self.size, int):
            plan = self._smaller(plan, self.size)
        if len(names) > 1:
            say(plan.describe())
        self._write(plan)
        return plan

    def _size(self, trainer: pl.Trainer) -> tuple[int, str]:
        m, device = len(self.module.members), trainer.strategy.root_device
        # The first process launches the others when it has written the plan.
        one_decides = trainer.world_size == 1 or (_launched_by_us(trainer) and self.keep)
        if self.size is None or m == 1:
            return m, ""
        if self.size != "auto":
            return self.size, f"--bank_size {self.size}"
        if not measurable(device):
            return m, f"memory of {device.type} cannot be measured; set --bank_size if it runs out"
        if not one_decides:
            return m, "several processes started from outside do not probe; set --bank_size if memory runs out"
        self.data.trainer = trainer
        self.data.setup("fit")
        fit, why = members_that_fit(self.module, self.data, trainer)
        if fit == 0:
            raise UserError(_too_large(f"not even one member fits: {why}"))
        return fit, why

    def _smaller(self, plan: Plan, size: int) -> Plan:
        """A plan that was begun, with banks cut to a smaller size, and their checkpoints too."""
        for bank in plan.banks:
            if len(bank.members) <= size or (bank.finished and self._same_end(bank.finished)):
                continue
            new = [PlannedBank(members=some) for some in banks_of(self.module, bank.members, size)]
            last = self._folder(bank) / "last.ckpt"
            if last.is_file():
                self._cut(torch.load(last, map_location="cpu", weights_only=True), self.module, new)
            plan = plan.replaced(bank, new, f"{len(bank.members)} members: --bank_size {size}")
        return plan

    def _folder(self, bank: PlannedBank) -> Path:
        whole = self.run_dir / "checkpoint"
        return whole if len(bank.members) == len(self.module.members) else whole / bank.key

    def _cut(self, checkpoint: dict[str, Any], module: BankModule, banks: Sequence[PlannedBank]) -> None:
        for bank in banks:
            write_checkpoint(self._folder(bank), split_checkpoint(checkpoint, module.bank, bank.members))
            self._made.add(bank.key)

    def _write(self, plan: Plan) -> None:
        if self.keep and rank_zero_only.rank == 0:
            write_plan(self.run_dir, plan)

    # One bank

    def _train(self, plan: Plan, bank: PlannedBank, ckpt_path: str | None, weights_only: bool | None) -> Plan:
        """The plan with the bank finished; or, when memory ran out, with its halves in its place."""
        folder, trainer = self._folder(bank), self._whole
        self._whole = None
        if len(bank.members) == len(self.module.members) and trainer is not None:
            module = self.module
            ckpt_path = self._checkpoint_of_all(ckpt_path)
        else:
            let_go(self.module)
            module = self.module.with_members([m for m in self.module.members if m.name in bank.members])
            last = folder / "last.ckpt"
            begun = last.is_file() and (ckpt_path is not None or bank.key in self._made)
            trainer, ckpt_path = self.make_trainer(folder, begun), str(last) if begun else None
        writer, failed = writer_of(trainer), False
        self._watch(plan, bank, trainer)
        try:
            trainer.fit(module, datamodule=self.data, ckpt_path=ckpt_path, weights_only=weights_only)
        except Exception as e:
            if not is_out_of_memory(e):
                if isinstance(e, torch.AcceleratorError):
                    raise UserError(
                        f"the device failed ({str(e).splitlines()[0]}); the same command{writer.goes_on} goes on from "
                        "the last checkpoint; what the pool holds is whole"
                    ) from e
                raise
            traceback.clear_frames(e.__traceback__)  # they hold the step's activations
            failed = True
        finally:
            self.data.trainer = None  # or it would keep this bank's state while the next one trains
        if failed:
            halves = self._halves(bank, module, trainer, ckpt_path)
            return plan.replaced(bank, halves, f"{len(bank.members)} members: out of memory")
        if writer.all_diverged and not self._is_all(plan):
            say("every member of this bank has diverged (NaN or infinity)")
        elif writer.all_diverged:
            raise UserError(_ALL_DIVERGED)
        if (stopped := self._stopped(plan, bank, module)) is not None:
            return stopped
        if not (writer.finished or writer.all_diverged):
            return plan
        header, rows = writer.summary(module)
        rows = [[None if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows]
        return plan.replaced(bank, [replace(bank, finished=Finished(header=header, rows=rows, **self._limits))])

    def _halves(
        self, bank: PlannedBank, module: BankModule, trainer: pl.Trainer, ckpt_path: str | None
    ) -> list[PlannedBank]:
        """Two banks in the place of one that ran out of memory, which leaves nothing on the device.

        They go on from its last checkpoint, or from the one that it began with.
        """
        m, epoch = len(bank.members), trainer.current_epoch + 1
        if m == 1:
            raise UserError(_too_large(f"out of memory with a single member ({bank.members[0]}) in epoch {epoch}"))
        if trainer.world_size > 1:
            raise UserError(
                f"out of memory in epoch {epoch} with {m} members on {trainer.world_size} devices; there a bank is not "
                f"split by itself: go on with --ckpt_path last --bank_size {math.ceil(m / 2)}"
            )
        halves = [PlannedBank(members=some) for some in banks_of(module, bank.members, math.ceil(m / 2))]
        saved = [c.file for c in trainer.callbacks if isinstance(c, RunCheckpoint) and c.saved]
        last = saved[0] if saved else ckpt_path
        if last:
            self._cut(torch.load(last, map_location="cpu", weights_only=True), module, halves)
        else:
            for half in halves:
                self._forget(half)
        where = "go on from the last checkpoint" if last else "start anew"
        sizes = " and ".join(str(len(half.members)) for half in halves)
        say(f"out of memory in epoch {epoch}: the bank of {m} members is split into banks of {sizes}, which {where}")
        # Lightning's command line keeps the first Trainer; not with all that it holds.
        trainer.strategy.optimizers = []
        trainer.strategy.lr_scheduler_configs = []
        device = trainer.strategy.root_device
        let_go(module)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return halves

    def _forget(self, bank: PlannedBank) -> None:
        """Let a bank start anew: what it left knows scores of members that the pool no longer has."""
        for name in ("last.ckpt", FILE):  # the checkpoint, and the plan of a bank that was trained by itself
            (self._folder(bank) / name).unlink(missing_ok=True)

    def _summary(self, plan: Plan, of: Sequence[str] | None = None) -> list[list[Any]]:
        """A row for each member, or for some: what became of it, and its dev scores, from the pool; printed, logged."""
        members = [m.name for m in self.module.members if of is None or m.name in of]
        there = [{r.name: r for r in pool.read_records(self._pool, t.name, members)} for t in self.module.tasks]
        said = {row[0]: row[1] for bank in plan.banks if bank.finished for row in bank.finished.rows}
        rows: list[list[Any]] = []
        for name in members:
            records = [by_name.get(name) for by_name in there]
            state = said.get(name, "-" if records[0] is None else records[0].best_epoch)
            if name in plan.left:
                state = f"left after {plan.left[name]}"
            rows.append([name, state, *(math.nan if r is None or r.score is None else r.score for r in records)])
        header = ["member", "best epoch", *(f"{t.name} dev ({t.score_name})" for t in self.module.tasks)]
        if self.keep and rank_zero_only.rank == 0:
            header, table = with_metrics(header, rows, self._pool, self.module)
            log_member_table(self._loggers, header, table)
            print_summary(header, table, folder=self._pool, tasks=[t.name for t in self.module.tasks])
        return rows


def _launched_by_us(trainer: pl.Trainer) -> bool:
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def evaluation_banks(module: BankModule, size: BankSize, run_dir: Path) -> list[list[str]]:
    """The module's members in banks to be evaluated, which takes less memory than training.

    auto: no more at a time than the run at ``run_dir`` trained at once; all of them where there is none.
    """
    names = [m.name for m in module.members]
    if size == "auto":
        plan = read_plan(run_dir, names)
        size = max(len(b.members) for b in plan.banks) if plan else None
    return banks_of(module, names, size or len(names))


def writer_of(trainer: pl.Trainer) -> PoolWriter:
    """A Trainer's callback that writes the pool."""
    return next(c for c in trainer.callbacks if isinstance(c, PoolWriter))


def let_go(module: BankModule) -> None:
    """Free the encoder and the state of a module that only makes others from now on."""
    module.trainer = None
    if "bank" in module._modules:
        module.bank.let_go()  # whoever else still holds the bank holds no numbers
        del module.bank, module._frozen
    gc.collect()


def _too_large(what: str) -> str:
    return (
        f"{what}; lower --data.batch_size, --data.eval_batch_size or --data.max_length, set --trainer.precision "
        "bf16-mixed, or use a device with more memory"
    )
