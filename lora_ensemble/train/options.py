"""The command line's own parser, what it checks before anything is loaded, and the name that settings give a run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from lora_ensemble.bank.lora import LATER
from lora_ensemble.bank.optim import check_precision
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Task
from lora_ensemble.train.runs.halving import EarlyExit
from lora_ensemble.train.runs.ray_sweep import RayOptions

NOT_THE_RUN = {
    *("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps", "devices", "num_nodes", "accelerator"),
    *("strategy", "logger", "callbacks", "log_every_n_steps", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "default_root_dir", "profiler", "num_sanity_val_steps", "fast_dev_run", "barebones"),
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "inference_mode", "detect_anomaly"),
    *("check_val_every_n_epoch", "val_check_interval", "eval_batch_size", "predict_split", "revision", "metrics"),
    "frozen_cache",
}
"""Settings that do not change what a run trains, so that it may be resumed with others. Another revision of the base
model does, but a run that began with the newest goes on with the one that it recorded."""

_HARMLESS = [
    "LightningCLI's args parameter is intended to run from within Python",  # main(args) from Python is meant
    # Losses are logged at the end of an epoch, however short.
    "The number of training batches .* is smaller than the logging interval",
    "Be aware that when using `ckpt_path`",  # validate saves no checkpoint
    "predict returned None",  # the pool has the logits
    ".*LeafSpec.*",  # torch's own, about lightning
    ".*does not have many workers.*",  # the loaders are arrays in memory
    ".*Checkpoint directory .* exists and is not empty.*",  # said by the command line
    "The dirpath has changed",  # a checkpoint that was moved
]


def quieten() -> None:
    """Let lightning say nothing that is not a warning, and no warning of what is meant."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning's own calls
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    # 'GPU available: ...', 'Seed set to ...' and advertisements; warnings and errors still come through.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line, where jsonargparse would print hundreds of lines of usage first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(line.strip() for line in message.splitlines() if line.strip())
        # jsonargparse puts the command before the option: distill.ensemble.
        text = re.sub(r"^the following arguments are required: \w+\.(\S+)$", r"--\1 is required", text)
        either = r"Does not validate against .*\[<class 'str'>, list\[str\]\].* Given value: "
        text = re.sub(either, "Expected a <class 'str'>, or a list of them. Got value: ", text)
        if re.search(r"Expected a <class 'str'>[^.]*\. Got value", text):  # which YAML made of a word without quotes
            text += '; write words like no, yes, on and off, and numbers, in quotes: "no"'
        if "Option 'shared' is not accepted" in text:
            text = "--ray.shared is gone: a cluster needs storage that all its nodes share; leave it out"
        print(f"lora-ensemble: error: {text}", file=sys.stderr)
        sys.exit(2)

    def set_own_defaults(self, defaults: dict[str, Any], where: str) -> None:
        """Other defaults; ``UserError`` that begins with ``where`` for one that is no value of its option."""
        try:
            self.set_defaults(defaults)
        except ArgumentError as e:
            raise UserError(f"{where} ({' '.join(str(e).split())})") from e


class SaveConfig(SaveConfigCallback):
    """Keeps the resolved config of ``fit`` in the run's ``folder``; ``validate`` and the others leave it alone."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        super().__init__(parser, config)
        self._folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write and log it."""
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = self.parser.dump(self.config, skip_none=False)
            (self._folder / "config.yaml").write_text(text, encoding="utf-8")
            for logger in trainer.loggers:
                logger.log_hyperparams(plain(self.parser, self.config))


def plain(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """A command's settings, resolved, as JSON has them."""
    return json.loads(parser.dump(config, format="json", skip_none=False))


def run_name(experiment: str, settings: dict[str, Any]) -> str:
    """The same settings give the same name, so that ``--ckpt_path last`` finds the run that they began."""
    for task in settings["data"]["tasks"]:
        if isinstance(task, dict):  # a run that an earlier version began keeps its name
            task.pop("metrics", None)
            for key in ("columns", "group", "weight", "class_weights", "label_smoothing", "score", "overall"):
                if not task.get(key):
                    task.pop(key, None)
            if task.get("label_separator") == ",":
                del task["label_separator"]
    for member in settings["model"]["members"] or []:
        for key, default in {**LATER, "peft": None}.items():
            if member[key] == default:
                del member[key]
    if settings["data"]["truncation"] == "head":
        del settings["data"]["truncation"]
    for key in ("overall", "folds", "refit"):
        if not settings["data"].get(key):
            settings["data"].pop(key, None)
    groups = {name: settings[name] for name in ("model", "data", "trainer")}
    what = {name: {k: v for k, v in group.items() if k not in NOT_THE_RUN} for name, group in groups.items()}
    return f"{experiment}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]}"


def check_settings(config: Namespace, *, sweep: bool) -> None:
    """``UserError`` for what would fail only after the model was loaded. Sets what keeps pickles from being loaded."""
    files = ", ".join(str(path) for path in config.get("config") or []) or "--data.tasks"
    for entry in config.data.tasks:
        if isinstance(entry, Namespace):  # told with the files of settings: a task does not know where it was written
            try:
                Task(**vars(entry))
            except UserError as e:
                raise UserError(f"{files}: {e}") from e
    check_precision(config.trainer.precision)
    if isinstance(config.bank_size, int) and config.bank_size < 1:
        wrong = f"--bank_size: {config.bank_size}"
        raise UserError(f"{wrong}; expected auto, null, or a number of members of at least 1")
    if config.get("ckpt_path") not in (None, "last", "best", "hpc"):
        _check_checkpoint_file(config.ckpt_path)
    if config.get("early_exit") is not None:
        EarlyExit(**vars(config.early_exit)).check()
    if config.get("ray") is not None:
        RayOptions(**vars(config.ray)).check()
    if sweep and config.pool.overwrite:
        raise UserError(
            "--pool.overwrite: a sweep trains what is not finished and replaces nothing; delete the folders of the "
            "members that are to be trained again, or choose another --pool.dir"
        )
    if not sweep and config.get("weights_only") is None:
        config.weights_only = True


def _check_checkpoint_file(path: str) -> None:
    """``UserError`` for a file that is no checkpoint of a bank, or that cannot be loaded safely."""
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
