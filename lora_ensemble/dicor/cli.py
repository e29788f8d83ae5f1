"""The command line ``dicor``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lora_ensemble import __version__
from lora_ensemble.dicor.choose.settings import MethodName, Similarity, Strategy
from lora_ensemble.dicor.imports import command as import_command
from lora_ensemble.dicor.report import command as report_command
from lora_ensemble.errors import Parser, UserError

if TYPE_CHECKING:
    from lora_ensemble.dicor.options import Options
    from lora_ensemble.pool import TaskPool


def _parser() -> Parser:
    parser = Parser(
        prog="dicor",
        description="Pick from a pool of members a few that are good and disagree, and let them decide together.",
        epilog="Scores and similarities are those of the dev logits in the pool. Nothing is trained here.",
    )
    parser.add_argument("--version", action="version", version=f"dicor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    import_command.add_parser(commands)

    settings = Parser(add_help=False)
    settings.add_argument("--pool", type=Path, required=True, metavar="DIR", help="the folder that training wrote")
    settings.add_argument(
        "--size",
        type=_size,
        metavar="N|auto",
        help="members in the ensemble (dicor: multiclass 11, binary 4, regression 10; dicor-auto: auto), "
        "steps of a greedy search, or the most members that exhaustive tries",
    )
    settings.add_argument(
        "--top-k", type=int, metavar="K", help="choose among the K best by dev score (default: 30, greedy 50)"
    )
    settings.add_argument(
        "--similarity",
        choices=get_args(Similarity),
        help="between members (dicor: cosine, or pearson for regression; dicor-auto: error)",
    )
    settings.add_argument(
        "--strategy",
        choices=get_args(Strategy),
        help="how members decide together (dicor: majority, or mean for regression; others: mean-probability)",
    )
    settings.add_argument(
        "--trade-off", type=float, metavar="X", help="dicor-auto: 0 for the score alone to 1 for similarity alone (0.5)"
    )
    settings.add_argument(
        "--temperature", action="store_true", default=None, help="divide each classifier's logits by its own first"
    )

    select = commands.add_parser(
        "select", parents=[settings], help="choose an ensemble", description="Choose an ensemble and write its record."
    )
    select.add_argument("--task", required=True, help="a task of the pool: sst, quora, sts or your own")
    select.add_argument("--output", type=Path, required=True, metavar="FILE", help="the record to write: dicor.json")
    select.add_argument("--method", choices=get_args(MethodName), help="how to choose (default: depends on the task)")

    compare = commands.add_parser(
        "compare",
        parents=[settings],
        help="all methods side by side, with honest estimates",
        description="Scores of the single best member, of all members (Omni) and of each method, in-sample and honest.",
    )
    compare.add_argument("--task", help="one task only (default: all tasks of the pool)")
    compare.add_argument(
        "--method", choices=get_args(MethodName), action="append", help="only this one; may be repeated (default: all)"
    )
    compare.add_argument(
        "--split",
        choices=("dev", "test"),
        default="dev",
        help="test: also score what was chosen on dev on the labelled test split; do it once",
    )
    compare.add_argument("--plots", type=Path, metavar="DIR", help="save the plots of dicor report as PNG and SVG")

    report_command.add_parser(commands, settings)

    apply = commands.add_parser(
        "apply",
        help="predictions of a chosen ensemble",
        description="Write an ensemble's predictions: CSV, or for sst, quora and sts the course's leaderboard file.",
    )
    apply.add_argument("--ensemble", type=Path, required=True, metavar="FILE", help="what dicor select or export wrote")
    apply.add_argument("--split", choices=("dev", "test"), default="test", help="default: test")
    apply.add_argument("--output", type=Path, required=True, metavar="FILE", help="the predictions to write")
    apply.add_argument("--pool", type=Path, metavar="DIR", help="the pool, if it is no longer where the record says")
    return parser


def _size(text: str) -> int | str:
    return text if text == "auto" else int(text)


_size.__name__ = "number"  # what argparse calls it: invalid number value: 'many'


def _options(given: argparse.Namespace) -> Options:
    from lora_ensemble.dicor.options import Options

    return Options(
        size=given.size,
        top_k=given.top_k,
        similarity=given.similarity,
        strategy=given.strategy,
        trade_off=given.trade_off,
        temperature=given.temperature,
    )


def _say(task: str, notices: Sequence[str]) -> None:
    for notice in notices:
        print(f"dicor: notice: task {task}: {notice}", file=sys.stderr)


def _head(task_pool: TaskPool) -> str:
    reasons = ", ".join(f"{n} {why}" for why, n in sorted(Counter(task_pool.left_out.values()).items()))
    return (
        f"{task_pool.name}: {len(task_pool.members)} members on {len(task_pool.examples().ids)} dev examples; "
        f"{len(task_pool.left_out)} left out{f' ({reasons})' if reasons else ''}"
    )


def _score_name(task_pool: TaskPool) -> str:
    return "Pearson r" if task_pool.kind == "regression" else "accuracy"


def _select(given: argparse.Namespace) -> None:
    from lora_ensemble.dicor import record
    from lora_ensemble.dicor.choose.settings import DEFAULT_METHOD
    from lora_ensemble.dicor.compare import compare
    from lora_ensemble.dicor.options import refuse_unheard
    from lora_ensemble.dicor.table import about, number, offsets, table, verdict
    from lora_ensemble.pool import TaskPool

    with record.whole(given.output) as f:
        task_pool, options = TaskPool(given.pool, given.task), _options(given)
        method = given.method or DEFAULT_METHOD[task_pool.kind]
        refuse_unheard(options, [method])
        comparison = compare(task_pool, [method], options)
        _say(given.task, comparison.notices)
        ensemble = record.make(comparison, method, folder=given.output.resolve().parent)
        f.write(ensemble.to_json())
    width = max(len(m.name) for m in ensemble.members)
    settings = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in ensemble.settings.items() if v is not None)
    print(f"{_head(task_pool)}\n{method}{f' ({settings})' if settings else ''}; strategy {ensemble.strategy}\n")
    print(f"{'member':<{width}} {_score_name(task_pool):>10} {'weight':>7} {'mean similarity to those above':>32}")
    for m in ensemble.members:
        print(f"{m.name:<{width}} {m.score:>10.4f} {m.weight:>7.4f} {number(m.mean_similarity):>32}")
    if ensemble.offsets is not None:
        print(offsets(ensemble.scale, ensemble.offsets, ensemble.labels))
    found = comparison.estimates
    print(f"\n{table(found, _score_name(task_pool))}\n\n{verdict(method, found.of[method])}\n{about(found)}")
    print(f"saved {given.output}")


def _compare(given: argparse.Namespace) -> None:
    from lora_ensemble.dicor.choose.settings import DEFAULT_METHOD
    from lora_ensemble.dicor.compare import compare, overall, test_scores
    from lora_ensemble.dicor.options import METHODS, refuse_unheard
    from lora_ensemble.dicor.table import about, number, table, verdict
    from lora_ensemble.pool import TaskPool, task_names

    if given.plots:
        report_command.check("--plots", folder=given.plots)
    tasks = [given.task] if given.task is not None else task_names(given.pool)
    if not tasks:
        raise UserError(f"{given.pool}: no task in this folder; give the folder that training wrote")
    methods, options = given.method or list(METHODS), _options(given)
    refuse_unheard(options, methods)
    comparisons = {}
    for task in tasks:
        task_pool = TaskPool(given.pool, task)
        comparison = comparisons[task] = compare(task_pool, methods, options, probabilities=bool(given.plots))
        found = comparison.estimates
        test = test_scores(comparison) if given.split == "test" else None
        _say(task, comparison.notices)
        print(f"{_head(task_pool)}\n\n{table(found, _score_name(task_pool), test)}\n")
        default = DEFAULT_METHOD[task_pool.kind]
        method = default if default in found.of else list(found.of)[-1]
        print(verdict(method, found.of[method]))
        if given.plots:
            report_command.save_plots(comparison, method, given.plots)
        print()
    if scores := overall(comparisons):
        print(f"overall: the mean of sst, quora and (sts + 1) / 2\n{'':<17} {'in-sample':>9} {'honest':>9}")
        rows = (f"{method:<17} {number(one):>9} {number(other):>9}" for method, (one, other) in scores.items())
        print("\n".join(rows), end="\n\n")
    print(about(found))


def _report(given: argparse.Namespace) -> None:
    report_command.run(given, _options(given))


def _apply(options: argparse.Namespace) -> None:
    from lora_ensemble.dicor import record
    from lora_ensemble.dicor.apply import predict, write_predictions
    from lora_ensemble.dicor.located import locate
    from lora_ensemble.dicor.table import IN_SAMPLE, number
    from lora_ensemble.scores import one_label

    with record.whole(options.output) as f:
        found = locate(options.ensemble, options.pool)
        ensemble, prediction = found.ensemble, predict(found.ensemble, found.pool, options.split)
        write_predictions(f, ensemble, prediction.examples.ids, prediction.decided)
    if prediction.score is not None:
        _say(ensemble.task, one_label(prediction.examples.labels, ensemble.labels, f"{options.split} labels"))
        name = "Pearson r" if ensemble.kind == "regression" else "accuracy"
        print(f"{ensemble.task} {options.split} {name} {number(prediction.score)}")
        if options.split == "dev":
            print(IN_SAMPLE)
    print(f"saved {len(prediction.decided)} predictions of {ensemble.size} members in {options.output}")


def main(args: list[str] | None = None) -> int:
    """Run ``dicor`` with ``args`` (None: those of the process); returns the exit code, 2 for a user's mistake."""
    try:
        options = _parser().parse_args(args)
        run = {
            "import": import_command.run, "select": _select, "compare": _compare, "report": _report, "apply": _apply,
        }  # fmt: skip
        run[options.command](options)
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
