"""The callback between a run and the pool: it writes members as they improve, and restores them to be used.

Axes: M members, N examples of a split, C outputs of a head, E epochs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lora_ensemble import pool
from lora_ensemble.bank_io import restore_members, weight_files
from lora_ensemble.base_model import base_difference, hub_id, way_back
from lora_ensemble.data import BankData
from lora_ensemble.errors import UserError
from lora_ensemble.module import BankModule
from lora_ensemble.notices import say
from lora_ensemble.tasks import Task, overall_score

# None of these changes what a member is: a run may be resumed for longer.
_MAY_DIFFER_ON_RESUME = ("max_epochs", "max_steps")
_WAY_OUT = "choose another --pool.dir, give the member another name, or set --pool.overwrite true"


class AllDivergedError(UserError):
    """No member of the bank is left to train."""


class PoolWriter(pl.Callback):
    """Puts a member that improved on dev into the pool; restores members for validate, test and predict."""

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
        self.resumed = False
        """Whether the run uses a checkpoint, set by the command line: the Trainer knows too late."""
        self.goes_on = " with --ckpt_path last"
        """What has to be added to the command after an interruption."""
        self.summarise = True
        """Whether to print the table at the end; not for one bank of several."""
        self.paused = False
        """Set where a bank stops before its end, to go on with fewer members: nobody is finished yet."""
        self._best: list[float] = []
        self._best_epoch: list[int] = []
        self._epochs: dict[str, list[np.ndarray]] = {}  # task -> E arrays (M, N, C) float16
        self._scores: dict[str, list[list[float]]] = {}  # task -> E lists of M scores
        self._dead: list[bool] = []
        self._restored = False
        self._tasks: list[Task] = []

    # What Lightning's checkpoint keeps of it: plain tensors and numbers, so that weights_only=True can load it.

    def state_dict(self) -> dict[str, Any]:
        """Best scores and epochs, and the dev logits of every epoch."""
        return {
            "best": list(self._best),
            "best_epoch": list(self._best_epoch),
            "epochs": {t: [torch.from_numpy(a) for a in arrays] for t, arrays in self._epochs.items()},
            "scores": self._scores,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self._best, self._best_epoch = list(state["best"]), list(state["best_epoch"])
        self._epochs = {t: [a.numpy() for a in arrays] for t, arrays in state["epochs"].items()}
        self._scores = {t: [list(s) for s in scores] for t, scores in state["scores"].items()}

    # Before

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the pool before an hour is spent; restore the members where nothing else was asked for."""
        assert isinstance(pl_module, BankModule)
        self._tasks, pl_module.any_base = pl_module.tasks, self.any_base
        if stage == "fit":
            if not trainer.fast_dev_run:
                self._check_pool(trainer, trainer.datamodule, pl_module)
        elif not self.resumed:
            here = None if self.any_base else pl_module.base_fingerprint(trainer.datamodule)
            restore_members(pl_module.bank, self.dir, base_model=hub_id(pl_module.base_model), fingerprint=here)
            self._restored = True

    def _check_pool(self, trainer: pl.Trainer, data: BankData, module: BankModule) -> None:
        for name, (record, _) in self.found(trainer, data, module, resumed=self.resumed).items():
            if record.finished and not (self.resumed and record.run == self.run):
                where = pool.member_folder(self.dir, record.task, name)
                raise UserError(
                    f"{where}: already trained with these very settings and finished; use it, or {_WAY_OUT}"
                )

    def found(
        self, trainer: pl.Trainer, data: BankData, module: BankModule, *, resumed: bool
    ) -> dict[str, tuple[pool.MemberRecord, bool]]:
        """The module's members that the pool has: name to record, and whether all tasks have it finished.

        With settings and data as they are now: ``UserError`` where a member of that name has others; only how long it
        trains may differ where this run is ``resumed``. Where members may be replaced (``overwrite``), none is there.
        """
        self.dir.mkdir(parents=True, exist_ok=True)
        there: dict[str, tuple[pool.MemberRecord, bool]] = {}
        if self.overwrite:
            return there
        number: Counter[str] = Counter()
        for task in module.tasks:
            for wanted in self._records(trainer, data, module, task, finished=False):
                found = pool.read_record(self.dir, task.name, wanted.name)
                if found is None:
                    continue
                difference = _difference(found, wanted, resumed=resumed and found.run == self.run)
                if not self.any_base and (base := base_difference(found.base_fingerprint, wanted.base_fingerprint)):
                    difference = difference or f"base_fingerprint: {base}; {way_back(found.revision)}"
                if difference:
                    where = pool.member_folder(self.dir, task.name, wanted.name)
                    raise UserError(
                        f"{where}: holds a member of this name with other settings ({difference}); {_WAY_OUT}"
                    )
                number[wanted.name] += found.finished
                there[wanted.name] = found, number[wanted.name] == len(module.tasks)
        return there

    def _records(
        self, trainer: pl.Trainer, data: BankData, module: BankModule, task: Task, *, finished: bool
    ) -> list[pool.MemberRecord]:
        """What member.json will say of each member, but for its results."""
        train, dev = data.splits["train"], data.splits["dev"][task.name]
        settings = {
            **module.training_settings,
            "tasks": [t.name for t in module.tasks],
            "train_fingerprints": {t.name: train[t.name].fingerprint for t in module.tasks},
            "batch_size": data.batch_size,
            "max_length": data.max_length,
            "steps_per_epoch": data.steps_per_epoch,
            "data_seed": data.seed,
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "precision": str(trainer.precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": None
            if trainer.gradient_clip_algorithm is None
            else str(trainer.gradient_clip_algorithm.value),
            "limit_train_batches": trainer.limit_train_batches,
            **data.taught,
        }
        return [
            pool.MemberRecord(
                name=member.name,
                task=task.name,
                kind=task.kind,
                labels=task.labels,
                finished=finished,
                examples={"dev": pool.fingerprint(dev.ids, dev.labels)},
                text=task.text,
                train_fingerprint=train[task.name].fingerprint,
                base_model=hub_id(module.base_model),
                revision=module.revision,
                base_fingerprint=module.base_fingerprint(data),
                finetune=module.finetune,
                rank=member.rank,
                scaling=member.scaling,
                targets=member.targets,
                lr=member.lr,
                seed=member.seed,
                settings=settings,
                run=self.run,
                versions={name: version(name) for name in ("torch", "transformers", "lightning", "lora-ensemble")},
            )
            for member in module.members
        ]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the count, or go on with what the pool has when a run is resumed."""
        assert isinstance(pl_module, BankModule)
        m = len(pl_module.members)
        if not self._best:
            self._best, self._best_epoch = [-math.inf] * m, [0] * m
        self._dead = [False] * m
        if not self.resumed or trainer.fast_dev_run:
            return
        # A kill may have come after the pool was written and before the checkpoint was: the pool's best stays.
        for index, member in enumerate(pl_module.members):
            records = [pool.read_record(self.dir, t.name, member.name) for t in pl_module.tasks]
            found = [r for r in records if r is not None and r.run == self.run and r.score is not None and r.best_epoch]
            same = len({r.best_epoch for r in found}) == 1 and len(found) == len(records)
            if same and (found[0].best_epoch or 0) > self._best_epoch[index]:
                self._best_epoch[index] = found[0].best_epoch or 0
                self._best[index] = overall({r.task: (float(r.score or 0.0), r.kind) for r in found})

    # During

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep this epoch's dev logits, and write the members that improved."""
        assert isinstance(pl_module, BankModule)
        if trainer.state.fn == "validate":
            self._print_scores(pl_module, "dev")
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        evaluations = pl_module.evaluations
        if not all(e.complete for e in evaluations.values()):
            say("dev was evaluated in part only (trainer.limit_val_batches), so nothing goes into the pool")
            return
        for name, e in evaluations.items():
            # Half precision holds a logit to three digits; beyond its range it would turn into infinity.
            self._epochs.setdefault(name, []).append(np.clip(e.logits, -65504, 65504).astype(np.float16))
            self._scores.setdefault(name, []).append(list(e.scores or []))
        kinds = {t.name: t.kind for t in pl_module.tasks}
        epoch = len(self._scores[pl_module.tasks[0].name])
        alive = pl_module.alive()
        for index in range(len(pl_module.members)):
            finite = all(np.isfinite(e.logits[index]).all() for e in evaluations.values())
            if not (alive[index] and finite):
                self._report_dead(pl_module, index, epoch)
                continue
            value = overall({n: ((e.scores or [])[index], kinds[n]) for n, e in evaluations.items()})
            if value > self._best[index]:  # never for NaN: an undefined score is no improvement
                self._best[index], self._best_epoch[index] = value, epoch
                self._write(trainer, pl_module, index)
        if self._dead and all(self._dead):
            raise AllDivergedError("every member has diverged (NaN or infinity); try lower learning rates or scalings")

    def _report_dead(self, module: BankModule, index: int, epoch: int) -> None:
        if not self._dead[index]:
            self._dead[index] = True
            name = module.members[index].name
            say(f"{name} has diverged (NaN or infinity) by epoch {epoch}: frozen, and left out of the selection")

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, module: BankModule, index: int) -> None:
        for task in module.tasks:
            data = trainer.datamodule.splits["dev"][task.name]
            pool.write_examples(self.dir, task.name, "dev", data.ids, data.labels)
            record = self._records(trainer, trainer.datamodule, module, task, finished=False)[index]
            record = self._with_results(record, task, index)
            files: dict[str, Any] = {
                pool.logits_file("dev"): module.evaluations[task.name].logits[index],
                pool.EPOCHS: np.stack([e[index] for e in self._epochs[task.name]]),
            }
            files |= weight_files(
                module.bank, index, task, base_model=hub_id(module.base_model), revision=record.revision
            )
            pool.write_member(self.dir, record, files)

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
        """Mark the members finished and add the dev logits of every epoch. Not reached after an interruption."""
        assert isinstance(pl_module, BankModule)
        if trainer.fast_dev_run or trainer.interrupted or not trainer.is_global_zero or not self._epochs or self.paused:
            return
        for index, member in enumerate(pl_module.members):
            for task in pl_module.tasks:
                found = pool.read_record(self.dir, task.name, member.name)
                if found is None or found.run != self.run or found.best_epoch != self._best_epoch[index]:
                    continue  # never improved (its score is undefined), or diverged at once
                done = not self._dead[index]
                record = self._records(trainer, trainer.datamodule, pl_module, task, finished=done)[index]
                record = dataclasses.replace(self._with_results(record, task, index), examples=found.examples)
                epochs = np.stack([e[index] for e in self._epochs[task.name]])
                pool.write_member(self.dir, record, {} if self._dead[index] else {pool.EPOCHS: epochs}, keep=found)
        if self.summarise:
            print_summary(*self.summary(pl_module), folder=self.dir, tasks=[t.name for t in pl_module.tasks])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say how an interrupted run goes on."""
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and trainer.state.fn == "fit":
            say(f"\ninterrupted: the same command{self.goes_on} goes on; what the pool holds is whole")

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

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the scores."""
        assert isinstance(pl_module, BankModule)
        self._print_scores(pl_module, "test")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the split's logits to the pool, where they are the pool's own members'."""
        assert isinstance(pl_module, BankModule)
        data = trainer.datamodule
        split = data.predict_split
        if not self._restored:
            say("predictions of --ckpt_path are not the pool's best weights, so they were not added to the pool")
            return
        if not all(e.complete for e in pl_module.evaluations.values()):
            say(f"{split} was predicted in part only (trainer.limit_predict_batches): nothing was added to the pool")
            return
        self._add_logits(pl_module, data, split)

    @rank_zero_only
    def _add_logits(self, module: BankModule, data: BankData, split: str) -> None:
        for task in module.tasks:
            examples, logits = data.splits[split][task.name], module.evaluations[task.name].logits
            print_ = pool.write_examples(self.dir, task.name, split, examples.ids, examples.labels)
            for index, member in enumerate(module.members):
                record = pool.read_record(self.dir, task.name, member.name)
                assert record is not None
                new = dataclasses.replace(record, examples={**record.examples, split: print_})
                pool.write_member(self.dir, new, {pool.logits_file(split): logits[index]}, keep=record)
            say(f"{task.name}: {split} logits of {len(module.members)} members added to {self.dir / task.name}")

    def _print_scores(self, module: BankModule, split: str) -> None:
        rows = [
            [
                m.name,
                *((module.evaluations[t.name].scores or [math.nan] * len(module.members))[i] for t in module.tasks),
            ]
            for i, m in enumerate(module.members)
        ]
        say(table(["member", *(f"{t.name} {split} ({t.score_name})" for t in module.tasks)], rows))


def overall(scores: dict[str, tuple[float, Any]]) -> float:
    """What a run's best epoch is chosen by: the score of its one task, or the overall score (task: score, kind)."""
    return next(iter(scores.values()))[0] if len(scores) == 1 else overall_score(scores)


def _difference(found: pool.MemberRecord, wanted: pool.MemberRecord, *, resumed: bool) -> str:
    """The first setting in which two records differ, in words; empty where they agree."""
    for key in ("base_model", "finetune", "rank", "scaling", "targets", "lr", "seed", "labels", "train_fingerprint"):
        a, b = getattr(found, key), getattr(wanted, key)
        if a != b:
            return f"{key} was {a!r}, is now {b!r}"
    if found.examples.get("dev") != wanted.examples.get("dev"):
        return "the dev examples were others"
    for key in dict.fromkeys([*wanted.settings, pool.DISTILLED]):
        a, b = found.settings.get(key), wanted.settings.get(key)
        if a != b and not (resumed and key in _MAY_DIFFER_ON_RESUME):
            return f"{key} was {a!r}, is now {b!r}"
    return ""


def print_summary(header: list[str], rows: list[list[Any]], *, folder: Path, tasks: list[str]) -> None:
    """The table of :meth:`PoolWriter.summary`, best members first, and what to do next."""
    say(table(header, sorted(rows, key=lambda r: [-s if s == s else math.inf for s in r[2:]])))
    say(f"pool: {folder}\nnext:" + "".join(f"\n  dicor compare --pool {folder} --task {t}" for t in tasks))


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Rows as lines of text in columns; floats with four decimals."""
    text = [header] + [[f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in text)
