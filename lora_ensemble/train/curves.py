"""Loggers of a run: a CSV file always, Weights & Biases where it can be had without blocking or asking."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from lora_ensemble.online import START_WITHIN_S, project, reachable
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.notices import say
from lora_ensemble.train.pool_writer import PoolWriter


def default_loggers(run_dir: Path, *, experiment: str, resumed: bool) -> list[Logger]:
    """The loggers of a run when the user names none. Written below ``run_dir``; nothing is asked, nothing waits."""
    loggers: list[Logger] = [CSVLogger(run_dir, name="csv")]
    wandb_logger = _wandb_logger(run_dir, experiment=experiment, resumed=resumed)
    if wandb_logger is not None:
        loggers.append(wandb_logger)
    return [unfailing(logger) for logger in loggers]


def unfailing(logger: Logger) -> Logger:
    """A logger that never costs the training: should it fail, that is said once, and it logs no more."""
    failed = False

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kw: Any) -> Any:
            nonlocal failed
            try:
                return None if failed else call(*args, **kw)
            except Exception as e:  # whatever it is: files, network, a service that died
                failed = True
                reason = " ".join(str(e).split())[:200]
                say(f"curves: {type(logger).__name__} failed ({reason}); training goes on without it")
                return None

        return attempt

    for name in ("log_metrics", "log_hyperparams", "log_table", "save", "finalize"):
        if hasattr(logger, name):
            setattr(logger, name, guarded(getattr(logger, name)))
    return logger


def _wandb_logger(run_dir: Path, *, experiment: str, resumed: bool) -> Logger | None:
    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger
    except ImportError:
        say("curves: wandb is not installed; metrics go to the CSV file alone")
        return None
    if not os.access(os.path.expanduser("~"), os.W_OK):  # where it would keep its own files
        for kind in ("DATA", "CACHE", "CONFIG"):
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(run_dir / "wandb"))
        (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
    online = reachable()
    # A resumed run goes on with its curves; a fresh one has an id of its own.
    id_file = run_dir / "wandb-id"
    run_id = id_file.read_text().strip() if resumed and id_file.is_file() else ""
    if not run_id:
        run_id = f"{run_dir.name}-{datetime.now():%Y%m%d-%H%M%S}"
    settings = wandb.Settings(init_timeout=START_WITHIN_S, silent=True, console="off")
    common: dict[str, Any] = {
        "project": project(),
        "group": experiment,
        "name": run_dir.name,
        "id": run_id,
        "save_dir": str(run_dir),
        "settings": settings,
    }
    if online:
        logger = _without_warning(WandbLogger(**common, resume="allow"))
        try:
            _ = logger.experiment  # starts it now, on the first process only
        except Exception as e:  # whatever keeps W&B from starting must not keep the run from starting
            say(f"curves: Weights & Biases did not start ({type(e).__name__}); going on offline")
            online = False
    if not online:
        logger = _without_warning(WandbLogger(**common, offline=True))
        say(f"curves: Weights & Biases offline; to see them online: wandb sync {run_dir}/wandb/offline-run-*-{run_id}")
    _remember(id_file, run_id)
    return logger


def _without_warning(logger: Any) -> Any:
    """Lightning 2.6 passes W&B an option that it warns about on every run."""
    getattr(logger, "_wandb_init", {}).pop("anonymous", None)
    return logger


@rank_zero_only
def _remember(id_file: Path, run_id: str) -> None:
    id_file.parent.mkdir(parents=True, exist_ok=True)
    id_file.write_text(run_id + "\n")


class MemberTable(pl.Callback):
    """Sends the summary table, a row per member, to Weights & Biases at the end of a run."""

    def __init__(self, writer: PoolWriter) -> None:
        self._writer = writer

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the table where a logger can take one."""
        assert isinstance(pl_module, BankModule)
        if trainer.is_global_zero and not trainer.fast_dev_run and self._writer.summarise:
            log_member_table(trainer.loggers, *self._writer.summary(pl_module))


def log_member_table(loggers: Sequence[Logger], header: list[str], rows: list[list[Any]]) -> None:
    """The table of ``PoolWriter.summary``, where a logger can take one."""
    for logger in loggers:
        log_table = getattr(logger, "log_table", None)
        if log_table is not None:
            # One type per column: W&B refuses a column of numbers and words.
            log_table(key="members", columns=header, data=[[r[0], str(r[1]), *r[2:]] for r in rows])
