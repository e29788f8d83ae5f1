"""A run's members in the pool: what their records say, which of those that are there may be replaced, and writing them.

Axes: M members, N examples of a split, C outputs of a head, E epochs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lora_ensemble import __version__, pool
from lora_ensemble.bank.base_model import base_difference, hub_id
from lora_ensemble.bank.member_files import answering_files
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import OOF
from lora_ensemble.train.batches import TokenisedSplit
from lora_ensemble.train.data import BankData
from lora_ensemble.train.evaluation import History
from lora_ensemble.train.module import BankModule

# None of these changes what a member is: a run may be resumed for longer.
_MAY_DIFFER_ON_RESUME = ("max_epochs", "max_steps")
_OF_THE_TRAINER = (
    *("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "limit_train_batches"),
)
_WAY_OUT = "choose another --pool.dir, give the member another name, or set --pool.overwrite true"


@dataclass(frozen=True)
class PoolOptions:
    """Puts a member that improved on dev into the pool.

    Args:
        dir: The pool's folder.
        overwrite: Replace members that are already there, finished or of other settings.
        any_base: Use members and checkpoints although the base model is no longer the one they were trained over.
    """  # --help shows all of it

    dir: str = "checkpoints/pool"
    overwrite: bool = False
    any_base: bool = False


class PoolRecords:
    """The members of one bank of the run of this name, which ties one member's folders in several tasks, in the pool.

    ``resumed``: whether it goes on from a checkpoint. ``replaced``: where members go that an evaluation at a cut
    replaces; None: it cannot be gone on with.
    """

    def __init__(self, options: PoolOptions, run: str, *, resumed: bool = False, replaced: Path | None = None) -> None:
        self.dir, self.options, self.run = Path(options.dir), options, run
        self.resumed, self.replaced = resumed, replaced
        self._records: dict[str, list[pool.MemberRecord]] = {}  # task -> a record per member, without results
        self._seen: dict[Path, dict[str, str]] = {}  # members that were there at the start: folder -> files

    def existing(
        self, data: BankData, module: BankModule, *, resumed: bool
    ) -> dict[str, tuple[pool.MemberRecord, bool]]:
        """The module's members that the pool has: name to record, and whether all tasks have it finished.

        ``UserError`` where a member of that name has other settings or data; only how long it trains may differ where
        this run is ``resumed``. Where members may be replaced (``overwrite``), none is there.
        """
        self.dir.mkdir(parents=True, exist_ok=True)
        self._records = described(data, module, run=self.run)
        there: dict[str, tuple[pool.MemberRecord, bool]] = {}
        finished: Counter[str] = Counter()
        for task, records in self._records.items() if not self.options.overwrite else ():
            expected = {record.name: record for record in records}
            for record in pool.read_records(self.dir, task, list(expected)):
                where, wanted = pool.member_folder(self.dir, task, record.name), expected[record.name]
                longer, any_base = resumed and record.run == self.run, self.options.any_base
                if differs := difference(record, wanted, resumed=longer, any_base=any_base):
                    raise UserError(f"{where}: holds a member of this name with other settings ({differs}); {_WAY_OUT}")
                self._seen[where] = record.files
                finished[record.name] += record.finished
                there[record.name] = record, finished[record.name] == len(module.tasks)
        return there

    def check_unfinished(self, there: Iterable[pool.MemberRecord]) -> None:
        """``UserError`` where a member is finished, unless this very run finished it and is resumed."""
        for record in there:
            if record.finished and not (self.resumed and record.run == self.run):
                raise UserError(
                    f"{pool.member_folder(self.dir, record.task, record.name)}: already trained with these very "
                    f"settings and finished; use it, or {_WAY_OUT}"
                )

    def write(self, module: BankModule, history: History, improved: Sequence[int], *, at_a_cut: bool) -> None:
        """Write the members that improved in the last evaluation.

        ``at_a_cut``: it is undone where the run goes on, so what they replace is kept.
        """
        new, data, base, folds = [], module.trainer.datamodule, hub_id(module.base_model), module.folds
        models = np.reshape(folds.rows(len(module.members), None), (len(module.members), -1)).tolist()
        for task in module.tasks if improved else ():
            said = {split: of[task.name].logits for split, of in module.evaluations.items() if task.name in of}
            for split in said:
                own = data.splits[split][task.name]
                pool.write_examples(self.dir, task.name, split, own.ids, own.labels, own.groups)
            for index in improved:
                record = self._records[task.name][index]
                files: dict[str, Any] = {
                    **{pool.logits_file(split): logits[index] for split, logits in said.items()},
                    pool.epochs_file(folds.decides): history.logits_of(task.name, index),
                    **answering_files(module.bank, models[index], task, base_model=base, revision=record.revision),
                }
                record = dataclasses.replace(record, **history.results(task.name, index))
                keep = self.replaced and pool.member_folder(self.replaced, task.name, record.name) if at_a_cut else None
                new.append(pool.NewMember(record=record, files=files, replaced_to=keep))
        pool.write_members(self.dir, new, check=None if self.options.overwrite else self._check_replaced)

    def _check_replaced(self, there: pool.MemberRecord) -> None:
        """``UserError`` where another run has written a member since this one began."""
        ours = there.run == self.run and (self.resumed or not there.finished)
        folder = pool.member_folder(self.dir, there.task, there.name)
        if not (ours or (not there.finished and self._seen.get(folder) == there.files)):
            raise UserError(
                f"{folder}: written meanwhile by another run ({there.run}); two runs cannot fill one pool with members "
                f"of the same names: {_WAY_OUT}"
            )

    def write_results(self, history: History, members: Sequence[int], *, finished: bool) -> list[pool.MemberRecord]:
        """The last word on these members, and their dev logits of every epoch; returns those that are not there."""
        gone, new = [], []
        for task, records in self._records.items() if len(history) else ():
            there = {r.name: r for r in pool.read_records(self.dir, task, history.members)}
            for index in members:
                record = records[index]
                before, best = there.get(record.name), history.best_epoch[index]
                if not best:
                    continue  # its score is undefined, or it diverged at once
                if before is None or before.run != self.run or before.best_epoch != best:
                    gone.append(record)
                    continue
                diverged = history.diverged[index]
                record = dataclasses.replace(
                    record, **history.results(task, index), finished=finished and not diverged, examples=before.examples
                )
                # One that improved in the last evaluation has them all.
                has_all = best == record.epochs_done == before.epochs_done
                epochs = pool.epochs_file(OOF if record.folds else "dev")
                files = {} if diverged or has_all else {epochs: history.logits_of(task, index)}
                new.append(pool.NewMember(record=record, files=files, keep=before))
        pool.write_members(self.dir, new)
        return gone

    def agree_with(self, history: History, *, writes: bool) -> list[str]:
        """Undo what the pool has from after a checkpoint whose ``history`` this is, and offer anew what it has not.

        Returns the members that are offered anew. ``writes``: false on all processes but one.
        """
        tasks = list(self._records)
        there = {(r.task, r.name): r for t in tasks for r in pool.read_records(self.dir, t, history.members)}
        back: list[pool.NewMember] = []
        anew = []
        for index, name in enumerate(history.members):
            best, records = history.best_epoch[index], [there.get((t, name)) for t in tasks]
            ours = [r.best_epoch or 0 for r in records if r is not None and r.run == self.run]
            if not best or (len(ours) == len(tasks) and set(ours) == {best}):
                continue
            if kept := self._kept(tasks, name, best):
                back += kept
            elif len(ours) < len(tasks) or min(ours) < best:
                history.forget_best(index)
                anew.append(name)
            # Else a kill came between the pool and the checkpoint: the same evaluation comes again.
        if writes:
            pool.write_members(self.dir, back)
        if writes and (replaced := self.replaced) is not None:
            for task, name in itertools.product(tasks, history.members):
                shutil.rmtree(pool.member_folder(replaced, task, name), ignore_errors=True)
        return anew

    def _kept(self, tasks: Sequence[str], name: str, best: int) -> list[pool.NewMember]:
        """A member as it was before the evaluation at a cut replaced it, if that is of the epoch ``best``."""
        kept = self.replaced
        records = [r for t in tasks for r in pool.read_records(kept, t, [name])] if kept else []
        if kept is None or len(records) < len(tasks) or any((r.best_epoch, r.run) != (best, self.run) for r in records):
            return []
        return [
            pool.NewMember(record=r, files={f: pool.member_folder(kept, r.task, name) / f for f in r.files})
            for r in records
        ]


def add_logits(
    folder: Path, task: str, split: str, examples: TokenisedSplit, members: Sequence[str], logits: np.ndarray
) -> None:
    """Add logits (M, N, C) on a split to members that the pool at ``folder`` has."""
    fingerprint = pool.write_examples(folder, task, split, examples.ids, examples.labels, examples.groups)
    new = [
        pool.NewMember(
            record=dataclasses.replace(record, examples={**record.examples, split: fingerprint}),
            files={pool.logits_file(split): logits[index]},
            keep=record,
        )
        for index, record in enumerate(pool.read_records(folder, task, members))
    ]
    pool.write_members(folder, new)


def described(data: BankData, module: BankModule, *, run: str) -> dict[str, list[pool.MemberRecord]]:
    """Task to what member.json will say of each member of a bank, but for its results. ``run``: the run's name."""
    trainer: Any = data.trainer
    train, evaluated = data.splits["train"], {split: data.splits[split] for split in data.evaluated}
    clipping, overfit = trainer.gradient_clip_algorithm, trainer.overfit_batches
    settings = {
        **module.training_settings,
        "tasks": [t.name for t in module.tasks],
        "train_fingerprints": {t.name: train[t.name].fingerprint for t in module.tasks},
        **{key: getattr(data, key) for key in ("batch_size", "max_length", "steps_per_epoch")},
        **({} if data.truncation == "head" else {"truncation": data.truncation}),
        "data_seed": data.seed,
        **{key: getattr(trainer, key) for key in _OF_THE_TRAINER},
        "precision": str(trainer.precision),
        "gradient_clip_algorithm": None if clipping is None else str(clipping.value),
        **({"overfit_batches": overfit} if overfit else {}),
        **data.taught,
    }
    records = {}
    for task in module.tasks:
        examples = {split: of[task.name] for split, of in evaluated.items() if task.name in of}
        common: dict[str, Any] = {
            **{"task": task.name, "kind": task.kind, "labels": task.labels, "text": task.text},
            **{"base_model": hub_id(module.base_model), "revision": module.revision, "finetune": module.finetune},
            "base_fingerprint": module.base_fingerprint(data),
            "examples": {s: pool.examples_fingerprint(e.ids, e.labels, e.groups) for s, e in examples.items()},
            **{"folds": data.folds.count or None, "refit": data.folds.refit or None},
            "train_fingerprint": train[task.name].fingerprint,
            **{"settings": settings | task.recorded, "run": run, "versions": _versions()},
        }
        records[task.name] = [pool.MemberRecord(**member.recorded(), **common) for member in module.members]
        for record in records[task.name]:
            if (weights := data.boosted.get(task.name, {}).get(record.name)) is not None:
                digest = hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()[:16]
                record.settings = {**record.settings, "boosted": digest}
    return records


@cache
def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("torch", "transformers", "lightning")}
    return {**others, "lora-ensemble": __version__}


def difference(there: pool.MemberRecord, wanted: pool.MemberRecord, *, resumed: bool, any_base: bool) -> str:
    """The first setting in which two records differ, in words; empty where they agree.

    ``resumed``: only how long it trains may differ. ``any_base``: the base model may, too.
    """
    for key in (
        *("base_model", "finetune", "rank", "scaling", "targets", "layers", "patience", "lr", "lr_b"),
        *("weight_decay", "dropout", "init", "bag", "folds", "refit", "seed", "labels", "train_fingerprint"),
    ):
        if (a := getattr(there, key)) != (b := getattr(wanted, key)):
            return f"{key} was {a!r}, is now {b!r}"
    for split in wanted.examples:
        if there.examples.get(split) != wanted.examples[split]:
            return f"the {split} examples were others"
    for key in {**there.settings, **wanted.settings}:
        a, b = there.settings.get(key), wanted.settings.get(key)
        if a != b and not (resumed and key in _MAY_DIFFER_ON_RESUME):
            return f"{key} was {a!r}, is now {b!r}"
    base = "" if any_base else base_difference(there.base_fingerprint, wanted.base_fingerprint, there.revision)
    return f"base_fingerprint: {base}" if base else ""
