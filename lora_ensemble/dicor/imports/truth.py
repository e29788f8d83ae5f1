"""What imported predictions are of: the task's kind and labels, and the ids and true labels of a split.

All three may be known from the members that are there, from a preset, from the command line and from a file of labels;
where two of them speak they must agree. Axis: N examples of a split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lora_ensemble.dicor.imports.outputs import read_classes
from lora_ensemble.dicor.imports.sources import Source, check_ids, read_source
from lora_ensemble.dicor.options import Request
from lora_ensemble.errors import UserError
from lora_ensemble.pool import Examples, MemberRecord, examples_fingerprint, read_examples
from lora_ensemble.tasks import PRESETS, Kind, Task
from lora_ensemble.text.cells import number, sets_reader


@dataclass(frozen=True, eq=False)
class Truth:
    """The examples that predictions must cover, in the order that the pool has or will have."""

    task: Task  # its kind and its labels; of its files nothing is known
    examples: Examples
    row_ids: list[str]
    """The ids (N,) in the order of the rows of predictions that have none: that of the labels file if there is one."""
    source: str  # what that order is called in a notice
    notices: list[str]  # what is to be known of the labels file

    @cached_property
    def fingerprint(self) -> str:
        return examples_fingerprint(self.examples.ids, self.examples.labels, self.examples.groups)


def find_truth(request: Request, members: Sequence[MemberRecord]) -> Truth:
    """The truth about a split, from ``members``, a file of labels or both; ``UserError`` where they differ."""
    members = [m for m in members if m.finished] or list(members)  # others are not selected, and may be left over
    kind, labels = _known(request, members)
    in_pool = _in_pool(request, members)
    if request.labels is None:
        if in_pool is None:
            raise UserError(
                f"{request.pool / request.task}: no {request.split} examples in this pool yet; give a file of their "
                "ids and labels with --labels FILE"
            )
        return Truth(_task(request, kind, labels, members), in_pool, in_pool.ids.tolist(), "the pool's examples", [])
    source, columns = read_source(request.labels, request), request.label_columns
    if source.table is None:
        columns = [next((name for name in ("", *columns) if name in source.columns), "labels")]
    cells = _label_cells(source, columns, request, kind)
    if cells is None and request.split != "test" and in_pool is None:
        raise UserError(f"{source.path}: all labels are empty; {request.split} needs them: members are chosen by it")
    if not source.ids:
        source.notices.append(f"{source.path.name}: it has no ids; its rows are numbered from 0")
        source = replace(source, ids=[str(i) for i in range(len(source))])
    if kind == "multilabel":
        labels = labels or (columns if len(columns) > 1 else None)
        if labels is None:
            raise UserError(f"{source.path}: which labels are there, in which order? name all with --label-names")
    elif labels is None and kind != "regression":
        labels = _labels_of(source, columns[0], cells, kind)
    task = _task(request, kind, labels, members)
    values = None if cells is None else _values(source, columns, task)
    if in_pool is not None:
        _check_against(in_pool, request, source, values)
    examples = Examples(np.array(source.ids), values, _groups(source, request)) if in_pool is None else in_pool
    return Truth(task, examples, source.ids, source.path.name, source.notices)


def _groups(source: Source, request: Request) -> np.ndarray | None:
    """(N,) unicode, of the labels file."""
    if request.group is None:
        return None
    if request.group not in source.columns:
        raise UserError(f"{source.path}: no column {request.group!r}; {source.shown}; name that of groups with --group")
    cells = source.columns[request.group]
    empty = [cell is None or cell != cell or not str(cell).strip() for cell in cells]
    source.refuse(empty, lambda _: "no group; give it the name of one, its own if it has none")
    return np.array([str(cell).strip() for cell in cells])


def _task(request: Request, kind: Kind, labels: list[str] | None, members: Sequence[MemberRecord]) -> Task:
    score = members[0].scored_by if members else None
    several = list(request.label) if len(request.label) > 1 else "label"
    how: dict[str, Any] = {"label": several, "label_separator": request.label_separator}
    return Task(name=request.task, kind=kind, text=["text"], label_names=labels or [], score=score, **how)


def _known(request: Request, members: Sequence[MemberRecord]) -> tuple[Kind, list[str] | None]:
    """The task's kind and, where they are known without a file of labels, its labels."""
    where, names = request.pool / request.task, list(request.label_names)
    known = members[0] if members else PRESETS.get(request.task)
    kind = request.task_kind or (known.kind if known else None)
    if kind is None:
        raise UserError(f"{where}: a new task; say --task-kind multiclass, binary, multilabel or regression")
    if known is not None and kind != known.kind:
        who = f"its member {known.name} is" if members else "the preset is"
        raise UserError(f"{where}: --task-kind {kind}, but {who} {known.kind}; leave it out, or give another --task")
    if names and kind == "regression":
        raise UserError("--label-names has no meaning for regression: its labels are numbers")
    if names and (len(set(names)) < max(2, len(names)) or (kind == "binary" and len(names) > 2)):
        expected = "two different names" if kind == "binary" else "two names or more, all different"
        raise UserError(f"--label-names {' '.join(names)}: expected {expected}")
    if names and known is not None and names != known.labels:
        raise UserError(
            f"{where}: --label-names {' '.join(names)}, but the task has {' '.join(known.labels)} in this order; leave "
            "it out, or give another --task"
        )
    return kind, names or (known.labels if known else None)


def _in_pool(request: Request, members: Sequence[MemberRecord]) -> Examples | None:
    """The split's examples that the members were made on."""
    fingerprints = {m.examples[request.split]: m.name for m in reversed(members) if request.split in m.examples}
    if len(fingerprints) > 1:
        raise UserError(
            f"{request.pool / request.task}: members {' and '.join(list(fingerprints.values())[:2])} are of different "
            f"{request.split} examples; nothing can be chosen from such a pool; delete the folders of one kind"
        )
    return read_examples(request.pool, request.task, request.split, *fingerprints) if fingerprints else None


def _label_cells(source: Source, columns: list[str], request: Request, kind: Kind) -> list[Any] | None:
    """The true labels in a file as they stand, of several columns those of the first; None where there are none.

    ``UserError`` where they must be, or some.
    """
    if source.table is None and not source.ids and columns[0]:
        raise UserError(f"{source.path}: no array 'ids'; {source.shown}; save ids and labels in it")
    check_ids(source, request)
    if lacking := [column for column in columns if column not in source.columns]:
        if request.label or request.split != "test":
            raise UserError(f"{source.path}: no labels: no column {lacking[0]!r}; {source.shown}; name it with --label")
        return None
    cells = source.columns[columns[0]]
    lists = [kind != "multilabel" and isinstance(cell, list) for cell in cells]
    source.refuse(lists, lambda row: f"{source.cell(columns[0], cells[row])}; expected one label")
    rows = zip(*(source.columns[column] for column in columns), strict=True)
    empty = [any(cell is None or cell != cell or not str(cell).strip() for cell in row) for row in rows]
    if all(empty):
        return None
    if kind != "multilabel" or len(columns) > 1:  # where a cell names several labels, an empty one names none
        advice = "add it, or leave the row out here and in the predictions"
        source.refuse(empty, lambda _: f"no label ({sum(empty)} of {len(cells)} rows have none); {advice}")
    return cells


def _labels_of(source: Source, column: str, cells: list[Any] | None, kind: Kind) -> list[str]:
    """Class labels that a file has: numbers by value, words by the alphabet, as scikit-learn orders them."""
    if cells is None:
        raise UserError(f"{source.path}: no labels to tell the classes; name them with --label-names")
    texts = list(dict.fromkeys(str(cell).strip() for cell in cells))
    # Of 1 and 1.0, the first counts. A word is no number, and so its own key.
    by_value = {text if math.isnan(n := number(text)) else n: text for text in reversed(texts)}
    if kind == "binary":
        if set(by_value) <= {0.0, 1.0} or {text.lower() for text in texts} <= {"false", "true"}:
            return ["0", "1"]
        example = f"--label-names {' '.join(sorted(texts)[:2])}, the positive one last"
        if len(texts) == 2:
            raise UserError(f"{source.path}: labels {texts[0]!r} and {texts[1]!r}: which is positive? say {example}")
        raise UserError(
            f"{source.path}: column {column!r} has {len(texts)} different labels ({', '.join(texts[:5])}); expected "
            f"two for a binary task; say --task-kind multiclass, or name two: {example}"
        )
    if len(by_value) < 2:
        only = ", ".join(texts)
        raise UserError(f"{source.path}: column {column!r} has one label only ({only}); name all with --label-names")
    values = sorted(n for n in by_value if isinstance(n, float) and math.isfinite(n))
    whole = all(n.is_integer() for n in values)
    labels = [str(int(n)) if whole else by_value[n] for n in values] if len(values) == len(by_value) else sorted(texts)
    order = f"the labels are {', '.join(labels)}, in this order"
    source.notices.append(f"{source.path.name}: {order}; --label-names says others")
    return labels


def _values(source: Source, columns: list[str], task: Task) -> np.ndarray:
    """(N,) labels as class numbers or values, or (N, L) of 0 and 1."""
    if task.kind == "multilabel":
        rows = list(zip(*(source.columns[column] for column in columns), strict=True))
        if source.table is None:  # (N, L) numbers
            rows, columns = source.columns[columns[0]], task.labels
        read = sets_reader(task.labels, columns, task.label_separator)
        found = [read(row) for row in rows]
        source.refuse([isinstance(one, str) for one in found], lambda row: str(found[row]))
        return np.array(found, np.int64)
    (column,) = columns
    if task.kind != "regression":
        return read_classes(source, column, task)
    cells = source.columns[column]
    values = np.array([math.nan if isinstance(cell, bool) else number(str(cell)) for cell in cells])
    source.refuse(~np.isfinite(values), lambda row: f"label {cells[row]!r}; expected a finite number")
    return values


def _check_against(in_pool: Examples, request: Request, source: Source, values: np.ndarray | None) -> None:
    """``UserError`` unless the labels file says of the pool's examples what the pool says, and of no others."""
    where, way_out = request.pool / request.task, "leave out --labels: the pool has them; or give another --task"
    rows = _rows_of(in_pool, source, f"{request.split} examples of {where}", extra=way_out, missing=way_out)
    if values is None:
        return
    if in_pool.labels is None:
        raise UserError(f"{source.path}: the {request.split} examples of {where} have no labels; {way_out}")
    there = np.empty_like(in_pool.labels)
    there[rows] = in_pool.labels
    source.refuse(
        (there != values).reshape(len(values), -1).any(axis=1),
        lambda row: f"the label of {source.ids[row]!r} is {values[row]}, but {there[row]} in {where}; {way_out}",
    )


def rows_of_examples(source: Source, truth: Truth, request: Request) -> np.ndarray:
    """(N,) for each example, in the pool's order, the row of the source that is of it, by id.

    A source without ids must have as many rows, in the order of ``truth.row_ids`` (which a notice says). ``UserError``
    for ids that are missing, or of something else.
    """
    what, n = f"{request.split} examples", len(truth.row_ids)
    if not source.ids:
        if len(source) != n:
            expected = f"{n}, one for each of the {what} in the order of the labels"
            raise UserError(f"{source.where}: {len(source)} rows without ids; expected {expected}")
        source.notices.append(f"{source.where}: no ids; its rows are taken in the order of {truth.source}")
        source = replace(source, ids=truth.row_ids)
    extra, missing = "remove it, or give labels that have it", "every example needs one"
    return _rows_of(truth.examples, source, what, extra=extra, missing=missing)


def _rows_of(examples: Examples, source: Source, what: str, *, extra: str, missing: str) -> np.ndarray:
    """(N,) where each example is in the source; ``extra``, ``missing``: what to do with ids too many or too few."""
    ids, wanted = source.ids, examples.ids.tolist()
    known, row_of = set(wanted), {name: row for row, name in enumerate(ids)}
    what = f"the {len(wanted)} {what}"
    if known.isdisjoint(ids):
        raise UserError(
            f"{source.where}: none of its ids is one of {what}: {ids[0]!r} here, {wanted[0]!r} there; is it another "
            "split, or another column of ids (--id)?"
        )
    source.refuse([name not in known for name in ids], lambda row: f"id {ids[row]!r} is not one of {what}; {extra}")
    if lacking := [name for name in wanted if name not in row_of]:
        first = f"the first with id {lacking[0]!r}"
        raise UserError(f"{source.where}: no row for {len(lacking)} of {what}, {first}; {missing}")
    return np.array([row_of[name] for name in wanted])
