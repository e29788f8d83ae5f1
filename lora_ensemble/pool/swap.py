"""How a member is put into the pool, or replaced, so that no reader ever sees half of one.

The new folder is written beside the old one, which is then moved aside; whoever comes next, reader or writer, mends
what a kill left in between. One lock per task's folder. The steps are in checkpoints/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lora_ensemble.errors import UserError
from lora_ensemble.files import locked, sole_process
from lora_ensemble.pool.contract import LOCK, NEW, OLD, RECORD, MemberRecord, check_name, checksum
from lora_ensemble.tasks import check_task_name


@dataclass(frozen=True, kw_only=True)
class NewMember:
    """A member to be written, or to take the place of one."""

    record: MemberRecord
    files: Mapping[str, Any] = field(default_factory=dict)
    """File name to content: an array (.npy), a dict of arrays (.safetensors), a dict (.json), or the path of a file,
    which is taken over as it is."""
    keep: MemberRecord | None = None  # the record now on disk, whose other files are taken over as they are
    replaced_to: Path | None = None
    """Where the folder that it replaces is moved to, unless there is something already; None: it is deleted."""


def write_member(
    pool: Path, record: MemberRecord, files: Mapping[str, Any], *, keep: MemberRecord | None = None
) -> MemberRecord:
    """:func:`write_members` of one."""
    return write_members(pool, [NewMember(record=record, files=files, keep=keep)])[0]


def write_members(
    pool: Path, members: Sequence[NewMember], *, check: Callable[[MemberRecord], None] | None = None
) -> list[MemberRecord]:
    """Write members or replace them, so that a reader never sees half of one. Returns the records with checksums.

    All files are on the disk before the first record, which vouches for them, is written: also where the power fails.
    ``check``: is given the record of each member that is there, with nobody else writing, and raises where it may not
    be replaced; then nothing is written. ``UserError`` where the record to ``keep`` is another by now.
    """
    written: dict[int, MemberRecord] = {}
    for member in members:
        check_task_name(member.record.task)
        check_name(member.record.name)
    for task in dict.fromkeys(m.record.task for m in members):
        home = Path(pool) / task
        home.mkdir(parents=True, exist_ok=True)
        of_task = {i: m for i, m in enumerate(members) if m.record.task == task}
        with locked(home / LOCK):
            _mend(home)
            for member in of_task.values():
                folder = home / member.record.name
                old = MemberRecord.read(folder / RECORD) if (member.keep or check) and folder.is_dir() else None
                if member.keep and (old is None or old.files != member.keep.files):
                    what = "replaced or deleted by another process meanwhile; let one run write it at a time"
                    raise UserError(f"{folder}: {what}")
                if check and old:
                    check(old)
            new = {i: _write_files(home, m) for i, m in of_task.items()}
            _sync([home / (NEW + r.name) / name for r in new.values() for name in r.files])
            records = {home / (NEW + r.name) / RECORD: r for r in new.values()}
            for path, record in records.items():
                path.write_text(record.to_json(), encoding="utf-8")
            _sync(list(records))
            for member in of_task.values():
                _swap(home, member.record.name, member.replaced_to)
            _sync([home])
        written |= new
    return [written[i] for i in range(len(members))]


def _write_files(home: Path, member: NewMember) -> MemberRecord:
    """All of a member but its record, beside where it belongs; returns the record."""
    record, kept = member.record, member.keep.files if member.keep else {}
    beside = home / (NEW + record.name)
    beside.mkdir()
    checksums = {}
    kept_too = sorted(kept.keys() - member.files.keys())
    for folder in {(beside / name).parent for name in [*kept_too, *member.files]} - {beside}:
        folder.mkdir()
    for name in kept_too:
        _link(home / record.name / name, beside / name)
        checksums[name] = kept[name]
    for name, content in member.files.items():
        checksums[name] = _write_file(beside / name, content)
    return dataclasses.replace(record, files=checksums)


def _write_file(path: Path, content: Any) -> str:
    """Write a file, and return its checksum."""
    if isinstance(content, Path):
        _link(content, path)
        return checksum(path)
    if path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, content, allow_pickle=False)
        data = buffer.getvalue()
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save

        # "pt" is what transformers and PEFT insist on reading. safetensors' save_file makes files for the owner's eyes
        # only, whatever the umask is.
        data = save({k: np.ascontiguousarray(v) for k, v in content.items()}, metadata={"format": "pt"})
    else:
        data = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    path.write_bytes(data)
    return checksum(data)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copy2(source, target)


def _sync(paths: Sequence[Path]) -> None:
    """Wait until files, or the names in folders, are on the disk: together, for a disk does that at a time."""

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    if os.name == "posix":  # Windows opens no folder, and syncs no file that is open for reading
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(sync, paths))


def _swap(home: Path, name: str, replaced_to: Path | None) -> None:
    folder, aside = home / name, home / (OLD + name)
    if folder.exists():
        os.rename(folder, aside)  # a folder cannot be renamed onto one that is not empty
    os.rename(home / (NEW + name), folder)
    if replaced_to is not None and aside.exists() and not replaced_to.exists():
        replaced_to.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(aside, replaced_to)
    shutil.rmtree(aside, ignore_errors=True)


def _mend(home: Path) -> None:
    """Put right what a kill left behind; call it with the lock held."""
    for left in sorted(home.glob(NEW + "*")) + sorted(home.glob(OLD + "*")):
        folder = home / left.name.removeprefix(NEW).removeprefix(OLD)
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


@lru_cache(maxsize=256)  # it lists the whole folder, which for each of ten thousand members takes minutes
def _mend_as_of(home: Path, changed_ns: int) -> None:
    """``_mend``, once for each time at which something was renamed in the folder."""
    _mend(home)


@contextlib.contextmanager
def no_swap(home: Path) -> Iterator[None]:
    """Nobody swaps folders of a task meanwhile, and what a kill left behind is put right first."""
    with contextlib.ExitStack() as stack:
        # A pool that cannot be written (somebody else's, mounted read-only) is read as it is. One without a lock was
        # never written here, and reading makes no file.
        with contextlib.suppress(OSError):
            try:
                stack.enter_context(locked(home / LOCK, "r+"))
            except OSError:
                stack.enter_context(locked(home / LOCK, "r"))
            changed = home.stat().st_mtime_ns
            # A folder's clock is coarse: of a change just now, another may have the same time.
            if time.time_ns() - changed > 2_000_000_000:
                _mend_as_of(home, changed)
            else:
                _mend(home)
        yield


def can_lock(folder: Path) -> bool:
    """Whether processes can keep each other out of a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK) as has_locks:
        return has_locks


@contextlib.contextmanager
def sole_sweep(pool: Path, tasks: Sequence[str]) -> Iterator[None]:
    """One sweep at a time trains members for a task's folder; ``UserError`` where another one does."""
    with contextlib.ExitStack() as stack:
        for task in sorted(tasks):
            stack.enter_context(sole_process(Path(pool) / task, "sweeps here", way_out="choose another --pool.dir"))
        yield
