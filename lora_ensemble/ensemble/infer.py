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

from lora_ensemble.errors import ANY_BASE, Parser, UserError
from lora_ensemble.text.streams import Row, Rows
from lora_ensemble.text.tables import DAMAGED, GZIP, Format, format_of

if TYPE_CHECKING:
    from lora_ensemble.ensemble.restored import Ensemble

_SHOWN = 20  # bad rows told one by one


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="lora-ensemble infer",
        description="Let a chosen ensemble decide about new text. Every row of the input comes back in its place, with "
        "the decision added; of plain lines, the decision alone. A row that cannot be read keeps its place without "
        "one, and is reported with its line. Interrupted, the same command goes on, where input and output are files.",
    )
    p.add_argument("--ensemble", type=Path, required=True, metavar="FILE", help="what dicor select or export wrote")
    p.add_argument(
        "--input", required=True, metavar="FILE", help="CSV, TSV, JSON lines, Parquet or plain lines, .gz too; -: stdin"
    )
    p.add_argument("--output", required=True, metavar="FILE", help="in the same format, packed if .gz; -: stdout")
    p.add_argument("--format", choices=get_args(Format), help="of the input (default: by its suffix; stdin: text)")
    p.add_argument("--text", nargs="+", default=[], metavar="COLUMN", help="default: the columns of the training data")
    p.add_argument("--header", nargs="+", default=[], metavar="COLUMN", help="columns of CSV or TSV that names none")
    p.add_argument("--column", default="prediction", help="name of what is added (default: prediction)")
    p.add_argument("--probabilities", action="store_true", help="add each label's probability too")
    p.add_argument("--pool", type=Path, metavar="DIR", help="the pool, if it is no longer where the record says")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    p.add_argument("--precision", choices=("32", "bf16"), default="32", help="of the matrix products")
    p.add_argument("--any-base", action="store_true", help=ANY_BASE)
    return p


def run(args: Sequence[str]) -> int:
    """Run the command; returns 0, or 1 where rows could not be read. ``UserError`` for what the user can put right."""
    try:
        given = _parser().parse_args(args)
    except SystemExit as e:  # --help
        return int(e.code or 0)
    if len(given.text) > 2:
        raise UserError(f"--text: {len(given.text)} columns; expected one, or two for a pair")
    with _source(given.input) as source, _sink(given) as sink:
        from lora_ensemble.bank.precision import advice
        from lora_ensemble.ensemble.restored import Ensemble

        ensemble = Ensemble.load(
            given.ensemble,
            pool=given.pool,
            device=given.device,
            precision=given.precision,
            any_base=given.any_base,
        )
        if note := advice(given.precision, ensemble.device.type, instead="--precision 32"):
            print(note, file=sys.stderr)
        if given.probabilities and ensemble.record.kind == "regression":
            raise UserError("--probabilities: a regression has values, not probabilities; leave it out")
        if given.text and ensemble.text and len(given.text) != len(ensemble.text):
            reads = ", ".join(ensemble.text)
            raise UserError(f"--text: {len(given.text)} columns; the ensemble reads {len(ensemble.text)} ({reads})")
        name = "stdin" if given.input == "-" else given.input
        stream, start = _unpacked(source, name)
        kind = given.format or format_of(name, start)
        if given.output != "-" and (kind == "parquet") != (format_of(given.output) == "parquet"):
            raise UserError(f"--output {given.output}: the output is {kind}, as the input is; let its name say so")
        if given.header and kind != "csv":
            raise UserError(f"--header: {name} is {kind}; it is for CSV and TSV without a header line")
        rows = Rows(stream, name, kind, given.text or ensemble.text, given.header)
        done = _Infer(ensemble, rows, column=given.column, probabilities=given.probabilities)
        try:
            known = given.input != "-" and stream is source
            done.run(sink, size=os.path.getsize(given.input) if known else None)
        except UserError:  # of the input: there is nothing to go on with
            sink.begun = False
            raise
        except BrokenPipeError:  # whoever read has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            if sink.partial is not None and sink.begun:
                print(f"\ninterrupted after {sink.rows} rows: the same command goes on", file=sys.stderr)
            raise
        sink.finish()
    done.say()
    return 1 if done.bad else 0


@contextlib.contextmanager
def _source(name: str) -> Iterator[Any]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        f = open(name, "rb")  # noqa: SIM115  (closed below)
    except OSError as e:
        raise UserError(f"{name}: cannot be read ({e.strerror}); expected a file of texts, or - for stdin") from e
    with f:
        yield f


def _unpacked(stream: Any, name: str) -> tuple[Any, bytes]:
    """The stream, or what gzip packed into it, and its first bytes."""
    try:
        if not (start := stream.peek(len(GZIP))).startswith(GZIP):
            return stream, start
        unpacked = gzip.GzipFile(fileobj=stream)
        return unpacked, unpacked.peek(1)
    except DAMAGED as e:
        raise UserError(f"{name}: damaged gzip file ({e}); write it again") from e


@dataclass(kw_only=True)
class _Sink:
    """Where the rows go: standard output, or a partial file that gets its name at the end.

    What it holds is noted beside it after each block, so that the same command goes on behind it.
    """

    stream: BinaryIO
    partial: Path | None = None
    target: Path | None = None
    rows: int = 0
    """How many are there already."""
    begun: bool = False
    """Whether anything is."""

    @property
    def _note(self) -> Path:
        assert self.partial is not None
        return self.partial.with_name(self.partial.name + ".json")

    def write(self, what: bytes) -> None:
        """Add some rows, and a note of it."""
        if self.target is not None and self.target.suffix.lower() == ".gz":
            what = gzip.compress(what)  # a file of several such parts is one that gzip reads, and may end at each
        self.stream.write(what)
        self.stream.flush()
        self.begun = True
        if self.partial is None:
            return
        new = self._note.with_name(self._note.name + ".new")
        new.write_text(json.dumps({"rows": self.rows, "bytes": self.stream.tell()}), encoding="utf-8")
        os.replace(new, self._note)

    def finish(self) -> None:
        """Give the file its name."""
        if self.partial is None or self.target is None:
            return
        self.stream.close()
        os.replace(self.partial, self.target)
        self._note.unlink(missing_ok=True)


@contextlib.contextmanager
def _sink(given: argparse.Namespace) -> Iterator[_Sink]:
    if given.output == "-":
        yield _Sink(stream=sys.stdout.buffer)
        return
    target = Path(given.output).resolve()
    if target.is_dir():
        raise UserError(f"{given.output}: is a folder; give the name of a file to write")
    if given.input != "-" and target.exists() and target.samefile(given.input):
        raise UserError(f"{given.output}: is the input; give another name")
    # Its name says what it was made from: another question does not go on with it.
    settings = {k: str(v) for k, v in vars(given).items() if k not in ("device", "output")}
    if given.input != "-":
        about = os.stat(given.input)
        settings["input"] = f"{about.st_size} {about.st_mtime_ns}"
    record = given.ensemble / "dicor.json" if given.ensemble.is_dir() else given.ensemble  # or an exported folder
    settings["ensemble"] = record.read_text(encoding="utf-8") if record.is_file() else ""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    partial = target.with_name(f".{target.name}.{digest}.partial")
    try:
        stream = open(partial, "r+b" if partial.exists() and given.input != "-" else "w+b")  # noqa: SIM115
    except OSError as e:
        raise UserError(f"{given.output}: cannot be written: {e.strerror}; give a file in a folder that exists") from e
    with stream:
        sink = _Sink(stream=stream, partial=partial, target=target)
        noted: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError):
            noted = json.loads(sink._note.read_text(encoding="utf-8"))
        if given.input != "-" and 0 < noted.get("bytes", 0) <= partial.stat().st_size:
            sink.rows, sink.begun = noted["rows"], True
            stream.truncate(noted["bytes"])
            stream.seek(noted["bytes"])
            print(f"going on after {sink.rows} rows", file=sys.stderr)
        else:
            stream.truncate(0)
        try:
            yield sink
        finally:
            if not sink.begun:
                partial.unlink(missing_ok=True)
                sink._note.unlink(missing_ok=True)


class _Infer:
    """Reads blocks of rows, asks, and writes; counts as it goes."""

    def __init__(self, ensemble: Ensemble, rows: Rows, *, column: str, probabilities: bool) -> None:
        self.ensemble, self.rows = ensemble, rows
        self.added = [column, *(f"p_{label}" for label in ensemble.labels if probabilities)]
        self.count = self.answered = self.bad = 0
        self.started = time.monotonic()

    def run(self, sink: _Sink, *, size: int | None) -> None:
        """All rows of the stream; ``size``: its bytes, where they are known."""
        skip = before = sink.rows
        with _bar(size) as bar:
            for read, block in self.rows:
                head = "" if sink.begun else self.rows.head(self.added)
                self._report(block)
                done, block = block[:skip], block[skip:]
                skip -= len(done)
                lines = self._answer(block, lambda share, read=read: bar.update(int(read * share)))
                if not block:
                    bar.update(read)
                sink.rows += len(block)
                if out := "".join([head, *lines]):
                    sink.write(out.encode())
        if self.bad and not self.answered and not before and sink.partial is not None:
            raise UserError(f"{self.rows.name}: none of its {self.count} rows could be read as {self.rows.kind}")
        if tail := self.rows.tail(self.added):
            sink.write(tail)

    def _report(self, block: list[Row]) -> None:
        for row in block:
            self.count += 1
            if row.error:
                self.bad += 1
                if self.bad <= _SHOWN:
                    print(f"{self.rows.name}:{row.line}: {row.error}; no decision", file=sys.stderr)

    def _answer(self, block: list[Row], progress: Any) -> list[str]:
        """A line for each row of the block."""
        asked = [row for row in block if row.texts is not None]
        texts = [row.texts for row in asked if row.texts is not None]
        logits = self.ensemble.logits(texts, progress=lambda n: progress(n / len(texts)))
        found = self.ensemble.named(self.ensemble.record.decide(logits)).tolist() if texts else []
        values = [[decided] for decided in found]
        if len(self.added) > 1 and texts:
            for one, p in zip(values, self.ensemble.probabilities(logits).tolist(), strict=True):
                one += [round(x, 6) for x in p]
        self.answered += len(asked)
        answers = iter(values)
        nothing = dict.fromkeys(self.added, "")
        lines = []
        for row in block:
            if row.texts is not None:
                lines.append(self.rows.back(row, dict(zip(self.added, next(answers), strict=True))))
            else:
                lines.append(self.rows.back(row, None if self.rows.kind in ("jsonl", "parquet") else nothing))
        return lines

    def say(self) -> None:
        """The counts."""
        seconds = time.monotonic() - self.started
        bad = f", {self.bad} could not be read" if self.bad else ""
        rate = f" in {seconds:.1f} s ({self.answered / seconds:.0f} a second)" if self.answered else ""
        print(f"{self.count} rows, {self.answered} answered{rate}{bad}", file=sys.stderr)


def _bar(size: int | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)
