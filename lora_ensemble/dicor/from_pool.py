"""A task's members from the pool, opened one at a time.

Axes: M members, N examples of a split, C outputs of a head, E epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from lora_ensemble.dicor.members import Dev
from lora_ensemble.errors import UserError
from lora_ensemble.pool import DISTILLED, EPOCHS, TaskPool, logits_file, map_array, member_folder, read_array
from lora_ensemble.scores import one_label

SMALL = 32_000_000


class Files(Sequence[np.ndarray]):
    """The logits (N, C) of each member of a pool, opened when they are asked for and let go afterwards.

    A file is checked (``TaskPool.logits``) the first time. What is kept open counts as resident memory, which for ten
    thousand members would be a copy of all logits. The first ``SMALL`` bytes are kept all the same: opening costs time.
    """

    def __init__(self, task_pool: TaskPool) -> None:
        self._pool, self._names = task_pool, [r.name for r in task_pool.members]
        self._checked = [False] * len(self._names)
        self._kept: dict[int, np.ndarray] = {}
        self._room = SMALL

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index in self._kept:
            return self._kept[index]
        if not self._checked[index]:
            logits = self._pool.logits(self._names[index])
            self._checked[index] = True
            if self._room >= logits.nbytes:
                self._room -= logits.nbytes
                self._kept[index] = logits = np.array(logits)
            return logits
        folder = member_folder(self._pool.pool, self._pool.name, self._names[index])
        return np.asarray(map_array(folder / logits_file(self._pool.split)))


def dev_of(task_pool: TaskPool) -> Dev:
    """The members of a pool on its dev examples, with the logits of every epoch where they were kept.

    Raises ``UserError`` where the dev examples have no labels, and as ``TaskPool`` does.
    """
    examples = task_pool.examples()
    if examples.labels is None:
        where = task_pool.pool / task_pool.name
        raise UserError(f"{where}: the dev examples have no labels, so there is no score to choose by")
    records = task_pool.members
    file = logits_file(task_pool.split)
    dev = Dev.of(
        Files(task_pool),
        examples.labels,
        kind=task_pool.kind,
        names=[r.name for r in records],
        ranks=[r.rank for r in records],
        ids=examples.ids,
        epochs=[_epochs(task_pool, i) for i in range(len(records))],
        fingerprints=[r.files.get(file, r.name) for r in records],
    )
    notices = [*dev.notices, *one_label(examples.labels, task_pool.labels, "dev labels")]
    students = sum(DISTILLED in r.settings for r in records)
    if not students:
        return replace(dev, notices=notices)
    who, whose = ("1 member was", "its") if students == 1 else (f"{students} members were", "their")
    said = f"{who} distilled from an ensemble that was chosen on dev: {whose} scores flatter a little, honest ones too"
    return replace(dev, notices=[*notices, said])


def _epochs(task_pool: TaskPool, i: int) -> np.ndarray | None:
    """(E, N, C) of a member, or None where it has none; ``UserError`` where they are of another shape."""
    record = task_pool.members[i]
    if EPOCHS not in record.files:
        return None
    each = read_array(task_pool.pool, record, EPOCHS)
    n = len(task_pool.examples().ids)
    outputs = len(task_pool.labels) if task_pool.kind == "multiclass" else 1
    if each.shape[1:] != (n, outputs):
        path = member_folder(task_pool.pool, task_pool.name, record.name) / EPOCHS
        raise UserError(f"{path}: shape {each.shape}; expected (E, {n}, {outputs}): the logits of every epoch")
    return each
