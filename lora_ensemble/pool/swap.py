"""How a member is put into the pool, or replaced, so that no reader ever sees half of one.

The new folder is written beside the old one, which is then moved aside; whoever comes next, reader or writer, mends
what a kill left in between. One lock per task's folder. The steps are in checkpoints/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_ensemble.errors import UserError
from lora_ensemble.pool.contract import LOCK, NEW, OLD, RECORD, SWEEP, MemberRecord, check_name, checksum
from lora_ensemble.tasks import check_task_name


def write_member(
    pool: Path, record: MemberRecord, files: Mapping[str, Any], *, keep: MemberRecord | None = None
) -> MemberRecord:
    """Write a member or replace it, so that a reader never sees half of it. Returns the record with its checksums.

    ``files``: file name to content: an array (.npy), a dict of arrays (.safetensors), a dict (.json), or the path
    of a file, which is taken over as it is.
    ``keep``: the record now on disk, whose other files are taken over as they are; ``UserError`` where it is another.
    """
    check_name(record.name)
    check_task_name(record.task)
    home = Path(pool) / record.task
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home):
        _mend(home)
        folder, beside, aside = home / record.name, home / (NEW + record.name), home / (OLD + record.name)
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


@contextlib.contextmanager
def _locked(home: Path, mode: str = "a") -> Iterator[None]:
    """One process at a time swaps folders in a task's folder, or reads there. Not to be entered twice."""
    with open(home / LOCK, mode) as f:
        try:
            import fcntl
        except ImportError:  # Windows: one writer only, as the CLI has it
            yield
            return
        fcntl.flock(f, fcntl.LOCK_EX)
        yield  # closing the file lets the lock go


@contextlib.contextmanager
def no_swap(home: Path) -> Iterator[None]:
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


@contextlib.contextmanager
def sole_sweep(pool: Path, tasks: Sequence[str]) -> Iterator[None]:
    """One sweep at a time trains members for a task's folder; ``UserError`` where another one does."""
    with contextlib.ExitStack() as stack:
        for task in sorted(tasks):
            stack.enter_context(sole_process(Path(pool) / task, "sweeps here", way_out="choose another --pool.dir"))
        yield


@contextlib.contextmanager
def sole_process(folder: Path, does: str, *, wait: float = 0.0, way_out: str = "let it end") -> Iterator[None]:
    """One process at a time does something in a folder. The lock goes with the process, however that ends.

    ``UserError``, naming the process that has it, where another one has it for longer than ``wait`` seconds. Where
    there are no such locks (Windows), nothing is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait
    with open(folder / SWEEP, "a+", encoding="utf-8") as f:
        while True:
            try:
                import fcntl

                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except ImportError:
                break
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.2)
                    continue
                f.seek(0)
                who = f.read().strip() or "another process"
                raise UserError(f"{folder}: {who} {does}; wait until it has ended, or {way_out}") from None
        f.truncate(0)
        f.write(f"process {os.getpid()} on {platform.node()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})\n")
        f.flush()
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
    if isinstance(content, Path):
        _link(content, path)
    elif path.suffix == ".npy":
        np.save(path, content, allow_pickle=False)
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save

        # "pt" is what transformers and PEFT insist on reading. safetensors' save_file makes files for the owner's eyes
        # only, whatever the umask is.
        path.write_bytes(save({k: np.ascontiguousarray(v) for k, v in content.items()}, metadata={"format": "pt"}))
    else:
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copy2(source, target)


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
