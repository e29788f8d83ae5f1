"""``lora-ensemble infer``: a chosen ensemble on the rows of a file or a pipe, in their order."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

from lora_ensemble.ensemble.options import add_options, load_ensemble
from lora_ensemble.errors import Parser, UserError
from lora_ensemble.files import replacing
from lora_ensemble.text.streams import Row, Rows
from lora_ensemble.text.tables import DAMAGED, GZIP, Format, format_of

if TYPE_CHECKING:
    from lora_ensemble.ensemble.restored import Ensemble

_SHOWN = 20  # bad rows told one by one


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="lora-ensemble infer",
        description="Let a chosen ensemble decide about new text. Every row of the input comes back in its place, with "
        "the decision added; of plain lines, the decision alone. Several labels are a list, in CSV and plain lines "
        "joined by commas. A row that cannot be read keeps its place without "
        "one, and is reported with its line. Interrupted, the same command goes on, where input and output are files.",
    )
    add_options(p)
    p.add_argument(
        "--input", required=True, metavar="FILE", help="CSV, TSV, JSON lines, Parquet or plain lines, .gz too; -: stdin"
    )
    p.add_argument("--output", required=True, metavar="FILE", help="in the same format, packed if .gz; -: stdout")
    p.add_argument("--format", choices=get_args(Format), help="of the input (default: by its suffix; stdin: text)")
    p.add_argument("--text", nargs="+", default=[], metavar="COLUMN", help="default: the columns of the training data")
    p.add_argument("--header", nargs="+", default=[], metavar="COLUMN", help="columns of CSV or TSV that names none")
    p.add_argument("--column", default="prediction", help="name of what is added (default: prediction)")
    p.add_argument("--probabilities", action="store_true", help="add each label's probability too")
    return p


def run(argv: Sequence[str]) -> int:
    """Run the command; returns 0, or 1 where rows could not be read. ``UserError`` for what the user can put right."""
    args = _parser().parse_args(argv)
    if len(args.text) > 2:
        raise UserError(f"--text: {len(args.text)} columns; expected one, or two for a pair")
    with _open_input(args.input) as file, _open_output(args) as output:
        ensemble = load_ensemble(args)
        if args.probabilities and ensemble.record.kind == "regression":
            raise UserError("--probabilities: a regression has values, not probabilities; leave it out")
        rows = _rows(args, file, ensemble.text)
        # Its bytes are known where it is a file, and not packed.
        size = os.path.getsize(args.input) if args.input != "-" and rows.stream is file else None
        infer = _Infer(ensemble, rows, column=args.column, probabilities=args.probabilities)
        try:
            infer.run(output, size=size)
        except UserError:  # of the input: there is nothing to go on with
            output.begun = False
            raise
        except BrokenPipeError:  # whoever read has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            if output.note is not None and output.begun:
                print(f"\ninterrupted after {output.rows} rows: the same command goes on", file=sys.stderr)
            raise
    infer.say()
    return 1 if infer.bad else 0


def _open_input(name: str) -> contextlib.AbstractContextManager[Any]:
    if name == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(name, "rb")
    except OSError as e:
        raise UserError(f"{name}: cannot be read ({e.strerror}); expected a file of texts, or - for stdin") from e


def _rows(args: argparse.Namespace, file: Any, reads: list[str]) -> Rows:
    """The rows of the input, unpacked; ``reads``: the ensemble's columns. ``UserError`` for options it contradicts."""
    if args.text and reads and len(args.text) != len(reads):
        raise UserError(f"--text: {len(args.text)} columns; the ensemble reads {len(reads)} ({', '.join(reads)})")
    name, stream = "stdin" if args.input == "-" else args.input, file
    try:
        if (start := file.peek(len(GZIP))).startswith(GZIP):
            stream = gzip.GzipFile(fileobj=file)
            start = stream.peek(1)
    except DAMAGED as e:
        raise UserError(f"{name}: damaged gzip file ({e}); write it again") from e
    kind = args.format or format_of(name, start)
    if args.output != "-" and (kind == "parquet") != (format_of(args.output) == "parquet"):
        raise UserError(f"--output {args.output}: the output is {kind}, as the input is; let its name say so")
    if args.header and kind != "csv":
        raise UserError(f"--header: {name} is {kind}; it is for CSV and TSV without a header line")
    return Rows(stream, name, kind, args.text or reads, args.header)


@dataclass(kw_only=True)
class _Output:
    """Standard output, or a partial file that gets its name at the end; after each block is noted what it holds."""

    stream: BinaryIO
    note: Path | None = None  # the file that says how many rows and bytes the partial file holds
    packed: bool = False
    rows: int = 0  # how many are there already
    begun: bool = False  # whether anything is

    def write(self, content: bytes) -> None:
        """Add some rows, and a note of it."""
        if self.packed:
            content = gzip.compress(content)  # a file of several such parts is one that gzip reads, and may end at each
        self.stream.write(content)
        self.stream.flush()
        self.begun = True
        if self.note is not None:
            with replacing(self.note) as new:
                new.write_text(json.dumps({"rows": self.rows, "bytes": self.stream.tell()}), encoding="utf-8")

    def go_on(self, note: Path) -> None:
        """Put the end where the note says that the last whole block ended, or at the start."""
        noted: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError):
            noted = json.loads(note.read_text(encoding="utf-8"))
        size = noted.get("bytes", 0)
        if 0 < size <= os.fstat(self.stream.fileno()).st_size:
            self.rows, self.begun = noted["rows"], True
            print(f"going on after {self.rows} rows", file=sys.stderr)
        self.stream.truncate(size if self.begun else 0)
        self.stream.seek(0, os.SEEK_END)


@contextlib.contextmanager
def _open_output(args: argparse.Namespace) -> Iterator[_Output]:
    if args.output == "-":
        yield _Output(stream=sys.stdout.buffer)
        return
    target = Path(args.output).resolve()
    if target.is_dir():
        raise UserError(f"{args.output}: is a folder; give the name of a file to write")
    again = args.input != "-"  # whether the input can be read a second time
    if again and target.exists() and target.samefile(args.input):
        raise UserError(f"{args.output}: is the input; give another name")
    partial = target.with_name(f".{target.name}.{_digest(args)}.partial")
    try:
        stream = open(partial, "r+b" if partial.exists() and again else "w+b")  # noqa: SIM115  (closed below)
    except OSError as e:
        raise UserError(f"{args.output}: cannot be written: {e.strerror}; give a file in a folder that exists") from e
    with stream:
        note = partial.with_name(partial.name + ".json")
        output = _Output(stream=stream, note=note, packed=target.suffix.lower() == ".gz")
        if again:
            output.go_on(note)
        try:
            yield output
            stream.close()
            os.replace(partial, target)
            note.unlink(missing_ok=True)
        finally:
            if not output.begun:
                partial.unlink(missing_ok=True)
                note.unlink(missing_ok=True)


def _digest(args: argparse.Namespace) -> str:
    """Eight hex digits of all that decides the output: another question does not go on with a partial file."""
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("device", "output")}
    if args.input != "-":
        about = os.stat(args.input)
        settings["input"] = f"{about.st_size} {about.st_mtime_ns}"
    record = args.ensemble / "dicor.json" if args.ensemble.is_dir() else args.ensemble  # or an exported folder
    settings["ensemble"] = record.read_text(encoding="utf-8") if record.is_file() else ""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class _Infer:
    """Reads blocks of rows, asks, and writes; counts as it goes."""

    def __init__(self, ensemble: Ensemble, rows: Rows, *, column: str, probabilities: bool) -> None:
        self.ensemble, self.rows = ensemble, rows
        self.added = [column, *(f"p_{label}" for label in ensemble.labels if probabilities)]
        self.count = self.answered = self.bad = 0
        self.started = time.monotonic()

    def run(self, output: _Output, *, size: int | None) -> None:
        """All rows of the stream; ``size``: its bytes, where they are known."""
        from tqdm import tqdm

        skip = before = output.rows
        shown = sys.stderr.isatty()
        with tqdm(total=size, unit="B", unit_scale=True, disable=not shown, leave=False) as bar:
            for read, block in self.rows:
                head = "" if output.begun else self.rows.head(self.added)
                self.count += len(block)
                for row in block:
                    self.bad += bool(row.error)
                    if row.error and self.bad <= _SHOWN:
                        print(f"{self.rows.name}:{row.line}: {row.error}; no decision", file=sys.stderr)
                new = block[skip:]
                skip -= len(block) - len(new)
                lines = self._answer(new, bar, read)
                if not new:
                    bar.update(read)
                output.rows += len(new)
                if out := "".join([head, *lines]):
                    output.write(out.encode())
        if self.bad and not self.answered and not before and output.note is not None:
            raise UserError(f"{self.rows.name}: none of its {self.count} rows could be read as {self.rows.kind}")
        if tail := self.rows.tail(self.added):
            output.write(tail)

    def _answer(self, block: list[Row], bar: Any, size: int) -> list[str]:
        """A line for each row of the block, which was ``size`` bytes; the bar goes on with each pass."""
        texts = [row.texts for row in block if row.texts is not None]
        logits = self.ensemble.logits(texts, progress=lambda n: bar.update(size * n // len(texts)))
        decided = self.ensemble.named(self.ensemble.record.decide(logits)).tolist()
        if self.ensemble.record.kind == "multilabel" and self.rows.kind in ("csv", "text"):
            decided = [",".join(names) for names in decided]
        values = [[one] for one in decided]
        if len(self.added) > 1:
            for row, p in zip(values, self.ensemble.probabilities(logits).tolist(), strict=True):
                row += [round(x, 6) for x in p]
        self.answered += len(texts)
        answers = iter(values)
        nothing = None if self.rows.kind in ("jsonl", "parquet") else dict.fromkeys(self.added, "")
        return [
            self.rows.back(row, nothing if row.texts is None else dict(zip(self.added, next(answers), strict=True)))
            for row in block
        ]

    def say(self) -> None:
        """The counts."""
        seconds = time.monotonic() - self.started
        bad = f", {self.bad} could not be read" if self.bad else ""
        rate = f" in {seconds:.1f} s ({self.answered / seconds:.0f} a second)" if self.answered else ""
        print(f"{self.count} rows, {self.answered} answered{rate}{bad}", file=sys.stderr)
