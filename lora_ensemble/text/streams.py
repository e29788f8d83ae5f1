"""Rows with texts in them, out of a file or a pipe as they come, and back again with something added.

The formats are those of tables.py, and plain lines; rows that are all wrong keep their place. No torch.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from lora_ensemble.errors import UserError
from lora_ensemble.text.delimited import NO_DELIMITER, Delimited
from lora_ensemble.text.tables import BOM, DAMAGED, Format, arrow_table, as_text, json_object

BLOCK = 1 << 18
"""Bytes that are read at once, fewer where a pipe has no more: several hundred texts, to sort and pack."""
_AT_ONCE = 4096  # rows of a Parquet file


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: either its texts, or what is wrong with it."""

    line: int
    """On which it starts, counted from 1; of Parquet, the row, counted from 0."""
    cells: Any
    """As it was read: fields, an object, a line; None where it could not be read."""
    texts: list[str] | None = None
    error: str | None = None
    """Neither this nor ``texts``: there is nothing to say about it, a blank line of plain text."""


class Rows:
    """The rows of a stream in blocks, as ``(bytes read, rows)``.

    ``name``: of the stream, for errors. ``columns``: where the texts are, two for a pair; empty: the only column there
    is. Of plain lines the whole line is the text, or two with a tab between them. ``header``: the columns of a
    delimited file without a header line. Raises ``UserError`` for a header without these columns; what is wrong with a
    single row is in the row.
    """

    def __init__(
        self, stream: BinaryIO, name: str, kind: Format, columns: Sequence[str], header: Sequence[str] = ()
    ) -> None:
        self.stream, self.name, self.kind, self.columns = stream, name, kind, list(columns)
        self._delimited = Delimited(name, header)
        self._places: list[int] = []
        self._table: Any = None
        self._added: list[dict[str, Any] | None] = []

    @property
    def header(self) -> list[str]:
        """The columns, where a file has some, once the first block is there."""
        return self._delimited.header if self._table is None else list(self._table.column_names)

    def __iter__(self) -> Iterator[tuple[int, list[Row]]]:
        if self.kind == "parquet":
            yield from self._parquet()
            return
        number, waiting, rest, end = 1, list[bytes](), b"", False
        while not end:
            read = self._read()
            end = not read
            lines = (rest + read).splitlines(keepends=True)
            # A "\r" may be half of a line end.
            rest = lines.pop() if lines and not end and not lines[-1].endswith(b"\n") else b""
            if number == 1 and not waiting and lines:
                lines[0] = lines[0].removeprefix(BOM)
            waiting += lines
            rows, used = self._rows(waiting, number, end)
            del waiting[:used]
            number += used
            if self.header or self.kind != "csv":  # else not all of it is there yet
                yield len(read), rows

    def _read(self, most: int = BLOCK) -> bytes:
        read1 = getattr(self.stream, "read1", None)  # what a pipe has now, without waiting for more
        try:
            return bytes(read1(most) if read1 and most > 0 else self.stream.read(most))
        except DAMAGED as e:
            raise UserError(f"{self.name}: damaged, cannot be read to its end ({e}); write it again") from e

    def _rows(self, lines: list[bytes], first: int, end: bool) -> tuple[list[Row], int]:
        """The rows in these lines, and how many lines they take."""
        text, errors = [], {}
        for number, line in enumerate(lines, first):
            decoded, error = _decoded(line)
            text.append(decoded)
            if error:
                errors[number] = error
        if self.kind == "csv":
            return self._records(text, first, end, errors)
        rows = [self._row(number, line, errors.get(number)) for number, line in enumerate(text, first)]
        return [row for row in rows if row is not None], len(lines)

    def _records(self, text: list[str], first: int, end: bool, errors: dict[int, str]) -> tuple[list[Row], int]:
        if not self.header:
            line = next((first + i for i, line in enumerate(text) if line.strip()), 0)
            if line in errors:
                raise UserError(f"{self.name}:{line}: {errors[line]}; save it as UTF-8 text")
        records, used = self._delimited.read(text, first, end=end)
        if self.header and not self._places:
            self._places = [self._place(name) for name in self.columns] or self._only()
        rows = []
        for record in records:
            lines = range(record.line, record.line + record.used)
            error = next((errors[line] for line in lines if line in errors), record.error)
            texts = None if error else [record.cells[place] for place in self._places]
            rows.append(Row(line=record.line, cells=None if error else record.cells, texts=texts, error=error))
        return rows, used

    def _place(self, column: str) -> int:
        if self.header.count(column) == 1:
            return self.header.index(column)
        what = "is there twice" if column in self.header else "is not there"
        raise UserError(f"{self.name}: column {column!r} {what}; {self._found()}")

    def _only(self) -> list[int]:
        if len(self.header) > 1:
            raise UserError(f"{self.name}: which columns hold the text? {self._found()}")
        return [0]

    def _found(self) -> str:
        found = ", ".join(name[:40] for name in self.header[:20] if name)
        return f"columns found: {found}; say --text COLUMN ..., and --header COLUMN ... where that is no header"

    # The others

    def _row(self, number: int, line: str, error: str | None) -> Row | None:
        """A line of JSON or of text; None where there is none."""
        text = line.rstrip("\r\n")
        if error:
            return Row(line=number, cells=None, error=error)
        if self.kind == "jsonl":
            if not text.strip():
                return None
            try:
                record = json_object(text)
            except ValueError as e:
                return Row(line=number, cells=None, error=str(e))
            return self._object(number, record, self.columns or [k for k, v in record.items() if isinstance(v, str)])
        if not text.strip():
            return Row(line=number, cells=text)
        texts = text.split("\t") if len(self.columns) == 2 else [text]
        if len(self.columns) == 2 and len(texts) != 2:
            error = f"{len(texts) - 1} tabs; expected two texts with one tab between them"
            return Row(line=number, cells=text, error=error)
        return Row(line=number, cells=text, texts=texts)

    def _object(self, number: int, record: dict[str, Any], columns: list[str]) -> Row:
        """A row of JSON or Parquet."""
        if not self.columns and len(columns) != 1:
            return Row(line=number, cells=record, error="which keys hold the text? say --text KEY ...")
        texts = [as_text(record.get(column)) for column in columns]
        if None in texts:
            column = columns[texts.index(None)]
            what = f"{column!r} holds no text" if column in record else f"no key {column!r}"
            return Row(line=number, cells=record, error=what)
        return Row(line=number, cells=record, texts=[text for text in texts if text is not None])

    def _parquet(self) -> Iterator[tuple[int, list[Row]]]:
        raw = self._read(-1)
        _, self._table = arrow_table(self.name, raw, None)
        columns = [self.header[i] for i in [self._place(name) for name in self.columns] or self._only()]
        texts, n = self._table.select(columns), len(self._table)
        for start in range(0, max(n, 1), _AT_ONCE):
            block = texts.slice(start, _AT_ONCE).to_pylist()
            yield (
                len(raw) * len(block) // max(n, 1),
                [self._object(start + i, row, columns) for i, row in enumerate(block)],
            )

    # And back

    def head(self, added: Sequence[str]) -> str:
        """What the output starts with, if its format has a header. ``UserError`` where a name is there already."""
        if twice := set(added) & set(self.header):
            raise UserError(f"{self.name}: has a column {min(twice)!r} of its own; choose another --column")
        return self._csv([*self.header, *added]) if self.kind == "csv" and not self._delimited.names else ""

    def back(self, row: Row, added: dict[str, Any] | None) -> str:
        """The row as a line, with something ``added`` to it: name to value; None where there is nothing to add."""
        if self.kind == "csv":
            values = list((added or {}).values())
            empty = row.cells is None
            return self._csv([*([""] * len(self.header) if empty else row.cells), *values])
        if self.kind == "jsonl":
            if twice := set(added or {}) & set(row.cells or {}):
                raise UserError(f"{self.name}:{row.line}: has a key {min(twice)!r} of its own; choose another --column")
            wrong = {"error": f"line {row.line}: {row.error}"}
            return json.dumps({**(row.cells or {}), **(wrong if added is None else added)}, ensure_ascii=False) + "\n"
        if self.kind == "parquet":
            self._added.append(added)
            return ""
        return "\t".join(str(value) for value in (added or {}).values()) + "\n"

    def tail(self, added: Sequence[str]) -> bytes:
        """What the output ends with: of Parquet, all of it."""
        if self._table is None:
            return b""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table, out = self._table, io.BytesIO()
        for name in added:
            table = table.append_column(name, pa.array([None if a is None else a[name] for a in self._added]))
        pq.write_table(table, out)
        return out.getvalue()

    def _csv(self, cells: Sequence[Any]) -> str:
        out = io.StringIO(newline="")
        delimiter = "," if self._delimited.delimiter == NO_DELIMITER else self._delimited.delimiter
        csv.writer(out, delimiter=delimiter, lineterminator="\n").writerow(cells)
        return out.getvalue()


def _decoded(line: bytes) -> tuple[str, str | None]:
    """A line as text, and what is wrong with it."""
    try:
        return line.decode("utf-8"), "a NUL byte" if b"\0" in line else None
    except UnicodeDecodeError as e:
        return line.decode("utf-8", "replace"), f"byte 0x{line[e.start]:02x} is not UTF-8"
