"""The command line ``dicor``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, get_args

from lora_ensemble import __version__
from lora_ensemble.dicor import import_command
from lora_ensemble.dicor.settings import Settings, Similarity, Strategy, settle
from lora_ensemble.errors import UserError

if TYPE_CHECKING:
    from lora_ensemble.dicor.compare import Comparison
    from lora_ensemble.pool import TaskPool

IN_SAMPLE = "In-sample: these are scores on the very dev set that members and ensembles were chosen on."


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="dicor",
        description="Pick from a pool of members a few that are good and disagree, and let them decide together.",
        epilog="Scores and similarities are those of the dev logits in the pool. Nothing is trained here.",
    )
    parser.add_argument("--version", action="version", version=f"dicor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    import_command.add_parser(commands)

    settings = _Parser(add_help=False)
    settings.add_argument("--pool", type=Path, required=True, metavar="DIR", help="the folder that training wrote")
    settings.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="members in the ensemble (default: multiclass 11, binary 4, regression 10)",
    )
    settings.add_argument(
        "--top-k", type=int, metavar="K", help="choose among the K best by dev score (default: 30, or all if fewer)"
    )
    settings.add_argument(
        "--similarity",
        choices=get_args(Similarity),
        help="of decisions or of values and logits (default: cosine; pearson for regression)",
    )
    settings.add_argument(
        "--strategy", choices=get_args(Strategy), help="how members decide (default: majority; mean for regression)"
    )

    select = commands.add_parser(
        "select", parents=[settings], help="choose an ensemble", description="Choose an ensemble and write its record."
    )
    select.add_argument("--task", required=True, help="a task of the pool: sst, quora, sts or your own")
    select.add_argument("--output", type=Path, required=True, metavar="FILE", help="the record to write: dicor.json")

    compare = commands.add_parser(
        "compare",
        parents=[settings],
        help="single best, all members and DiCor side by side",
        description="Dev scores of the single best member, of all members (Omni) and of DiCor.",
    )
    compare.add_argument("--task", help="one task only (default: all tasks of the pool)")
    compare.add_argument("--plots", type=Path, metavar="DIR", help="save a heat map and a score-by-rank plot per task")

    apply = commands.add_parser(
        "apply",
        help="predictions of a chosen ensemble",
        description="Write an ensemble's predictions in the course's leaderboard format.",
    )
    apply.add_argument("--ensemble", type=Path, required=True, metavar="FILE", help="what dicor select wrote")
    apply.add_argument("--split", choices=("dev", "test"), default="test", help="default: test")
    apply.add_argument("--output", type=Path, required=True, metavar="FILE", help="the predictions to write")
    apply.add_argument("--pool", type=Path, metavar="DIR", help="the pool, if it is no longer where the record says")
    return parser


def _compared(options: argparse.Namespace, task: str) -> tuple[TaskPool, Comparison, Settings]:
    """Open a task's pool, select, and score the three systems."""
    import numpy as np

    from lora_ensemble.dicor.compare import compare
    from lora_ensemble.pool import TaskPool

    task_pool = TaskPool(options.pool, task)
    records = task_pool.members
    try:
        settings, notices = settle(
            task_pool.kind,
            len(records),
            size=options.size,
            top_k=options.top_k,
            similarity=options.similarity,
            strategy=options.strategy,
        )
    except UserError as e:
        raise UserError(f"task {task}: {e}") from e
    for notice in notices:
        print(f"dicor: notice: task {task}: {notice}", file=sys.stderr)
    labels = task_pool.examples().labels
    if labels is None:
        raise UserError(f"{options.pool / task}: the dev examples have no labels, so there is no score to choose by")
    comparison = compare(
        np.stack([task_pool.logits(r.name) for r in records]),  # (M, N, C)
        labels,
        kind=task_pool.kind,
        names=[r.name for r in records],
        ranks=[r.rank for r in records],
        settings=settings,
    )
    return task_pool, comparison, settings


def _head(task_pool: TaskPool, settings: Settings) -> str:
    reasons = ", ".join(f"{n} {why}" for why, n in sorted(Counter(task_pool.left_out.values()).items()))
    return (
        f"{task_pool.name}: {len(task_pool.members)} members on {len(task_pool.examples().ids)} dev examples; "
        f"{len(task_pool.left_out)} left out{f' ({reasons})' if reasons else ''}\n"
        f"DiCor: {settings.size} of the {settings.top_k} best, {settings.similarity} similarity; "
        f"strategy {settings.strategy}"
    )


def _score(value: float) -> str:
    return "undefined" if value != value else f"{value:.4f}"


def _table(comparison: Comparison, score_name: str) -> str:
    rows = [f"{'':<12} {'members':>8} {score_name:>10}"]
    rows += [f"{s:<12} {comparison.members[s]:>8} {_score(v):>10}" for s, v in comparison.scores.items()]
    return "\n".join(rows)


def _score_name(task_pool: TaskPool) -> str:
    return "Pearson r" if task_pool.kind == "regression" else "accuracy"


def _select(options: argparse.Namespace) -> None:
    from lora_ensemble.dicor import record

    with record.whole(options.output) as f:
        task_pool, comparison, settings = _compared(options, options.task)
        ensemble = record.make(task_pool, comparison, settings, folder=options.output.resolve().parent)
        f.write(ensemble.to_json())
    width = max(len(m.name) for m in ensemble.members)
    print(_head(task_pool, settings), end="\n\n")
    print(f"{'member':<{width}} {_score_name(task_pool):>10} {'mean similarity to those above':>32}")
    for m in ensemble.members:
        similarity = "-" if m.mean_similarity is None else f"{m.mean_similarity:.4f}"
        print(f"{m.name:<{width}} {m.score:>10.4f} {similarity:>32}")
    print(f"\n{_table(comparison, _score_name(task_pool))}\n\n{IN_SAMPLE}\nsaved {options.output}")


def _compare(options: argparse.Namespace) -> None:
    from lora_ensemble.dicor.compare import overall
    from lora_ensemble.pool import task_names
    from lora_ensemble.tasks import PRESETS

    if options.plots:
        from lora_ensemble.dicor import plots

        plots.check_folder(options.plots)
    tasks = [options.task] if options.task else task_names(options.pool)
    if not tasks:
        raise UserError(f"{options.pool}: no task in this folder; give the folder that training wrote")
    comparisons = {}
    for task in tasks:
        task_pool, comparison, settings = _compared(options, task)
        comparisons[task] = comparison
        print(f"{_head(task_pool, settings)}\n\n{_table(comparison, _score_name(task_pool))}")
        if options.plots:
            for path in plots.save(task_pool, comparison, settings, options.plots):
                print(f"saved {path}")
        print()
    others = [task for task in task_names(options.pool) if task in PRESETS and task not in comparisons]
    if len(others) + len(comparisons) >= len(PRESETS) and others:
        # Asked about one task: the overall score needs the others, chosen with their defaults.
        defaults = argparse.Namespace(pool=options.pool, size=None, top_k=None, similarity=None, strategy=None)
        with contextlib.redirect_stderr(io.StringIO()):  # their notices were not asked for
            comparisons |= {task: _compared(defaults, task)[1] for task in others}
    if scores := overall(comparisons):
        print("overall: the mean of sst, quora and (sts + 1) / 2" + (" (others with their defaults)" if others else ""))
        print("\n".join(f"{system:<12} {'':>8} {_score(value):>10}" for system, value in scores.items()), end="\n\n")
    print(IN_SAMPLE)


def _apply(options: argparse.Namespace) -> None:
    from lora_ensemble.dicor import record
    from lora_ensemble.dicor.apply import leaderboard, predict

    with record.whole(options.output) as f:
        ensemble = record.read(options.ensemble)
        pool = options.pool or options.ensemble.resolve().parent / ensemble.pool
        prediction = predict(ensemble, pool, options.split)
        f.writelines(leaderboard(ensemble, prediction.examples.ids, prediction.decided))
    if prediction.score is not None:
        name = "Pearson r" if ensemble.kind == "regression" else "accuracy"
        print(f"{ensemble.task} {options.split} {name} {_score(prediction.score)}")
        if options.split == "dev":
            print(IN_SAMPLE)
    print(f"saved {len(prediction.decided)} predictions of {ensemble.size} members in {options.output}")


def main(args: list[str] | None = None) -> int:
    """Run ``dicor`` with ``args`` (None: those of the process); returns the exit code, 2 for a user's mistake."""
    try:
        options = _parser().parse_args(args)
        {"import": import_command.run, "select": _select, "compare": _compare, "apply": _apply}[options.command](
            options
        )
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
