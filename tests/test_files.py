"""Files that are there whole or not at all, and locks that go with the process that holds them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pool_factory import refused

from lora_ensemble.files import locked, replacing, sole_process

HOLD = """
import sys, time
from pathlib import Path
from lora_ensemble.files import sole_process
with sole_process(Path(sys.argv[1]), "works here"):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as beside:
        beside.write_text("new")
        assert not path.exists()
    before = path.stat().st_ino
    with pytest.raises(TypeError), replacing(path) as beside, beside.open("w") as f:
        f.writelines(["half", None])  # type: ignore[list-item]
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "new"
    with replacing(path) as beside:  # another file: whoever reads the old one reads it to its end
        beside.write_text("newer")
    assert path.stat().st_ino != before


def test_a_file_is_on_the_disk_before_it_takes_the_others_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or, where the power fails, an empty file could stand where a whole one was."""
    sync, replace, seen = os.fsync, os.replace, []

    def synced(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        seen.append("replaced")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with replacing(tmp_path / "a.txt") as beside:
        beside.write_text("new")
    assert seen == [(tmp_path / "a.txt").stat().st_ino, "replaced"]


def test_one_process_at_a_time_and_a_killed_one_lets_the_next_in(tmp_path: Path) -> None:
    """The other is named, by process and host; who waits gets in when it has ended, however that was."""
    folder = tmp_path / "new" / "folder"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        who = f"process {other.pid} on {platform.node()} (since "
        for wait in (0.0, 0.3):
            started = time.monotonic()
            way_out = "works here; wait until it has ended, or let it end"
            with refused(folder, who, way_out), sole_process(folder, "works here", wait=wait):
                pass
            assert time.monotonic() - started >= wait
        threading.Timer(0.3, other.kill).start()
        with sole_process(folder, "works here", wait=30):
            assert other.wait() != 0
            with refused(f"process {os.getpid()} on "), sole_process(folder, "works here", way_out="go away"):
                pass
    with sole_process(folder, "works here"):
        pass


@pytest.mark.parametrize("mode", ["a", "r+", "r"])
def test_a_lock_is_for_one_thread_at_a_time(tmp_path: Path, mode: str) -> None:
    """Also where the file may only be read."""
    (tmp_path / ".lock").touch()
    inside: list[str] = []

    def other() -> None:
        with locked(tmp_path / ".lock", mode) as has_locks:
            assert has_locks
            inside.append("other")

    thread = threading.Thread(target=other)
    with locked(tmp_path / ".lock"):
        thread.start()
        thread.join(0.2)
        inside.append("first")
    thread.join(20)
    assert inside == ["first", "other"]
