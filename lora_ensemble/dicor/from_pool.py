"""A task's members from the pool, opened one at a time.

Axes: M members, N examples of a split, C outputs of a head, E epochs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_ensemble import pool
from lora_ensemble.dicor.members import Dev
from lora_ensemble.errors import UserError
from lora_ensemble.scores import one_label

SMALL = 32_000_000


class Files:
    """The logits (N, C) of each member of a pool, opened when they are asked for, the first time with all checks.

    What is kept open counts as resident memory, which for ten thousand members would be a copy of all logits. The first
    ``SMALL`` bytes are kept all the same: opening costs time.
    """

    def __init__(self, task_pool: pool.TaskPool) -> None:
        self._pool, self._room = task_pool, SMALL
        self._checked: set[int] = set()
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._pool.members)

    def __getitem__(self, index: int, /) -> np.ndarray:
        if index in self._kept:
            return self._kept[index]
        name = self._pool.members[index].name
        if index in self._checked:
            folder = pool.member_folder(self._pool.pool, self._pool.name, name)
            return np.asarray(pool.map_array(folder / pool.logits_file(self._pool.split)))
        logits = self._pool.logits(name)
        self._checked.add(index)
        if self._room >= logits.nbytes:
            self._room -= logits.nbytes
            self._kept[index] = logits = np.array(logits)
        return logits


def dev_of(task_pool: pool.TaskPool) -> Dev:
    """The members of a pool on its dev examples; ``UserError`` where these have no labels, and as ``TaskPool``."""
    examples, records = task_pool.examples(), task_pool.members
    if examples.labels is None:
        where = task_pool.pool / task_pool.name
        raise UserError(f"{where}: the dev examples have no labels, so there is no score to choose by")
    file = pool.logits_file(task_pool.split)
    dev = Dev.of(
        Files(task_pool),
        examples.labels,
        kind=task_pool.kind,
        names=[r.name for r in records],
        ranks=[r.rank for r in records],
        ids=examples.ids,
        epochs=[task_pool.epochs(r.name) for r in records],
        fingerprints=[r.files.get(file, r.name) for r in records],
    )
    notices = [*dev.notices, *one_label(examples.labels, task_pool.labels, "dev labels")]
    if students := sum(pool.DISTILLED in r.settings for r in records):
        who, whose = ("1 member was", "its") if students == 1 else (f"{students} members were", "their")
        what = "distilled from an ensemble that was chosen on dev"
        notices.append(f"{who} {what}: {whose} scores flatter a little, honest ones too")
    return replace(dev, notices=notices)
