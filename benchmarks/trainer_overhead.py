"""What a training run's own bookkeeping costs, against what it costs to train and evaluate its members.

    python benchmarks/trainer_overhead.py --task sst --targets none --members 8 64 256 --steps 1068

The command runs with its defaults (CSV file, Weights & Biases offline, the pool's writer, checkpoints) and evaluates
dev twice, after half of the steps and after all. Training and evaluation are the optimiser's steps with their forward
and backward passes, the passes over dev, and scores; bookkeeping is all else from the moment the module is there until
the command ends: batches, records, files, checks, syncing, checkpoints, tables, logging. Each run has its own process.
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
from sides import OUR_PRECISION

Seconds = tuple[float, float]
"""On the wall clock, and of the process on all processors."""


def run_fit(work: workload.Workload, members: int) -> tuple[Seconds, Seconds]:
    """What ``lora-ensemble fit`` took to train and evaluate, and for all else."""
    os.environ["WANDB_MODE"] = "offline"
    import wandb

    from clocks import ComputeClock, now
    from lora_ensemble.train.cli import run

    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "data.root": work.root,
            "data.tasks": json.dumps([dataclasses.asdict(work.task)]),
            "data.batch_size": work.batch_size,
            "data.steps_per_epoch": work.steps // 2,
            "model.base_model": work.base_model,
            "model.members": json.dumps([dataclasses.asdict(m) for m in work.members(members)]),
            "model.head_dropout": work.head_dropout,
            "model.encoder_dropout": "null" if work.encoder_dropout is None else work.encoder_dropout,
            "bank_size": "null",
            "pool.dir": f"{folder}/pool",
            "trainer.default_root_dir": folder,
            "trainer.accelerator": "gpu" if work.device == "cuda" else "cpu",
            "trainer.devices": 1,
            "trainer.precision": OUR_PRECISION[work.precision],
            "trainer.max_epochs": 2,
            "trainer.callbacks+": "clocks.ComputeClock",
        }
        if run(["fit", *(f"--{name}={value}" for name, value in options.items())]) != 0:
            raise RuntimeError("lora-ensemble fit failed")
        spent, end, start = ComputeClock.seconds, now(), ComputeClock.started
        wandb.finish()  # its own process would outlive this one
    return spent, (end[0] - start[0] - spent[0], end[1] - start[1] - spent[1])


def _row(work: workload.Workload, members: int, repeats: int) -> str:
    runs = []
    for _ in range(repeats):
        runs.append(in_fresh_process(run_fit, work, members))
        (wall, processor), (wall_rest, processor_rest) = runs[-1]
        print(
            f"  M = {members}: {processor:.1f} s of processor time and {processor_rest:.2f} for bookkeeping "
            f"({wall:.1f} and {wall_rest:.2f} on the wall clock)",
            flush=True,
        )
    each = [[rest[i] / spent[i] for spent, rest in runs] for i in (1, 0)]
    cells = [
        work.task.name,
        work.targets,
        str(members),
        f"{statistics.median(spent[1] for spent, _ in runs):.1f}",
        f"{statistics.median(rest[1] for _, rest in runs):.2f}",
        *(f"{statistics.median(shares):.1%}" for shares in each),
    ]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.set_defaults(steps=40, repeats=1, warmup_steps=0, dev=200)
    parser.add_argument("--members", type=int, nargs="+", default=[8, 64, 256], help="sizes (default: 8 64 256)")
    args = parser.parse_args(arguments)
    args.device = in_fresh_process(choose_device, args.device)
    print(in_fresh_process(describe, args.device, args.threads))
    rows = []
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        for task in args.task:
            work = workload.workload(args, task, Path(folder))
            rows += [_row(work, members, args.repeats) for members in args.members]
    print("\n| task | targets | M | training and evaluation, s | bookkeeping, s | share | on the wall clock |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
