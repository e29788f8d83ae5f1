"""What choosing costs in time and memory: dicor's methods beside other libraries' on made-up members.

    python benchmarks/selection_cost.py
    python benchmarks/selection_cost.py --kinds binary --members 24 --examples 1101

Each contestant is a process of its own: it makes the members (logits in memory, float32), then chooses ``--repeats``
times. Time is the processor's, which what else runs changes least, and the median; memory is the most that was resident
while it chose less what was before (Linux). A first choice that takes longer than ``--long`` seconds is the only one,
and is marked. AutoGluon's selection runs with its own metrics and, like ours and auto-sklearn's loop here, sees all
members (``top_k`` all): the same work. Ratios are to the method of ours that does the like: greedy selection to
``greedy``, voting to ``omni``, stacking to ``weighted``.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from large_pool import members_of
from lora_ensemble.dicor.choose.methods import Greedy, Method, Omni, Weighted
from lora_ensemble.tasks import Kind

KINDS: tuple[Kind, ...] = ("multiclass", "binary", "regression")
LIKE = {
    "AutoGluon, by loss": "greedy, by loss",
    "AutoGluon, by score": "greedy, by score",
    "auto-sklearn's loop": "greedy, by score",
    "sklearn soft voting": "omni",
    "sklearn hard voting": "omni",
    "sklearn voting": "omni",
    "sklearn stacking": "weighted",
}


def ours(members: int) -> dict[str, Method]:
    """Those that do what a peer does, on as many members."""
    return {
        "greedy, by loss": Greedy(top_k=members, criterion="loss"),
        "greedy, by score": Greedy(top_k=members, criterion="score"),
        "omni": Omni(),
        "weighted": Weighted(top_k=members),
        "weighted, its default": Weighted(),
    }


def resident(key: str) -> float:
    """MB, from the kernel: VmRSS now, VmHWM at most. Where there is no such file, the most ever."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def choices(name: str, kind: Kind, logits: np.ndarray, labels: np.ndarray) -> Callable[[], object]:
    """A function that chooses and decides for the very examples, as a user would call it."""
    methods = ours(len(logits))
    if name in methods:
        return lambda: methods[name].fit(logits, labels, kind=kind).predict(logits)
    from peers import peers

    fit = peers(kind, own_metric=True)[name]
    return lambda: fit(logits, labels, kind)(logits)


def alone(name: str, kind: Kind, members: int, examples: int, repeats: int, long: float) -> None:
    """One contestant; prints its figures."""
    labels, each = members_of(kind, members, examples)
    logits = np.stack(list(each))
    choose = choices(name, kind, logits, labels)
    choices("omni", kind, logits[:2], labels)()  # what is imported late is imported now
    before = resident("VmRSS")
    try:  # the most so far is forgotten
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = 0.0
    seconds: list[float] = []
    while len(seconds) < repeats and not (seconds and seconds[0] > long):
        start = time.process_time()
        choose()
        seconds.append(time.process_time() - start)
    print(json.dumps({"seconds": seconds, "mb": resident("VmHWM") - before}))


def main() -> None:
    """All contestants, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--members", nargs="+", type=int, default=[24, 186, 1000])
    parser.add_argument("--examples", nargs="+", type=int, default=[1101, 10000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", type=float, default=10.0, help="seconds (default: 10)")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(
            options.alone,
            options.kinds[0],
            options.members[0],
            options.examples[0],
            options.repeats,
            options.long,
        )
        return
    print("| kind | M | N | contestant | seconds | times ours | MB while choosing | times ours |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in options.kinds:
        from peers import peers

        for m in options.members:
            for n in options.examples:
                found = {}
                for name in [*ours(m), *peers(kind, own_metric=True)]:
                    command = [sys.executable, "-W", "ignore", __file__, "--alone", name, "--kinds", kind]
                    command += ["--members", str(m), "--examples", str(n)]
                    command += ["--repeats", str(options.repeats), "--long", str(options.long)]
                    told = subprocess.run(command, capture_output=True, text=True)
                    if told.returncode:
                        raise SystemExit(told.stderr)
                    one = found[name] = json.loads(told.stdout.splitlines()[-1])
                    like = found[LIKE.get(name, name)]
                    seconds, theirs = (float(np.median(x["seconds"])) for x in (one, like))
                    once = "" if len(one["seconds"]) == options.repeats else " (once)"
                    # Less than a megabyte is what Python happens to have left over.
                    memory = f"{one['mb'] / like['mb']:.1f}" if like["mb"] > 1 else ""
                    ratios = [f"{seconds / theirs:.1f}", memory] if name in LIKE else ["", ""]
                    print(
                        f"| {kind} | {m} | {n} | {name} | {seconds:.4f}{once} | {ratios[0]} | {one['mb']:.1f} "
                        f"| {ratios[1]} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
