"""How long ``lora-ensemble fit`` takes to answer ``--help``, and to end its first training step.

    python benchmarks/startup.py --root DIR

Three commands in turns, each a fresh process: a bare import of LightningCLI; ``fit --help``; and ``fit`` with
``configs/sst.yaml``, timed from the command to the end of its first step, which ``clocks.FirstStep`` writes down from
inside (loggers, checkpoints and the pool as by default, Weights & Biases offline). One round before is not counted, so
that files are in the system's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import workload
from machine import describe, in_fresh_process

_HERE = Path(__file__).resolve().parent
_SST_EXAMPLES = 8544


def _run(command: Sequence[str]) -> None:
    path = os.pathsep.join([str(_HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")


def import_cli(_: Sequence[str]) -> float:
    """Seconds of a process that imports LightningCLI."""
    start = time.perf_counter()
    _run(["-c", "from lightning.pytorch.cli import LightningCLI"])
    return time.perf_counter() - start


def fit_help(_: Sequence[str]) -> float:
    """Seconds of ``lora-ensemble fit --help``."""
    start = time.perf_counter()
    _run(["-m", "lora_ensemble", "fit", "--help"])
    return time.perf_counter() - start


def first_step(options: Sequence[str]) -> float:
    """Seconds from the command to the end of the first step."""
    with tempfile.TemporaryDirectory() as folder:
        stamp = Path(folder) / "stamp"
        own = [
            *("--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.callbacks+=clocks.FirstStep"),
            *(f"--trainer.callbacks.init_args.file={stamp}", f"--trainer.default_root_dir={folder}"),
            f"--pool.dir={folder}/pool",
        ]
        start = time.time()
        _run(["-m", "lora_ensemble", "fit", f"--config={_HERE.parent}/configs/sst.yaml", *options, *own])
        return float(stamp.read_text()) - start


MEASURES: dict[str, Callable[[Sequence[str]], float]] = {
    "import LightningCLI": import_cli,
    "lora-ensemble fit --help": fit_help,
    "lora-ensemble fit, to the end of its first step": first_step,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="SST's folder (default: $LORA_ENSEMBLE_DATA, ../shared/data)")
    parser.add_argument(
        "--task", choices=["sst", workload.MADE_UP], default="sst", help="random: made-up sentences, as many as SST's"
    )
    parser.add_argument("--base_model", default="all-MiniLM-L6-v2")
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(arguments)
    print(in_fresh_process(describe, "cpu", torch.get_num_threads()), flush=True)
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        options = [f"--model.base_model={args.base_model}"]
        if args.task == workload.MADE_UP:
            task = workload.made_up(Path(folder), args.base_model, _SST_EXAMPLES)
            options += [f"--data.root={folder}", f"--data.tasks={json.dumps([dataclasses.asdict(task)])}"]
        else:
            options.append(f"--data.root={workload.data_root(args.root)}")
        seconds: dict[str, list[float]] = {name: [] for name in MEASURES}
        for repeat in range(args.repeats + 1):
            for name, measure in MEASURES.items():
                found = measure(options)
                print(f"  {name}: {found:.2f} s{' (not counted)' * (repeat == 0)}", flush=True)
                if repeat:
                    seconds[name].append(found)
    print("\n| command | seconds, median (min – max) |\n| --- | --- |")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} – {max(values):.2f}) |")
    bare, helped, _ = seconds.values()
    above = statistics.median(b - a for a, b in zip(bare, helped, strict=True))
    print(f"\n`fit --help` above the bare import: {above:.2f} s (median of the differences)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
