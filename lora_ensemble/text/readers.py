"""From a task's files to its examples: ids, texts and labels, everything checked, and what was skipped said.

The file formats are in tables.py. No torch. Axes: N examples of a split.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_ensemble.errors import UserError
from lora_ensemble.tasks import SPLITS, Task, class_reader, number
from lora_ensemble.text.tables import Table, as_text, read_hub, read_table

_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_MOST_SKIPPED = 0.2
"""Share of a split's rows: more is no untidiness but a file that is read the wrong way (commas without quotes)."""
_LONGEST_ID = 1000  # ids are an array of fixed width: one endless id would cost its length for every row


@dataclass(frozen=True, eq=False)
class Split:
    """The examples of a split, in the order of the file."""

    ids: np.ndarray
    """(N,) unicode, unique."""
    texts: list[list[str]]
    """One list of N strings per text column of the task, surrounding whitespace stripped, otherwise as they stand."""
    labels: np.ndarray | None
    """(N,) int64 output numbers (multiclass, binary: 0 or 1) or float64 values (regression); None where unknown."""
    notices: list[str] = field(default_factory=list)
    """One line for each kind of thing that was skipped or mended: how many rows, the first of them, and why."""

    def __len__(self) -> int:
        return len(self.ids)


def read_split(task: Task, split: str, root: Path | None, *, need_labels: bool) -> Split:
    """Read one split ("train", "dev" or "test") of a task from its file below ``root``, or from the hub.

    ``need_labels`` (training, scoring): rows without a label or with an empty text are skipped, and ``notices`` says
    so. Without it (prediction), every row is kept, so that every id gets its prediction; labels are read if all rows
    have one, else None. ``UserError`` for whatever cannot be read, told with the file, the line and what to do.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    table = _open(task, split, root)
    _check_columns(task, table, need_labels)
    texts = [_text_column(table, name) for name in task.text]
    labels = table.columns.get(task.label)
    notices = list(table.notices)
    rows = _usable_rows(task, table, texts, labels, need_labels, notices)
    _enough(table, "examples", rows, len(texts[0]), notices)
    numbers = None if labels is None else _read_labels(task, table, labels, rows, notices)
    return Split(_read_ids(task, table, rows), [[column[r] for r in rows] for column in texts], numbers, notices)


def read_texts(task: Task, path: Path) -> Split:
    """Read texts without labels from a file that has the task's text columns; the ids are the file's name and the row.

    Rows with an empty text are skipped, and ``notices`` says so. ``UserError`` as :func:`read_split`.
    """
    nameless = replace(task, id=None)
    table = read_table(path, task.text, task.columns)
    _check_columns(nameless, table, need_labels=False)
    texts = [_text_column(table, name) for name in task.text]
    notices = list(table.notices)
    rows = _usable_rows(nameless, table, texts, None, True, notices)
    _enough(table, "texts", rows, len(texts[0]), notices)
    return Split(np.array([f"{path.name}:{r}" for r in rows]), [[c[r] for r in rows] for c in texts], None, notices)


def fingerprint(split: Split) -> str:
    """16 hex digits over ids, texts and labels in their order."""
    digest = hashlib.sha256(json.dumps([split.ids.tolist(), split.texts]).encode())
    if split.labels is not None:
        digest.update(split.labels.astype("<f8").tobytes())  # one width on every machine
    return digest.hexdigest()[:16]


def shared_texts(a: Split, b: Split) -> int:
    """How many examples of ``b`` have a text (for a pair: both texts, in this order) that is also in ``a``."""
    known = set(zip(*a.texts, strict=True))
    return sum(texts in known for texts in zip(*b.texts, strict=True))


def split_source(task: Task, split: str, root: Path | None) -> str:
    """What a split is read from, as settings name it: a file, or a data set of the hub (or one in a folder).

    ``UserError`` where the task or ``root`` does not say.
    """
    if task.dataset is not None:
        return task.dataset
    name: str | None = getattr(task, split)
    if name is None:
        raise UserError(f"task {task.name!r}: it names no {split} file; set {split}: in the task")
    if root is None and not Path(name).is_absolute():
        raise UserError(f"task {task.name!r}: --data.root is not set; it is the folder that holds {name}")
    return str(Path(root or "") / name)


def _open(task: Task, split: str, root: Path | None) -> Table:
    wanted = list(dict.fromkeys([*task.text, task.label, *([task.id] if task.id is not None else [])]))
    if task.dataset is not None:
        source, name = split_source(task, split, root), getattr(task, split) or _HUB_SPLITS[split]
        return read_hub(source, task.dataset_config, name, wanted, task.label, task.labels)
    return read_table(split_file(task, split, root), wanted, task.columns)


def split_file(task: Task, split: str, root: Path | None) -> Path:
    """The file of a split, on this machine. ``UserError`` where it is missing, or as :func:`split_source`."""
    path = Path(split_source(task, split, root)).expanduser()
    if not path.exists():
        what = "no such file" if path.parent.is_dir() else "no such file, nor its folder"
        raise UserError(f"{path}: {what}; set --data.root to the folder that holds {getattr(task, split)}")
    if path.is_dir():
        raise UserError(f"{path}: a folder; expected the {split} file of task {task.name!r}")
    return path


def _check_columns(task: Task, table: Table, need_labels: bool) -> None:
    shown = ", ".join(c[:40] for c in table.found[:20] if c) or "none"
    advice = f"of task {task.name!r} to what the file has"
    if table.header_line and not table.columns:
        advice += "; if these are no names, a header line seems to be missing: give the names as columns: of the task"
    for name, key in [*((t, "text") for t in task.text), *([(task.id, "id")] if task.id is not None else [])]:
        if name not in table.columns:
            raise UserError(f"{table.where}: no column {name!r}; columns found: {shown}; set {key}: {advice}")
    if need_labels and task.label not in table.columns:
        raise UserError(
            f"{table.where}: no label column {task.label!r}; columns found: {shown}; "
            "an unlabelled split is for `lora-ensemble predict`"
        )


def _is_empty(value: Any) -> bool:
    return value is None or (value.strip() == "" if isinstance(value, str) else value != value)  # NaN is not itself


def _string(table: Table, row: int, column: str, value: Any) -> str:
    if _is_empty(value):
        return ""
    text = as_text(value)
    if text is None:
        raise UserError(f"{table.at(row)}: column {column!r} holds a {type(value).__name__}; expected text")
    return text.strip()


def _text_column(table: Table, name: str) -> list[str]:
    return [_string(table, row, name, value) for row, value in enumerate(table.columns[name])]


def _usable_rows(
    task: Task,
    table: Table,
    texts: list[list[str]],
    labels: list[Any] | None,
    need_labels: bool,
    notices: list[str],
) -> list[int]:
    """Numbers of the rows to keep; what is skipped, or kept though empty, goes to ``notices``."""
    rows: list[int] = []
    odd: dict[str, list[int]] = {}
    for row in range(len(texts[0])):
        if row in table.broken:
            if not need_labels:
                raise UserError(f"{table.at(row)}: {table.broken[row]}; mend it: every row needs a prediction")
            odd.setdefault(table.broken[row], []).append(row)
            continue
        empty = [name for name, column in zip(task.text, texts, strict=True) if not column[row]]
        if need_labels and labels is not None and _is_empty(labels[row]):
            empty.append(task.label)
        if empty:
            odd.setdefault(f"empty {' and '.join(empty)}", []).append(row)
        if not (empty and need_labels):
            rows.append(row)
    done = "skipped" if need_labels else "kept all the same, so that every id gets a prediction"
    for why, where in odd.items():
        notices.append(f"{table.name}: {len(where)} row{'s' * (len(where) > 1)} {done}: {why} ({table.places(where)})")
    return rows


def _enough(table: Table, what: str, rows: Sequence[int], count: int, notices: Sequence[str]) -> None:
    """``UserError`` where few of a table's rows are usable."""
    if not rows:
        raise UserError(f"{table.where}: no usable {what}{''.join('; ' + n for n in notices) or ': no rows'}")
    if count - len(rows) > _MOST_SKIPPED * count:
        raise UserError(
            f"{table.where}: only {len(rows)} of {count} rows are usable {what}; {'; '.join(notices)}; mend the "
            f"others, or take them out (up to {_MOST_SKIPPED:.0%} are skipped)"
        )


def _read_ids(task: Task, table: Table, rows: Sequence[int]) -> np.ndarray:
    """(N,) unicode ids. ``UserError`` for one that is empty, endless or there twice."""
    if task.id is None:
        return np.array([str(row) for row in rows])
    seen: dict[str, int] = {}
    for row in rows:
        name = _string(table, row, task.id, table.columns[task.id][row])
        if not name or len(name) > _LONGEST_ID or "\0" in name:
            what = (
                "empty"
                if not name
                else "longer than 1000 characters"
                if "\0" not in name
                else "one with a NUL character"
            )
            raise UserError(f"{table.at(row)}: the id in column {task.id!r} is {what}; each example needs its own")
        if name in seen:
            raise UserError(f"{table.at(row)}: id {name!r} is already at {table.at(seen[name])}; ids must be unique")
        seen[name] = row
    return np.array(list(seen))


def _read_labels(
    task: Task, table: Table, cells: Sequence[Any], rows: Sequence[int], notices: list[str]
) -> np.ndarray | None:
    """(N,) labels of the rows; None, with a notice, where some rows have none, and without one where all have none."""
    empty = [row for row in rows if _is_empty(cells[row])]
    if empty:
        if len(empty) < len(rows):
            notices.append(
                f"{table.name}: {len(empty)} of {len(rows)} rows have no {task.label} ({table.places(empty)}); "
                "the labels of this split are not used"
            )
        return None
    regression = task.kind == "regression"
    read = (
        _value_reader(task.label_range)
        if regression
        else class_reader(task.labels, truth=task.kind == "binary" and not task.label_names)
    )
    known: dict[Any, float | None] = {}  # a split has few different labels, and a dict is faster than float()
    out = np.empty(len(rows), np.float64 if regression else np.int64)
    for i, row in enumerate(rows):
        cell = cells[row]
        # Keyed with the type: 1, 1.0 and True are one key in a dict, but need not be one label.
        key = cell if isinstance(cell, str) else (type(cell), str(cell))
        number = known[key] if key in known else known.setdefault(key, read(cell))
        if number is None:
            raise UserError(
                f"{table.at(row)}: label out of range: {task.label} is {cell!r}; expected {_expected(task)}"
            )
        out[i] = number
    return out


def _expected(task: Task) -> str:
    if task.kind != "regression":
        return "one of " + ", ".join(task.labels)
    return "a number from {} to {}".format(*task.label_range) if task.label_range else "a finite number"


def _value_reader(label_range: Sequence[float]) -> Callable[[Any], float | None]:
    low, high = label_range or (-math.inf, math.inf)

    def read(cell: Any) -> float | None:
        value = math.nan if isinstance(cell, bool) else number(str(cell))
        return value if math.isfinite(value) and low <= value <= high else None

    return read
