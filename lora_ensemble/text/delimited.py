"""Delimited text, whole or in pieces: a header, and records whose quotes are believed where that fits the header.

Training reads a file at once, ``infer`` as it comes, and both read it here. No torch.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from lora_ensemble.errors import UserError

NO_DELIMITER = "\x1f"  # a header of one column: the whole line is the cell, its commas included
LOOK_AHEAD = 10_000
"""Lines in which a quote that was opened may be closed; after that it is text."""
_DELIMITERS = {"\t": "a tab", ",": "a comma", ";": "a semicolon"}
_NEWLINE = "\r\n"
_QUOTED_CELL = re.compile(r'"(?:[^"]|"")*"')


def suffix_of(name: str) -> str:
    """What a file's name says of its format: its suffix, in lower case, of the unpacked file if it is a .gz."""
    return PurePath(name.lower().removesuffix(".gz")).suffix


class Record(NamedTuple):
    """One row of a delimited file."""

    line: int
    """On which it starts."""
    used: int
    """How many lines it takes."""
    cells: list[str]
    stray: bool
    """Whether an unbalanced quote was taken as text."""
    error: str | None
    """What is wrong with it."""


class Delimited:
    """Reads delimited lines in as many pieces as they come. ``names``: the columns, where there is no header line."""

    def __init__(self, name: str, names: Sequence[str] = ()) -> None:
        self.name, self.names = name, list(names)
        self.header: list[str] = []
        """The columns, once enough lines are there; a nameless one is ''."""
        self.delimiter = ","
        self._index: int | None = None  # what the nameless index that the header leaves out says in the next row

    def read(self, lines: list[str], number: int, *, end: bool) -> tuple[list[Record], int]:
        """The records in some lines, each with its line end, and how many lines they take.

        ``number``: of the first of them. ``end``: there are no more, else what may go on in later lines is left.
        Raises ``UserError`` for a header, or a first row, that cannot be.
        """
        i = 0
        if not self.header:
            i = self._start(lines, number, end)
            if not self.header:
                return [], 0
        records = []
        width, blank = len(self.header), self.delimiter + " " + _NEWLINE
        while i < len(lines):
            line, used, stray = lines[i], 1, False
            if not line.strip(blank):
                i += 1
                continue
            if '"' in line:
                if not end and self._goes_on(lines, i):
                    break
                cells, used, stray = _record_at(lines, i, self.delimiter, width)
            else:
                cells = line.rstrip(_NEWLINE).split(self.delimiter)
            error = None if len(cells) == width else f"{len(cells)} fields instead of {width}"
            if self._index is not None:
                if error is None and cells[0].strip() != str(self._index):
                    error = f"starts with {cells[0]!r:.40} instead of the row's number {self._index}"
                self._index += 1
            records.append(Record(number + i, used, cells, stray, error))
            i += used
        return records, i

    def _start(self, lines: list[str], number: int, end: bool) -> int:
        """Find the header, and return how many lines come before the rows.

        The first row must be there too: it says whether there is a nameless index in front.
        """
        first = next((i for i, line in enumerate(lines) if line.strip()), None)
        if first is None and end:
            raise UserError(f"{self.name}: empty file; expected a header line with the names of the columns")
        if first is None:
            return 0
        self.delimiter = self._delimiter_of(lines, first)
        if not end and self._goes_on(lines, first):
            return 0
        found, used, _ = _record_at(lines, first, self.delimiter, None)
        header = [name.strip() for name in found]
        if self.names:
            if header == self.names:
                raise UserError(f"{self.name}: has a header line of its own; do not give the names of its columns")
            header, used = self.names, 0
        start = first + used
        row = next((i for i in range(start, len(lines)) if lines[i].strip()), None)
        if row is None or (not end and self._goes_on(lines, row)):
            if not end:
                return 0
        else:
            if self.delimiter == "\t" and len(header) == 2 and "\t" not in lines[row] and " , " in lines[row]:
                self.delimiter = ","  # the course's leaderboard files have a tab in their header, and none below it
            header = self._with_index(header, lines, row, number, lines[first])
        self.header = header
        return start

    def _with_index(self, header: list[str], lines: list[str], row: int, number: int, line: str) -> list[str]:
        """The header as it fits the first row: with '' in front where that has a number more, as R writes it.

        Any other field too many is a text that needs quotes, here and in all rows, and cannot be told from an index.
        """
        width = len(header)
        count = len(_record_at(lines, row, self.delimiter, width)[0])
        if count <= width:
            return header
        cells = _record_at(lines, row, self.delimiter, width + 1)[0]
        if not self.names and len(cells) == width + 1 > 2 and cells[0].strip() in ("0", "1"):
            self._index = int(cells[0])
            return ["", *header]
        shown = ", ".join(self.names) if self.names else line.strip()
        raise UserError(
            f"{self.name}:{number + row}: {count} fields instead of {width}: header {shown!r:.80}, row "
            f"{lines[row].strip()!r:.80}; put a text that holds {_DELIMITERS[self.delimiter]} in double quotes: "
            f"""{f'"one{self.delimiter} two"'!r}"""
        )

    def _delimiter_of(self, lines: list[str], first: int) -> str:
        """What separates the fields, by the first line; what no file holds, where there is one column."""
        if self.names:
            width = len(self.names)
            fits = [d for d in _DELIMITERS if len(_record_at(lines, first, d, width)[0]) == width]
            if fits or width == 1:
                return NO_DELIMITER if width == 1 else fits[0]
        # By content, since the course's .csv files are tab-separated.
        if "\t" in lines[first]:
            return "\t"
        if suffix_of(self.name) == ".tsv":
            return NO_DELIMITER
        return "," if "," in lines[first] else ";" if ";" in lines[first] else NO_DELIMITER

    def _goes_on(self, lines: list[str], i: int) -> bool:
        """Whether a quote that opens in the record that starts in line ``i`` may be closed in lines to come."""
        if '"' not in lines[i] or len(lines) - i >= LOOK_AHEAD:
            return False
        try:
            next(csv.reader((lines[j] for j in range(i, len(lines))), delimiter=self.delimiter, strict=True))
        except csv.Error as e:
            return "end of data" in str(e)
        return False


def _record_at(lines: list[str], i: int, delimiter: str, width: int | None) -> tuple[list[str], int, bool]:
    """The record that starts in line ``i``: its cells, how many lines it takes, whether a stray quote was kept.

    Quoting is believed where it gives ``width`` cells. Otherwise the quote is text: an opening quote that is never
    closed, or is closed by some other row's quote, must not swallow the rows between. In a tab-separated file, rows
    that fit as they stand are not merged even if they could be; commas are too common in text for this test.
    ``width`` None believes any quoting.
    """
    quoted = _quoted_record(lines, i, delimiter)
    plain = lines[i].rstrip(_NEWLINE).split(delimiter)
    if quoted is not None:
        cells, used = quoted
        fits = width is None or len(cells) == width
        if used > 1 and delimiter == "\t":
            fits = fits and any(line.count(delimiter) + 1 != width for line in lines[i : i + used] if line.strip())
        if fits or (used == 1 and len(plain) != width):  # the latter is wrong both ways
            return cells, used, False
    cells = [_unquoted(cell) for cell in plain]
    return cells, 1, any(a == b and a.startswith('"') for a, b in zip(plain, cells, strict=True))


def _quoted_record(lines: list[str], i: int, delimiter: str) -> tuple[list[str], int] | None:
    """The record by the rules of CSV, and the lines it takes; None where its quotes do not balance."""
    # strict: '"Foo" bar' is an error (which leaves the quotes in the text) rather than 'Foo bar'.
    # A stray quote reads on only to the next quote in the file, so that many of them cost no more than one pass.
    reader = csv.reader((lines[j] for j in range(i, min(len(lines), i + LOOK_AHEAD))), delimiter=delimiter, strict=True)
    try:
        return next(reader), reader.line_num
    except csv.Error:
        return None


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _QUOTED_CELL.fullmatch(cell) else cell
