"""From which epoch on it pays to keep what lies below the members' lowest adapters.

    python benchmarks/frozen.py --task sst quora sts --members 8 --repeats 3 --root DIR

Times each epoch of the same bank, by the Lightning Trainer, with what is frozen kept on the disk (from an empty folder)
and computed anew in each step. Every run is a process of its own; in each repeat the order moves on by one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from machine import describe, in_fresh_process
from sides import trainer_settings
from workload import Workload, add_arguments, workload


class _EpochClock(pl.Callback):
    """The seconds of each epoch; the first one's clock starts at the end of its first step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self._since = steps, list[float](), 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the clock."""
        now, step = time.perf_counter(), trainer.global_step
        if step == 1:
            self._since = now
        elif step % self.steps == 0:
            self.seconds.append((now - self._since) * (self.steps / (self.steps - 1) if step == self.steps else 1))
            self._since = now


def epochs(work: Workload, members: int, number: int, kept: bool) -> list[float]:
    """Seconds of each of ``number`` epochs over the workload's examples."""
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    steps = work.steps
    data, module = work.data(), work.module(work.members(members))
    with tempfile.TemporaryDirectory() as folder:
        module.frozen_cache, module.frozen_dir = 20.0 if kept else 0.0, Path(folder) / "frozen"
        clock = _EpochClock(steps)
        settings = {**trainer_settings(work, folder), "max_steps": number * steps}
        trainer = pl.Trainer(**settings, logger=False, enable_checkpointing=False, callbacks=[clock])
        trainer.fit(module, datamodule=data)
    return clock.seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args(arguments)
    args.device = "cpu"
    print(describe("cpu", args.threads))
    print("\n| task | layers | what is frozen | seconds of each epoch | it has paid after epoch |")
    print("| --- | --- | --- | --- | --- |")
    for task in args.task:
        for layers in ("top-half", "top-third"):
            args.layers = layers
            with tempfile.TemporaryDirectory() as folder:
                work = workload(args, task, Path(folder))
                runs: dict[bool, list[list[float]]] = {True: [], False: []}
                for repeat in range(args.repeats):
                    for kept in (True, False) if repeat % 2 else (False, True):
                        runs[kept].append(in_fresh_process(epochs, work, args.members, args.epochs, kept))
            medians = {kept: [statistics.median(e) for e in zip(*of, strict=True)] for kept, of in runs.items()}
            sums = zip(accumulate(medians[True]), accumulate(medians[False]), strict=True)
            paid = next((i for i, (with_it, without) in enumerate(sums, 1) if with_it < without), f"> {args.epochs}")
            for kept, name in ((False, "computed in each step"), (True, "kept")):
                seconds = ", ".join(f"{s:.2f}" for s in medians[kept])
                print(f"| {task} | {layers} | {name} | {seconds} | {paid if kept else ''} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
