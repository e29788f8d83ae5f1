"""The command line ``dicor``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ensemble import __version__
from lora_ensemble.dicor.choose.settings import DEFAULT_METHOD
from lora_ensemble.dicor.options import METHODS, Options, Request, add_options, options_of, refuse_unheard
from lora_ensemble.errors import Parser, UserError
from lora_ensemble.tasks import OOF, SCORES

if TYPE_CHECKING:
    from lora_ensemble.pool import TaskPool


def _parser() -> Parser:
    parser = Parser(
        prog="dicor",
        description="Pick from a pool of members a few that are good and disagree, and let them decide together.",
        epilog="Scores and similarities are those of the dev logits in the pool. Nothing is trained here.",
    )
    parser.add_argument("--version", action="version", version=f"dicor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    import_ = commands.add_parser("import", help="predictions of any model become members", description=Request.__doc__)
    import_.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="predictions of one split, of one model or several"
    )
    add_options(import_, Request)
    settings, one_task, several = _shared()
    select = commands.add_parser(
        "select",
        parents=[settings, one_task],
        help="choose an ensemble",
        description="Choose an ensemble and write its record: dicor.json.",
    )
    select.add_argument("--method", choices=METHODS, help="how to choose (default: depends on the task)")
    compare = commands.add_parser(
        "compare",
        parents=[settings, several],
        help="all methods side by side, with honest estimates",
        description="Scores of the single best member, of all members (Omni) and of each method, in-sample and honest.",
    )
    compare.add_argument("--task", help="one task only (default: all tasks of the pool)")
    report = commands.add_parser(
        "report",
        parents=[settings, one_task, several],
        help="one page about an ensemble and its pool",
        description="Write one HTML file that opens without a network: the table of compare, plots, calibration, and "
        "theory beside observation, about one method.",
    )
    report.add_argument(
        "--wandb", action="store_true", help="log table and plots to Weights & Biases, in the group of the members' run"
    )
    apply = commands.add_parser(
        "apply",
        help="predictions of a chosen ensemble",
        description="Write an ensemble's predictions: CSV, or for sst, quora and sts the course's leaderboard file.",
    )
    apply.add_argument("--ensemble", type=Path, required=True, metavar="FILE", help="what dicor select or export wrote")
    apply.add_argument("--split", choices=("dev", OOF, "test"), default="test", help="default: test")
    apply.add_argument("--output", type=Path, required=True, metavar="FILE", help="the predictions to write")
    apply.add_argument("--pool", type=Path, metavar="DIR", help="the pool, if it is no longer where the record says")
    return parser


def _shared() -> tuple[Parser, Parser, Parser]:
    """The options that several commands have: of the methods, about one task, and with several methods."""
    settings, one_task, several = (Parser(add_help=False) for _ in range(3))
    settings.add_argument("--pool", type=Path, required=True, metavar="DIR", help="the folder that training wrote")
    settings.add_argument(
        "--on",
        choices=("dev", OOF),
        help="what to choose on: dev (the default where there is one), or the out-of-fold predictions of training",
    )
    settings.add_argument(
        "--score",
        choices=SCORES,
        metavar="NAME",
        help="what is to be good (default: what members were trained by): " + ", ".join(SCORES),
    )
    add_options(settings, Options)
    one_task.add_argument("--task", required=True, help="a task of the pool: sst, quora, sts or your own")
    one_task.add_argument("--output", type=Path, required=True, metavar="FILE", help="what to write")
    several.add_argument(
        "--method",
        choices=METHODS,
        action="append",
        help="only this one; may be repeated, a report is about the first (default: all, about what select takes)",
    )
    several.add_argument(
        "--split",
        choices=("dev", "test"),
        default="dev",
        help="test: also score what was chosen on the labelled test split; do it once",
    )
    several.add_argument("--plots", type=Path, metavar="DIR", help="save the plots of a report as PNG and SVG")
    return settings, one_task, several


def _notify(notices: Iterable[str], task: str = "") -> None:
    for notice in notices:
        print(f"dicor: notice: {f'task {task}: ' if task else ''}{notice}", file=sys.stderr)


def _import(given: argparse.Namespace) -> None:
    from lora_ensemble.dicor.imports.importing import import_predictions
    from lora_ensemble.dicor.table import number

    members, truth, notices = import_predictions(options_of(given, Request))
    _notify(notices)
    width = max(len(member.name) for member in members)
    for member in members:
        score = "no labels" if member.score is None else f"{truth.task.score_name} {number(member.score)}"
        state = "was there already, unchanged" if member.unchanged else f"{member.form} from {member.source.path.name}"
        print(f"{member.name:<{width}}  {given.split} {score}, {len(member.logits)} examples ({state})")


def _head(task_pool: TaskPool) -> str:
    reasons = ", ".join(f"{n} {why}" for why, n in sorted(Counter(task_pool.left_out.values()).items()))
    return (
        f"{task_pool.name}: {len(task_pool.members)} members on {len(task_pool.examples().ids)} {task_pool.split} "
        "examples; "
        f"{len(task_pool.left_out)} left out{f' ({reasons})' if reasons else ''}"
    )


def _select(given: argparse.Namespace) -> None:
    from lora_ensemble.dicor import record
    from lora_ensemble.dicor.compare import compare, judged
    from lora_ensemble.dicor.table import about, judgement, number, offsets, table, verdict
    from lora_ensemble.files import writing
    from lora_ensemble.pool import TaskPool

    with writing(given.output) as f:
        task_pool, options = TaskPool(given.pool, given.task, split=given.on), options_of(given, Options)
        method = given.method or DEFAULT_METHOD[task_pool.kind]
        refuse_unheard(options, [method])
        comparison = compare(task_pool, [method], options, score=given.score)
        found = judged(comparison, method, test=False)
        _notify(comparison.notices, given.task)
        ensemble = record.make(comparison, method, folder=given.output.resolve().parent)
        f.write(ensemble.to_json())
    rows, score, estimates = ensemble.rows(), f"{comparison.score.words:>10}", comparison.estimates
    width = max(len(row["name"]) for row in rows)
    settings = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in ensemble.settings.items() if v is not None)
    print(f"{_head(task_pool)}\n{method}{f' ({settings})' if settings else ''}; strategy {ensemble.strategy}\n")
    print(f"{'member':<{width}} {score} {'weight':>7} {'mean similarity to those above':>32}")
    for row in rows:
        similarity = number(row["mean_similarity"])
        print(f"{row['name']:<{width}} {row['score']:>{len(score)}.4f} {row['weight']:>7.4f} {similarity:>32}")
    if ensemble.offsets is not None:
        print(offsets(ensemble.scale, ensemble.offsets, ensemble.labels, ensemble.kind))
    said = [verdict(method, estimates.of[method]), *([judgement(method, found)] if found else []), about(estimates)]
    print(f"\n{table(estimates, found)}\n", *said, sep="\n")
    print(f"saved {given.output}")


def _compare(given: argparse.Namespace) -> None:
    from lora_ensemble.dicor.compare import compare, judged, overall
    from lora_ensemble.dicor.table import about, judgement, number, table, verdict
    from lora_ensemble.pool import TaskPool, task_names

    if given.plots:
        _check_report("--plots", given.plots)
        from lora_ensemble.dicor.report.charts import plots
        from lora_ensemble.dicor.report.facts import gather
        from lora_ensemble.dicor.report.plot import save
    tasks = [given.task] if given.task is not None else task_names(given.pool)
    if not tasks:
        raise UserError(f"{given.pool}: no task in this folder; give the folder that training wrote")
    methods, options = given.method or list(METHODS), options_of(given, Options)
    refuse_unheard(options, methods)
    comparisons = {}
    for task in tasks:
        task_pool = TaskPool(given.pool, task, split=given.on)
        comparison = comparisons[task] = compare(
            task_pool, methods, options, score=given.score, probabilities=bool(given.plots)
        )
        estimates = comparison.estimates
        default = DEFAULT_METHOD[task_pool.kind]
        method = default if default in estimates.of else list(estimates.of)[-1]
        found = judged(comparison, method, test=given.split == "test")
        _notify(comparison.notices, task)
        print(f"{_head(task_pool)}\n\n{table(estimates, found)}\n")
        print(verdict(method, estimates.of[method]), *([judgement(method, found)] if found else []), sep="\n")
        if given.plots:
            for path in save(plots(gather(comparison, method)).values(), task, given.plots):
                print(f"saved {path}")
        print()
    if scores := overall(comparisons):
        print(f"overall: the mean of sst, quora and (sts + 1) / 2\n{'':<17} {'in-sample':>9} {'honest':>9}")
        for method, (in_sample, honest) in scores.items():
            print(f"{method:<17} {number(in_sample):>9} {number(honest):>9}")
        print()
    print(about(estimates))


def _check_report(what: str, folder: Path | None) -> None:
    """Before the work: ``UserError`` where a report's packages are missing, or ``folder`` takes no plots."""
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


def _report(given: argparse.Namespace) -> None:
    """Write the page, and say where it is."""
    _check_report("dicor report", given.plots)
    from lora_ensemble.dicor.compare import compare, judged
    from lora_ensemble.dicor.report import page, to_wandb
    from lora_ensemble.dicor.report.charts import plots
    from lora_ensemble.dicor.report.facts import gather, method_shown
    from lora_ensemble.dicor.report.plot import save
    from lora_ensemble.dicor.table import judgement, verdict
    from lora_ensemble.files import writing
    from lora_ensemble.pool import TaskPool

    if given.wandb:
        to_wandb.check()
    methods, options = given.method or list(METHODS), options_of(given, Options)
    refuse_unheard(options, methods)
    with writing(given.output) as f:
        task_pool = TaskPool(given.pool, given.task, split=given.on)
        comparison = compare(task_pool, methods, options, score=given.score, probabilities=True)
        method = method_shown(comparison, given.method)
        found = judged(comparison, method, test=given.split == "test")
        _notify(comparison.notices, given.task)
        facts = gather(comparison, method, judgement=found)
        shown = plots(facts)
        text = page.page(facts, shown, options)
        f.write(text)
    print(verdict(facts.method, facts.estimate), *([judgement(method, found)] if found else []), sep="\n")
    print(f"saved {given.output}")
    for path in save(shown.values(), given.task, given.plots) if given.plots else ():
        print(f"saved {path}")
    if given.wandb:
        print(to_wandb.log(facts, shown.values(), text, given.output.resolve().parent))


def _apply(given: argparse.Namespace) -> None:
    from lora_ensemble.dicor.apply import predict, write_predictions
    from lora_ensemble.dicor.located import locate
    from lora_ensemble.dicor.table import IN_SAMPLE, number
    from lora_ensemble.files import writing
    from lora_ensemble.scores import one_label

    with writing(given.output) as f:
        located = locate(given.ensemble, given.pool)
        ensemble = located.ensemble
        examples, decided, score = predict(ensemble, located.pool, given.split)
        write_predictions(f, ensemble, examples.ids, decided)
    if score is not None:
        _notify(one_label(examples.labels, ensemble.labels, f"{given.split} labels"), ensemble.task)
        print(f"{ensemble.task} {given.split} {SCORES[ensemble.score].words} {number(score)}")
        if given.split == ensemble.chosen_on:
            print(IN_SAMPLE.format(given.split))
    print(f"saved {len(decided)} predictions of {ensemble.size} members in {given.output}")


_RUN = {"import": _import, "select": _select, "compare": _compare, "report": _report, "apply": _apply}


def main(args: list[str] | None = None) -> int:
    """Run ``dicor`` with ``args`` (None: those of the process); returns the exit code, 2 for a user's mistake."""
    try:
        given = _parser().parse_args(args)
        _RUN[given.command](given)
        sys.stdout.flush()
    except SystemExit as e:  # --help and --version
        return int(e.code or 0)
    except BrokenPipeError:  # `dicor compare | head`: what was wanted was read
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as e:
        print(f"dicor: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"dicor: error: {e.filename or 'input/output'}: {e.strerror or e}", file=sys.stderr)
        return 2
    return 0
