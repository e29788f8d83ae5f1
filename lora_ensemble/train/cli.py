"""``lora-ensemble fit|sweep|validate|test|predict``: LightningCLI with the pool, a run's folder, one-line errors."""

from __future__ import annotations

import copy
import json
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lora_ensemble import __version__
from lora_ensemble.bank.encode import bf16_advice
from lora_ensemble.errors import UserError
from lora_ensemble.pool import check_name
from lora_ensemble.train.batches import TokenisedSplit
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import default_loggers, say, unfailing
from lora_ensemble.train.options import OneLineParser, SaveConfig, check_settings, plain, quieten, run_name
from lora_ensemble.train.pool_writer import PoolUser, PoolWriter
from lora_ensemble.train.records import PoolOptions, PoolRecords
from lora_ensemble.train.restart import BankTrainer, RunCheckpoint
from lora_ensemble.train.runs import ray_sweep
from lora_ensemble.train.runs.banks import BankRun
from lora_ensemble.train.runs.halving import EarlyExit
from lora_ensemble.train.runs.plan import FILE as PLAN_FILE
from lora_ensemble.train.runs.plan import evaluation_banks
from lora_ensemble.train.runs.ray_sweep import RayOptions
from lora_ensemble.train.runs.sweep import Sweep

Run = TypeVar("Run", bound=BankRun)
GOES_ON = ("sweep", "boost")
"""Commands that go on by themselves where they were stopped."""


class CLI(LightningCLI):
    """LightningCLI with ``sweep``, ``--pool.*``, ``--experiment`` and ``--bank_size``.

    ``trainer_class``: has a method for each command of ours, whose arguments become the command's. ``tokenised``:
    splits that commands of one program read once: :attr:`BankData.tokenised`.
    """

    def __init__(
        self,
        args: Sequence[str],
        trainer_class: type[pl.Trainer],
        *,
        tokenised: dict[Any, TokenisedSplit] | None = None,
    ) -> None:
        self._command, self._tokenised = args[0], {} if tokenised is None else tokenised
        super().__init__(
            BankModule,
            BankData,
            trainer_class=trainer_class,
            save_config_callback=SaveConfig,
            seed_everything_default=11711,
            auto_configure_optimizers=False,
            trainer_defaults={
                "max_epochs": 10,
                "default_root_dir": "checkpoints",
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "log_every_n_steps": 20,
            },
            parser_kwargs={"version": __version__},
            args=list(args),
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Lightning's, and our own; the one that is asked for alone, for each has a parser that takes time to make."""
        every = {**LightningCLI.subcommands(), "sweep": {"model", "datamodule"}}
        return {self._command: every[self._command]} if self._command in every else every

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser with one-line errors."""
        parser = OneLineParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Settings in YAML; several files, later ones win.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The pool, the experiment's name, the size of banks, and what the model takes from the data."""
        parser.add_class_arguments(PoolOptions, "pool")
        parser.add_argument(
            "--experiment", type=str | None, default=None, help="Groups runs in Weights & Biases; default: the tasks."
        )
        parser.add_argument(
            "--bank_size",
            type=int | Literal["auto"] | None,
            default="auto",
            help="Members that train at once: as many as fit the device's memory (auto), a number, or all (null). The "
            "others wait for their turn, in banks of their own.",
        )
        parser.link_arguments("model.base_model", "data.base_model")
        parser.link_arguments("model.revision", "data.revision")
        for key in ("seed", "folds", "refit"):
            parser.link_arguments(f"data.{key}", f"model.{key}")
        parser.link_arguments("data.tasks", "model.tasks", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check what would fail only after the model was loaded."""
        super().parse_arguments(parser, args)
        check_settings(self.config[self.config.subcommand], sweep=self.config.subcommand in GOES_ON)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer for all members in one bank, with this run's folder, its checkpoint and its curves."""
        config, sweep = self.config[self.subcommand], self.subcommand in GOES_ON
        self.datamodule.tokenised = self._tokenised
        self._trains = self.subcommand not in ("validate", "test", "predict")
        given = config.trainer
        dry = given.fast_dev_run or given.barebones
        self._saves = self._trains and given.enable_checkpointing is not False and not dry
        if self._trains:  # what can be seen now, before there is a run that would stay empty
            self.datamodule.check_files()
        root = Path(given.default_root_dir or "checkpoints")
        self.model.any_base, self.model.frozen_dir = config.pool.any_base, None if dry else root / "frozen"
        experiment = "-".join(t.name for t in self.datamodule.tasks)
        if config.experiment is not None:
            check_name(experiment := config.experiment, what="--experiment")
        name = run_name(experiment, plain(self._parser(self.subcommand), config))
        self.run_dir = root / "runs" / name
        self.save_config_kwargs = {"folder": self.run_dir}
        folder = self.run_dir / "checkpoint"
        resumed = config.get("ckpt_path") is not None or (sweep and (folder / "last.ckpt").is_file())
        # Shared by all banks: a member's curves have names of their own. All else, a bank's Trainer has anew.
        self._logger: Any = self._get(self.config_init, "trainer").logger
        if self._logger in (None, True):
            again = resumed or (sweep and (self.run_dir / PLAN_FILE).is_file())
            use = self._trains and not dry
            self._logger = default_loggers(self.run_dir, experiment=experiment, resumed=again) if use else False
        elif self._logger:
            self._logger = [unfailing(logger) for logger in as_list(self._logger)]
        settings = {**vars(self._get(self.config_init, "trainer"))}
        if given.barebones:  # would refuse a default of ours
            settings["log_every_n_steps"] = None
        self._settings = copy.deepcopy({k: v for k, v in settings.items() if k != "logger"})
        if self._saves and not sweep and not resumed and any(folder.rglob("last.ckpt")):
            say(f"note: these settings were run before; add --ckpt_path last to go on from {folder}")
        trainer = self._trainer(folder, resumed, whole=not sweep)
        device = trainer.strategy.root_device.type
        if note := bf16_advice(trainer.precision, device, instead="--trainer.precision 32-true"):
            say(note)
        return trainer

    def _trainer(self, folder: Path, resumed: bool, *, whole: bool) -> pl.Trainer:
        """A Trainer whose checkpoints go to ``folder``; ``whole``: for all members, so that it prints the table."""
        options: PoolOptions = self._get(self.config_init, "pool")
        settings = copy.deepcopy(self._settings)
        writer: pl.Callback = PoolUser(options, from_checkpoint=resumed)
        if self._trains:
            replaced = self.run_dir / "replaced" if self._saves else None
            records = PoolRecords(options, self.run_dir.name, resumed=resumed, replaced=replaced)
            writer = PoolWriter(records, summarise=whole)
        settings["callbacks"] = [*as_list(settings["callbacks"] or []), writer]
        trainer = super().instantiate_trainer(**settings, logger=self._logger)
        # Lightning's own default would write beside the logger's files, where --ckpt_path last never finds them.
        default = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.dirpath is None]
        trainer.callbacks = [c for c in trainer.callbacks if c not in default]
        if self._saves:
            trainer.callbacks.append(RunCheckpoint(folder))
        return trainer

    # The commands, which LightningCLI looks for by name

    def fit(
        self, model: BankModule, datamodule: BankData, ckpt_path: str | None = None, weights_only: bool | None = None
    ) -> None:
        """Train all members, in as many banks as it takes."""
        self._run(BankRun, model, datamodule).fit(ckpt_path, weights_only)

    def sweep(
        self,
        model: BankModule,
        datamodule: BankData,
        early_exit: EarlyExit | None = None,
        plan_only: bool = False,
        bank: int | None = None,
        ray: RayOptions | None = None,
    ) -> None:
        """Train what the pool has not finished, and go on where a run of these settings stopped.

        Args:
            early_exit: Lets members that cannot catch up leave their bank.
            plan_only: Write the plan of banks, say how many there are, and stop.
            bank: Train this bank of the plan alone, counted from 1: for an array of jobs. Then sweep once more.
            ray: Train the banks as tasks of a Ray cluster.
        """
        # Whoever trains a bank elsewhere has the base model of this process, though the hub's newest be another there.
        self.config["sweep"].model.revision = model.revision
        train = None
        if plan_only:
            train = ray_sweep.planned
        elif ray is not None:
            if self.trainer.world_size > 1:  # Lightning would start the other processes from Ray's worker script
                raise UserError(
                    f"--ray: each bank is a task on one device, but the Trainer has {self.trainer.world_size}; leave "
                    "--trainer.devices at 1, or --ray out"
                )
            # Resolved, for a process that is given the number of its bank besides: --config.
            settings = json.dumps({**plain(self._parser("sweep"), self.config["sweep"]), "ray": None})
            train = partial(ray_sweep.train, ray, settings)
        self._run(Sweep, model, datamodule).sweep(early_exit, bank=bank, train=train)

    def _run(self, kind: type[Run], model: BankModule, datamodule: BankData) -> Run:
        config, trainer = self.config[self.subcommand], self.trainer
        del self.trainer  # or it would keep the first bank's state
        make, keep = partial(self._trainer, whole=False), not config.trainer.fast_dev_run
        return kind(model, datamodule, trainer, make, run_dir=self.run_dir, size=config.bank_size, keep=keep)

    def _evaluate(self, verb: str, model: BankModule, datamodule: BankData, **options: Any) -> None:
        """Score the members on dev or test, or add a split's logits to the pool."""
        config, last = self.config[self.subcommand], self.run_dir / "checkpoint" / "last.ckpt"
        if options.get("ckpt_path") in ("last", "best"):  # Lightning would go on without one
            if options["ckpt_path"] == "best" or not last.is_file():
                why = f"there is no {last}; leave it out for the pool's best weights, or give a file"
                raise UserError(f"--ckpt_path {options['ckpt_path']}: {why}")
            options["ckpt_path"] = str(last)
        # A checkpoint is of one bank.
        banks = [] if options.get("ckpt_path") else evaluation_banks(model, config.bank_size, self.run_dir)
        # Members without a folder: their score was never defined, or they are not trained yet.
        homes = [Path(config.pool.dir) / task.name for task in model.tasks]
        gone = [m.name for m in model.members if banks and not any((home / m.name).is_dir() for home in homes)]
        gone = gone if len(gone) < len(model.members) else []  # nobody is there: an error that says so
        if len(banks) <= 1 and not gone:
            getattr(self.trainer, verb)(model=model, datamodule=datamodule, **options)
            return
        if gone:
            say(f"{len(gone)} of {len(model.members)} members are not in the pool, and left out: {', '.join(gone)}")
        model.release()
        for names in banks:
            if members := [m for m in model.members if m.name in names and m.name not in gone]:
                trainer = self._trainer(last.parent, False, whole=False)
                getattr(trainer, verb)(model=model.with_members(members), datamodule=datamodule, **options)

    validate = partialmethod(_evaluate, "validate")
    test = partialmethod(_evaluate, "test")
    predict = partialmethod(_evaluate, "predict")


def as_list(value: Any) -> list[Any]:
    """A list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


class CommandTrainer(BankTrainer):
    """The Trainer's own flags"""  # a heading of --help

    # LightningCLI reads a command's arguments off the Trainer's method, and then calls its own.
    sweep = CLI.sweep


def run(args: Sequence[str], cli: Callable[..., CLI] = CLI, trainer_class: type[pl.Trainer] = CommandTrainer) -> int:
    """Parse and run a command; returns the exit code. ``UserError`` for what the user can put right."""
    quieten()
    try:
        cli(args, trainer_class)
    except SIGTERMException:
        return 128 + signal.SIGTERM
    except (MisconfigurationException, ValueError) as e:
        if "lightning" not in traceback.extract_tb(e.__traceback__)[-1].filename.split(os.sep):
            raise
        raise UserError(f"trainer: {' '.join(str(e).split())}") from e  # flags that do not go together
    except SystemExit as e:  # Lightning's answer to Ctrl-C, where it is not RunCheckpoint's to answer
        if isinstance(e.__context__, KeyboardInterrupt):
            return 128 + signal.SIGINT
        raise
    finally:
        # Lightning (2.6) does so for NCCL only. What gloo's threads still hold when the interpreter ends may abort it.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0
