"""What the Trainer, the callbacks and the logging of ``lora-ensemble fit`` cost over a bare loop around the same bank.

    python benchmarks/trainer_overhead.py --task sst --members 1 8 --steps 40

One side is the command itself with its defaults: progress bar, CSV file, Weights & Biases offline, the pool's writer,
checkpoints. The other is the shortest loop over the same loader around the same bank with the same loss and optimiser.
Sides alternate, each in a process of its own; time goes from the end of the last warm-up step to the end of the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import workload
from machine import choose_device, describe, in_fresh_process
from sides import OUR_PRECISION, Stopwatch, bare_steps

_LOG_EVERY = 20  # the command's default


def run_fit(work: workload.Workload, members: int) -> float:
    """Seconds of the timed steps of ``lora-ensemble fit``."""
    os.environ["WANDB_MODE"] = "offline"
    import wandb

    from lora_ensemble.cli import run

    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        seconds = Path(folder) / "seconds"
        clock = {"file": str(seconds), "first": work.warmup_steps, "last": work.all_steps}
        options = {
            "data.root": work.root,
            "data.tasks": json.dumps([dataclasses.asdict(work.task)]),
            "data.batch_size": work.batch_size,
            "data.steps_per_epoch": work.all_steps,
            "model.base_model": work.base_model,
            "model.members": json.dumps([dataclasses.asdict(m) for m in work.members(members)]),
            "model.head_dropout": work.head_dropout,
            "model.encoder_dropout": "null" if work.encoder_dropout is None else work.encoder_dropout,
            "pool.dir": f"{folder}/pool",
            "trainer.default_root_dir": folder,
            "trainer.accelerator": "gpu" if work.device == "cuda" else "cpu",
            "trainer.devices": 1,
            "trainer.precision": OUR_PRECISION[work.precision],
            "trainer.max_epochs": 1,
            "trainer.limit_val_batches": 0,
            "trainer.callbacks+": "clocks.WindowClock",
            **{f"trainer.callbacks.init_args.{name}": value for name, value in clock.items()},
        }
        if run(["fit", *(f"--{name}={value}" for name, value in options.items())]) != 0:
            raise RuntimeError("lora-ensemble fit failed")
        wandb.finish()  # its own process would outlive this one
        return float(seconds.read_text())


def run_loop(work: workload.Workload, members: int) -> float:
    """Seconds of the timed steps of a bare loop."""
    stopwatch = Stopwatch(work)
    for _ in bare_steps(work, members):
        stopwatch.step_done()
    return stopwatch.seconds


def _row(work: workload.Workload, members: int, repeats: int) -> str:
    loop: list[float] = []
    fit: list[float] = []
    for repeat in range(repeats):
        for side, seconds in ((run_loop, loop), (run_fit, fit))[:: -1 if repeat % 2 else 1]:
            seconds.append(in_fresh_process(side, work, members))
            print(f"  {side.__name__}, M = {members}: {1000 * seconds[-1] / work.steps:.2f} ms / step", flush=True)
    ratios = [a / b for a, b in zip(fit, loop, strict=True)]
    cells = [
        work.task.name,
        str(members),
        *(f"{1000 * statistics.median(seconds) / work.steps:.2f}" for seconds in (loop, fit)),
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} – {max(ratios):.3f})",
    ]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.set_defaults(steps=2 * _LOG_EVERY)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8], help="sizes of banks (default: 1 8)")
    args = parser.parse_args(arguments)
    if args.steps % _LOG_EVERY:
        print(f"note: losses are logged every {_LOG_EVERY} steps; --steps is better a multiple of it")
    args.device = in_fresh_process(choose_device, args.device)
    print(in_fresh_process(describe, args.device, args.threads))
    rows = []
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        for task in args.task:
            work = workload.workload(args, task, Path(folder))
            rows += [_row(work, members, args.repeats) for members in args.members]
    print("\n| task | M | bare loop, ms / step | lora-ensemble fit, ms / step | ratio |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
