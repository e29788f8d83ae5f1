"""What a step of a bank costs against the number of members, and against the length of the examples.

    python benchmarks/cost.py --members 1 2 4 8 16 --lengths 16 32 64 128 256 512 --plot cost.png

A bare loop around the bank, each point in a process of its own, the median of ``--repeats``. Against M: the task's
examples (made-up sentences with SST's lengths by default). Against L: all examples of one length, ``--length_members``
members. The exponent of growth is the slope of log time over log M (or L): 1 is linear. As attention's products grow
with L squared, the exponent that useful FLOPs alone would have stands beside it. ``--profile`` lists where the time of
one step goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import workload
from machine import choose_device, describe, in_fresh_process
from sides import Stopwatch, bare_steps


@dataclass(frozen=True)
class Point:
    """What a step of a bank took."""

    members: int
    length: float
    """Mean tokens of an example."""
    tokens: int
    """Real tokens of a step, on average."""
    seconds: float
    attention: float
    """Attention's products in one member's useful FLOPs of a step."""
    flops: float
    """All of one member's useful FLOPs of a step."""


def measure(work: workload.Workload, members: int, repeats: int) -> Point:
    """The median over fresh processes."""
    lengths = in_fresh_process(work.timed_lengths)
    seconds = statistics.median(in_fresh_process(_run, work, members) for _ in range(repeats)) / work.steps
    attention, rest = (flops / work.steps for flops in workload.useful_flops(work, lengths))
    point = Point(members, float(lengths.mean()), int(lengths.sum() / work.steps), seconds, attention, attention + rest)
    print(f"  M = {members}, L = {point.length:.0f}: {1000 * seconds:.1f} ms / step", flush=True)
    return point


def _run(work: workload.Workload, members: int) -> float:
    stopwatch = Stopwatch(work)
    for _ in bare_steps(work, members):
        stopwatch.step_done()
    return stopwatch.seconds


def profile(work: workload.Workload, members: int) -> str:
    """torch's profile of one step after the warm-up."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if work.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    steps = bare_steps(work, members)
    for _ in range(work.warmup_steps):
        next(steps)
    with torch.profiler.profile(activities=activities) as profiler:
        next(steps)
    return profiler.key_averages().table(
        sort_by=f"self_{work.device}_time_total", row_limit=20, max_name_column_width=50
    )


def exponents(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of log y over log x: fitted to all points, and the steepest between neighbours."""
    log_x, log_y = np.log(x), np.log(y)
    return float(np.polyfit(log_x, log_y, 1)[0]), float(np.max(np.diff(log_y) / np.diff(log_x)))


def _table(points: Sequence[Point]) -> str:
    header = [
        "M",
        "L",
        "real tokens / step",
        "ms / step",
        "ms / member-step",
        "µs / member-token",
        "attention's FLOPs",
    ]
    rows = [
        [
            str(p.members),
            f"{p.length:.0f}",
            str(p.tokens),
            f"{1000 * p.seconds:.2f}",
            f"{1000 * p.seconds / p.members:.2f}",
            f"{1e6 * p.seconds / p.members / p.tokens:.2f}",
            f"{p.attention / p.flops:.1%}",
        ]
        for p in points
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _growth(points: Sequence[Point], key: str) -> str:
    if len(points) < 2:
        return ""
    x = [float(p.members if key == "M" else p.length) for p in points]
    fitted, steepest = exponents(x, [p.seconds for p in points])
    line = f"time of a step grows as {key}^{fitted:.2f} (steepest between neighbours: {steepest:.2f})"
    if key == "M":
        return line
    wanted, _ = exponents(x, [p.flops for p in points])
    return f"{line}; useful FLOPs as {key}^{wanted:.2f}, without attention's products as {key}^1.00"


def _plot(by_members: Sequence[Point], by_length: Sequence[Point], file: Path) -> None:
    plt = _matplotlib()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot([p.members for p in by_members], [1000 * p.seconds / p.members for p in by_members], "o-")
    left.set(xlabel="members M", ylabel="ms per member-step", xscale="log", ylim=(0, None))
    left.set_xticks([p.members for p in by_members], [str(p.members) for p in by_members], minor=False)
    x = np.array([p.length for p in by_length])
    y = np.array([1000 * p.seconds / p.members for p in by_length])
    right.plot(x, y, "o-", label="measured")
    right.plot(x, y[0] * x / x[0], "--", color="grey", label="linear")
    right.set(xlabel="tokens of an example L", ylabel="ms per member-step", xscale="log", yscale="log")
    right.set_xticks(x, [f"{v:.0f}" for v in x], minor=False)
    right.legend()
    for axes in (left, right):
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    figure.savefig(file, dpi=150)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --plot needs matplotlib; pip install matplotlib, or leave --plot out")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.set_defaults(task=[workload.MADE_UP], repeats=3, steps=5, warmup_steps=2)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512], help="default: 16 32 ... 512"
    )
    parser.add_argument("--length_members", type=int, default=4, help="members against length (default: 4)")
    parser.add_argument("--plot", type=Path, help="draw both curves into this PNG (needs matplotlib)")
    parser.add_argument("--profile", action="store_true", help="also list where the largest bank's step goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.plot:
        _matplotlib()  # before an hour is spent
    args.device = in_fresh_process(choose_device, args.device)
    print(in_fresh_process(describe, args.device, args.threads), flush=True)
    with tempfile.TemporaryDirectory(prefix="cost-") as folder:
        work = workload.workload(args, args.task[0], Path(folder))
        by_members = [measure(work, members, args.repeats) for members in args.members]
        by_length = []
        for length in args.lengths:
            root = Path(folder) / f"length-{length}"
            task = workload.write_sentences(root, work.base_model, [length] * (work.batch_size * work.all_steps))
            fixed = dataclasses.replace(work, root=str(root), task=task)
            by_length.append(measure(fixed, args.length_members, args.repeats))
        print(f"\nAgainst members, task {work.task.name}:\n\n{_table(by_members)}\n\n{_growth(by_members, 'M')}")
        print(f"\nAgainst length, all examples equally long:\n\n{_table(by_length)}\n\n{_growth(by_length, 'L')}")
        if args.profile:
            print("\n" + in_fresh_process(profile, work, args.members[-1]))
    if args.plot:
        _plot(by_members, by_length, args.plot)
        print(f"\n{args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
