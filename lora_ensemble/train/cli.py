"""``lora-ensemble fit|distill|sweep|...``: LightningCLI with the pool, a run's folder, one-line errors."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lora_ensemble import __version__
from lora_ensemble.bank.lora import MemberConfig
from lora_ensemble.bank.precision import advice
from lora_ensemble.errors import UserError
from lora_ensemble.pool import check_name
from lora_ensemble.studies.distill import Distillation
from lora_ensemble.tasks import Task
from lora_ensemble.train.curves import MemberTable, default_loggers, unfailing
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule, check_precision
from lora_ensemble.train.notices import say
from lora_ensemble.train.pool_user import PoolUser
from lora_ensemble.train.pool_writer import PoolWriter
from lora_ensemble.train.restart import BankTrainer, RunCheckpoint
from lora_ensemble.train.runs import ray_sweep
from lora_ensemble.train.runs.banks import BankRun, release
from lora_ensemble.train.runs.halving import EarlyExit
from lora_ensemble.train.runs.plan import FILE as PLAN_FILE
from lora_ensemble.train.runs.plan import check_bank_size, evaluation_banks
from lora_ensemble.train.runs.ray_sweep import RayOptions
from lora_ensemble.train.runs.sweep import Sweep

# Settings that do not change what a run trains, so that it may be resumed with others. Another revision of the base
# model does, but a run that began with the newest goes on with the one that it recorded.
_NOT_THE_RUN = {
    *("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps", "devices", "num_nodes", "accelerator"),
    *("strategy", "logger", "callbacks", "log_every_n_steps", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "default_root_dir", "profiler", "num_sanity_val_steps", "fast_dev_run", "barebones"),
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "inference_mode", "detect_anomaly"),
    *("check_val_every_n_epoch", "val_check_interval"),
    "revision",
}


Run = TypeVar("Run", bound=BankRun)


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line, where jsonargparse would print hundreds of lines of usage first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        said = " ".join(line.strip() for line in message.splitlines() if line.strip())
        # jsonargparse puts the command before the option: distill.ensemble.
        said = re.sub(r"^the following arguments are required: \w+\.(\S+)$", r"--\1 is required", said)
        if "Expected a <class 'str'>. Got value" in said:  # which YAML made of a word without quotes
            said += '; write words like no, yes, on and off, and numbers, in quotes: "no"'
        if "Option 'shared' is not accepted" in said:
            said = "--ray.shared is gone: a cluster needs storage that all its nodes share; leave it out"
        print(f"lora-ensemble: error: {said}", file=sys.stderr)
        sys.exit(2)


class _SaveConfig(SaveConfigCallback):
    """Keeps the resolved config of ``fit`` in the run's folder; ``validate`` and the others leave it alone."""

    run_dir: Path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            _save_settings(self.run_dir, self.parser, self.config)
            for logger in trainer.loggers:
                logger.log_hyperparams(json.loads(self.parser.dump(self.config, format="json", skip_none=False)))


def _save_settings(run_dir: Path, parser: LightningArgumentParser, config: Any) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(parser.dump(config, skip_none=False), encoding="utf-8")


class CLI(LightningCLI):
    """LightningCLI with ``distill``, ``sweep``, ``--pool.*``, ``--experiment`` and ``--bank_size``."""

    _distillation: Distillation | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and our own."""
        return {**LightningCLI.subcommands(), **{verb: {"model", "datamodule"} for verb in ("distill", "sweep")}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser with one-line errors."""
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Settings in YAML; several files, later ones win.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The pool, the experiment's name, the size of banks, and what the model takes from the data."""
        parser.add_lightning_class_args(PoolWriter, "pool")
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
        parser.link_arguments("data.seed", "model.seed")
        parser.link_arguments("data.tasks", "model.tasks", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check what would fail only after the model was loaded."""
        super().parse_arguments(parser, args)
        if self.config.subcommand == "distill":
            self._parse_as_the_ensemble(parser, args)
        config = self.config[self.config.subcommand]
        _check_tasks(config)
        check_precision(config.trainer.precision)
        check_bank_size(config.bank_size)
        if config.get("ckpt_path") not in (None, "last", "best", "hpc"):
            _check_checkpoint(config.ckpt_path)
        if self.config.subcommand == "sweep" and config.pool.overwrite:
            raise UserError(
                "--pool.overwrite: a sweep trains what is not finished and replaces nothing; delete the folders of the "
                "members that are to be trained again, or choose another --pool.dir"
            )
        if config.get("early_exit") is not None:
            EarlyExit(**vars(config.early_exit)).check()
        if config.get("ray") is not None:
            RayOptions(**vars(config.ray)).check()
        if self.config.subcommand != "sweep" and config.get("weights_only") is None:
            config.weights_only = True  # a checkpoint is never unpickled

    def _parse_as_the_ensemble(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse again with other defaults: students are trained as the ensemble's best member was."""
        given = self.config.distill
        self._distillation = Distillation(
            given.ensemble,
            ensemble_pool=given.ensemble_pool,
            unlabelled=[given.unlabelled] if isinstance(given.unlabelled, str) else given.unlabelled or [],
            soft_weight=given.soft_weight,
            any_base=given.pool.any_base,
        )
        defaults = self._distillation.defaults()
        try:
            self._parser("distill").set_defaults(defaults)
        except ArgumentError as e:
            reason = " ".join(str(e).split())
            raise UserError(f"--ensemble: its best member has settings that are none ({reason})") from e
        super().parse_arguments(parser, args)
        model = self.config.distill.model
        if model.base_model != defaults.get("model.base_model") and model.revision == defaults.get("model.revision"):
            model.revision = self.config.distill.data.revision = None  # the ensemble's is of its own base model
        entries = None if model.members is None else [MemberConfig(**vars(entry)) for entry in model.members]
        students = self._distillation.named(entries, finetune=model.finetune)
        model.members = tuple(Namespace(**dataclasses.asdict(s)) for s in students)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer for all members in one bank, with this run's folder, its checkpoint and its curves."""
        config = self.config[self.subcommand]
        if self._trains:  # what can be seen now, before there is a run that would stay empty
            if self._distillation is not None:
                self._distillation.task_of(self.datamodule)
            self.datamodule.check_files()
        experiment = "-".join(t.name for t in self.datamodule.tasks)
        if config.experiment is not None:
            check_name(experiment := config.experiment, what="--experiment")
        self.run_dir = (
            Path(config.trainer.default_root_dir or "checkpoints") / "runs" / self._run_name(config, experiment)
        )
        _SaveConfig.run_dir = self.run_dir
        folder = self.run_dir / "checkpoint"
        sweep = self.subcommand == "sweep"
        resumed = config.get("ckpt_path") is not None or (sweep and (folder / "last.ckpt").is_file())
        fit, logger = self._trains, config.trainer.logger
        if logger is None or logger is True:
            use = fit and not (config.trainer.fast_dev_run or config.trainer.barebones)
            again = resumed or (sweep and (self.run_dir / PLAN_FILE).is_file())
            logger = default_loggers(self.run_dir, experiment=experiment, resumed=again) if use else False
        else:
            given = self._get(self.config_init, "trainer").logger
            logger = [unfailing(one) for one in (given if isinstance(given, list) else [given])] if given else given
        # Shared by all banks: a member's curves have names of their own. All else, a bank's Trainer has anew.
        self._logger: Any = logger
        settings = {k: v for k, v in vars(self._get(self.config_init, "trainer")).items() if k != "logger"}
        if config.trainer.barebones:  # would refuse a default of ours
            settings["log_every_n_steps"] = None
        self._settings = copy.deepcopy(settings)
        if fit and not sweep and self._writes_checkpoints(config) and not resumed and any(folder.rglob("last.ckpt")):
            say(f"note: these settings were run before; add --ckpt_path last to go on from {folder}")
        trainer = self._trainer(folder, resumed, whole=not sweep)
        device = trainer.strategy.root_device.type
        if note := advice(trainer.precision, device, instead="--trainer.precision 32-true"):
            say(note)
        return trainer

    @property
    def _trains(self) -> bool:
        return self.subcommand in ("fit", "distill", "sweep")

    @staticmethod
    def _writes_checkpoints(config: Any) -> bool:
        given = config.trainer
        return given.enable_checkpointing is not False and not (given.fast_dev_run or given.barebones)

    def _trainer(self, folder: Path, resumed: bool, *, whole: bool) -> pl.Trainer:
        """A Trainer whose checkpoints go to ``folder``; ``whole``: for all members, so that it prints the table."""
        config = self.config[self.subcommand]
        given = self._get(self.config_init, "pool")
        writer: Any = PoolUser(Path(given.dir), any_base=given.any_base, from_checkpoint=resumed)
        saves = self._trains and self._writes_checkpoints(config)
        if self._trains:
            writer = PoolWriter(str(given.dir), given.overwrite, given.any_base)
            writer.run, writer.resumed, writer.summarise = self.run_dir.name, resumed, whole
            writer.replaced = self.run_dir / "replaced" if saves else None
        self.config_init[self.subcommand]["pool"] = writer
        trainer = super().instantiate_trainer(**copy.deepcopy(self._settings), logger=self._logger)
        # Lightning's own default would write beside the logger's files, where --ckpt_path last never finds them.
        default = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.dirpath is None]
        trainer.callbacks = [c for c in trainer.callbacks if c not in default]
        if self._trains:
            trainer.callbacks += [MemberTable(writer), *([RunCheckpoint(folder)] if saves else [])]
        return trainer

    # The verbs, which LightningCLI looks for by name

    def fit(
        self,
        model: BankModule,
        datamodule: BankData,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train all members, in as many banks as it takes."""
        self._run(BankRun, model, datamodule).fit(ckpt_path, weights_only)

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
        assert self._distillation is not None
        config = self.config[self.subcommand]
        keep = None if config.trainer.fast_dev_run else self.run_dir.parent.parent / "soft"
        self._distillation.teach(datamodule, self.trainer, keep=keep)
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
            train = partial(ray_sweep.train, ray, self._settings_of_a_bank())
        self._run(Sweep, model, datamodule).sweep(early_exit, bank=bank, train=train)

    def _settings_of_a_bank(self) -> str:
        """This sweep's settings, resolved, for a process that is given the number of its bank besides: ``--config``."""
        text = self._parser("sweep").dump(self.config["sweep"], format="json", skip_none=False)
        return json.dumps({**json.loads(text), "ray": None})

    def _run(self, kind: type[Run], model: BankModule, datamodule: BankData) -> Run:
        config, trainer = self.config[self.subcommand], self.trainer
        del self.trainer  # or it would keep the first bank's state
        return kind(
            model,
            datamodule,
            trainer,
            lambda folder, resumed: self._trainer(folder, resumed, whole=False),
            run_dir=self.run_dir,
            size=config.bank_size,
            keep=not config.trainer.fast_dev_run,
        )

    def validate(self, model: BankModule, datamodule: BankData, **options: Any) -> None:
        """Score the members on dev."""
        self._evaluate("validate", model, datamodule, options)

    def test(self, model: BankModule, datamodule: BankData, **options: Any) -> None:
        """Score the members on test."""
        self._evaluate("test", model, datamodule, options)

    def predict(self, model: BankModule, datamodule: BankData, **options: Any) -> None:
        """Add a split's logits to the pool."""
        self._evaluate("predict", model, datamodule, options)

    def _evaluate(self, verb: str, model: BankModule, datamodule: BankData, options: dict[str, Any]) -> None:
        size = self.config[self.subcommand].bank_size
        if options.get("ckpt_path") in ("last", "best"):  # Lightning would go on without one
            last = self.run_dir / "checkpoint" / "last.ckpt"
            if options["ckpt_path"] == "best" or not last.is_file():
                why = f"there is no {last}; leave it out for the pool's best weights, or give a file"
                raise UserError(f"--ckpt_path {options['ckpt_path']}: {why}")
            options["ckpt_path"] = str(last)
        # A checkpoint is of one bank.
        banks = [] if options.get("ckpt_path") else evaluation_banks(model, size, self.run_dir)
        gone = self._not_in_the_pool(model) if banks else []
        if len(banks) <= 1 and not gone:
            getattr(self.trainer, verb)(model=model, datamodule=datamodule, **options)
            return
        if gone:
            say(f"{len(gone)} of {len(model.members)} members are not in the pool, and left out: {', '.join(gone)}")
        release(model)
        for names in banks:
            here = [m for m in model.members if m.name in names and m.name not in gone]
            if not here:
                continue
            part = model.with_members(here)
            trainer = self._trainer(self.run_dir / "checkpoint", False, whole=False)
            getattr(trainer, verb)(model=part, datamodule=datamodule, **options)

    def _not_in_the_pool(self, model: BankModule) -> list[str]:
        """Members whose score was never defined, or that are not trained yet; none where nobody is there."""
        folder = Path(self.config[self.subcommand].pool.dir)
        homes = [folder / task.name for task in model.tasks]
        gone = [m.name for m in model.members if not any((home / m.name).is_dir() for home in homes)]
        return gone if len(gone) < len(model.members) else []

    def _run_name(self, config: Any, experiment: str) -> str:
        """The same settings give the same name, so that ``--ckpt_path last`` finds the run that they began."""
        plain = json.loads(self._parser(self.subcommand).dump(config, format="json", skip_none=False))
        for task in plain["data"]["tasks"]:
            if isinstance(task, dict) and not task.get("columns"):
                task.pop("columns", None)  # a run that an earlier version began keeps its name
        what = {
            "model": {k: v for k, v in plain["model"].items() if k not in _NOT_THE_RUN},
            "data": {k: v for k, v in plain["data"].items() if k not in ("eval_batch_size", "predict_split")},
            "trainer": {k: v for k, v in plain["trainer"].items() if k not in _NOT_THE_RUN},
        }
        return f"{experiment}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]}"


class OurTrainer(BankTrainer):
    """The Trainer's own flags"""  # a heading of --help

    # LightningCLI reads a command's arguments off the Trainer's method, and then calls its own.
    distill = CLI.distill
    sweep = CLI.sweep


def _check_tasks(config: Any) -> None:
    """What is wrong with a task, told with the files of settings: a task does not know where it was written."""
    files = ", ".join(str(path) for path in config.get("config") or []) or "--data.tasks"
    for entry in config.data.tasks:
        if isinstance(entry, Namespace):
            try:
                Task(**vars(entry))
            except UserError as e:
                raise UserError(f"{files}: {e}") from e


def _check_checkpoint(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"--ckpt_path: {path}: no such file; give a checkpoint, or last for this run's own")
    try:
        bank = torch.load(path, map_location="cpu", weights_only=True).get("bank")
    except Exception as e:  # damaged archives and refused pickles raise many kinds of exception
        raise UserError(
            f"--ckpt_path: {path}: not a checkpoint that can be loaded safely ({type(e).__name__}); give one of ours"
        ) from e
    if bank is None:
        raise UserError(f"--ckpt_path: {path}: a checkpoint, but not of a bank; give one that lora-ensemble fit wrote")


def run(args: Sequence[str] | None = None) -> int:
    """Parse and run a subcommand; ``UserError`` for what the user can put right."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning's own calls
    # main(args) from Python is meant.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    # Losses are logged at the end of an epoch, however short.
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # validate saves no checkpoint
    warnings.filterwarnings("ignore", message="predict returned None")  # the pool's writer has the logits
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # torch's own, about lightning
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the loaders are arrays in memory
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")  # said above
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # a checkpoint that was sent or brought home
    # 'GPU available: ...', 'Seed set to ...' and advertisements; warnings and errors still come through.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        _start(args)
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
    return 0


def _start(args: Sequence[str] | None) -> None:
    CLI(
        BankModule,
        BankData,
        trainer_class=OurTrainer,
        save_config_callback=_SaveConfig,
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
        args=None if args is None else list(args),
    )
