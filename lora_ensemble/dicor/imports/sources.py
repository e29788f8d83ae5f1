"""Anyone's files, read as they stand: tables and arrays of predictions or labels.

.npy and .npz arrays are known by their first bytes; everything else is a table with a header. What the columns mean is
decided elsewhere. No pickle is loaded. Axes: N rows, K columns.
"""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lora_ensemble.dicor.options import Request
from lora_ensemble.errors import UserError
from lora_ensemble.text import readers
from lora_ensemble.text.cells import number
from lora_ensemble.text.tables import DAMAGED, GZIP, Table, one_line, read_table

_NPY, _ZIP = b"\x93NUMPY", b"PK"
_PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, eq=False)
class Source:
    """N rows of a file: all of it, or one model's part."""

    path: Path
    columns: Mapping[str, list[Any]]
    """Cells as they stand, by column. An array is a column of numbers or texts, or of lists; an .npy file's is ''."""
    ids: list[str]  # empty where the file has none
    table: Table | None  # None: the file holds arrays
    notices: list[str]  # what is to be known of the file
    rows: Sequence[int] | None = None  # of a model in a table: their numbers in it
    name: str = ""
    """What the file calls the model: its array, its column, or its entry in the column of models; '' if it is alone."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), self.ids))

    @property
    def where(self) -> str:
        """Where the source is, for an error about all of it."""
        return f"{self.path}: {'model' if self.table else 'array'} {self.name!r}" if self.name else str(self.path)

    def at(self, row: int) -> str:
        """Where one of the N rows is, for an error."""
        return self.table.at(self.rows[row] if self.rows else row) if self.table else f"{self.where}: row {row}"

    def cell(self, name: str, cell: Any) -> str:
        """A cell of a column, as the start of an error."""
        shown = "empty" if cell in ("", None) else f"{cell:g}" if isinstance(cell, float) else repr(cell)[:80]
        return f"column {name!r} is {shown}" if self.table else f"found {shown}"

    def refuse(self, bad: ArrayLike, why: Callable[[int], str]) -> None:
        """``UserError`` for the first of the N rows that is ``bad``."""
        if np.any(bad):
            row, more = int(np.argmax(bad)), f" ({np.sum(bad)} such rows)" if np.sum(bad) > 1 else ""
            raise UserError(f"{self.at(row)}: {why(row)}{more}")

    @property
    def shown(self) -> str:
        """The columns, for an error."""
        names = self.table.found if self.table else list(self.columns)
        return f"columns found: {', '.join(repr(name)[:40] for name in names[:20] if name) or 'none'}"

    def require(self, columns: Sequence[str]) -> None:
        """``UserError`` where one of these columns is not there."""
        for name in columns:
            if name not in self.columns:
                raise UserError(f"{self.path}: no column {name!r}; {self.shown}")

    def cut(self, name: str, columns: Sequence[str], rows: Sequence[int] | None = None) -> Source:
        """One model's columns and, of a table, its rows (all, if not given)."""
        cells = {column: self.columns[column] for column in columns}
        if rows is None:
            return replace(self, name=name, columns=cells)
        part = {column: [cells[column][row] for row in rows] for column in columns}
        ids = [self.ids[row] for row in rows] if self.ids else []
        return replace(self, name=name, columns=part, ids=ids, rows=rows)


def read_models(path: Path, request: Request) -> list[Source]:
    """The models that a file of predictions holds.

    A table is one model, or one for each name in its column of models, or for each of ``member_columns``. An .npy file
    is one model; an .npz file one for each array but ids and labels. ``UserError`` where it cannot be read.
    """
    source = read_source(path, request)
    models, by = [source], request.model_column or "model"
    if source.table is None:
        arrays = [name for name in source.columns if name != "labels"]
        if not arrays:
            raise UserError(f"{path}: no array but ids and labels; expected one for each model")
        models = [source.cut(name if len(arrays) > 1 else "", [name]) for name in arrays]
    elif request.model_column is not None or by in source.columns:
        source.require([by])
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(source.columns[by]):
            rows.setdefault("" if name is None else str(name).strip(), []).append(row)
        if "" in rows:
            raise UserError(f"{source.at(rows[''][0])}: no name in the column of models; expected one in every row")
        models = [source.cut(name, [c for c in source.columns if c != by], own) for name, own in rows.items()]
    if request.member_columns:
        for model in models:
            model.require(request.member_columns)
            if model.name:
                raise UserError(f"{model.where}: the rows name models already; give --member-columns or --model-column")
        models = [source.cut(name, [name]) for name in request.member_columns]
    for model in models:
        check_ids(model, request)
    return models


def check_ids(source: Source, request: Request) -> None:
    """``UserError`` for an id that is empty, endless or there twice, and for a table without any but ``by_row``."""
    if not source.ids and source.table and not request.by_row:
        raise UserError(
            f"{source.path}: no column of ids; {source.shown}; name it with --id, or say --by-row if its rows are in "
            "the order of the labels"
        )
    several = "" if source.name else "; several models in one file: name their column with --model-column"
    readers.check_ids(source.ids, source.at, advice=f"each example once{several}")


def read_source(path: Path, request: Request) -> Source:
    """All columns of a file of predictions or labels, and apart from them its ids.

    They are in the column ``request.id``, else in one called id or ids, else in a table's nameless first one (as pandas
    and R write the names of rows). ``UserError`` where the file cannot be read.
    """
    start = _start(path)
    table = None if start.startswith((_NPY, _ZIP)) else _table(path)
    columns = {**(_arrays(path, start) if table is None else table.columns)}
    notices = [] if table is None else [*table.notices]
    if table and table.found[0]:
        columns.pop("", None)
    names = [n for n in columns if n == request.id or n.lower() in ("id", "ids") or (table and not n)]
    rest = {n: cells for n, cells in columns.items() if n not in names}
    if not names:
        return Source(path, rest, [], table, notices)
    name = min(names, key=lambda n: (n != request.id, not n))
    ids = columns[name]
    if table is None and isinstance(ids[0], float | list):
        raise UserError(f"{path}: array {name!r} holds {ids[0]!r:.80}; expected ids: text or whole numbers")
    for other, cells in rest.items():
        if len(cells) != len(ids):
            raise UserError(f"{path}: array {other!r}: {len(cells)} rows, but {len(ids)} ids; expected one for each")
    return Source(path, rest, [_id(cell) for cell in ids], table, notices)


def _id(cell: Any) -> str:
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "backslashreplace")
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # whole numbers that pandas made floats of
    return "" if cell is None or isinstance(cell, list | dict) else str(cell).strip()


def _start(path: Path) -> bytes:
    """The first bytes of a file; ``UserError`` where there are none, or where they are those of a pickle."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: a pipe or a device; save it to a file first, which is read more than once")
    try:
        with open(path, "rb") as f:
            start = f.read(8)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); expected a data file") from e
    if not start:
        raise UserError(f"{path}: empty file; expected predictions or labels")
    if path.suffix.lower() in _PICKLES or (start[0] == 0x80 and start[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        raise UserError(f"{path}: a pickle, which is never loaded; save the numbers with numpy.save, or as CSV")
    if start.startswith(GZIP):
        with contextlib.suppress(*DAMAGED), gzip.open(path) as f:  # read_table says what is damaged
            start = f.read(8)
        if start.startswith((_NPY, _ZIP, b"\x80")):
            raise UserError(f"{path}: an array, compressed with gzip; unpack it first: gunzip {path.name}")
    return start


def _arrays(path: Path, start: bytes) -> dict[str, list[Any]]:
    """The array of an .npy file, or those of an .npz file, as columns."""
    try:
        # Opened here: np.load leaves a damaged archive's file open.
        with open(path, "rb") as f:
            data = np.load(f, allow_pickle=False)
            arrays = {"": data} if start.startswith(_NPY) else {name: data[name] for name in data.files}
    except Exception as e:  # damaged headers and zips raise many kinds of exception
        what = "an array" if start.startswith(_NPY) else "an .npz archive"
        raise UserError(
            f"{path}: cannot be read as {what} ({type(e).__name__}: {one_line(e)}); expected numbers, as numpy.save "
            "and numpy.savez write them; Python objects are never loaded"
        ) from e
    for name, array in arrays.items():
        where = f"{path}: array {name!r}" if name else path
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path}: a zip archive, but no .npz: it holds {name!r}; save the predictions as CSV")
        if array.dtype.kind not in "biufSU" or array.ndim not in (1, 2) or not array.size:
            several = "; several models: one array for each in an .npz file" if array.ndim == 3 else ""
            expected = f"expected (N,) or (N, C) numbers: a row for each example{several}"
            raise UserError(f"{where}: {array.dtype} of shape {array.shape}; {expected}")
    return {name: (array if array.size > len(array) else array.reshape(-1)).tolist() for name, array in arrays.items()}


def _table(path: Path) -> Table:
    table = read_table(path, None)
    if table.broken:
        row, why = next(iter(table.broken.items()))
        raise UserError(f"{table.at(row)}: {why}; mend it: every row counts")
    if not any(table.columns.values()):
        raise UserError(f"{path}: no rows; expected a header line and a row for each example")
    if not any(math.isnan(number(name)) or name.strip().isdigit() for name in table.found):
        shown = ", ".join(table.found[:3])
        raise UserError(
            f"{path}: its first line holds numbers ({shown}); expected a header line that names the columns"
        )
    return table
