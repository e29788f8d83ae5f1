"""From a task's files to its examples: ids, texts and labels, everything checked, and what was skipped said."""

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
from lora_ensemble.tasks import SPLITS, Task
from lora_ensemble.text.cells import class_reader, is_empty, number, sets_reader
from lora_ensemble.text.splits import Deal
from lora_ensemble.text.tables import Table, as_text, read_hub, read_table

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}  # as the hub calls them
_MOST_SKIPPED = 0.2  # share of rows: more is a file read the wrong way (commas without quotes)
_LONGEST_ID = 1000  # ids are an array of fixed width: one endless id would cost its length for every row


@dataclass(frozen=True, eq=False)
class Split:
    """The examples of a split, in the order of the file."""

    ids: np.ndarray  # (N,) unicode, unique
    texts: list[list[str]]  # one list of N stripped strings per text column of the task
    labels: np.ndarray | None
    """(N,) int64 class numbers, (N, L) int64 of 0 and 1 for several labels, or (N,) float64 values; None: unknown."""
    notices: list[str] = field(default_factory=list)  # a line for each kind of thing that was skipped or mended
    weights: np.ndarray | None = None  # (N,) float64, of training examples whose task names a column of them
    groups: np.ndarray | None = None  # (N,) unicode, of training and dev examples whose task names a column of them

    def take(self, rows: np.ndarray, notices: list[str]) -> Split:
        """The examples ``rows`` (N',) alone, with other notices."""
        labels, weights, groups = (None if a is None else a[rows] for a in (self.labels, self.weights, self.groups))
        texts = [[column[row] for row in rows] for column in self.texts]
        return Split(self.ids[rows], texts, labels, notices, weights, groups)

    def __len__(self) -> int:
        return len(self.ids)


def read_split(task: Task, split: str, root: Path | None, *, need_labels: bool) -> Split:
    """Read one split ("train", "dev" or "test") of a task from its file below ``root``, or from the hub.

    ``need_labels`` (training, scoring): rows without a label or with an empty text are skipped, with a notice. Without
    it (prediction), every row is kept, for every id gets its prediction; labels are read if all rows have one, else
    None. ``UserError`` for whatever cannot be read, told with the file, the line and what to do.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    if split != "test" and isinstance(task.dev, float):
        whole = read_split(replace(task, dev=None), "train", root, need_labels=True)
        return _part(task, whole, split, task.dev)
    task = replace(
        task, weight=task.weight if split == "train" else None, group=task.group if split != "test" else None
    )
    more = [name for name in (task.id, task.weight, task.group) if name is not None]
    wanted = list(dict.fromkeys([*task.text, *task.label_columns, *more]))
    if task.dataset is not None:
        name = getattr(task, split) or HUB_SPLITS[split]
        table = read_hub(task.dataset, task.dataset_config, name, wanted, task.label_columns[0], task.labels)
    else:
        table = read_table(split_file(task, split, root), wanted, task.columns)
    return _examples(task, table, "examples", skip=need_labels, need_labels=need_labels)


def read_texts(task: Task, path: Path) -> Split:
    """Read a file's texts in the task's text columns, the empty ones skipped; ids are the file's name and the row.

    ``UserError`` as :func:`read_split`.
    """
    table = read_table(path, task.text, task.columns)
    split = _examples(replace(task, id=None, weight=None, group=None), table, "texts", skip=True, need_labels=False)
    return replace(split, ids=np.array([f"{path.name}:{row}" for row in split.ids]))


def _part(task: Task, whole: Split, split: str, share: float) -> Split:
    """``split`` of a file that is both train and dev, of which dev is a share."""
    assert whole.labels is not None
    dev = Deal(whole.ids, whole.labels, task.kind, [1 - share, share], whole.groups)(0) == 1
    rows = np.flatnonzero(dev if split == "dev" else ~dev)
    if not len(rows):
        raise UserError(f"task {task.name!r}: dev is {share} of {len(whole)} examples, which leaves none in {split}")
    if split == "train":
        return whole.take(rows, whole.notices)
    return replace(whole, weights=None).take(rows, [f"{share:g} of the training file, kept apart"])


def fingerprint(split: Split) -> str:
    """16 hex digits over ids, texts, labels, weights and groups in their order."""
    digest = hashlib.sha256(json.dumps([split.ids.tolist(), split.texts]).encode())
    if split.labels is not None:
        digest.update(split.labels.astype("<f8").tobytes())  # one width on every machine
    if split.weights is not None:
        digest.update(b"weights" + split.weights.astype("<f8").tobytes())
    if split.groups is not None:
        digest.update(b"groups" + "\0".join(split.groups.tolist()).encode())
    return digest.hexdigest()[:16]


def shared_texts(a: Split, b: Split) -> int:
    """How many examples of ``b`` have a text (for a pair: both texts, in this order) that is also in ``a``."""
    known = set(zip(*a.texts, strict=True))
    return sum(texts in known for texts in zip(*b.texts, strict=True))


def split_file(task: Task, split: str, root: Path | None) -> Path:
    """The file of a split, on this machine. ``UserError`` where the task or ``root`` does not say, or it is missing."""
    name = task.train if isinstance(task.dev, float) and split == "dev" else getattr(task, split)
    if name is None:
        offer = " to one, or to a share of the training file, as in dev: 0.2," if split == "dev" else ""
        others = "; or train with --data.folds 5, without one" if split == "dev" else ""
        raise UserError(f"task {task.name!r}: it names no {split} file; set {split}:{offer} in the task{others}")
    if root is None and not Path(name).is_absolute():
        raise UserError(f"task {task.name!r}: --data.root is not set; it is the folder that holds {name}")
    path = Path(root or "", name).expanduser()
    if not path.exists():
        what = "no such file" if path.parent.is_dir() else "no such file, nor its folder"
        raise UserError(f"{path}: {what}; set --data.root to the folder that holds {name}")
    if path.is_dir():
        raise UserError(f"{path}: a folder; expected the {split} file of task {task.name!r}")
    return path


def _examples(task: Task, table: Table, what: str, *, skip: bool, need_labels: bool) -> Split:
    """The rows of a table as examples, in words ``what``. ``skip``: those that lack something are left out."""
    _check_columns(task, table, need_labels)
    texts = [[_string(table, row, name, cell) for row, cell in enumerate(table.columns[name])] for name in task.text]
    rows = _usable_rows(task, table, texts, what, skip)
    lacking = [name for name in task.label_columns if name not in table.columns]
    labels = None if lacking else _labels(task, table, rows)
    if 0 < len(lacking) < len(task.label_columns):
        table.notices.append(f"{table.name}: no column {lacking[0]!r}; the labels of this split are not used")
    if labels is None and need_labels:
        raise UserError(f"{table.where}: {task.label} is empty in all rows; expected names out of {task.labels}")
    kept, groups = [[column[row] for row in rows] for column in texts], None
    if task.group is not None:
        groups = np.array([_string(table, row, task.group, table.columns[task.group][row]) for row in rows])
        if not groups.all():
            row = rows[int(np.flatnonzero(groups == "")[0])]
            raise UserError(
                f"{table.at(row)}: {task.group} is empty; expected the name of a group, its own if it has none"
            )
    return Split(_ids(task, table, rows), kept, labels, table.notices, _weights(task, table, rows), groups)


def _check_columns(task: Task, table: Table, need_labels: bool) -> None:
    shown = ", ".join(name[:40] for name in table.found[:20] if name) or "none"
    advice = f"of task {task.name!r} to what the file has"
    if table.header_line and not table.columns:
        advice += "; if these are no names, a header line seems to be missing: give the names as columns: of the task"
    for name, key in [
        *((name, "text") for name in task.text),
        (task.id, "id"),
        (task.weight, "weight"),
        (task.group, "group"),
    ]:
        if name is not None and name not in table.columns:
            raise UserError(f"{table.where}: no column {name!r}; columns found: {shown}; set {key}: {advice}")
    if need_labels and (lacking := [name for name in task.label_columns if name not in table.columns]):
        raise UserError(
            f"{table.where}: no label column {lacking[0]!r}; columns found: {shown}; "
            "an unlabelled split is for `lora-ensemble predict`"
        )


def _string(table: Table, row: int, column: str, cell: Any) -> str:
    text = "" if is_empty(cell) else as_text(cell)
    if text is None:
        raise UserError(f"{table.at(row)}: column {column!r} holds a {type(cell).__name__}; expected text")
    return text.strip()


def _usable_rows(task: Task, table: Table, texts: list[list[str]], what: str, skip: bool) -> list[int]:
    """Numbers of the rows to keep; what is skipped, or kept though empty, goes to the notices."""
    needed = list(zip(task.text, texts, strict=True))
    if skip and not _named(task):
        needed += [(name, table.columns[name]) for name in task.label_columns if name in table.columns]
    rows: list[int] = []
    odd: dict[str, list[int]] = {}
    for row in range(len(texts[0])):
        why = table.broken.get(row)
        if why and not skip:
            raise UserError(f"{table.at(row)}: {why}; mend it: every row needs a prediction")
        if not why and (empty := [name for name, column in needed if is_empty(column[row])]):
            why = f"empty {' and '.join(empty)}"
        if why:
            odd.setdefault(why, []).append(row)
        if not (why and skip):
            rows.append(row)
    for why, where in odd.items():
        table.note(where, f"{'skipped' if skip else 'kept all the same, so that every id gets a prediction'}: {why}")
    count = len(texts[0])
    if not rows:
        raise UserError(f"{table.where}: no usable {what}{''.join('; ' + n for n in table.notices) or ': no rows'}")
    if count - len(rows) > _MOST_SKIPPED * count:
        raise UserError(
            f"{table.where}: only {len(rows)} of {count} rows are usable {what}; {'; '.join(table.notices)}; mend the "
            f"others, or take them out (up to {_MOST_SKIPPED:.0%} are skipped)"
        )
    return rows


def _ids(task: Task, table: Table, rows: Sequence[int]) -> np.ndarray:
    """(N,) unicode ids, checked."""
    if task.id is None:
        return np.array([str(row) for row in rows])
    ids = [_string(table, row, task.id, table.columns[task.id][row]) for row in rows]
    check_ids(ids, lambda i: table.at(rows[i]), what=f"the id in column {task.id!r}")
    return np.array(ids)


def check_ids(
    ids: Sequence[str], at: Callable[[int], str], *, what: str = "the id", advice: str = "ids must be unique"
) -> None:
    """``UserError`` for an id that is empty, endless or there twice; ``at``: where the i-th is."""
    first: dict[str, int] = {}
    for i, name in enumerate(ids):
        if not name or len(name) > _LONGEST_ID or "\0" in name:
            why = "one with a NUL character" if "\0" in name else "longer than 1000 characters" if name else "empty"
            raise UserError(f"{at(i)}: {what} is {why}; each example needs its own")
        if first.setdefault(name, i) != i:
            raise UserError(f"{at(i)}: id {name!r} is already at {at(first[name])}; {advice}")


def _named(task: Task) -> bool:
    """Whether a cell names any number of labels, so that an empty one says that there are none."""
    return task.kind == "multilabel" and isinstance(task.label, str)


def _labels(task: Task, table: Table, rows: Sequence[int]) -> np.ndarray | None:
    """(N,) labels of the rows, or (N, L); None, with a notice, where some rows have none; without, where all have none.

    Where cells name several labels, only the latter.
    """
    columns, named = [table.columns[name] for name in task.label_columns], _named(task)
    empty = [row for row in rows if any(is_empty(c[row]) or (named and c[row] == []) for c in columns)]
    if len(empty) == len(rows) or (empty and not named):
        if len(empty) < len(rows):
            table.notices.append(
                f"{table.name}: {len(empty)} of {len(rows)} rows have no {' or '.join(task.label_columns)} "
                f"({table.places(empty)}); "
                "the labels of this split are not used"
            )
        return None
    if task.kind == "multilabel":
        read_row, found = sets_reader(task.labels, task.label_columns, task.label_separator), list[list[int]]()
        for row in rows:
            if isinstance(there := read_row([cells[row] for cells in columns]), str):
                raise UserError(f"{table.at(row)}: label out of range: {there}")
            found.append(there)
        return np.array(found, np.int64)
    (cells,) = columns
    if task.kind == "regression":
        low, high = task.label_range or (-math.inf, math.inf)
        values = np.array([math.nan if isinstance(cells[row], bool) else number(str(cells[row])) for row in rows])
        good = np.isfinite(values) & (low <= values) & (values <= high)
        expected = f"a number from {low} to {high}" if task.label_range else "a finite number"
    else:
        read = class_reader(task.labels, truth=task.kind == "binary" and not task.label_names)
        values = np.array([read(cells[row]) for row in rows], np.float64)  # None becomes NaN
        good = np.isfinite(values)
        expected = f"one of {', '.join(task.labels)}"
    if not good.all():
        row = rows[int(good.argmin())]
        raise UserError(f"{table.at(row)}: label out of range: {task.label} is {cells[row]!r}; expected {expected}")
    return values if task.kind == "regression" else values.astype(np.int64)


def _weights(task: Task, table: Table, rows: Sequence[int]) -> np.ndarray | None:
    """(N,) weights of the rows, checked; None where the task names no column of them."""
    if task.weight is None:
        return None
    cells = table.columns[task.weight]
    weights = np.array([number(str(cells[row])) for row in rows])
    good = np.isfinite(weights) & (weights >= 0)
    if not good.all():
        row = rows[int(good.argmin())]
        raise UserError(f"{table.at(row)}: {task.weight} is {cells[row]!r}; expected a weight, a number of at least 0")
    if not weights.any():
        raise UserError(f"{table.where}: {task.weight} is 0 in all rows, so there is nothing to train on")
    return weights
