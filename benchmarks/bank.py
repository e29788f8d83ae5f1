"""Banks of members against PEFT one by one: the same members, data, batch size, dropout and precision, in one run.

    python benchmarks/bank.py --task sst --members 1 2 4 8 --repeats 5

Sides: PEFT + HF Trainer, PEFT in a plain loop (both one member at a time; all members cost them the same, so one is
trained per repeat), and ``lora-ensemble`` for each M of ``--members`` (``BankModule``, ``BankData`` and the Lightning
Trainer as ``lora-ensemble fit`` sets them up). Logger, checkpoints and validation are off on every side. Every
measurement is a process of its own; in each repeat the order of the sides moves on by one.

Time goes from the end of the last warm-up step to the end of the last step, loading included. Tokens are real ones:
padding is not counted. The share of the peak is useful FLOP/s (``useful_flops`` in workload.py says what is counted)
over those of the largest matrix product at the same precision, the best of the run. Peak memory: CUDA, what torch
allocated; CPU, growth of the resident size from before the model is loaded; the largest of the repeats.

Exit code 1 where the sides do not train the same model (``sameness.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import workload
from lora_ensemble.tasks import PRESETS
from machine import choose_device, describe, in_fresh_process, peak_flops
from sameness import Sameness, check
from sides import PEERS, Run, run_bank

_REFERENCE = "PEFT + Trainer"
_HEADER = ["side", "M", "tokens × members / s", "× PEFT + Trainer", "share of peak", "peak memory", "ms / member-step"]


@dataclass
class Side:
    """One way to train, and what it took in each repeat."""

    name: str
    members: int
    measure: Callable[[workload.Workload], Run]
    runs: list[Run] = field(default_factory=list)
    refused: str = ""
    """Why it was given up: the device's memory."""


@dataclass
class Comparison:
    """All sides on one task."""

    work: workload.Workload
    sides: list[Side]
    tokens: int
    """Real tokens of the timed steps."""
    flops: float
    """Useful FLOPs of one member's timed steps."""
    peak: float
    """The machine's FLOP/s at this precision."""
    sameness: list[Sameness]

    def ratios(self, side: Side) -> list[float]:
        """Throughput over that of PEFT + Trainer in the same repeat."""
        reference = next(s for s in self.sides if s.name == _REFERENCE)
        return [side.members * r.seconds / s.seconds for r, s in zip(reference.runs, side.runs, strict=False)]

    def row(self, side: Side) -> list[str]:
        """The side's row of the table."""
        if not side.runs:
            return [side.name, str(side.members), side.refused, *[""] * (len(_HEADER) - 3)]
        seconds = statistics.median(run.seconds for run in side.runs)
        ratios = self.ratios(side)
        if not ratios:
            raise RuntimeError(f"{_REFERENCE} was given up ({self.sides[0].refused}); there is nothing to compare with")
        share = side.members * self.flops / seconds / self.peak
        return [
            side.name,
            str(side.members),
            f"{side.members * self.tokens / seconds:,.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})",
            f"{share:.1%}",
            f"{max(run.peak_bytes for run in side.runs) / 2**20:,.0f} MiB",
            f"{1000 * seconds / self.work.steps / side.members:.2f}",
        ]

    def pays(self) -> str:
        """The smallest bank whose worst repeat beat PEFT + Trainer."""
        banks = [side for side in self.sides if side.name == "bank" and side.runs]
        paying = [side.members for side in banks if min(self.ratios(side)) > 1]
        if not paying:
            return "no bank had a ratio above 1 in every repeat"
        return f"smallest bank with a ratio above 1 in every repeat: M = {min(paying)}"


def compare(work: workload.Workload, args: argparse.Namespace, folder: Path) -> Comparison:
    """Check that the sides are the same, then time them in turns."""
    lengths = in_fresh_process(work.timed_lengths)
    sameness = []
    for precision in dict.fromkeys(["32", work.precision]):
        sameness.append(check(work, precision, steps=args.check_steps, folder=folder))
        _say(str(sameness[-1]))
    sides = [Side(name, 1, _peer(run)) for name, run in PEERS.items()]
    sides += [Side("bank", count, _bank(count)) for count in args.members]
    peak = 0.0
    for repeat in range(args.repeats):
        found = in_fresh_process(peak_flops, work.device, work.precision, work.threads)
        _say(f"repeat {repeat + 1}/{args.repeats}: matrix peak {found / 1e9:,.0f} GFLOP/s")
        peak = max(peak, found)
        first = repeat % len(sides)
        for side in sides[first:] + sides[:first]:
            _measure(side, work, int(lengths.sum()))
    return Comparison(work, sides, int(lengths.sum()), sum(workload.useful_flops(work, lengths)), peak, sameness)


def _peer(run: Callable[..., Run]) -> Callable[[workload.Workload], Run]:
    return lambda work: in_fresh_process(run, work, work.members(1)[0])


def _bank(count: int) -> Callable[[workload.Workload], Run]:
    return lambda work: in_fresh_process(run_bank, work, work.members(count))


def _measure(side: Side, work: workload.Workload, tokens: int) -> None:
    if side.refused:
        return
    try:
        run = side.measure(work)
    except MemoryError:
        # Runs that were whole are not shown beside one that was not.
        side.refused, side.runs = "out of memory", []
        _say(f"  {side.name}, M = {side.members}: out of memory")
        return
    side.runs.append(run)
    rate = side.members * tokens / run.seconds
    _say(f"  {side.name}, M = {side.members}: {run.seconds:.2f} s, {rate:,.0f} tokens x members / s")


def markdown(comparisons: Sequence[Comparison], machine: str, command: str) -> str:
    """What goes into benchmarks/README.md."""
    lines = [f"    {command}", "", f"{machine}."]
    for c in comparisons:
        w = c.work
        padded = "" if w.task.name != workload.MADE_UP else " (made-up sentences with SST's lengths)"
        lines += [
            "",
            f"**{w.task.name}**{padded}, batch {w.batch_size}, precision {w.precision}, {w.steps} timed steps, "
            f"{c.tokens:,} real tokens, matrix peak {c.peak / 1e9:,.0f} GFLOP/s, median (min – max) of "
            f"{max(len(s.runs) for s in c.sides)} repeats:",
            "",
            "| " + " | ".join(_HEADER) + " |",
            "| " + " | ".join("---" for _ in _HEADER) + " |",
            *("| " + " | ".join(c.row(side)) + " |" for side in c.sides),
            "",
            c.pays()[0].upper() + c.pays()[1:] + ".",
            *(f"{str(s)[0].upper()}{str(s)[1:]}." for s in c.sameness),
        ]
    return "\n".join(lines) + "\n"


def command_line(arguments: Sequence[str]) -> str:
    """The command as anybody can run it: no paths of this machine, no output files."""
    kept: list[str] = []
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    skip = False
    for word in words:
        if word.startswith("--"):
            skip = word in ("--root", "--markdown", "--json")
        if not skip:
            kept.append("MODEL" if Path(word).is_absolute() else word)
    if "--task" not in kept or any(task in kept for task in PRESETS):
        kept += ["--root", "DIR"]
    return f"python benchmarks/bank.py {shlex.join(kept)}"


def as_json(comparisons: Sequence[Comparison], machine: str, command: str) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "command": command,
        "machine": machine,
        "comparisons": [
            {
                "task": c.work.task.name,
                "precision": c.work.precision,
                "batch_size": c.work.batch_size,
                "steps": c.work.steps,
                "real_tokens": c.tokens,
                "useful_flops_per_member": c.flops,
                "matrix_peak_flops": c.peak,
                "sameness": [{**dataclasses.asdict(s), "agrees": s.agrees} for s in c.sameness],
                "sides": [
                    {
                        "side": s.name,
                        "members": s.members,
                        "seconds": [run.seconds for run in s.runs],
                        "ratios": c.ratios(s),
                        "peak_bytes": [run.peak_bytes for run in s.runs],
                        "refused": s.refused,
                    }
                    for s in c.sides
                ],
            }
            for c in comparisons
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.add_argument(
        "--members", type=int, nargs="+", default=[1, 2, 4, 8], help="sizes of banks (default: 1 2 4 8)"
    )
    parser.add_argument("--check_steps", type=int, default=5, help="steps of the check of sameness (default: 5)")
    parser.add_argument(
        "--peer_attention", choices=["eager", "sdpa"], help="PEFT's attention (default: as transformers chooses)"
    )
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    return parser


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where the sides trained different models."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(arguments)
    args.device = in_fresh_process(choose_device, args.device)
    machine, command = in_fresh_process(describe, args.device, args.threads), command_line(arguments)
    _say(machine)
    with tempfile.TemporaryDirectory(prefix="bank-") as folder:
        comparisons = []
        for task in args.task:
            _say(f"\n{task}")
            comparisons.append(compare(workload.workload(args, task, Path(folder)), args, Path(folder)))
    text = markdown(comparisons, machine, command)
    _say("\n" + text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(as_json(comparisons, machine, command), indent=1) + "\n")
    return 0 if all(s.agrees for c in comparisons for s in c.sameness) else 1


if __name__ == "__main__":
    sys.exit(main())
