"""File formats: a table with named columns out of .tsv, .csv, JSON lines, Parquet or a data set of the hub.

What the columns mean is not decided here (see readers.py). No torch; pyarrow and datasets are imported when needed.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ensemble.errors import UserError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PARQUET_MAGIC = b"PAR1"
NO_DELIMITER = "\x1f"  # a header of one column: the whole line is the cell, its commas included
_QUOTED_CELL = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True, eq=False)
class Table:
    """The columns that were asked for and are there, one cell per row of the file."""

    name: str
    """The file as notices name it."""
    where: str
    """The file as errors name it: its path, or the data set and split."""
    found: list[str]
    """Every column of the file, in its order; an unnamed one is ''."""
    columns: dict[str, list[Any]]
    """Column to cells: strings, or whatever JSON and Parquet hold (None where there is nothing)."""
    lines: list[int] | None = None
    """Line number (from 1) on which each row starts; None for formats without lines."""
    broken: dict[int, str] = field(default_factory=dict)
    """Row to what is wrong with it; its cells are None."""
    notices: list[str] = field(default_factory=list)

    def at(self, row: int) -> str:
        """Where a row is, for an error: "path:line", or "path: row 7" (from 0) for formats without lines."""
        return f"{self.where}: row {row}" if self.lines is None else f"{self.where}:{self.lines[row]}"

    def places(self, rows: Sequence[int]) -> str:
        """Where the first few of some rows are, for a notice: "lines 3, 8, 9, ..."."""
        numbers = rows if self.lines is None else [self.lines[r] for r in rows[:3]]
        return _places(numbers, "row" if self.lines is None else "line", len(rows))


def _places(numbers: Sequence[int], unit: str, count: int) -> str:
    return f"{unit}{'s' * (count > 1)} {', '.join(map(str, numbers[:3]))}{', ...' * (count > 3)}"


def read_table(path: Path, wanted: Sequence[str] | None) -> Table:
    """The ``wanted`` columns of a file (None: all); those it lacks are left out (``Table.found`` says what is there).

    ``UserError`` where the file cannot be read, is damaged, is not UTF-8 or has a wanted column twice.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); expected a data file") from e
    if raw.startswith(_PARQUET_MAGIC) or path.suffix.lower() == ".parquet":
        return _read_parquet(path, raw, wanted)
    text = _decode(raw, path)
    if path.suffix.lower() in JSON_SUFFIXES or text.lstrip().startswith("{"):
        return _read_json_lines(path, text, wanted)
    return _read_delimited(path, text, wanted)


def _decode(raw: bytes, path: Path) -> str:
    bom = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    bad, what = raw.find(b"\0"), "a NUL byte"
    try:
        text = raw[bom:].decode("utf-8")
    except UnicodeDecodeError as e:
        bad, what = e.start + bom, f"byte 0x{raw[e.start + bom]:02x} is not UTF-8"
        text = ""
    if bad >= 0:
        line = raw.count(b"\n", 0, bad) + 1
        raise UserError(f"{path}:{line}: {what} (byte offset {bad}); save it as UTF-8 text")
    return text


def _split_lines(text: str) -> list[str]:
    """Lines without their "\\n" (a "\\r" before it stays). ``str.splitlines`` would also break at U+2028 and others."""
    return (text if "\n" in text else text.replace("\r", "\n")).split("\n")


def _read_delimited(path: Path, text: str, wanted: Sequence[str] | None) -> Table:
    lines = _split_lines(text)
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise UserError(f"{path}: empty file; expected a header line with the names of the columns")
    delimiter = delimiter_of(path, lines[first])
    header, used, _ = record_at(lines, first, delimiter, None)
    header = [name.strip() for name in header]
    start = first + used
    if delimiter == "\t" and len(header) == 2 and any("\t" not in line and " , " in line for line in lines[start:][:1]):
        delimiter = ","  # the course's leaderboard files have a tab in their header, and none below it
    width = width_of(lines, start, delimiter, len(header))
    rows: list[list[str]] = []
    broken: dict[int, str] = {}
    starts, stray, spanning = [], [], []
    blank, i = delimiter + " \r", start
    while i < len(lines):
        line, number = lines[i], i + 1
        if not line.strip(blank):
            i += 1
            continue
        if '"' in line:
            cells, used, has_stray = record_at(lines, i, delimiter, width)
            if has_stray:
                stray.append(number)
            if used > 1:
                spanning.append(number)
            i += used
        else:
            cells = line.removesuffix("\r").split(delimiter)
            i += 1
        if len(cells) != width:
            broken[len(rows)] = f"{len(cells)} fields instead of {width}"
            cells = [""] * width
        starts.append(number)
        rows.append(cells)
    # A file with one field more than its header has a nameless index in front, as R and some spreadsheets write it.
    found = [""] * (width - len(header)) + header
    columns = {name: [cells[j] for cells in rows] for name, j in _positions(path, found, wanted).items()}
    notices = []
    if stray:
        where = _places(stray, "line", len(stray))
        notices.append(f"{path.name}: {_rows(len(stray))} with an unbalanced quote, taken as text ({where})")
    if spanning:
        where = _places(spanning, "line", len(spanning))
        notices.append(f"{path.name}: {_rows(len(spanning))} with a quoted field over several lines ({where})")
    return Table(path.name, str(path), found, columns, starts, broken, notices)


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _positions(path: Path, found: list[str], wanted: Sequence[str] | None) -> dict[str, int]:
    if wanted is None:
        wanted = list(dict.fromkeys(found))
    # Of columns without a name, the first counts.
    twice = [name for name in wanted if name and found.count(name) > 1]
    if twice:
        raise UserError(f"{path}: column {twice[0]!r} is there {found.count(twice[0])} times; name each column once")
    return {name: found.index(name) for name in wanted if name in found}


def delimiter_of(path: Path, header: str) -> str:
    """What separates the fields of a file with this header; what no file holds, where it has one column."""
    # By content, since the course's .csv files are tab-separated.
    if "\t" in header:
        return "\t"
    if path.suffix.lower() == ".tsv":
        return NO_DELIMITER
    return "," if "," in header else ";" if ";" in header else NO_DELIMITER


def width_of(lines: list[str], start: int, delimiter: str, header: int) -> int:
    """Fields per row: those of the header, or one more if the first row has a nameless index in front."""
    first = next((i for i in range(start, len(lines)) if lines[i].strip()), None)
    if first is not None and header > 1:
        for width in (header, header + 1):
            if len(record_at(lines, first, delimiter, width)[0]) == width:
                return width
    return header


def record_at(lines: list[str], i: int, delimiter: str, width: int | None) -> tuple[list[str], int, bool]:
    """The record that starts in line ``i``: its cells, how many lines it takes, whether a stray quote was kept.

    Quoting is believed where it gives ``width`` cells. Otherwise the quote is text: an opening quote that is never
    closed, or is closed by some other row's quote, must not swallow the rows between. In a tab-separated file, rows
    that fit as they stand are not merged even if they could be; commas are too common in text for this test.
    ``width`` None believes any quoting.
    """
    quoted = _quoted_record(lines, i, delimiter)
    plain = lines[i].removesuffix("\r").split(delimiter)
    if quoted is not None:
        cells, used = quoted
        fits = width is None or len(cells) == width
        if used > 1 and delimiter == "\t":
            fits = fits and any(n + 1 != width for n in _delimiters(lines[i : i + used], delimiter))
        if fits or (used == 1 and len(plain) != width):  # the latter is wrong both ways
            return cells, used, False
    cells = [_unquoted(cell) for cell in plain]
    return cells, 1, any(a == b and a.startswith('"') for a, b in zip(plain, cells, strict=True))


def _delimiters(lines: list[str], delimiter: str) -> Iterator[int]:
    return (line.count(delimiter) for line in lines if line.strip())


def _quoted_record(lines: list[str], i: int, delimiter: str) -> tuple[list[str], int] | None:
    """The record by the rules of CSV, and the lines it takes; None where its quotes do not balance."""
    # strict: '"Foo" bar' is an error (which leaves the quotes in the text) rather than 'Foo bar'.
    # A stray quote reads on only to the next quote in the file, so that many of them cost no more than one pass.
    reader = csv.reader((lines[j] + "\n" for j in range(i, len(lines))), delimiter=delimiter, strict=True)
    try:
        return next(reader), reader.line_num
    except csv.Error:
        return None


def goes_on(lines: list[str], i: int, delimiter: str) -> bool:
    """Whether a quote that opens in the record that starts in line ``i`` is not closed in these lines."""
    reader = csv.reader((lines[j] + "\n" for j in range(i, len(lines))), delimiter=delimiter, strict=True)
    try:
        next(reader)
    except csv.Error as e:
        return "end of data" in str(e)
    return False


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _QUOTED_CELL.fullmatch(cell) else cell


def _read_json_lines(path: Path, text: str, wanted: Sequence[str] | None) -> Table:
    starts, records, found = [], [], dict[str, None]()
    for number, line in enumerate(_split_lines(text), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "\\u" in line:  # half of a surrogate pair is no text that a tokenizer could take
                json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number}: not JSON ({e}); expected one JSON object per line") from e
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: a JSON {type(record).__name__}; expected one JSON object per line")
        starts.append(number)
        records.append(record)
        found.update(dict.fromkeys(record))
    columns = {
        name: [record.get(name) for record in records]
        for name in (found if wanted is None else wanted)
        if name in found
    }
    return Table(path.name, str(path), list(found), columns, starts)


def _read_parquet(path: Path, raw: bytes, wanted: Sequence[str] | None) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise UserError(
            f"{path}: a Parquet file needs the package pyarrow: pip install pyarrow; or save it as CSV"
        ) from e
    try:
        with pq.ParquetFile(pa.BufferReader(raw)) as file:
            found = file.schema_arrow.names
            content = file.read(columns=list(_positions(path, found, wanted)))
            columns = {name: content.column(name).to_pylist() for name in content.column_names}
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path}: damaged, or not a Parquet file ({_one_line(e)}); write it again") from e
    return Table(path.name, str(path), found, columns)


def read_hub(
    name: str, config: str | None, split: str, wanted: Sequence[str], label: str, label_names: Sequence[str]
) -> Table:
    """The ``wanted`` columns of a split of a data set that ``datasets`` loads: from the hub, or from a local folder.

    A ClassLabel in the column ``label`` becomes the feature's names where those are ``label_names``, else its number;
    -1, the hub's sign for "no label", becomes None. ``UserError`` where the data set or the split cannot be loaded.
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
            f"data set {where}: cannot be loaded ({type(e).__name__}: {_one_line(e)}); check the name, the "
            "configuration and the split, and whether the hub can be reached"
        ) from e
    if label in columns and isinstance(data.features[label], datasets.ClassLabel):
        names = data.features[label].names
        by_name = set(label_names) == set(names)
        columns[label] = [None if v is None or v < 0 else names[v] if by_name else str(v) for v in columns[label]]
    return Table(where, f"data set {where}", found, columns)


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:300]
