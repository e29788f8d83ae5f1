"""A report in Weights & Biases: the table of methods, the plots and the page. In dicor, only this imports wandb."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_ensemble.dicor.report.facts import Facts
from lora_ensemble.dicor.report.plot import Plot
from lora_ensemble.errors import UserError
from lora_ensemble.online import START_WITHIN_S, project, reachable


def check() -> None:
    """``UserError`` where wandb is not there; before the work, for it need not be imported to know."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb: wandb is not installed; run: pip install wandb, or leave out --wandb")


def group(facts: Facts) -> str:
    """The group of the members' run, which is its name without what tells its settings apart; or the task's name."""
    runs = [r.run for r in facts.shown if r.run]
    return runs[0].rpartition("-")[0] or runs[0] if runs else facts.task


def log(facts: Facts, plots: Iterable[Plot], page: str, folder: Path) -> str:
    """Log the table of methods, each plot, and the page; returns what to tell the user.

    Online where there is a key and the server answers, otherwise into ``folder``, as curves are. ``UserError`` where
    nothing can be written there, or wandb does not start.
    """
    import wandb

    if os.environ.get("WANDB_MODE") == "disabled":
        return "wandb: WANDB_MODE is disabled; nothing was logged"
    name = f"{facts.task}-report"
    common: dict[str, Any] = {
        "project": project(),
        "group": group(facts),
        "job_type": "report",
        "name": name,
        "id": f"{name}-{datetime.now():%Y%m%d-%H%M%S}",
        "dir": str(folder),
        "config": {"task": facts.task, "method": facts.method, "pool": str(facts.comparison.task_pool.pool)},
        "settings": wandb.Settings(init_timeout=START_WITHIN_S, silent=True, console="off"),
    }
    run: Any = None
    why = ""
    for mode in ("online", "offline") if reachable() else ("offline",):
        try:
            run = wandb.init(**common, mode=mode)
            break
        except Exception as e:  # whatever keeps W&B from starting must not lose the report
            why = f" (it did not start: {type(e).__name__})"
            if mode == "offline":
                raise UserError(
                    f"--wandb: Weights & Biases did not start ({type(e).__name__}: {e}); the page is written"
                ) from e
    header = ["method", "members", "in_sample", "honest", "low", "high", "optimism", "to_best", "to_omni"]
    rows = []
    for method, about in facts.comparison.estimates.of.items():
        honest = (about.honest.value, about.honest.low, about.honest.high) if about.honest else (None, None, None)
        differences = (d.value if d else None for d in (about.against_best, about.against_omni))
        rows.append([method, len(about.names), about.in_sample, *honest, about.optimism, *differences])
    logged: dict[str, Any] = {"methods": wandb.Table(columns=header, data=rows)}
    for plot in plots:
        logged[f"plots/{plot.name}"] = wandb.Html(plot.file(f"{facts.task}: {plot.title}"), inject=False)
    run.log(logged | {"report": wandb.Html(page, inject=False)})
    run.finish()
    if run.settings.mode == "online":
        return f"wandb: logged in group {group(facts)!r}"
    return f"wandb: offline{why}; to see it online: wandb sync {folder}/wandb/offline-run-*-{run.id}"
