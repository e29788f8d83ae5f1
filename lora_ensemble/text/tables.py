"""File formats: a table with named columns out of .tsv, .csv, JSON lines, Parquet or a data set of the hub."""

from __future__ import annotations

import gzip
import io
import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_ensemble.errors import UserError, one_line
from lora_ensemble.text.delimited import Delimited, Row, encoding_error, suffix_of

Format = Literal["csv", "jsonl", "parquet", "text"]
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
GZIP = b"\x1f\x8b"
DAMAGED = (OSError, EOFError, zlib.error)  # what gzip raises
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, eq=False)
class Table:
    """The columns that were asked for and are there, one cell per row of the file."""

    name: str  # the file as notices name it
    where: str  # the file as errors name it: its path, or the data set and split
    found: list[str]  # every column of the file, in its order; an unnamed one is ''
    columns: dict[str, list[Any]]  # cells: strings, or whatever JSON and Parquet hold (None: nothing)
    lines: list[int] | None = None  # on which each row starts, from 1; None for formats without lines
    broken: dict[int, str] = field(default_factory=dict)  # row to what is wrong with it; its cells are empty
    notices: list[str] = field(default_factory=list)
    header_line: bool = False  # whether ``found`` is what the first line says

    def at(self, row: int) -> str:
        """Where a row is, for an error: "path:line", or "path: row 7" (from 0) for formats without lines."""
        return f"{self.where}: row {row}" if self.lines is None else f"{self.where}:{self.lines[row]}"

    def places(self, rows: Sequence[int]) -> str:
        """Where the first few of some rows are, for a notice: "lines 3, 8, 9, ..."."""
        unit, first = ("row", rows[:3]) if self.lines is None else ("line", [self.lines[r] for r in rows[:3]])
        return f"{unit}{'s' * (len(rows) > 1)} {', '.join(map(str, first))}{', ...' * (len(rows) > 3)}"

    def note(self, rows: Sequence[int], what: str) -> None:
        """Add a notice about some rows, if there are any."""
        if rows:
            count = f"{len(rows)} row{'s' * (len(rows) > 1)}"
            self.notices.append(f"{self.name}: {count} {what} ({self.places(rows)})")


def read_table(path: Path, wanted: Sequence[str] | None, names: Sequence[str] = ()) -> Table:
    """The ``wanted`` columns of a file (None: all); those it lacks are left out (``Table.found`` says what is there).

    ``names``: all the columns of a delimited file without a header. ``UserError`` where the file cannot be read, is
    damaged, is not UTF-8 or has a wanted column twice.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(GZIP) else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: damaged gzip file ({e}); write it again") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); expected a data file") from e
    kind = format_of(path.name, raw)
    if kind == "text":  # a table too, of which its name does not tell
        kind = format_of("table.csv", raw)
    if kind == "csv":
        return _read_delimited(path, _lines(raw, path), wanted, names)
    if kind == "jsonl":
        table = _read_json_lines(path, _lines(raw, path), wanted)
    else:
        found, content = arrow_table(str(path), raw, wanted)
        table = Table(path.name, str(path), found, {name: content[name].to_pylist() for name in content.column_names})
    if names:
        raise UserError(f"{path}: names its columns itself; columns: is for CSV and TSV files without a header")
    return table


def format_of(name: str, start: bytes = b"") -> Format:
    """The format of a file, by its suffix and its first bytes, unpacked; plain lines where they say nothing."""
    suffix = suffix_of(name)
    if suffix == ".parquet" or start.startswith(b"PAR1"):
        return "parquet"
    delimited = suffix in (".csv", ".tsv")
    if suffix in _JSON_SUFFIXES or (delimited and start.removeprefix(BOM).lstrip().startswith(b"{")):
        return "jsonl"
    return "csv" if delimited else "text"


def _lines(raw: bytes, path: Path) -> list[str]:
    bad, what = raw.find(b"\0"), "a NUL byte"
    try:
        text = raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as e:
        bad, what = raw.startswith(BOM) * len(BOM) + e.start, f"byte 0x{e.object[e.start]:02x} is not UTF-8"
    if bad >= 0:
        line = len(raw[: bad + 1].splitlines())
        raise UserError(f"{path}:{line}: {what} (byte offset {bad}); save it as UTF-8 text")
    # Only "\n", "\r" and "\r\n" end a line; str.splitlines would also break at U+2028 and others.
    return list(io.StringIO(text, newline=""))


def _read_delimited(path: Path, lines: list[str], wanted: Sequence[str] | None, names: Sequence[str]) -> Table:
    reader = Delimited(str(path), names)
    rows, _ = reader.read(lines, 1, end=True)
    empty = [""] * len(reader.header)
    cells = [empty if row.error else row.cells for row in rows]
    columns = {name: [c[j] for c in cells] for name, j in _positions(path, reader.header, wanted).items()}
    broken = {i: row.error for i, row in enumerate(rows) if row.error}
    starts = [row.line for row in rows]
    table = Table(path.name, str(path), reader.header, columns, starts, broken, header_line=not names)
    table.note([i for i, row in enumerate(rows) if row.stray], "with an unbalanced quote, taken as text")
    table.note([i for i, row in enumerate(rows) if row.used > 1], "with a quoted field over several lines")
    return table


def _positions(where: Path | str, found: list[str], wanted: Sequence[str] | None) -> dict[str, int]:
    """Where the ``wanted`` columns (None: all) are among those ``found``; of those without a name, the first counts."""
    wanted = list(dict.fromkeys(found)) if wanted is None else wanted
    if twice := [name for name in wanted if name and found.count(name) > 1]:
        raise UserError(f"{where}: column {twice[0]!r} is there {found.count(twice[0])} times; name each column once")
    return {name: found.index(name) for name in wanted if name in found}


def _read_json_lines(path: Path, lines: list[str], wanted: Sequence[str] | None) -> Table:
    rows = [json_row(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    for row in rows:
        if row.error:
            raise UserError(f"{path}:{row.line}: {row.error}; expected one JSON object per line")
    found = list(dict.fromkeys(name for row in rows for name in row.cells))
    columns = {name: [row.cells.get(name) for row in rows] for name in _positions(path, found, wanted)}
    return Table(path.name, str(path), found, columns, [row.line for row in rows])


def json_row(line: str, number: int) -> Row:
    """The JSON object that a line is, or what it is instead."""
    if wrong := encoding_error(line):
        return Row(number, None, error=wrong)
    try:
        cells = json.loads(line)
        if "\\u" in line:  # half of a surrogate pair is no text that a tokenizer could take
            json.dumps(cells, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        return Row(number, None, error=f"not JSON ({e})")
    return Row(number, cells) if isinstance(cells, dict) else Row(number, None, error=f"a JSON {type(cells).__name__}")


def as_text(value: Any) -> str | None:
    """The text in a cell of JSON or Parquet, where numbers are texts too; None where it holds none."""
    return str(value) if isinstance(value, (str, bool, int, float)) and value == value else None  # NaN is not itself


def arrow_table(where: str, raw: bytes, wanted: Sequence[str] | None) -> tuple[list[str], Any]:
    """The columns that a Parquet file has, and the ``wanted`` ones of them (None: all) as a table of pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise UserError(
            f"{where}: a Parquet file needs the package pyarrow: pip install pyarrow; or save it as CSV"
        ) from e
    try:
        with pq.ParquetFile(pa.BufferReader(raw)) as file:
            found = file.schema_arrow.names
            return found, file.read(columns=list(_positions(where, found, wanted)))
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{where}: damaged, or not a Parquet file ({one_line(e)}); write it again") from e


def read_hub(
    name: str, config: str | None, split: str, wanted: Sequence[str], label: str, label_names: Sequence[str]
) -> Table:
    """The ``wanted`` columns of a split of a data set that ``datasets`` loads: from the hub, or from a local folder.

    A ClassLabel in the column ``label``, or a list of them, becomes its name where the names are ``label_names``, else
    its number; -1, the hub's "no label", becomes None. ``UserError`` where the data set or the split cannot be loaded.
    """
    try:
        import datasets
    except ImportError as e:
        raise UserError(f"data set {name!r}: needs the package datasets: pip install 'lora-ensemble[hub]'") from e
    if not sys.stderr.isatty():  # in a log, a progress bar is a thousand lines
        datasets.disable_progress_bars()
    where = f"{name}{f' ({config})' if config else ''} [{split}]"
    try:
        data = datasets.load_dataset(name, config, split=split)
        found = list(data.column_names)
        columns = data.select_columns([c for c in wanted if c in found]).to_dict()
    except Exception as e:  # hub, network, cache and format each raise their own
        raise UserError(
            f"data set {where}: cannot be loaded ({type(e).__name__}: {one_line(e)}); check the name, the "
            "configuration and the split, and whether the hub can be reached"
        ) from e
    feature = data.features.get(label)
    one = getattr(feature, "feature", feature)  # what a list is of
    if label in columns and isinstance(one, datasets.ClassLabel):
        by_name = set(label_names) == set(one.names)

        def named(v: Any) -> Any:
            if isinstance(v, list):
                return [named(each) for each in v]
            return None if v is None or v < 0 else one.names[v] if by_name else str(v)

        columns[label] = [named(v) for v in columns[label]]
    return Table(where, f"data set {where}", found, columns)
