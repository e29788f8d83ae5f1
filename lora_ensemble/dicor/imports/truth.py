"""What imported predictions are of: the task's kind and labels, and the ids and true labels of a split.

All three may be known from the members that are there, from a preset, from the command line and from a file of labels;
where two of them speak they must agree. Axis: N examples of a split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_ensemble.dicor.imports.sources import Source, read_labels
from lora_ensemble.errors import UserError
from lora_ensemble.pool import Examples, MemberRecord, read_examples
from lora_ensemble.tasks import PRESETS, Kind, class_reader, number

_LONGEST_ID = 1000  # ids are an array of fixed width: one endless id would cost its length for every row


@dataclass(frozen=True, eq=False)
class Truth:
    """The examples that predictions must cover, in the order that the pool has or will have."""

    kind: Kind
    labels: list[str]
    """Label values in the order of the outputs; empty for regression."""
    examples: Examples
    row_ids: list[str]
    """The ids (N,) in the order of the rows of predictions that have none: that of the labels file if there is one."""
    source: str
    """What that order is called in a notice."""
    notices: list[str]


def find(
    pool: Path,
    task: str,
    split: str,
    members: Sequence[MemberRecord],
    file: Path | None,
    *,
    kind: Kind | None = None,
    label_names: Sequence[str] = (),
    id_column: str | None = None,
    label_column: str | None = None,
    by_row: bool = False,
) -> Truth:
    """The truth about a split of a task, from the pool's ``members`` and from a ``file`` of labels, or from either.

    ``by_row``: a table of labels without ids numbers its rows from 0, as tasks without an id column do (an array
    always does). ``UserError`` where nothing says it, or where what says it disagrees.
    """
    members = [m for m in members if m.finished] or members  # others are not selected, and may be left over
    kind = _kind(pool / task, task, members, kind)
    if label_names and kind == "regression":
        raise UserError("--label-names has no meaning for regression: its labels are numbers")
    few = len(label_names) != 2 if kind == "binary" else len(label_names) < 2
    if label_names and (few or len(set(label_names)) < len(label_names)):
        expected = "two different names" if kind == "binary" else "two names or more, all different"
        raise UserError(f"--label-names {' '.join(label_names)}: expected {expected}")
    known = _known_labels(pool / task, task, members, label_names)
    in_pool = _in_pool(pool, task, split, members)
    if file is None:
        if in_pool is None:
            raise UserError(
                f"{pool / task}: no {split} examples in this pool yet; give a file of their ids and labels with "
                "--labels FILE"
            )
        return Truth(kind, known or [], in_pool, in_pool.ids.tolist(), "the pool's examples", [])
    column = label_column or (PRESETS[task].label if task in PRESETS else "label")
    source = read_labels(file, id_column=id_column, label_column=column)
    notices = list(source.notices)
    ids = _ids(source, by_row, notices)
    if "labels" not in source.columns and (label_column or split == "dev"):
        shown = f"; columns found: {', '.join(n for n in source.table.found if n)[:300]}" if source.table else ""
        raise UserError(f"{file}: no labels: no column {column!r}{shown}; name it with --label")
    cells = _complete(source)
    if cells is None and split == "dev" and in_pool is None:
        raise UserError(f"{file}: all labels are empty; dev needs them: members are chosen by their dev score")
    if known is None and kind != "regression":
        if cells is None:
            raise UserError(f"{file}: no labels to tell the classes; name them with --label-names")
        known = _distinct(source, cells, kind, label_column or column)
        if kind == "multiclass":
            notices.append(f"{file.name}: the labels are {', '.join(known)}, in this order; --label-names says others")
    values = None if cells is None else _numbers(source, cells, kind, known or [])
    if in_pool is None:
        return Truth(kind, known or [], Examples(np.array(ids), values), ids, file.name, notices)
    _agree(pool / task, split, in_pool, source, ids, values)
    return Truth(kind, known or [], in_pool, ids, file.name, notices)


def _kind(where: Path, task: str, members: Sequence[MemberRecord], kind: Kind | None) -> Kind:
    there = members[0].kind if members else PRESETS[task].kind if task in PRESETS else None
    if kind is None and there is None:
        raise UserError(f"{where}: a new task; say --task-kind multiclass, binary or regression")
    if kind is not None and there is not None and kind != there:
        who = f"its member {members[0].name} is" if members else "the preset is"
        raise UserError(f"{where}: --task-kind {kind}, but {who} {there}; leave it out, or give another --task")
    return kind or there  # type: ignore[return-value]


def _known_labels(
    where: Path, task: str, members: Sequence[MemberRecord], label_names: Sequence[str]
) -> list[str] | None:
    there = members[0].labels if members else PRESETS[task].labels if task in PRESETS else None
    if label_names and there is not None and list(label_names) != there:
        raise UserError(
            f"{where}: --label-names {' '.join(label_names)}, but the task has {' '.join(there)} in this order; leave "
            "it out, or give another --task"
        )
    return list(label_names) or there


def _in_pool(pool: Path, task: str, split: str, members: Sequence[MemberRecord]) -> Examples | None:
    """The split's examples that the members were made on."""
    prints = {m.examples[split]: m.name for m in reversed(members) if split in m.examples}
    if len(prints) > 1:
        raise UserError(
            f"{pool / task}: members {' and '.join(list(prints.values())[:2])} are of different {split} examples; "
            "nothing can be chosen from such a pool; delete the folders of one kind"
        )
    return read_examples(pool, task, split, next(iter(prints))) if prints else None


def _ids(source: Source, by_row: bool, notices: list[str]) -> list[str]:
    if source.ids is None:
        if source.table is not None and not by_row:
            raise UserError(
                f"{source.path}: no column of ids; columns found: {source.found}; name it with --id, or number the "
                "rows with --by-row"
            )
        notices.append(f"{source.path.name}: it has no ids; its rows are numbered from 0")
        return [str(i) for i in range(len(source.rows))]
    _check_ids(source, source.ids)
    return source.ids


def _check_ids(source: Source, ids: Sequence[str]) -> None:
    """``UserError`` for an id that is empty, endless or there twice."""
    seen: dict[str, int] = {}
    for row, name in enumerate(ids):
        if not name or len(name) > _LONGEST_ID or "\0" in name:
            raise UserError(f"{source.at(row)}: the id {name[:40]!r} is empty, endless or has a NUL; mend it")
        if name in seen:
            raise UserError(
                f"{source.at(row)}: id {name!r} is already at {source.at(seen[name])}; each example once"
                + ("" if source.name else "; several models in one file: name their column with --model-column")
            )
        seen[name] = row


def _is_empty(cell: Any) -> bool:
    return cell is None or (cell.strip() == "" if isinstance(cell, str) else bool(cell != cell))


def _distinct(source: Source, cells: Sequence[Any], kind: Kind, column: str) -> list[str]:
    """Class labels found in a file: numbers by value, words by the alphabet, as scikit-learn orders them."""
    found = list(dict.fromkeys(str(c).strip() for c in cells))
    # Words are no numbers: each is its own key.
    numbers = {text if (n := number(text)) != n else n: text for text in reversed(found)}
    if kind == "binary":
        if set(numbers) <= {0.0, 1.0} or {text.lower() for text in found} <= {"false", "true"}:
            return ["0", "1"]
        example = f"--label-names {' '.join(sorted(found)[:2])}, the positive one last"
        if len(found) != 2:
            raise UserError(
                f"{source.path}: column {column!r} has {len(found)} different labels ({', '.join(found[:5])}); "
                f"expected two for a binary task; say --task-kind multiclass, or name two: {example}"
            )
        raise UserError(f"{source.path}: labels {found[0]!r} and {found[1]!r}: which is positive? say {example}")
    if len(numbers) < 2:
        raise UserError(
            f"{source.path}: column {column!r} has one label only ({', '.join(found)}); name all with --label-names"
        )
    values = [n for n in numbers if isinstance(n, float) and math.isfinite(n)]
    if len(values) == len(numbers):
        whole = all(n.is_integer() for n in values)
        return [str(int(n)) if whole else numbers[n] for n in sorted(values)]
    return sorted(found)


def _complete(source: Source) -> Sequence[Any] | None:
    """The cells of the labels; None where there are none at all. ``UserError`` where some rows have none."""
    cells = source.columns.get("labels")
    if cells is None:
        return None
    cells = cells.tolist() if isinstance(cells, np.ndarray) else cells
    empty = [row for row, cell in enumerate(cells) if _is_empty(cell)]
    if empty and len(empty) < len(cells):
        raise UserError(
            f"{source.at(empty[0])}: no label ({len(empty)} of {len(cells)} rows have none); add it, or leave the row "
            "out here and in the predictions"
        )
    return None if empty else cells


def _numbers(source: Source, cells: Sequence[Any], kind: Kind, labels: list[str]) -> np.ndarray:
    """(N,) labels as class numbers or values."""
    if kind != "regression":
        read = class_reader(labels, truth=labels == ["0", "1"])
        found = [read(cell) for cell in cells]
        bad = next((row for row, value in enumerate(found) if value is None), None)
        if bad is not None:
            raise UserError(
                f"{source.at(bad)}: label {cells[bad]!r}; expected one of {', '.join(labels)}; if there are others, "
                "name all with --label-names"
            )
        return np.array(found, np.int64)
    values = np.array([math.nan if isinstance(c, bool) else number(str(c)) for c in cells])
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UserError(f"{source.at(bad)}: label {cells[bad]!r}; expected a finite number")
    return values


def _agree(
    where: Path, split: str, in_pool: Examples, source: Source, ids: Sequence[str], values: np.ndarray | None
) -> None:
    """``UserError`` unless the labels file says of the pool's examples what the pool says, and of no others."""
    way_out = "leave out --labels: the pool has them; or give another --task"
    position = {name: i for i, name in enumerate(in_pool.ids.tolist())}
    extra = [row for row, name in enumerate(ids) if name not in position]
    if extra:
        raise UserError(
            f"{source.at(extra[0])}: id {ids[extra[0]]!r} is not among the {len(position)} {split} examples of {where} "
            f"({len(extra)} such rows); {way_out}"
        )
    if len(ids) < len(position):
        named = set(ids)
        missing = next(name for name in position if name not in named)
        raise UserError(
            f"{source.path}: {len(position) - len(ids)} of the {len(position)} {split} examples of {where} are not in "
            f"it, the first with id {missing!r}; {way_out}"
        )
    if values is not None and in_pool.labels is None:
        raise UserError(f"{source.path}: the {split} examples of {where} have no labels; {way_out}")
    if values is not None and in_pool.labels is not None:
        there = in_pool.labels[[position[name] for name in ids]]
        differ = np.flatnonzero(there != values)
        if len(differ):
            row = int(differ[0])
            raise UserError(
                f"{source.at(row)}: the label of {ids[row]!r} is {values[row]}, but {there[row]} in {where} "
                f"({len(differ)} differ); {way_out}"
            )


def rows_of_examples(source: Source, found: Truth, split: str, *, by_row: bool, notices: list[str]) -> np.ndarray:
    """(N,) for each example, in the pool's order, the row of the source that is of it, by id.

    A source without ids must have as many rows, in the order of ``found.row_ids`` (which a notice says); a table only
    where ``by_row`` says so. ``UserError`` for ids that are missing, too many, there twice or of something else.
    """
    wanted = found.examples.ids.tolist()
    if source.ids is None:
        if source.table is not None and not by_row:
            raise UserError(
                f"{source.path}: no column of ids; columns found: {source.found}; name it with --id, or say --by-row "
                "if its rows are in the order of the labels"
            )
        if len(source.rows) != len(wanted):
            raise UserError(
                f"{source.where}: {len(source.rows)} rows without ids; expected {len(wanted)}, one for each "
                f"{split} example in the order of the labels"
            )
        notices.append(f"{source.where}: no ids; its rows are taken in the order of {found.source}")
        ids = found.row_ids
    else:
        ids = source.ids
        _check_ids(source, ids)
    position = {name: i for i, name in enumerate(wanted)}
    extra = [row for row, name in enumerate(ids) if name not in position]
    if len(extra) == len(ids):
        raise UserError(
            f"{source.where}: none of its ids is one of the {len(wanted)} {split} examples: {ids[0]!r} here, "
            f"{wanted[0]!r} there; is it another split, or another column of ids (--id)?"
        )
    if extra:
        raise UserError(
            f"{source.at(extra[0])}: id {ids[extra[0]]!r} is not one of the {len(wanted)} {split} examples"
            f"{f' ({len(extra)} such rows)' if len(extra) > 1 else ''}; remove it, or give labels that have it"
        )
    rows = np.full(len(wanted), -1)
    rows[[position[name] for name in ids]] = np.arange(len(ids))
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise UserError(
            f"{source.where}: no prediction for {len(missing)} of the {len(wanted)} {split} examples, the "
            f"first with id {wanted[missing[0]]!r}; every example needs one"
        )
    return rows
