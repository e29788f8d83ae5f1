"""``lora-ensemble distill``: the command ``fit``, but its members are students of an ensemble."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lora_ensemble.bank.lora import Member
from lora_ensemble.studies.distill import Distillation
from lora_ensemble.train import cli
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule


class DistillCLI(cli.CLI):
    """The command line of training with the command ``distill`` alone."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """``distill``."""
        return {"distill": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse twice, with other defaults: students are trained as the ensemble's best member was."""
        LightningCLI.parse_arguments(self, parser, args)
        given = self.config.distill
        self._distillation = Distillation(
            path=Path(given.ensemble),
            elsewhere=Path(given.ensemble_pool) if given.ensemble_pool else None,
            unlabelled=[Path(file) for file in cli.as_list([] if given.unlabelled is None else given.unlabelled)],
            soft_weight=given.soft_weight,
            any_base=given.pool.any_base,
        )
        defaults = self._distillation.defaults()
        self._parser("distill").set_own_defaults(defaults, "--ensemble: its best member has settings that are none")
        super().parse_arguments(parser, args)
        model = self.config.distill.model
        if model.base_model != defaults.get("model.base_model") and model.revision == defaults.get("model.revision"):
            model.revision = self.config.distill.data.revision = None  # the ensemble's is of its own base model
        entries = None if model.members is None else [Member(**vars(entry)) for entry in model.members]
        students = self._distillation.named(entries, finetune=model.finetune)
        model.members = tuple(Namespace(**dataclasses.asdict(s)) for s in students)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """As in training, once it is clear that the data are the ensemble's."""
        self._distillation.task_of(self.datamodule)
        return super().instantiate_trainer(**kwargs)

    def distill(
        self,
        model: BankModule,
        datamodule: BankData,
        ensemble: str,
        ensemble_pool: str | None = None,
        unlabelled: list[str] | str | None = None,
        soft_weight: float = 0.5,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train a student of an ensemble: on what its members say on average, and on the labels.

        Settings that are not given are those of the ensemble's best member.

        Args:
            ensemble: What ``dicor select`` wrote.
            ensemble_pool: Where its members are, if no longer where it says.
            unlabelled: A file, or several, of texts without labels, with the task's text columns.
            soft_weight: Weight of the ensemble's prediction against the label: 0 to 1.
        """
        keep = None if self.config.distill.trainer.fast_dev_run else self.run_dir.parent.parent / "soft"
        self._distillation.teach(datamodule, self.trainer, keep=keep)
        self.fit(model, datamodule, ckpt_path, weights_only)


class _Trainer(cli.CommandTrainer):
    """The Trainer's own flags"""  # a heading of --help

    distill = DistillCLI.distill


def run(args: Sequence[str]) -> int:
    """As ``train.cli.run``."""
    return cli.run(args, DistillCLI, _Trainer)
