"""``dicor report``: what it does and prints. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ensemble.dicor.options import METHODS, Options, options_of, refuse_unheard
from lora_ensemble.errors import UserError

if TYPE_CHECKING:
    from lora_ensemble.dicor.compare import Comparison


def check(what: str, *, folder: Path | None = None) -> None:
    """``UserError`` where ``what`` is not installed, or plots cannot be written to ``folder``; before the work."""
    needed = {"altair": "altair", "vl_convert": "vl-convert-python", "jinja2": "jinja2"}
    absent = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if absent:
        raise UserError(f"{what} needs {' and '.join(absent)}; run: pip install 'lora-ensemble[report]'")
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as e:
            raise UserError(f"{folder}: plots cannot be written: {e.strerror}; give another folder with --plots") from e


def save_plots(comparison: Comparison, method: str, folder: Path) -> None:
    """Save the plots of a comparison that kept its probabilities, and say where they are."""
    from lora_ensemble.dicor.report.charts import plots
    from lora_ensemble.dicor.report.facts import gather
    from lora_ensemble.dicor.report.plot import save

    for path in save(plots(gather(comparison, method)).values(), comparison.task_pool.name, folder):
        print(f"saved {path}")


def run(given: argparse.Namespace) -> None:
    """Write the page, and say where it is."""
    check("dicor report", folder=given.plots)
    from lora_ensemble.dicor.compare import compare, test_scores
    from lora_ensemble.dicor.report import page, to_wandb
    from lora_ensemble.dicor.report.charts import plots
    from lora_ensemble.dicor.report.facts import gather, method_shown
    from lora_ensemble.dicor.report.plot import save
    from lora_ensemble.dicor.table import verdict
    from lora_ensemble.files import writing
    from lora_ensemble.pool import TaskPool

    if given.wandb:
        to_wandb.check()
    methods, options = given.method or list(METHODS), options_of(given, Options)
    refuse_unheard(options, methods)
    with writing(given.output) as f:
        comparison = compare(TaskPool(given.pool, given.task), methods, options, probabilities=True)
        test = test_scores(comparison) if given.split == "test" else None
        for notice in comparison.notices:
            print(f"dicor: notice: task {given.task}: {notice}", file=sys.stderr)
        facts = gather(comparison, method_shown(comparison, given.method), test=test)
        shown = plots(facts)
        text = page.page(facts, shown, options)
        f.write(text)
    print(verdict(facts.method, facts.estimate))
    print(f"saved {given.output}")
    for path in save(shown.values(), given.task, given.plots) if given.plots else ():
        print(f"saved {path}")
    if given.wandb:
        print(to_wandb.log(facts, shown.values(), text, given.output.resolve().parent))
