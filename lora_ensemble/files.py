"""How a file is written so that nobody ever sees half of it, and how processes keep each other out of a folder.

Locks are held on an open file and go with the process, however that ends. Where a file system has none, nothing is
locked, and :func:`locked` says so: one program at a time is for the user to see to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from filelock import lock_descriptor

from lora_ensemble.errors import UserError

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_POLL_S = 0.002  # a writer leaves its folder for a moment only between two members: who waits must not miss that
_SOLE = ".sweep"


def gib(size: float) -> str:
    """A number of bytes as people read it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to: it takes the place of ``path`` where the block ends well, else it goes."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield beside
        with open(beside, "rb+") as f:
            os.fsync(f.fileno())  # or, where the power fails, an empty file could stand where a whole one was
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong counts, not that nothing can be removed
            beside.unlink()
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Open a file for text that appears under its name only where the block ends well.

    Opened before the work, it tells at once that a path cannot be written (``UserError``) and not after it.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    special = path.exists() and not path.is_file()  # /dev/stdout, a pipe: nothing to replace
    if not special and path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{path}: cannot be written: the file is there and read-only")
    with contextlib.ExitStack() as stack:
        try:
            # What a symbolic link points to is replaced, not the link.
            target = path if special else stack.enter_context(replacing(path.resolve()))
            f = stack.enter_context(open(target, "w", encoding="utf-8", newline="\n"))
        except OSError as e:
            raise UserError(f"{path}: cannot be written: {e.strerror}; give a file in a folder that exists") from e
        yield f


def _lock(file: IO[Any], *, wait: bool) -> bool | None:
    """Lock an open file until it is closed. Whether that was done, without waiting; None where there are no locks."""
    try:
        return lock_descriptor(file.fileno(), blocking=wait, poll_interval=_POLL_S)
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
        return None


@contextlib.contextmanager
def locked(path: Path, mode: str = "a") -> Iterator[bool]:
    """The lock of a file, for one process, and one thread in it, at a time; others wait. Not to be entered twice.

    Gives whether there are locks. ``mode``: what the file is opened with; "a" makes it.
    """
    with open(path, mode) as f:
        yield _lock(f, wait=True) is not None


@contextlib.contextmanager
def sole_process(folder: Path, does: str, *, wait: float = 0.0, way_out: str = "let it end") -> Iterator[None]:
    """One process at a time does something in a folder, which is made.

    ``UserError``, naming the process that has it, where another one has it for longer than ``wait`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait
    with open(folder / _SOLE, "a+", encoding="utf-8") as f:
        while _lock(f, wait=False) is False:
            if time.monotonic() >= until:
                f.seek(1)
                who = f.read().strip() or "another process"
                raise UserError(f"{folder}: {who} {does}; wait until it has ended, or {way_out}")
            time.sleep(0.2)
        f.truncate(0)
        # Windows lets nobody else read the first byte, which is the one that is locked.
        f.write(f"\nprocess {os.getpid()} on {platform.node()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})\n")
        f.flush()
        yield
