"""How long `dicor select` takes on a large pool, and how much memory, beside reading the logits once.

    python benchmarks/large_pool.py                     # 10,000 members on 40,429 examples: 1.6 GB on disk
    python benchmarks/large_pool.py --members 186 --examples 863 --kind regression --compare

A pool of made-up members is written into a temporary folder. Then, each in a process of its own and with its files in
the system's cache: every logits file is opened and added up (the time to read the logits once, with nothing checked);
every member is read as the pool reads it, checksums and all; ``dicor select`` as a user runs it. The three take turns,
so that what else the machine does falls on all of them alike: ratios are medians of the rounds' own, by the clock and
in the processor's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lora_ensemble.pool import MemberRecord, checksum, logits_file, write_examples
from lora_ensemble.tasks import Kind

RAW = """
import sys, numpy as np
from pathlib import Path
total = 0.0
for path in sorted(Path(sys.argv[1]).glob("*/dev.logits.npy")):
    total += float(np.load(path, mmap_mode="r").sum())
"""
CHECKED = """
import sys
from pathlib import Path
from lora_ensemble.pool import TaskPool
pool = TaskPool(Path(sys.argv[1]).parent, "large")
for record in pool.members:
    pool.logits(record.name).sum()
"""


def members_of(kind: Kind, members: int, examples: int) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Labels (N,), and the logits (N, C) float32 of one member after another. Half of the members' noise is common."""
    rng = np.random.default_rng(0)
    outputs = 5 if kind == "multiclass" else 1
    labels = rng.normal(size=examples) if kind == "regression" else rng.integers(max(outputs, 2), size=examples)
    known = (
        np.eye(5)[labels]
        if kind == "multiclass"
        else (labels[:, None] if kind == "regression" else labels[:, None] * 2.0 - 1)
    )
    common = rng.normal(size=known.shape)

    def each() -> Iterator[np.ndarray]:
        for m in range(members):
            own = rng.normal(size=known.shape, scale=1 + m / members)
            yield (known + common + own).astype(np.float32)

    return labels, each()


def write_pool(pool: Path, kind: Kind, members: int, examples: int) -> int:
    """Write a pool of one task, ``large``; returns the bytes of its logits."""
    labels, each = members_of(kind, members, examples)
    fingerprint = write_examples(pool, "large", "dev", np.arange(examples).astype(np.str_), labels)
    written = 0
    for m, logits in enumerate(each):
        folder = pool / "large" / f"m{m:05d}"
        folder.mkdir()
        np.save(folder / logits_file("dev"), logits)
        written += logits.nbytes
        record = MemberRecord(
            name=folder.name,
            task="large",
            kind=kind,
            labels=[] if kind == "regression" else [str(c) for c in range(5 if kind == "multiclass" else 2)],
            finished=True,
            rank=4 + m % 29,
            examples={"dev": fingerprint},
            files={logits_file("dev"): checksum(folder / logits_file("dev"))},
        )
        (folder / "member.json").write_text(record.to_json(), encoding="utf-8")
    return written


def measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds of a process, those of the processor in it, and its peak resident memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command} failed: {status}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=40_429)
    parser.add_argument("--kind", choices=("binary", "multiclass", "regression"), default="binary")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--method", action="append", help="for select (default: the task's own); may be repeated")
    parser.add_argument("--compare", action="store_true", help="also run dicor compare")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "pool"
        size = write_pool(pool, options.kind, options.members, options.examples) / 1e9
        dicor = [sys.executable, "-m", "lora_ensemble.dicor"]
        select = [
            *dicor,
            "select",
            "--pool",
            str(pool),
            "--task",
            "large",
            "--output",
            str(Path(folder) / "dicor.json"),
        ]
        commands = {
            "read the files": [sys.executable, "-c", RAW, str(pool / "large")],
            "read them as the pool does, checked": [sys.executable, "-c", CHECKED, str(pool / "large")],
        }
        for method in options.method or [None]:
            asked = ["--method", method] if method else []
            commands[" ".join(["dicor select", *asked])] = [*select, *asked]
        if options.compare:
            commands["dicor compare"] = [*dicor, "compare", "--pool", str(pool), "--task", "large"]
        print(f"{options.members} members, {options.examples} examples, {options.kind}: {size:.3f} GB of logits\n")
        rounds = [{what: measured(command) for what, command in commands.items()} for _ in range(options.repeats)]
        print(
            "| | seconds, median (least) | of the processor | times reading the files | the same of the processor ",
            end="",
        )
        print("| peak resident GB | copies of the logits |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        figures = {}
        for what in commands:
            runs = np.array([r[what] for r in rounds])  # (rounds, 3)
            seconds, processor, _ = np.median(runs, axis=0)
            ratio, of_processor, _ = np.median(runs / np.array([r["read the files"] for r in rounds]), axis=0)
            least, memory = runs[:, 0].min(), runs[:, 2].max()
            figures[what] = {
                "seconds": seconds,
                "least": least,
                "processor": processor,
                "ratio": ratio,
                "ratio of the processor": of_processor,
                "gb": memory,
                "copies": memory / size,
            }
            print(
                f"| {what} | {seconds:.2f} ({least:.2f}) | {processor:.2f} | {ratio:.2f} | {of_processor:.2f} "
                f"| {memory:.2f} | {memory / size:.2f} |"
            )
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
