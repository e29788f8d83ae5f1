"""Anyone's files, read: tables and arrays of predictions or labels, still in the files' own words.

.npy (memory-mapped) and .npz arrays are known by their first bytes; everything else is a table with a header (CSV, TSV,
JSON lines, Parquet: see tables.py). What the columns mean is decided in outputs.py and truth.py. No pickle is loaded.
"""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_ensemble.errors import UserError
from lora_ensemble.tasks import number
from lora_ensemble.text.tables import DAMAGED, GZIP, Table, one_line, read_table

ARRAY = ""
"""Name of the one column that an array is: (N,) or (N, K)."""
_PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, eq=False)
class Source:
    """Columns of N rows out of one file: all of it, or one model's part of it."""

    path: Path
    name: str
    """What the file calls the model: its array or its entry in the column of models; '' where the file is one model."""
    columns: dict[str, Sequence[Any] | np.ndarray]
    """Cells as they stand, by column; the array (N,) or (N, K) of an array file is the column ''."""
    ids: list[str] | None
    """None where the file has none."""
    rows: Sequence[int]
    """Numbers of the rows in the file."""
    table: Table | None = None
    notices: list[str] = field(default_factory=list)

    def at(self, row: int) -> str:
        """Where one of the N rows is, for an error."""
        if self.table:
            return self.table.at(self.rows[row])
        return f"{self.path}: {f'array {self.name!r}, ' if self.name else ''}row {row}"

    @property
    def where(self) -> str:
        """Where the source is, for an error about all of it."""
        return f"{self.path}: model {self.name!r}" if self.name else str(self.path)

    @property
    def found(self) -> str:
        """The columns, for an error."""
        names = self.table.found if self.table else list(self.columns)
        return ", ".join(repr(name)[:40] for name in names[:20] if name) or "none"


def read_sources(path: Path, *, id_column: str | None = None, model_column: str | None = None) -> list[Source]:
    """The models that a file of predictions holds.

    A table is one model, or one for each name in its column ``model_column`` ("model" if it has one). An .npy file is
    one model; an .npz file one for each array but ``ids`` and ``labels``. ``UserError`` where it cannot be read.
    """
    start = _start(path)
    if start.startswith(b"\x93NUMPY"):
        return [_array_source(path, "", _mapped(path), None)]
    if start.startswith(b"PK"):
        arrays = _archive(path)
        ids, rest = _ids_of(path, arrays, id_column), _without(arrays, id_column)
        if not rest:
            raise UserError(f"{path}: no array but ids and labels; expected one for each model")
        names = [""] if len(rest) == 1 else list(rest)
        return [_array_source(path, n, a, ids) for n, a in zip(names, rest.values(), strict=True)]
    table = _table(path)
    ids, columns = _table_ids(table, id_column)
    column = model_column if model_column is not None else "model"
    if column in columns:
        return _by_model(path, table, list(columns.pop(column)), columns, ids)
    n = len(next(iter(table.columns.values())))
    source = Source(path, "", columns, ids, range(n), table, table.notices)
    if model_column is not None:
        raise UserError(f"{path}: no column {model_column!r}; columns found: {source.found}")
    return [source]


def by_column(source: Source, columns: Sequence[str]) -> list[Source]:
    """A table in wide format, cut: one source for each of these columns, called after it."""
    missing = [name for name in columns if name not in source.columns]
    if missing:
        raise UserError(f"{source.path}: no column {missing[0]!r}; columns found: {source.found}")
    if source.name:
        raise UserError(f"{source.where}: the rows name models already; give --member-columns or --model-column")
    return [replace(source, name=name, columns={name: source.columns[name]}) for name in columns]


def read_labels(path: Path, *, id_column: str | None, label_column: str) -> Source:
    """A file of ids and labels as one source; its labels, where it has any, are its only column, called ``labels``.

    A table needs no labels; an .npz file holds ``ids`` and ``labels``; an .npy file is the labels (N,) alone.
    """
    start = _start(path)
    if start.startswith(b"\x93NUMPY"):
        source = _array_source(path, "", _mapped(path), None)
        return Source(path, "", {"labels": _vector(path, source.columns[ARRAY])}, None, source.rows)
    if start.startswith(b"PK"):
        arrays = _archive(path)
        ids = _ids_of(path, arrays, id_column)
        label = label_column if label_column in arrays else "labels"
        if ids is None:
            raise UserError(f"{path}: no array 'ids'; arrays found: {', '.join(arrays)}; save ids and labels in it")
        columns = {"labels": _vector(path, arrays[label])} if label in arrays else {}
        if columns and len(columns["labels"]) != len(ids):
            raise UserError(f"{path}: {len(ids)} ids, but {len(columns['labels'])} labels; expected one for each")
        return Source(path, "", dict(columns), ids, range(len(ids)))
    table = _table(path)
    ids, rest = _table_ids(table, id_column)
    n = len(next(iter(table.columns.values()), ()))
    kept = {"labels": rest[label_column]} if label_column in rest else {}
    return Source(path, "", kept, ids, range(n), table, table.notices)


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
        if start.startswith((b"\x93NUMPY", b"PK", b"\x80")):
            raise UserError(f"{path}: an array, compressed with gzip; unpack it first: gunzip {path.name}")
    return start


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # never unpickles, unlike np.load
    except Exception as e:  # a damaged header raises several kinds of exception
        raise UserError(
            f"{path}: cannot be read as an array ({one_line(e)}); expected numbers, as numpy.save writes them; "
            "Python objects are never loaded"
        ) from e


def _archive(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here: np.load leaves a damaged archive's file open.
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except Exception as e:  # a damaged zip raises many kinds of exception
        raise UserError(
            f"{path}: cannot be read as an .npz archive ({type(e).__name__}: {one_line(e)}); expected arrays of "
            "numbers, as numpy.savez writes them; Python objects are never loaded"
        ) from e
    other = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if other:
        raise UserError(f"{path}: a zip archive, but no .npz: it holds {other[0]!r}; save the predictions as CSV")
    return arrays


def _ids_of(path: Path, arrays: Mapping[str, np.ndarray], id_column: str | None) -> list[str] | None:
    name = next((n for n in (id_column, "ids", "id") if n in arrays), None)
    if name is None:
        return None
    ids = _vector(path, arrays[name])
    if ids.dtype.kind == "S":
        ids = np.char.decode(ids, "utf-8", "backslashreplace")
    if ids.dtype.kind not in "Uiu":
        raise UserError(f"{path}: array {name!r} is {ids.dtype}; expected ids: text or whole numbers")
    return [str(i).strip() for i in ids.tolist()]


def _without(arrays: Mapping[str, np.ndarray], id_column: str | None) -> dict[str, np.ndarray]:
    return {n: a for n, a in arrays.items() if n not in (id_column, "ids", "id", "labels")}


def _vector(path: Path, array: Any) -> np.ndarray:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise UserError(f"{path}: an array of shape {array.shape}; expected one number or name for each row")
    return np.asarray(array)


def _array_source(path: Path, name: str, array: np.ndarray, ids: list[str] | None) -> Source:
    where = f"{path}: array {name!r}" if name else str(path)
    if array.dtype.names or array.ndim not in (1, 2):
        raise UserError(
            f"{where}: {array.dtype} of shape {array.shape}; expected (N,) or (N, C): a row for each example"
            + ("; several models: one array for each in an .npz file" if array.ndim == 3 else "")
        )
    if not array.size:
        raise UserError(f"{where}: shape {array.shape}: no numbers; expected a row for each example")
    if ids is not None and len(ids) != len(array):
        raise UserError(f"{where}: {len(array)} rows, but {len(ids)} ids; expected one for each")
    return Source(path, name, {ARRAY: array}, ids, range(len(array)))


def _table(path: Path) -> Table:
    table = read_table(path, None)
    if table.broken:
        row = next(iter(table.broken))
        raise UserError(f"{table.at(row)}: {table.broken[row]}; mend it: every row counts")
    if not any(len(cells) for cells in table.columns.values()):
        raise UserError(f"{path}: no rows; expected a header line and a row for each example")
    if not any(math.isnan(number(name)) or name.strip().isdigit() for name in table.found):
        raise UserError(
            f"{path}: its first line holds numbers ({', '.join(table.found[:3])}); expected a header line with the "
            "names of the columns"
        )
    return table


def _table_ids(table: Table, wanted: str | None) -> tuple[list[str] | None, dict[str, Sequence[Any] | np.ndarray]]:
    """The ids of a table's rows, None where there are none, and its other columns.

    They are in the column ``wanted``, else in one called id or ids, else in a nameless first one (as pandas and R
    write the names of rows).
    """
    columns: dict[str, Sequence[Any] | np.ndarray] = dict(table.columns)
    name = wanted if wanted in columns else next((n for n in columns if n.lower() in ("id", "ids")), None)
    if name is None and table.found[0] == "":
        name = ""
    cells = None if name is None else columns.pop(name)
    columns.pop("", None)
    if cells is None:
        return None, columns
    ids = []
    for row, cell in enumerate(cells):
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)  # whole numbers that pandas made floats of
        ids.append(str(cell).strip() if cell is not None else "")
        if not ids[-1] or isinstance(cell, (list, dict)):
            raise UserError(f"{table.at(row)}: the id in column {name!r} is {cell!r}; each row needs its own")
    return ids, columns


def _by_model(
    path: Path,
    table: Table,
    models: Sequence[Any],
    columns: Mapping[str, Sequence[Any] | np.ndarray],
    ids: list[str] | None,
) -> list[Source]:
    """A table in long format, cut: one source for each model, in the order of their first rows."""
    rows: dict[str, list[int]] = {}
    for row, model in enumerate(models):
        name = str(model).strip() if model is not None else ""
        if not name:
            raise UserError(f"{table.at(row)}: no name in the column of models; expected one in every row")
        rows.setdefault(name, []).append(row)
    return [
        Source(
            path,
            name,
            {column: [cells[r] for r in its] for column, cells in columns.items()},
            None if ids is None else [ids[r] for r in its],
            its,
            table,
            table.notices if i == 0 else [],
        )
        for i, (name, its) in enumerate(rows.items())
    ]
