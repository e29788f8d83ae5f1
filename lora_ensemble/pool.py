"""The pool: the folder that training writes and that everything after reads. The contract is in checkpoints/README.md.

    <pool>/<task>/examples/<split>-<fingerprint>.npz   ids and, where known, labels; once per split
    <pool>/<task>/<member>/                            weights, logits and, written last, member.json

Only numpy and safetensors are imported here, and nothing is ever pickled. Every file name of the pool lives in this
module. Axes: N examples of a split, C outputs of a head, E epochs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import time
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Kind

SCHEMA = 1
RECORD = "member.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
FULL_CONFIG = "config.json"
FULL = "model.safetensors"
EPOCHS = "dev.epochs.npy"
EXAMPLES = "examples"
_NEW, _OLD, _LOCK = ".new.", ".old.", ".lock"


def logits_file(split: str) -> str:
    """File name of a split's logits (N, C) float32 inside a member's folder."""
    return f"{split}.logits.npy"


@dataclass(kw_only=True)
class MemberRecord:
    """What ``member.json`` says. Unknown things are None: a member made elsewhere may have no rank."""

    name: str
    task: str
    kind: Kind
    labels: list[str] = field(default_factory=list)
    """Label values in the order of the outputs; empty for regression."""
    finished: bool = False
    """Whole is not finished: a member is written at every improvement, and selected only once finished."""
    diverged: bool = False
    """True when training gave NaN or infinity; the member is then never finished."""
    score: float | None = None
    """The task's score on dev at the best epoch."""
    best_epoch: int | None = None
    """Counted from 1."""
    epochs_done: int | None = None
    epoch_scores: list[float | None] = field(default_factory=list)
    """The dev score of every epoch; None where it is undefined."""
    examples: dict[str, str] = field(default_factory=dict)
    """Split name to fingerprint of the examples its logits belong to."""
    train_fingerprint: str | None = None
    """Fingerprint of the training examples (ids, texts and labels)."""
    base_model: str | None = None
    """Hub id or the path as the user gave it; never a path inside site-packages."""
    revision: str | None = None
    finetune: str | None = None
    rank: int | None = None
    scaling: float | None = None
    targets: str | None = None
    lr: float | None = None
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Whatever else decides the result of training: epochs, batch size, schedule, precision, ..."""
    run: str | None = None
    """The run that made it; it ties the folders of one member in several tasks."""
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """File name to "sha256:<hex>" of every other file in the folder; a file not listed does not count."""

    def to_json(self) -> str:
        """JSON text, keys in the order of the fields."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> MemberRecord:
        """Read ``member.json``; ``UserError`` where it is missing, not JSON, of another schema or lacks a key."""
        if not path.is_file():
            raise UserError(
                f"{path.parent}: half-written member: {RECORD} is missing; delete the folder, or copy it again whole"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            schema = raw.pop("schema")
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{path}: not a member record ({type(e).__name__}: {e}); expected JSON and a schema") from e
        if schema != SCHEMA:
            raise UserError(f"{path}: schema {schema!r}; this version reads schema {SCHEMA}")
        try:
            record = cls(**raw)
        except TypeError as e:
            raise UserError(f"{path}: {str(e).removeprefix('MemberRecord.__init__() ')}") from e
        for key, hint in _record_types().items():
            if not _fits(getattr(record, key), hint):
                expected = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
                raise UserError(f"{path}: {key} is {getattr(record, key)!r}; expected {expected}")
        if any("/" in name or "\\" in name for name in record.files):
            raise UserError(f"{path}: files holds a path; expected names of files in the same folder")
        if record.name != path.parent.name.removeprefix(_NEW).removeprefix(_OLD):
            raise UserError(f"{path}: name is {record.name!r}, but the folder is {path.parent.name!r}")
        if record.task != path.parent.parent.name:
            raise UserError(f"{path}: task is {record.task!r}, but the folder is {path.parent.parent.name!r}")
        return record


@cache
def _record_types() -> dict[str, Any]:
    """What type each key of a record has; worked out once, not for each of thousands of members."""
    return typing.get_type_hints(MemberRecord)


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(hint), typing.get_args(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of a JSON file is what a field's type says; a whole number is a float too."""
    origin, args = _parts(hint)
    if origin is typing.Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, args[1]) for v in value.values())
    if args:
        return any(_fits(value, a) for a in args)
    if hint is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return hint is Any or type(value) is hint


@dataclass(frozen=True)
class Examples:
    """The examples of a split: ids (N,) unicode, labels (N,) int64 or float64, or None where unknown."""

    ids: np.ndarray
    labels: np.ndarray | None


def fingerprint(ids: np.ndarray, labels: np.ndarray | None) -> str:
    """16 hex digits over ids and labels in their order."""
    digest = hashlib.sha256("\0".join(ids.tolist()).encode())
    if labels is not None:
        digest.update(b"\1")
        digest.update(np.ascontiguousarray(labels, _label_type(labels)).tobytes())
    return digest.hexdigest()[:16]


def _label_type(labels: np.ndarray) -> str:
    return "<f8" if np.issubdtype(labels.dtype, np.floating) else "<i8"


def write_examples(pool: Path, task: str, split: str, ids: ArrayLike, labels: ArrayLike | None) -> str:
    """Write a split's examples once; returns their fingerprint.

    ``ids`` (N,), ``labels`` (N,) numbers (classes count from 0) or None. ``UserError`` where ids are not unique, a
    label is no finite number, or the lengths differ.
    """
    where = f"{task} {split} examples"
    arrays = {"ids": np.asarray(ids, dtype=np.str_)}
    _check_ids(arrays["ids"], where)
    if labels is not None:
        arrays["labels"] = np.asarray(labels)
        _check_labels(arrays["labels"], arrays["ids"], where)
        arrays["labels"] = arrays["labels"].astype(_label_type(arrays["labels"]))
    print_ = fingerprint(arrays["ids"], arrays.get("labels"))
    path = Path(pool) / task / EXAMPLES / f"{split}-{print_}.npz"
    if path.exists():
        return print_
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.{os.getpid()}"
    with open(beside, "wb") as f:
        np.savez_compressed(f, allow_pickle=False, **arrays)
    os.replace(beside, path)
    return print_


def _check_ids(ids: np.ndarray, where: str) -> None:
    if ids.ndim != 1:
        raise UserError(f"{where}: ids of shape {ids.shape}; expected (N,)")
    if len(set(ids.tolist())) < len(ids):
        first: dict[str, int] = {}
        i = next(i for i, x in enumerate(ids.tolist()) if first.setdefault(x, i) != i)
        raise UserError(f"{where}: id {str(ids[i])!r} is there twice, in rows {first[ids[i]]} and {i}")


def _check_labels(labels: np.ndarray, ids: np.ndarray, where: str) -> None:
    if labels.shape != ids.shape:
        raise UserError(f"{where}: {len(ids)} ids, but labels of shape {labels.shape}; expected one for each")
    if labels.dtype.kind not in "biuf":
        raise UserError(f"{where}: labels are {labels.dtype}; expected numbers (classes count from 0)")
    if not np.isfinite(labels).all():
        row = int(np.flatnonzero(~np.isfinite(labels))[0])
        raise UserError(f"{where}: the label is {labels[row]} in row {row}; expected a finite number")


def read_examples(pool: Path, task: str, split: str, print_: str) -> Examples:
    """Read a split's examples; ``UserError`` where they are missing or are not those of the fingerprint."""
    path = Path(pool) / task / EXAMPLES / f"{split}-{print_}.npz"
    if not path.is_file():
        raise UserError(f"{path}: missing, though members of this pool refer to it; copy it back, or train again")
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as data:
            ids, labels = data["ids"], data.get("labels")
        found = fingerprint(ids, labels)
    except Exception as e:  # a damaged zip raises many kinds of exception
        raise UserError(f"{path}: cannot be read ({type(e).__name__}: {e}); copy it again") from e
    if found != print_:
        raise UserError(f"{path}: its content is not what its name says (tampered with, or damaged); copy it again")
    return Examples(ids, labels)


def member_folder(pool: Path, task: str, name: str) -> Path:
    """Where a member lives."""
    return Path(pool) / task / name


def check_name(name: str) -> None:
    """``UserError`` unless ``name`` can be the name of a member's folder."""
    good = name and name[0] not in "._" and name != EXAMPLES and all(c.isalnum() or c in "-_.+" for c in name)
    # File systems end at 255 bytes.
    if not good or len(name.encode()) > 150:
        raise UserError(
            f"member name {name!r}: expected up to 150 bytes of letters, digits, '-', '_', '.' or '+', not starting "
            f"with '.' or '_', and not {EXAMPLES!r}"
        )


@contextlib.contextmanager
def _locked(home: Path, mode: str = "a") -> Iterator[None]:
    """One process at a time swaps folders in a task's folder, or reads there. Not to be entered twice."""
    with open(home / _LOCK, mode) as f:
        try:
            import fcntl
        except ImportError:  # Windows: one writer only, as the CLI has it
            yield
            return
        fcntl.flock(f, fcntl.LOCK_EX)
        yield  # closing the file lets the lock go


@contextlib.contextmanager
def _reading(home: Path) -> Iterator[None]:
    """Nobody swaps folders meanwhile, and what a kill left behind is put right first."""
    with contextlib.ExitStack() as stack:
        # A pool that cannot be written (somebody else's, mounted read-only) is read as it is. One without a lock was
        # never written here, and reading makes no file.
        with contextlib.suppress(OSError):
            try:
                stack.enter_context(_locked(home, "r+"))
            except OSError:
                stack.enter_context(_locked(home, "r"))
            _mend_once(home)
        yield


_mended: dict[Path, int] = {}


def _mend_once(home: Path) -> None:
    """``_mend``, unless nothing was renamed here since it last was; call it with the lock held.

    Looking for what is left lists the whole folder, which for each of ten thousand members takes minutes.
    """
    changed = home.stat().st_mtime_ns
    if _mended.get(home) != changed:
        _mend(home)
        changed = home.stat().st_mtime_ns
        # A folder's clock is coarse: of a change just now, another may have the same time.
        if time.time_ns() - changed > 2_000_000_000:
            _mended[home] = changed


def _write_file(path: Path, content: Any) -> None:
    if path.suffix == ".npy":
        np.save(path, content, allow_pickle=False)
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save

        # "pt" is what transformers and PEFT insist on reading. safetensors' save_file makes files for the owner's eyes
        # only, whatever the umask is.
        path.write_bytes(save({k: np.ascontiguousarray(v) for k, v in content.items()}, metadata={"format": "pt"}))
    else:
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def checksum(path: Path) -> str:
    """ "sha256:<hex>" of a file."""
    with open(path, "rb") as f:
        return "sha256:" + hashlib.file_digest(f, "sha256").hexdigest()


def write_member(
    pool: Path, record: MemberRecord, files: Mapping[str, Any], *, keep: MemberRecord | None = None
) -> MemberRecord:
    """Write a member or replace it, so that a reader never sees half of it. Returns the record with its checksums.

    ``files``: file name to content: an array (.npy), a dict of arrays (.safetensors) or a dict (.json).
    ``keep``: the record now on disk, whose other files are taken over as they are; ``UserError`` where it is another.
    """
    check_name(record.name)
    home = Path(pool) / record.task
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home):
        _mend(home)
        folder, beside, aside = home / record.name, home / (_NEW + record.name), home / (_OLD + record.name)
        if keep and not (folder.is_dir() and MemberRecord.read(folder / RECORD).files == keep.files):
            raise UserError(
                f"{folder}: replaced or deleted by another process meanwhile; let one run write it at a time"
            )
        beside.mkdir()
        checksums = {}
        for name in sorted(set(keep.files if keep else ()) - set(files)):
            _link(folder / name, beside / name)
            checksums[name] = keep.files[name]  # type: ignore[union-attr]
        for name, content in files.items():
            _write_file(beside / name, content)
            checksums[name] = checksum(beside / name)
        record = dataclasses.replace(record, files=checksums)
        (beside / RECORD).write_text(record.to_json(), encoding="utf-8")
        if folder.exists():
            os.rename(folder, aside)  # a folder cannot be renamed onto one that is not empty
        os.rename(beside, folder)
        shutil.rmtree(aside, ignore_errors=True)
    return record


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copy2(source, target)


def _mend(home: Path) -> None:
    """Put right what a kill left behind; call it with the lock held."""
    for left in sorted(home.glob(_NEW + "*")) + sorted(home.glob(_OLD + "*")):
        folder = home / left.name.removeprefix(_NEW).removeprefix(_OLD)
        # member.json is written last: a folder that has it is whole. The new one comes first.
        if not folder.exists() and _is_whole(left):
            os.rename(left, folder)
        else:
            shutil.rmtree(left)


def _is_whole(folder: Path) -> bool:
    try:
        record = MemberRecord.read(folder / RECORD)
    except UserError:  # the kill came while member.json was being written
        return False
    return all((folder / name).is_file() for name in record.files)


def read_record(pool: Path, task: str, name: str) -> MemberRecord | None:
    """A member's record, or None where there is no such member."""
    home = Path(pool) / task
    with _reading(home):
        return MemberRecord.read(home / name / RECORD) if (home / name).is_dir() else None


def _checked_file(pool: Path, record: MemberRecord, name: str) -> Path:
    """Path of one of a member's files, its checksum compared; call it while reading.

    ``UserError`` where it is missing or another.
    """
    folder = member_folder(pool, record.task, record.name)
    if name not in record.files:
        raise UserError(f"{folder}: this member has no {name}")
    found = checksum(folder / name) if (folder / name).is_file() else None
    if found == record.files[name]:
        return folder / name
    if (folder / RECORD).is_file() and MemberRecord.read(folder / RECORD).files.get(name) != record.files[name]:
        raise UserError(f"{folder}: this member was replaced while it was being read; run the command again")
    if found is None:
        raise UserError(f"{folder}: half-written member: {name} is missing; delete the folder, or copy it again whole")
    raise UserError(
        f"{folder / name}: tampered with, or damaged: found {found[:19]}..., {RECORD} says "
        f"{record.files[name][:19]}...; copy the member again, or train it again"
    )


def read_array(pool: Path, record: MemberRecord, name: str) -> np.ndarray:
    """One of a member's .npy files, memory-mapped, checksum compared, finite (``UserError`` otherwise)."""
    with _reading(Path(pool) / record.task):
        path = _checked_file(pool, record, name)
        try:
            array = _mapped(path)
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


def _mapped(path: Path) -> np.ndarray:
    """An array file, memory-mapped and read-only. Nothing is ever unpickled, unlike by np.load.

    As ``np.lib.format.open_memmap``, which opens a file twice and follows each folder of its path: twice the time.
    """
    with open(path, "rb") as f:
        start = f.read(10)
        shape, fortran, dtype, offset = _header(start + f.read(int.from_bytes(start[8:10], "little")))
        return np.memmap(f, dtype, "r", offset, shape, "F" if fortran else "C")


@lru_cache(maxsize=64)
def _header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order of the axes, type and where the numbers start, from the start of an array file.

    Thousands of members' files have the same, and numpy takes longer to read it than to map the file.
    """
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

    with _reading(Path(pool) / record.task):
        return load_file(_checked_file(pool, record, name))


class TaskPool:
    """The members of one task that can be selected, and what was left out.

    Everything that would make a selection meaningless is refused when it is opened: members of other examples,
    another order of labels or another schema (``UserError`` naming both folders and the first difference).
    """

    def __init__(self, pool: str | Path, task: str, *, split: str = "dev") -> None:
        self.pool, self.name, self.split = Path(pool), task, split
        home = self.pool / task
        if not home.is_dir():
            found = ", ".join(task_names(self.pool)) or "none"
            raise UserError(f"{self.pool}: no task {task!r} in this pool; tasks found: {found}")
        with _reading(home):
            folders = sorted(p for p in home.iterdir() if p.is_dir() and p.name[0] != "." and p.name != EXAMPLES)
            records = [MemberRecord.read(folder / RECORD) for folder in folders]
        self.members: list[MemberRecord] = []
        """Finished members, by name."""
        self.left_out: dict[str, str] = {}
        """Name to reason of members that were not finished."""
        for record in records:
            if record.finished:
                self.members.append(record)
            else:
                self.left_out[record.name] = "diverged" if record.diverged else "not finished"
        if not self.members:
            more = f" ({len(self.left_out)} not finished)" if self.left_out else ""
            raise UserError(f"{home}: no finished member{more}; train some with lora-ensemble fit --pool.dir {pool}")
        self._by_name = {record.name: record for record in self.members}
        self._agree()
        self.kind: Kind = self.members[0].kind
        self.labels = self.members[0].labels

    def _folder(self, record: MemberRecord) -> Path:
        return member_folder(self.pool, self.name, record.name)

    def _agree(self) -> None:
        # The split is compared with the first that has it.
        first = next((r for r in self.members if self.split in r.examples), self.members[0])
        for other in self.members:
            both = f"{self._folder(first)} and {self._folder(other)} do not belong together"
            for key in ("task", "kind", "labels"):
                a, b = getattr(first, key), getattr(other, key)
                if a != b:
                    raise UserError(f"{both}: {key} is {a!r} in one and {b!r} in the other")
            a, b = first.examples.get(self.split), other.examples.get(self.split)
            if a != b and a is not None and b is not None:
                raise UserError(f"{both}: {self._first_difference(a, b)}; they must be of the same data")

    def _first_difference(self, a: str, b: str) -> str:
        one, two = (read_examples(self.pool, self.name, self.split, x) for x in (a, b))
        if len(one.ids) != len(two.ids):
            return f"{len(one.ids)} {self.split} examples against {len(two.ids)}"
        differ = np.flatnonzero(one.ids != two.ids)
        if len(differ):
            i = differ[0]
            return f"{self.split} ids differ, first in row {i}: {str(one.ids[i])!r} against {str(two.ids[i])!r}"
        if one.labels is None or two.labels is None:
            return f"one has labels for {self.split}, the other has none"
        if one.labels.dtype != two.labels.dtype:
            return f"{self.split} labels are {one.labels.dtype} in one and {two.labels.dtype} in the other"
        i = np.flatnonzero(one.labels != two.labels)[0]
        both = f"{one.labels[i]} against {two.labels[i]}"
        return f"{self.split} labels differ, first in row {i} ({str(one.ids[i])!r}): {both}"

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
                f" ({len(missing)} of {len(self.members)} members lack them); run lora-ensemble predict first"
            )
        return self._examples

    @cached_property
    def _examples(self) -> Examples:
        print_ = next(r.examples[self.split] for r in self.members if self.split in r.examples)
        return read_examples(self.pool, self.name, self.split, print_)

    def logits(self, name: str) -> np.ndarray:
        """(N, C) float32 logits of a member on the split, memory-mapped, checked."""
        record = self.record(name)
        array = read_array(self.pool, record, logits_file(self.split))
        n = len(self._examples.ids)
        c = len(self.labels) if self.kind == "multiclass" else 1
        if array.shape != (n, c):
            raise UserError(
                f"{self._folder(record) / logits_file(self.split)}: shape {array.shape}; expected ({n}, {c}): "
                "the rows of the examples file by the outputs of the task"
            )
        return array


def task_names(pool: str | Path) -> list[str]:
    """Tasks that have a folder in the pool."""
    pool = Path(pool)
    if not pool.is_dir():
        raise UserError(f"{pool}: no such folder; give the folder that training wrote with --pool.dir")
    return sorted(p.name for p in pool.iterdir() if (p / EXAMPLES).is_dir())
