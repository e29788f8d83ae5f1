"""Rows with texts in them, out of a file or a pipe as they come, and back again with something added.

The formats are those of tables.py, and plain lines; rows that are all wrong keep their place. No torch.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lora_ensemble.errors import UserError
from lora_ensemble.tables import JSON_SUFFIXES, NO_DELIMITER, delimiter_of, goes_on, record_at, width_of

Format = Literal["csv", "jsonl", "text"]
BLOCK = 1 << 18
"""Bytes that are read at once, fewer where a pipe has no more: several hundred texts, to sort and pack."""
_LOOK_AHEAD = 1000
"""Lines in which a quote that was opened may be closed; after that it is text."""


def format_of(name: str) -> Format:
    """The format that a file's suffix says; plain lines where it says nothing."""
    suffix = name[name.rfind(".") :].lower()
    return "csv" if suffix in (".csv", ".tsv") else "jsonl" if suffix in JSON_SUFFIXES else "text"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: either its texts, or what is wrong with it."""

    line: int
    """On which it starts, counted from 1."""
    cells: Any
    """As it was read: fields, an object, a line; None where it could not be read."""
    texts: list[str] | None = None
    error: str | None = None
    """Neither this nor ``texts``: there is nothing to say about it, a blank line of plain text."""


class Rows:
    """The rows of a stream in blocks, as ``(bytes read, rows)``.

    ``name``: of the stream, for errors. ``columns``: where the texts are, two for a pair; empty: the only column there
    is. Of plain lines the whole line is the text, or two with a tab between them. Raises ``UserError`` for a header
    without these columns; what is wrong with a single row is in the row.
    """

    def __init__(self, stream: BinaryIO, name: str, kind: Format, columns: Sequence[str]) -> None:
        self.stream, self.name, self.kind, self.columns = stream, name, kind, list(columns)
        self.header: list[str] = []
        """The columns of a delimited file, once the first block is there."""
        self.delimiter = ","
        self._places: list[int] = []
        self._width = 0

    def __iter__(self) -> Iterator[tuple[int, list[Row]]]:
        number, waiting, rest, end = 1, list[bytes](), b"", False
        while not end:
            read = self._read()
            end = not read
            *lines, rest = (rest + read).split(b"\n")
            if end and rest:
                lines.append(rest)
            waiting += lines
            if not self.header and self.kind == "csv":
                number += self._read_header(waiting, end)
                if not self.header:  # not all of it is there yet
                    continue
            rows, used = self._rows(waiting, number, end)
            del waiting[:used]
            number += used
            if rows or read:
                yield len(read), rows

    def _read(self) -> bytes:
        read1 = getattr(self.stream, "read1", None)  # what a pipe has now, without waiting for more
        return bytes(read1(BLOCK) if read1 else self.stream.read(BLOCK))

    def _rows(self, lines: list[bytes], first: int, end: bool) -> tuple[list[Row], int]:
        """The rows in these lines, and how many lines they take."""
        if self.kind == "csv":
            return self._delimited(lines, first, end)
        one = self._object if self.kind == "jsonl" else self._line
        rows = [one(first + i, line) for i, line in enumerate(lines)]
        return [row for row in rows if row is not None], len(lines)

    # Delimited

    def _read_header(self, lines: list[bytes], end: bool) -> int:
        """Find the header, take it away, and return how many lines that were; 0 where too few lines are there yet.

        The first row must be there too: it says whether there is a nameless index in front.
        """
        first = next((i for i, line in enumerate(lines) if line.strip()), None)
        if first is None or (not end and not any(line.strip() for line in lines[first + 1 :])):
            if end:
                raise UserError(f"{self.name}: empty; expected a header line with the names of the columns")
            return 0
        text = []
        for i, line in enumerate(lines[first : first + _LOOK_AHEAD], first + 1):
            decoded, error = _decoded(line.removeprefix(b"\xef\xbb\xbf") if i == first + 1 else line)
            if i == first + 1 and error:
                raise UserError(f"{self.name}:{i}: {error}; save it as UTF-8 text")
            text.append(decoded)
        self.delimiter = delimiter_of(Path(self.name), text[0])
        names, used, _ = record_at(text, 0, self.delimiter, None)
        row = next((i for i in range(used, len(text)) if text[i].strip()), 0)
        if not end and len(text) < _LOOK_AHEAD and any(goes_on(text, i, self.delimiter) for i in (0, row)):
            return 0
        names = [name.strip() for name in names]
        self._width = width_of(text, used, self.delimiter, len(names))
        self.header = [""] * (self._width - len(names)) + names
        self._places = [self._place(name) for name in self.columns] or self._only()
        del lines[: first + used]
        return first + used

    def _place(self, column: str) -> int:
        if self.header.count(column) == 1:
            return self.header.index(column)
        what = "is there twice" if column in self.header else "is not there"
        found = ", ".join(name for name in self.header if name)
        raise UserError(f"{self.name}: column {column!r} {what}; columns found: {found}; say --text COLUMN ...")

    def _only(self) -> list[int]:
        if len(self.header) > 1:
            found = ", ".join(name for name in self.header if name)
            raise UserError(f"{self.name}: which columns hold the text? columns found: {found}; say --text COLUMN ...")
        return [0]

    def _delimited(self, lines: list[bytes], first: int, end: bool) -> tuple[list[Row], int]:
        text, errors = [], {}
        for i, line in enumerate(lines):
            decoded, error = _decoded(line)
            text.append(decoded)
            if error:
                errors[i] = error
        rows, i = [], 0
        while i < len(text):
            if not text[i].strip(self.delimiter + " \r") and i not in errors:
                i += 1
                continue
            # A field may go on in lines that are not there yet.
            if '"' in text[i] and not end and len(text) - i < _LOOK_AHEAD and goes_on(text, i, self.delimiter):
                break
            cells, used, _ = record_at(text, i, self.delimiter, self._width)
            error = next((errors[k] for k in range(i, i + used) if k in errors), None)
            if error is None and len(cells) != self._width:
                error = f"{len(cells)} fields instead of {self._width}"
            texts = None if error else [cells[place] for place in self._places]
            rows.append(Row(line=first + i, cells=None if error else cells, texts=texts, error=error))
            i += used
        return rows, i

    # The others

    def _object(self, number: int, line: bytes) -> Row | None:
        text, error = _decoded(line)
        if not error and not text.strip():
            return None
        record: Any = None
        if not error:
            try:
                record = json.loads(text)
                json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            except (ValueError, RecursionError) as e:
                record, error = None, f"not JSON ({e})"
        if not error and not isinstance(record, dict):
            error = f"a JSON {type(record).__name__}; expected an object"
        if error:
            return Row(line=number, cells=None, error=error)
        columns = self.columns or [k for k, v in record.items() if isinstance(v, str)]
        if not self.columns and len(columns) != 1:
            return Row(line=number, cells=record, error="which keys hold the text? say --text KEY ...")
        texts = [record.get(column) for column in columns]
        wrong = next((c for c, t in zip(columns, texts, strict=True) if not isinstance(t, str)), None)
        if wrong is not None:
            what = f"{wrong!r} holds no text" if wrong in record else f"no key {wrong!r}"
            return Row(line=number, cells=record, error=what)
        return Row(line=number, cells=record, texts=texts)

    def _line(self, number: int, line: bytes) -> Row:
        text, error = _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        text = text.removesuffix("\r")
        if error:
            return Row(line=number, cells=None, error=error)
        if not text.strip():
            return Row(line=number, cells=text)
        texts = text.split("\t") if len(self.columns) == 2 else [text]
        if len(self.columns) == 2 and len(texts) != 2:
            error = f"{len(texts) - 1} tabs; expected two texts with one tab between them"
            return Row(line=number, cells=text, error=error)
        return Row(line=number, cells=text, texts=texts)

    # And back

    def head(self, added: Sequence[str]) -> str:
        """The line that the output starts with, if its format has one. ``UserError`` where a name is there already."""
        if self.kind != "csv":
            return ""
        if twice := set(added) & set(self.header):
            raise UserError(f"{self.name}: has a column {min(twice)!r} of its own; choose another --column")
        return self._csv([*self.header, *added])

    def back(self, row: Row, added: dict[str, Any] | None) -> str:
        """The row as a line, with something ``added`` to it: name to value; None where there is nothing to add."""
        if self.kind == "csv":
            values = list((added or {}).values())
            empty = row.cells is None
            return self._csv([*([""] * self._width if empty else row.cells), *values])
        if self.kind == "jsonl":
            wrong = {"error": f"line {row.line}: {row.error}"}
            return json.dumps({**(row.cells or {}), **(wrong if added is None else added)}, ensure_ascii=False) + "\n"
        return "\t".join(str(value) for value in (added or {}).values()) + "\n"

    def _csv(self, cells: Sequence[Any]) -> str:
        out = io.StringIO(newline="")
        delimiter = "," if self.delimiter == NO_DELIMITER else self.delimiter
        csv.writer(out, delimiter=delimiter, lineterminator="\n").writerow(cells)
        return out.getvalue()


def _decoded(line: bytes) -> tuple[str, str | None]:
    """A line as text, and what is wrong with it."""
    if b"\0" in line:
        return "", "a NUL byte"
    try:
        return line.decode("utf-8"), None
    except UnicodeDecodeError as e:
        return "", f"byte 0x{line[e.start]:02x} is not UTF-8"
