"""Reading the pool, checksums compared: a member's record, arrays and weights, or all members of a task."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from lora_ensemble.errors import UserError
from lora_ensemble.pool.contract import (
    EXAMPLES,
    RECORD,
    Examples,
    MemberRecord,
    check_name,
    checksum,
    epochs_file,
    logits_file,
    member_folder,
    read_examples,
)
from lora_ensemble.pool.swap import no_swap
from lora_ensemble.tasks import OOF, Kind, ScoreName, check_task_name, outputs_of


def read_record(pool: Path, task: str, name: str) -> MemberRecord | None:
    """A member's record, or None where there is no such member."""
    check_name(name)
    return next(iter(read_records(pool, task, [name])), None)


def read_records(pool: Path, task: str, names: Sequence[str] | None = None) -> list[MemberRecord]:
    """The records of a task's members, finished or not: all by name, or those of ``names`` that are there, in order."""
    check_task_name(task)
    home = Path(pool) / task
    if not home.is_dir():
        return []
    with no_swap(home):
        if names is None:
            with os.scandir(home) as entries:
                names = sorted(e.name for e in entries if e.name[0] != "." and e.name != EXAMPLES and e.is_dir())
        else:
            names = [name for name in names if (home / name).is_dir()]
        return [MemberRecord.read(Path(home, name, RECORD)) for name in names]


def _check(folder: Path, record: MemberRecord, name: str, found: str | None) -> None:
    """``UserError`` unless ``found``, the checksum of a member's file, None where it is missing, is the record's."""
    recorded = record.files.get(name)
    if recorded is None:
        raise UserError(f"{folder}: this member has no {name}")
    if found == recorded:
        return
    if (folder / RECORD).is_file() and MemberRecord.read(folder / RECORD).files.get(name) != recorded:
        raise UserError(f"{folder}: this member was replaced while it was being read; run the command again")
    if found is None:
        raise UserError(f"{folder}: half-written member: {name} is missing; delete the folder, or copy it again whole")
    raise UserError(
        f"{folder / name}: tampered with, or damaged: found {found[:19]}..., {RECORD} says {recorded[:19]}...; copy "
        "the member again, or train it again"
    )


def read_array(pool: Path, record: MemberRecord, name: str) -> np.ndarray:
    """One of a member's .npy files, memory-mapped, checksum compared, finite (``UserError`` otherwise)."""
    folder = Path(pool, record.task, record.name)
    path = folder / name
    with no_swap(folder.parent):
        try:
            content = _mapped(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            content = None
        # Of the mapping itself, so that the file is opened and read once.
        _check(folder, record, name, None if content is None else checksum(content))
        assert content is not None
        try:
            array = _array(content)
        except Exception as e:  # a damaged header raises several kinds of exception
            raise UserError(f"{path}: not an array file ({e})") from e
    if not np.issubdtype(array.dtype, np.floating) or array.ndim < 2:
        raise UserError(f"{path}: {array.dtype} of shape {array.shape}; expected floats of shape (..., N, C)")
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][-2])
        raise UserError(
            f"{path}: logits are NaN or infinite, first in row {row}; delete this member's folder to go on without it"
        )
    return array


def map_array(path: Path) -> np.ndarray:
    """An array file of the pool, memory-mapped and read-only, without the checks of :func:`read_array`.

    In half the time of ``np.lib.format.open_memmap``, which opens a file twice and follows each folder of its path.
    """
    return _array(_mapped(path))


def _mapped(path: Path) -> mmap.mmap | bytes:
    """A file's bytes, memory-mapped and read-only."""
    with open(path, "rb", buffering=0) as f:
        # A file without bytes cannot be mapped.
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(f.fileno()).st_size else b""


def _array(content: mmap.mmap | bytes) -> np.ndarray:
    """The array in an array file's bytes, in place. Nothing is ever unpickled, unlike by np.load."""
    start = content[:10]
    shape, fortran, dtype, offset = _header(start + content[10 : 10 + int.from_bytes(start[8:10], "little")])
    return np.ndarray.__new__(np.memmap, shape, dtype, content, offset, order="F" if fortran else "C")


@lru_cache(maxsize=64)  # thousands of files have the same, and numpy takes longer to read it than to map the file
def _header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order of the axes, type and where the numbers start, from the start of an array file."""
    f = io.BytesIO(start)
    if np.lib.format.read_magic(f) != (1, 0):
        raise ValueError("a format of numpy's that no plain array needs")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, fortran, dtype, f.tell()


def read_tensors(pool: Path, record: MemberRecord, name: str) -> dict[str, np.ndarray]:
    """One of a member's .safetensors files, checksum compared."""
    from safetensors.numpy import load_file

    folder = Path(pool, record.task, record.name)
    path = folder / name
    with no_swap(folder.parent):
        _check(folder, record, name, checksum(path) if path.is_file() else None)
        return load_file(path)


class TaskPool:
    """The members of one task that can be selected, and what was left out.

    ``split``: whose logits are read; None: dev, or ``oof`` where no member has predicted dev. ``UserError``, naming
    both folders and the first difference, where members have other examples or labels.
    """

    def __init__(self, pool: str | Path, task: str, *, split: str | None = None) -> None:
        check_task_name(task)
        self.pool, self.name = Path(pool), task
        home = self.pool / task
        if not home.is_dir():
            tasks = ", ".join(task_names(self.pool)) or "none"
            raise UserError(f"{self.pool}: no task {task!r} in this pool; tasks found: {tasks}")
        records = read_records(self.pool, task)
        self.members = [r for r in records if r.finished]  # finished members, by name
        self.left_out = {r.name: "diverged" if r.diverged else "not finished" for r in records if not r.finished}
        """Name to reason of members that were not finished, or have no predictions of what is chosen on."""
        if not self.members:
            more = f" ({len(self.left_out)} not finished)" if self.left_out else ""
            raise UserError(f"{home}: no finished member{more}; train some with lora-ensemble fit --pool.dir {pool}")
        there = {of for r in self.members for of in r.examples}
        self.split = split or ("dev" if "dev" in there or OOF not in there else OOF)
        if self.split == OOF and OOF not in there:
            raise UserError(f"{home}: no member has out-of-fold predictions; train some with --data.folds 5")
        if self.split in there & {"dev", OOF}:  # either is what a member is chosen by, and it need not have both
            instead = OOF if self.split == "dev" else "dev"
            lacking = {r.name for r in self.members if self.split not in r.examples and instead in r.examples}
            self.left_out |= dict.fromkeys(sorted(lacking), f"without {self.split} predictions")
            self.members = [r for r in self.members if r.name not in lacking]
        self._by_name = {record.name: record for record in self.members}
        # The split is compared with the first that has it.
        first = next((r for r in self.members if self.split in r.examples), self.members[0])
        for other in self.members:
            if difference := self._difference(first, other):
                both = f"{self._folder(first)} and {self._folder(other)}"
                raise UserError(f"{both} do not belong together: {difference}")
        self.kind: Kind = self.members[0].kind
        self.labels = self.members[0].labels
        trained = [r for r in self.members if r.train_fingerprint] or self.members
        scores = {r.scored_by for r in trained}
        self.scored_by: ScoreName | None = scores.pop() if len(scores) == 1 else None
        """The score by which its members were trained; None where they were by several."""

    def _folder(self, record: MemberRecord) -> Path:
        return member_folder(self.pool, self.name, record.name)

    def _difference(self, one: MemberRecord, other: MemberRecord) -> str:
        """Why two members do not belong together; empty where they do."""
        for key in ("task", "kind", "labels"):
            if (a := getattr(one, key)) != (b := getattr(other, key)):
                return f"{key} is {a!r} in one and {b!r} in the other"
        fingerprints = [r.examples[self.split] for r in (one, other) if self.split in r.examples]
        if len(set(fingerprints)) < 2:
            return ""
        first, second = (read_examples(self.pool, self.name, self.split, f) for f in fingerprints)
        return f"{_first_difference(first, second, self.split)}; they must be of the same data"

    def record(self, name: str) -> MemberRecord:
        """The finished member of that name; ``UserError`` where there is none."""
        if name in self._by_name:
            return self._by_name[name]
        why = self.left_out.get(name, "not there")
        raise UserError(f"{self.pool / self.name}: member {name!r} is {why}; finished members: {len(self.members)}")

    def examples(self) -> Examples:
        """Ids and labels of the split; ``UserError`` where a member has no logits for it."""
        missing = [r.name for r in self.members if self.split not in r.examples]
        if missing:
            raise UserError(
                f"{self._folder(self.record(missing[0]))}: no logits for the {self.split} split"
                f" ({len(missing)} of {len(self.members)} members lack them); run lora-ensemble predict first, or "
                f"dicor import --split {self.split} for one that was imported"
            )
        return self._examples

    @cached_property
    def _examples(self) -> Examples:
        fingerprint = next(r.examples[self.split] for r in self.members if self.split in r.examples)
        examples = read_examples(self.pool, self.name, self.split, fingerprint)
        expected = (len(self.labels),) if self.kind == "multilabel" else ()
        if examples.labels is not None and examples.labels.shape[1:] != expected:
            where, wanted = f"{self.pool / self.name}: {self.split} labels", "0 or 1 for each" if expected else "one"
            raise UserError(f"{where} of shape {examples.labels.shape}; {self.kind} has {wanted}: write them again")
        return examples

    def logits(self, name: str) -> np.ndarray:
        """(N, C) float32 logits of a member on the split, memory-mapped, checked."""
        return self._array(name, logits_file(self.split))

    def epochs(self, name: str) -> np.ndarray | None:
        """(E, N, C) logits of every epoch of a member, memory-mapped, checked; None where they were not kept."""
        file = epochs_file(self.split)
        return self._array(name, file) if file in self.record(name).files else None

    def _array(self, name: str, file: str) -> np.ndarray:
        record, epochs = self.record(name), file == epochs_file(self.split)
        array = read_array(self.pool, record, file)
        n, c = len(self._examples.ids), outputs_of(self.kind, self.labels)
        if array.ndim != 2 + epochs or array.shape[-2:] != (n, c):
            raise UserError(
                f"{self._folder(record) / file}: shape {array.shape}; expected ({'E, ' * epochs}{n}, {c}): "
                f"{'for every epoch ' * epochs}the rows of the examples file by the outputs of the task"
            )
        return array


def _first_difference(a: Examples, b: Examples, split: str) -> str:
    """Where two sets of examples of a split differ, in words."""
    if len(a.ids) != len(b.ids):
        return f"{len(a.ids)} {split} examples against {len(b.ids)}"
    for row in np.flatnonzero(a.ids != b.ids):
        return f"{split} ids differ, first in row {row}: {str(a.ids[row])!r} against {str(b.ids[row])!r}"
    if a.labels is None or b.labels is None:
        return f"one has labels for {split}, the other has none"
    if a.labels.dtype != b.labels.dtype:
        return f"{split} labels are {a.labels.dtype} in one and {b.labels.dtype} in the other"
    row = np.argwhere(a.labels != b.labels)[0][0]
    labels = f"{a.labels[row]} against {b.labels[row]}"
    return f"{split} labels differ, first in row {row} ({str(a.ids[row])!r}): {labels}"


def task_names(pool: str | Path) -> list[str]:
    """Tasks that have a folder in the pool."""
    pool = Path(pool)
    if not pool.is_dir():
        raise UserError(f"{pool}: no such folder; give the folder that training wrote with --pool.dir")
    return sorted(p.name for p in pool.iterdir() if (p / EXAMPLES).is_dir())
