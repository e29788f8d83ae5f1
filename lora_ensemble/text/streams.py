"""Rows with texts in them, out of a file or a pipe as they come, and back again with something added.

The formats are those of tables.py, and plain lines; rows that are all wrong keep their place.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from lora_ensemble.errors import UserError
from lora_ensemble.text.delimited import NO_DELIMITER, Delimited, Row, encoding_error
from lora_ensemble.text.tables import BOM, DAMAGED, Format, arrow_table, as_text, json_row

BLOCK = 1 << 18
"""Bytes that are read at once, fewer where a pipe has no more: several hundred texts, to sort and pack."""
_AT_ONCE = 4096  # rows of a Parquet file


class Rows:
    """The rows of a stream in blocks, as ``(bytes read, rows)``.

    ``columns``: where the texts are, two for a pair; empty: the only column there is. Of plain lines the whole line is
    the text, or two with a tab between them. ``header``: the columns of a delimited file without a header line. Raises
    ``UserError`` for a header without these columns; what is wrong with a single row is in the row.
    """

    def __init__(
        self, stream: BinaryIO, name: str, kind: Format, columns: Sequence[str], header: Sequence[str] = ()
    ) -> None:
        self.stream, self.name, self.kind, self.columns = stream, name, kind, list(columns)
        self.header: list[str] = []  # the columns, where a file has some, once the first block is there
        self._delimited = Delimited(name, header)
        self._places: list[int] = []
        self._table: Any = None
        self._added: list[dict[str, Any] | None] = []

    def __iter__(self) -> Iterator[tuple[int, list[Row]]]:
        for size, rows in self._parquet() if self.kind == "parquet" else self._lines():
            yield size, [row if row.error else self._with_texts(row) for row in rows]

    def _lines(self) -> Iterator[tuple[int, list[Row]]]:
        number, lines, rest, end = 1, list[str](), b"", False
        while not end:
            read = self._read()
            end = not read
            complete = (rest + read).splitlines(keepends=True)
            # A "\r" may be half of a line end.
            rest = complete.pop() if complete and not end and not complete[-1].endswith(b"\n") else b""
            if complete and number == 1 and not lines:
                complete[0] = complete[0].removeprefix(BOM)
            lines += [line.decode(errors="surrogateescape") for line in complete]
            rows, used = self._rows(lines, number, end)
            del lines[:used]
            number += used
            if self.header or self.kind != "csv":  # else not all of it is there yet
                yield len(read), rows

    def _read(self, most: int = BLOCK) -> bytes:
        read1 = getattr(self.stream, "read1", None)  # what a pipe has now, without waiting for more
        try:
            return bytes(read1(most) if read1 and most > 0 else self.stream.read(most))
        except DAMAGED as e:
            raise UserError(f"{self.name}: damaged, cannot be read to its end ({e}); write it again") from e

    def _rows(self, lines: list[str], number: int, end: bool) -> tuple[list[Row], int]:
        """The rows in some lines, from line ``number`` on, and how many lines they take."""
        if self.kind == "csv":
            rows, used = self._delimited.read(lines, number, end=end)
            if self._delimited.header and not self.header:
                self.header = self._delimited.header
                self._places = self._find_columns()
            return rows, used
        stripped = [(n, line.rstrip("\r\n")) for n, line in enumerate(lines, number)]
        if self.kind == "jsonl":
            return [json_row(line, n) for n, line in stripped if line.strip()], len(lines)
        return [Row(n, line, error=encoding_error(line)) for n, line in stripped], len(lines)

    def _find_columns(self) -> list[int]:
        wrong = "which columns hold the text?" if not self.columns and len(self.header) > 1 else ""
        if bad := [column for column in self.columns if self.header.count(column) != 1]:
            wrong = f"column {bad[0]!r} {'is there twice' if bad[0] in self.header else 'is not there'};"
        if wrong:
            found = ", ".join(name[:40] for name in self.header[:20] if name)
            say = "say --text COLUMN ..., and --header COLUMN ... where that is no header"
            raise UserError(f"{self.name}: {wrong} columns found: {found}; {say}")
        return [self.header.index(column) for column in self.columns] or [0]

    def _with_texts(self, row: Row) -> Row:
        """A row that could be read, with its texts or with what is wrong with them."""
        if self.kind == "csv":
            return row._replace(texts=[row.cells[place] for place in self._places])
        if self.kind == "text":
            pair = len(self.columns) == 2
            parts = row.cells.split("\t") if pair else [row.cells]
            if pair and len(parts) != 2 and row.cells.strip():
                return row._replace(error=f"{len(parts) - 1} tabs; expected two texts with one tab between them")
            return row._replace(texts=parts) if row.cells.strip() else row
        columns = self.columns or [key for key, value in row.cells.items() if isinstance(value, str)]
        if not self.columns and len(columns) != 1:
            return row._replace(error="which keys hold the text? say --text KEY ...")
        texts = [as_text(row.cells.get(column)) for column in columns]
        if None in texts:
            column = columns[texts.index(None)]
            return row._replace(error=f"{column!r} holds no text" if column in row.cells else f"no key {column!r}")
        return row._replace(texts=[text for text in texts if text is not None])

    def _parquet(self) -> Iterator[tuple[int, list[Row]]]:
        raw = self._read(-1)
        self.header, self._table = arrow_table(self.name, raw, None)
        self.columns = [self.header[place] for place in self._find_columns()]
        texts, count = self._table.select(self.columns), len(self._table)
        for start in range(0, max(count, 1), _AT_ONCE):
            block = texts.slice(start, _AT_ONCE).to_pylist()
            yield len(raw) * len(block) // max(count, 1), [Row(n, cells) for n, cells in enumerate(block, start)]

    # And back

    def head(self, added: Sequence[str]) -> str:
        """What the output starts with, if its format has a header. ``UserError`` where a name is there already."""
        if twice := set(added) & set(self.header):
            raise UserError(f"{self.name}: has a column {min(twice)!r} of its own; choose another --column")
        return self._csv([*self.header, *added]) if self.kind == "csv" and not self._delimited.names else ""

    def back(self, row: Row, added: dict[str, Any] | None) -> str:
        """The row as a line, with something ``added`` to it: name to value; None where there is nothing to add."""
        values = list((added or {}).values())
        if self.kind == "csv":
            return self._csv([*(row.cells or [""] * len(self.header)), *values])
        if self.kind == "jsonl":
            cells = row.cells or {}
            if twice := set(added or {}) & set(cells):
                raise UserError(f"{self.name}:{row.line}: has a key {min(twice)!r} of its own; choose another --column")
            wrong = {"error": f"line {row.line}: {row.error}"}
            return json.dumps({**cells, **(wrong if added is None else added)}, ensure_ascii=False) + "\n"
        if self.kind == "parquet":
            self._added.append(added)
            return ""
        return "\t".join(map(str, values)) + "\n"

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
