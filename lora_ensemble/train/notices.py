"""What a run tells: lines on its standard output, once however many processes it has, and curves in its loggers.

Curves go to a CSV file always, and to Weights & Biases where it can be had without blocking or asking.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from lora_ensemble import pool
from lora_ensemble.errors import one_line
from lora_ensemble.online import START_WITHIN_S, project, reachable
from lora_ensemble.train.evaluation import metric, summary_header


@rank_zero_only
def say(text: str) -> None:
    """Print from the first process alone, at once: the output may be a file that somebody follows."""
    print(text, flush=True)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Rows as lines of text in columns; floats with four decimals."""
    text = [header] + [[f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in text)


def tell_members(rows: list[list[Any]], module: Any, folder: Path, loggers: Sequence[Logger], *, printed: bool) -> None:
    """Log, and print, rows of :meth:`History.summary` with a column more for each metric of a ``BankModule``.

    ``folder``: of the pool, of whose logits the metrics are.
    """
    split = module.folds.decides
    header, rows = summary_header(module.tasks, split), [list(row) for row in rows]
    for task in module.tasks:
        names = module.metrics[task.name]
        records = {r.name: r for r in pool.read_records(folder, task.name, [row[0] for row in rows])} if names else {}
        header += [f"{task.name} {split} ({name})" for name in names]
        for row in rows if names else []:
            values = [math.nan] * len(names)
            if record := records.get(row[0]):
                logits = pool.read_array(folder, record, pool.logits_file(split))
                labels = pool.read_examples(folder, task.name, split, record.examples[split]).labels
                values = [metric(name, task, logits, labels) for name in names] if labels is not None else values
            row += values
    for logger in loggers:
        if log_table := getattr(logger, "log_table", None):  # W&B's; it refuses a column of numbers and words
            log_table(key="members", columns=header, data=[[r[0], str(r[1]), *r[2:]] for r in rows])
    if printed:
        print_summary(header, rows, folder=folder, signs={t.name: t.sign for t in module.tasks})


def print_summary(header: list[str], rows: list[list[Any]], *, folder: Path, signs: Mapping[str, int]) -> None:
    """The table of ``History.summary``, best members first by the tasks' scores, and what to do next.

    ``signs``: task to the sign of its score, -1 where lower is better.
    """
    by = list(enumerate(signs.values(), 2))
    order = sorted(rows, key=lambda r: [-sign * r[i] if r[i] == r[i] else math.inf for i, sign in by])
    say(table(header, order))
    say(f"pool: {folder}\nnext:" + "".join(f"\n  dicor compare --pool {folder} --task {t}" for t in signs))


def default_loggers(run_dir: Path, *, experiment: str, resumed: bool) -> list[Logger]:
    """The loggers of a run when the user names none. Written below ``run_dir``; nothing is asked, nothing waits."""
    loggers = [CSVLogger(run_dir, name="csv"), _wandb_logger(run_dir, experiment=experiment, resumed=resumed)]
    return [unfailing(logger) for logger in loggers if logger is not None]


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
                say(f"curves: {type(logger).__name__} failed ({one_line(e)}); training goes on without it")
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
    # A resumed run goes on with its curves; a fresh one has an id of its own.
    id_file = run_dir / "wandb-id"
    run_id = id_file.read_text().strip() if resumed and id_file.is_file() else ""
    run_id = run_id or f"{run_dir.name}-{datetime.now():%Y%m%d-%H%M%S}"

    def made(**where: Any) -> Any:
        settings = wandb.Settings(init_timeout=START_WITHIN_S, silent=True, console="off")
        names: dict[str, Any] = {"project": project(), "group": experiment, "name": run_dir.name, "id": run_id}
        logger = WandbLogger(**names, save_dir=str(run_dir), settings=settings, **where)
        # Lightning 2.6 passes W&B an option that it warns about on every run.
        getattr(logger, "_wandb_init", {}).pop("anonymous", None)
        return logger

    online = reachable()
    if online:
        logger = made(resume="allow")
        try:
            _ = logger.experiment  # starts it now, on the first process only
        except Exception as e:  # whatever keeps W&B from starting must not keep the run from starting
            say(f"curves: Weights & Biases did not start ({type(e).__name__}); going on offline")
            online = False
    if not online:
        logger = made(offline=True)
        say(f"curves: Weights & Biases offline; to see them online: wandb sync {run_dir}/wandb/offline-run-*-{run_id}")
    if rank_zero_only.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        id_file.write_text(run_id + "\n")
    return logger
