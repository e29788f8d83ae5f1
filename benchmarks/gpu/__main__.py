"""Everything that waits for a GPU, in an order in which each part is worth having if the next is cut off.

    bash benchmarks/gpu.sh                       run what benchmarks/results/gpu does not hold, or holds of older code
    bash benchmarks/gpu.sh --tiny --output DIR   try the script, on a CPU too

Each row is a process of its own, and is written to OUTPUT/<part>.jsonl as soon as it is there; OUTPUT.md holds the
tables. A second start goes on: what is whole and whose code is unchanged is kept.

Exit code: 1 where something failed or is not as expected, 3 where the time did not suffice, else 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from gpu.page import as_expected, page
from gpu.parts import Part, Row, parts
from gpu.record import REPOSITORY, Record, code_hashes
from gpu.setting import Setting, call
from machine import choose_device, describe, in_fresh_process

_OUTPUT = REPOSITORY / "benchmarks/results/gpu"
_SHORTEST_S = 5.0
"""A row is not begun with less."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="in all, start included (default: 9)")
    parser.add_argument(
        "--output", type=Path, default=_OUTPUT, help="folder of the records (default: benchmarks/results/gpu)"
    )
    parser.add_argument(
        "--changed", type=Path, metavar="DIR", help="start from the records in DIR: only parts whose code has changed"
    )
    parser.add_argument("--parts", nargs="+", choices=[p.name for p in parts(tiny=True)], help="these alone")
    parser.add_argument("--minilm", type=Path, metavar="DIR", help="all-MiniLM-L6-v2 as --carry wrote it")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of SST's files, for the grid with --minilm")
    parser.add_argument("--carry", type=Path, metavar="DIR", help="write all-MiniLM-L6-v2 there in bf16, and stop")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--list", action="store_true", help="say which parts would run, and why, and stop")
    return parser


class Run:
    """One start of the script."""

    def __init__(self, args: argparse.Namespace, began: float) -> None:
        self.end = began + 60 * args.minutes
        self.args = args
        chosen = args.parts or [p.name for p in parts(tiny=args.tiny)]
        self.all = parts(tiny=args.tiny)
        self.parts = [p for p in self.all if p.name in chosen]
        self.records = {p.name: Record.read(args.output / f"{p.name}.jsonl") for p in self.all}

    def about(self, part: Part) -> dict[str, Any]:
        """What a part's record says of this run."""
        carried = {"minilm": self.args.minilm, "root": self.args.root} if part.name == "grid" else {}
        return {
            "code": code_hashes(part.code),
            "device": self.args.device,
            "tiny": self.args.tiny,
            "given": [name for name, path in carried.items() if path],
        }

    def why(self, part: Part) -> str:
        """Why a part runs; empty where it need not."""
        record, about = self.records[part.name], self.about(part)
        if not record.about:
            return "not measured yet"
        if changed := record.changed(about["code"]):
            return f"changed since: {', '.join(changed)}"
        if not record.fits(about):
            return "measured on another kind of device, in other sizes, or without what is given now"
        missing = record.missing([row.name for row in part.rows])
        return f"not there yet: {', '.join(missing)}" if missing else ""

    def measure(self) -> bool:
        """Run what has to; returns whether the time sufficed."""
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        due = [p for p in self.parts if self.why(p)]
        if not due:
            return True
        description = _describe(self.args.device, threads)
        # Of what is left when the libraries are imported.
        scale = max(0.0, self.end - time.monotonic()) / 60 / sum(p.minutes for p in self.all)
        whole = True
        with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
            setting = Setting(
                device=self.args.device,
                threads=threads,
                tiny=self.args.tiny,
                folder=Path(folder),
                minilm=self.args.minilm and self.args.minilm.resolve(),
                root=self.args.root and self.args.root.resolve(),
            )
            for number, part in enumerate(due):
                _say(f"{part.title} ({self.why(part)})")
                record = self.records[part.name]
                record.start({**self.about(part), "machine": description})
                # The others' shares are theirs; what this part leaves goes to them.
                until = self.end - 60 * scale * sum(p.minutes for p in due[number + 1 :])
                for row in part.rows:
                    if record.missing([row.name]):
                        whole &= self._row(record, row, setting, until)
                        self.write()
        return whole

    def _row(self, record: Record, row: Row, setting: Setting, until: float) -> bool:
        start = time.monotonic()
        left = until - start
        if left < _SHORTEST_S:
            _say(f"  {row.name}: no time left")
            return False
        given = dataclasses.replace(setting, left=left)
        try:
            found = in_fresh_process(call, row.function, given, *row.arguments, seconds=left)
        except TimeoutError:
            _say(f"  {row.name}: stopped after {left:.0f} s")
            return False
        except MemoryError:
            # Too many members for this device is a result.
            found = {"error": "out of memory"}
            if row.arguments:
                found = {"refused": "out of memory", "members": row.arguments[0]}
        except RuntimeError as e:
            print(e, file=sys.stderr, flush=True)
            found = {"error": _last_line(str(e))}
        record.add(row.name, found)
        _say(f"  {row.name}: {found.get('error', 'done')}, {time.monotonic() - start:.1f} s")
        return True

    def write(self) -> None:
        """The page."""
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        page_file = self.args.output.with_name(self.args.output.name + ".md")
        page_file.write_text(page(self.all, self.records), encoding="utf-8")


def _describe(device: str, threads: int) -> str:
    """What the run is on; and a look at whether processes that are forked can use the GPU."""
    try:
        return in_fresh_process(describe, device, threads)
    except RuntimeError as e:
        if "forked subprocess" not in str(e):
            raise
        _say("a library looks at the GPU while it is imported: each row imports everything anew")
        machine.start_method = "spawn"
        return in_fresh_process(describe, device, threads)


def _last_line(error: str) -> str:
    """The error itself, below its traceback and above what the process printed."""
    lines = error.removeprefix("call: ").splitlines()
    return next((line for line in lines if line and not line.startswith((" ", "Traceback"))), error)


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    began = time.monotonic()
    args = _parser().parse_args(arguments)
    if args.carry:
        from gpu.carry import carry

        _say(carry(args.carry))
        return 0
    found = args.device if args.device != "auto" else in_fresh_process(choose_device, args.device)
    if found == "cpu" and args.device == "auto" and not args.tiny:
        _parser().error("there is no GPU; --tiny tries the script, --device cpu measures a CPU all the same")
    if (found == "cpu" or args.tiny) and args.output == _OUTPUT and not args.list:
        _parser().error("--output: the tables of a GPU are there; name another folder")
    args.device = found
    if args.changed:
        args.output.mkdir(parents=True, exist_ok=True)
        for file in sorted(args.changed.glob("*.jsonl")):
            if not (args.output / file.name).exists():
                shutil.copy(file, args.output)
    run = Run(args, began)
    if args.list:
        for part in run.parts:
            _say(f"{part.name}: {run.why(part) or 'nothing to do'}")
        return 0
    whole = run.measure()
    run.write()
    text = page(run.all, run.records)
    _say("\n" + text)
    if not as_expected(run.records):
        return 1
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
