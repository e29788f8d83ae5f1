"""Delimited text, whole or in pieces: a header, and rows whose quotes are believed where that fits the header."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from lora_ensemble.errors import UserError

NO_DELIMITER = "\x1f"  # a header of one column: the whole line is the cell, its commas included
LOOK_AHEAD = 10_000  # lines in which a quote that was opened may be closed; after that it is text
_DELIMITERS = {"\t": "a tab", ",": "a comma", ";": "a semicolon"}
_NEWLINE = "\r\n"
_QUOTED_CELL = re.compile(r'"(?:[^"]|"")*"')
_NO_UTF8 = re.compile("[\udc80-\udcff]")


def suffix_of(name: str) -> str:
    """What a file's name says of its format: its suffix, in lower case, of the unpacked file if it is a .gz."""
    return PurePath(name.lower().removesuffix(".gz")).suffix


def encoding_error(line: str) -> str | None:
    """What is wrong with a line that was decoded with ``errors="surrogateescape"``."""
    if not line.isascii() and (bad := _NO_UTF8.search(line)):
        return f"byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8"
    return "a NUL byte" if "\0" in line else None


class Row(NamedTuple):
    """One row of a file of any format. Without ``texts`` and ``error``: a blank line of plain text."""

    line: int  # on which it starts, counted from 1; of Parquet, the row, counted from 0
    cells: Any  # as it was read: fields, an object, a line; None where it could not be read
    texts: list[str] | None = None  # those that ``streams.Rows`` was asked for
    error: str | None = None  # what is wrong with it
    used: int = 1  # how many lines it takes
    stray: bool = False  # whether an unbalanced quote was taken as text


class Delimited:
    """Reads delimited lines in as many pieces as they come. ``names``: the columns, where there is no header line."""

    def __init__(self, name: str, names: Sequence[str] = ()) -> None:
        self.name, self.names = name, list(names)
        self.header: list[str] = []  # the columns, once enough lines are there; a nameless one is ''
        self.delimiter = ","
        self._index: int | None = None  # what the nameless index that the header leaves out says in the next row

    def read(self, lines: list[str], number: int, *, end: bool) -> tuple[list[Row], int]:
        """The rows in some lines, with their ends, from line ``number`` on, and how many lines they take.

        Unless it is the ``end``, what may go on in later lines is left. ``UserError`` for a header, or a first row,
        that cannot be.
        """
        i = 0 if self.header else self._start(lines, number, end)
        if not self.header:
            return [], 0
        rows, width, blank = list[Row](), len(self.header), self.delimiter + " " + _NEWLINE
        while i < len(lines):
            if not lines[i].strip(blank):
                i += 1
                continue
            cells, used, stray = _record_at(lines, i, self.delimiter, width, end)
            if not used:
                break
            error = None if len(cells) == width else f"{len(cells)} fields instead of {width}"
            if self._index is not None:
                if error is None and cells[0].strip() != str(self._index):
                    error = f"starts with {cells[0]!r:.40} instead of the row's number {self._index}"
                self._index += 1
            error = encoding_error("".join(lines[i : i + used])) or error
            rows.append(Row(number + i, None if error else cells, error=error, used=used, stray=stray))
            i += used
        return rows, i

    def _start(self, lines: list[str], number: int, end: bool) -> int:
        """Find the header, with the first row, which tells of an index; return how many lines come before the rows."""
        first = _next_filled(lines, 0)
        if first is None:
            if end:
                raise UserError(f"{self.name}: empty file; expected a header line with the names of the columns")
            return 0
        if wrong := encoding_error(lines[first]):
            raise UserError(f"{self.name}:{number + first}: {wrong}; save it as UTF-8 text")
        self.delimiter = self._delimiter_of(lines, first)
        cells, used, _ = _record_at(lines, first, self.delimiter, None, end)
        if not used:
            return 0
        header = [name.strip() for name in cells]
        if self.names:
            if header == self.names:
                raise UserError(f"{self.name}: has a header line of its own; do not give the names of its columns")
            header, used = self.names, 0
        row = _next_filled(lines, first + used)
        if not end and (row is None or _record_at(lines, row, self.delimiter, len(header), end)[1] == 0):
            return 0
        if row is not None:
            if self.delimiter == "\t" and len(header) == 2 and "\t" not in lines[row] and " , " in lines[row]:
                self.delimiter = ","  # the course's leaderboard files have a tab in their header, and none below it
            header = self._with_index(header, lines, row, number, lines[first])
        self.header = header
        return first + used

    def _with_index(self, header: list[str], lines: list[str], row: int, number: int, line: str) -> list[str]:
        """The header as it fits the first row: with '' in front where that has a number more, as R writes it."""
        width = len(header)
        count = len(_record_at(lines, row, self.delimiter, width)[0])
        if count <= width:
            return header
        cells = _record_at(lines, row, self.delimiter, width + 1)[0]
        if not self.names and len(cells) == width + 1 > 2 and cells[0].strip() in ("0", "1"):
            self._index = int(cells[0])
            return ["", *header]
        # Any other field too many is a text that needs quotes, here and in all rows.
        shown = ", ".join(self.names) if self.names else line.strip()
        raise UserError(
            f"{self.name}:{number + row}: {count} fields instead of {width}: header {shown!r:.80}, row "
            f"{lines[row].strip()!r:.80}; put a text that holds {_DELIMITERS[self.delimiter]} in double quotes: "
            f"""{f'"one{self.delimiter} two"'!r}"""
        )

    def _delimiter_of(self, lines: list[str], first: int) -> str:
        """What separates the fields, by the first line; what no file holds, where there is one column."""
        width = len(self.names)
        if width == 1:
            return NO_DELIMITER
        fits = [d for d in _DELIMITERS if width and len(_record_at(lines, first, d, width)[0]) == width]
        # By content, since the course's .csv files are tab-separated.
        allowed = "\t" if suffix_of(self.name) == ".tsv" else _DELIMITERS
        return next(iter(fits or [d for d in allowed if d in lines[first]]), NO_DELIMITER)


def _next_filled(lines: list[str], start: int) -> int | None:
    return next((i for i in range(start, len(lines)) if lines[i].strip()), None)


def _record_at(
    lines: list[str], i: int, delimiter: str, width: int | None, end: bool = True
) -> tuple[list[str], int, bool]:
    """The record that starts in line ``i``: its cells, how many lines it takes, whether a stray quote was kept."""
    # It takes no line where a quote that it opens may be closed in lines to come. Quoting is believed where it gives
    # `width` cells (None: always). Otherwise the quote is text: one that is never closed, or by some other row's quote,
    # must not swallow the rows between. With tabs, rows that fit as they stand are not merged even if they could be;
    # commas are too common in text for this test.
    plain = lines[i].rstrip(_NEWLINE).split(delimiter)
    if '"' not in lines[i]:
        return plain, 1, False
    # strict: '"Foo" bar' is an error (which leaves the quotes in the text) rather than 'Foo bar'.
    # A stray quote reads on only to the next quote in the file, so that many of them cost no more than one pass.
    reader = csv.reader((lines[j] for j in range(i, min(len(lines), i + LOOK_AHEAD))), delimiter=delimiter, strict=True)
    try:
        cells, used = next(reader), reader.line_num
    except csv.Error as e:
        if not end and len(lines) - i < LOOK_AHEAD and "end of data" in str(e):
            return [], 0, False
    else:
        fits = width is None or len(cells) == width
        if used > 1 and delimiter == "\t":
            fits = fits and any(line.count(delimiter) + 1 != width for line in lines[i : i + used] if line.strip())
        if fits or (used == 1 and len(plain) != width):  # the latter is wrong both ways
            return cells, used, False
    cells = [cell[1:-1].replace('""', '"') if _QUOTED_CELL.fullmatch(cell) else cell for cell in plain]
    return cells, 1, any(a == b and a.startswith('"') for a, b in zip(plain, cells, strict=True))
