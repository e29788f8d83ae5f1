"""The callback that restores the pool's members to be used, and adds to the pool what they predict."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from lora_ensemble import pool
from lora_ensemble.bank.base_model import hub_id
from lora_ensemble.bank.member_files import restore_members
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import say, table


class PoolUser(pl.Callback):
    """For validate, test and predict: the members' best weights, unless a checkpoint was asked for, and their scores.

    ``dir``: the pool's folder. ``any_base``: take members although the base model is no longer theirs.
    ``from_checkpoint``: use what the Trainer restores.
    """

    def __init__(self, dir: Path, *, any_base: bool, from_checkpoint: bool) -> None:
        self.dir, self.any_base, self.from_checkpoint = dir, any_base, from_checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the members where nothing else was asked for."""
        assert isinstance(pl_module, BankModule)
        pl_module.any_base = self.any_base
        if not self.from_checkpoint:
            here = None if self.any_base else pl_module.base_fingerprint(trainer.datamodule)
            restore_members(pl_module.bank, self.dir, base_model=hub_id(pl_module.base_model), fingerprint=here)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the scores."""
        assert isinstance(pl_module, BankModule)
        self._print_scores(pl_module, "dev")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the scores."""
        assert isinstance(pl_module, BankModule)
        self._print_scores(pl_module, "test")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the split's logits to the pool, where they are the pool's own members'."""
        assert isinstance(pl_module, BankModule)
        data = trainer.datamodule
        split = data.predict_split
        if self.from_checkpoint:
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
            fingerprint = pool.write_examples(self.dir, task.name, split, examples.ids, examples.labels)
            new = []
            records = pool.read_records(self.dir, task.name, [m.name for m in module.members])
            for index, record in enumerate(records):
                added = dataclasses.replace(record, examples={**record.examples, split: fingerprint})
                new.append(pool.NewMember(record=added, files={pool.logits_file(split): logits[index]}, keep=record))
            pool.write_members(self.dir, new)
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
