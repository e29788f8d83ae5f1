"""The pool on disk: a kill, a reader and a writer at the same time; a member is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pool_factory import (
    LOGITS,
    refused,
    sha256,
    two_members,
)

from lora_ensemble.errors import UserError
from lora_ensemble.pool import (
    MemberRecord,
    TaskPool,
    read_array,
    read_record,
    swap,
    write_member,
)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return two_members(tmp_path / "pool")


# Kills

# A fresh process that forks, so that no thread of the test's own is in the way. The child is killed at its k-th step on
# the file system (k = 1, 2, ... until it gets through), once as it is and once with the file that it was writing cut
# in half.
KILL_EVERYWHERE = """
import json, os, shutil, signal, sys, traceback
from pathlib import Path
import numpy as np
import safetensors.numpy
from lora_ensemble.pool import MemberRecord, TaskPool, read_record, write_member

STEPS = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}
first, base, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
LOGITS = np.array([[-1.5], [2.0], [0.25], [-3.0]], np.float32)

def new(pool):
    record = MemberRecord(name="m0", task="quora", kind="binary", labels=["0", "1"], finished=True, rank=2)
    old = read_record(base, "quora", "m1")
    files = {"dev.logits.npy": LOGITS * 2, "dev.epochs.npy": np.ones((2, 4, 1), np.float16)}
    files["adapter_model.safetensors"] = {"A": np.ones((2, 2), np.float32)}
    record.examples = old.examples
    write_member(pool, record, files)

def keep(pool):
    old = read_record(pool, "quora", "m0")
    old.rank = 3
    write_member(pool, old, {"test.logits.npy": LOGITS * 3}, keep=old)

def read(pool):
    TaskPool(pool, "quora")

def kill_at(pool, act, k, torn, steps=STEPS):
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if status not in (0, signal.SIGKILL):
            sys.exit(f"{pool}: step {k} failed")
        return status != 0
    count, writing = 0, None
    def hook(event, args):
        nonlocal count, writing
        if event not in steps or (event == "open" and not str(args[0]).startswith(str(pool))):
            return
        count += 1
        if count == k:
            if torn and (half := writing) and os.path.exists(half):  # threads may change what is being written
                os.truncate(half, os.path.getsize(half) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and not str(args[0]).endswith(".lock")
        writing = args[0] if writes else None
    sys.addaudithook(hook)
    try:
        act(pool)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def everywhere(start, act, tag, *more):
    made, k, going = [], 1, True
    while going:
        pool = out / f"{tag}-{k}"
        shutil.copytree(start, pool)
        going = kill_at(pool, act, k, *more)
        k += 1
        made.append(pool)
    return made

act = {"new": new, "replace": new, "keep": keep}[first]
made = everywhere(base, act, first, False) + everywhere(base, act, first + "-torn", True)
left = [p for p in made if any(p.glob("quora/.new.*")) or any(p.glob("quora/.old.*"))]
twice = [p for one in left for p in everywhere(one, read, one.name + "-read", False, STEPS - {"open"})]
print(json.dumps([[str(p) for p in made], [str(p) for p in twice]]))
"""


def what_is_there(pool: Path) -> int | None:
    """The rank of the member m0, which says which of its versions it is; everything it names is compared."""
    opened = TaskPool(pool, "quora")  # a reader mends
    record = read_record(pool, "quora", "m0")
    left = [p.name for p in (pool / "quora").iterdir() if p.name.startswith((".new.", ".old."))]
    assert left == []
    np.testing.assert_array_equal(opened.logits("m1"), -LOGITS)
    if record is None:
        assert [r.name for r in opened.members] == ["m1"]
        return None
    assert opened.members[0] == record
    folder = pool / "quora" / "m0"
    assert {p.name: sha256(p) for p in folder.iterdir() if p.name != "member.json"} == record.files
    expected = {
        None: {"dev.logits.npy"},
        2: {"dev.logits.npy", "dev.epochs.npy", "adapter_model.safetensors"},
        3: {"dev.logits.npy", "test.logits.npy"},
    }[record.rank]
    assert set(record.files) == expected
    np.testing.assert_array_equal(opened.logits("m0"), LOGITS * 2 if record.rank == 2 else LOGITS)
    if record.rank == 3:
        np.testing.assert_array_equal(np.load(folder / "test.logits.npy"), LOGITS * 3)
    return record.rank or 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("act", "before", "after"), [("new", None, 2), ("replace", 0, 2), ("keep", 0, 3)])
def test_a_kill_at_any_step_leaves_the_old_member_or_the_new_one(pool, tmp_path, act, before, after):
    if act == "new":
        shutil.rmtree(pool / "quora" / "m0")
    (tmp_path / "out").mkdir()
    run = [sys.executable, "-W", "error", "-c", KILL_EVERYWHERE, act, str(pool), str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    once, twice = ([Path(p) for p in paths] for paths in json.loads(done.stdout))
    assert len(once) >= 2 * 6  # steps there certainly are: lock, folder, files, record, rename
    assert len(twice) > len(once)
    found = {}
    for path in once:
        shutil.copytree(path, tmp_path / "written")
        found[path.name] = what_is_there(path)
        # A writer that comes first mends too.
        write_member(tmp_path / "written", MemberRecord(name="m2", task="quora", kind="binary"), {})
        assert what_is_there(tmp_path / "written") == found[path.name]
        shutil.rmtree(tmp_path / "written")
    assert set(found.values()) == {before, after}
    # From the old to the new once, never to nothing in between and never back.
    for tag in (act, f"{act}-torn"):
        results = [found[f"{tag}-{k}"] for k in range(1, 1 + sum(n.rsplit("-", 1)[0] == tag for n in found))]
        assert results == [before] * results.count(before) + [after] * results.count(after)
        assert results[-1] == after
    # The reader that mends may be killed as well.
    for path in twice:
        assert what_is_there(path) == found[path.name.split("-read")[0]]


# Others at work at the same time

REPLACE = """
import dataclasses, os, sys, time
from pathlib import Path
import numpy as np
from lora_ensemble.pool import read_record, write_member
rename = os.rename
def slow(source, target):
    if Path(source).name.startswith(".new."):
        time.sleep(0.001)  # the member is away: a moment made long
    rename(source, target)
os.rename = slow
pool, how, enough = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
record = read_record(pool, "quora", "m0")
print("ready", flush=True)
i = 0
while not enough.exists():
    i += 1
    record = dataclasses.replace(record, rank=i)
    array = np.full((4, 1), i, np.float32)
    if how == "keep":
        record = write_member(pool, record, {"test.logits.npy": array}, keep=record)
    else:
        record = write_member(pool, record, {"dev.logits.npy": array})
"""


@pytest.mark.parametrize("how", ["keep", "replace"])
def test_a_reader_beside_a_writer_always_finds_a_whole_member(pool, how, monkeypatch):
    read = MemberRecord.read

    def slow(path: Path) -> MemberRecord:
        time.sleep(0.0005)  # the moment between listing the members and reading them, made long
        return read(path)

    monkeypatch.setattr(MemberRecord, "read", slow)
    enough, until = pool / "enough", time.monotonic() + 60
    run = [sys.executable, "-c", REPLACE, str(pool), how, str(enough)]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        seen = set()
        while writer.poll() is None:
            if len(seen) > 20 or time.monotonic() > until:
                enough.touch()
            time.sleep(0.0005)  # or the writer would hardly ever get in
            assert read_record(pool, "quora", "m0") is not None
            opened = TaskPool(pool, "quora")
            assert [r.name for r in opened.members] == ["m0", "m1"]
            rank = opened.record("m0").rank
            seen.add(rank)
            if how == "keep":
                # As when test logits are added: the dev logits stay what they were, and nothing may go wrong.
                np.testing.assert_array_equal(opened.logits("m0"), LOGITS)
                continue
            try:
                logits = opened.logits("m0")
            except UserError as e:
                # Other logits than those of the record cannot be had any more, and that is what is said.
                assert "was replaced while it was being read" in str(e)  # noqa: PT017
            else:
                assert (logits == (rank or LOGITS)).all()
    assert writer.returncode == 0
    assert len(seen) > 20, "the two hardly met"


def test_a_reader_waits_for_the_swap(pool, monkeypatch):
    """The member is away between two renames; a reader that comes then waits, and does not report it as missing."""
    away, go_on = threading.Event(), threading.Event()
    rename = os.rename

    def slow(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".new."):
            away.set()
            assert go_on.wait(20)
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    found: list[object] = []
    old = read_record(pool, "quora", "m0")
    writer = threading.Thread(target=write_member, args=(pool, old, {"dev.logits.npy": LOGITS}))
    readers = [
        threading.Thread(target=lambda f=f: found.append(f()))
        for f in (
            lambda: read_record(pool, "quora", "m0"),
            lambda: TaskPool(pool, "quora").record("m0"),
            lambda: read_array(pool, old, "dev.logits.npy").tolist(),
        )
    ]
    writer.start()
    assert away.wait(20)
    assert not (pool / "quora" / "m0").exists()
    for reader in readers:
        reader.start()
    readers[0].join(0.2)
    waited = not found
    go_on.set()
    for thread in (writer, *readers):
        thread.join(20)
    assert waited
    assert sorted(map(str, found)) == sorted(map(str, (old, old, LOGITS.tolist())))


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.EROFS, "read-only")])
@pytest.mark.parametrize("left", [False, True])
def test_a_pool_that_cannot_be_written_is_read_as_it_is(pool, monkeypatch, error, left):
    """Somebody else's, or mounted read-only; as root, permissions would not stop the test."""
    if left:
        shutil.copytree(pool / "quora" / "m0", pool / "quora" / ".old.m0")
        (pool / "quora" / ".new.m0").mkdir()
    before = sorted(pool.rglob("*"))

    def locked(*_: object) -> None:
        raise error

    monkeypatch.setattr(swap, "locked", locked)
    opened = TaskPool(pool, "quora")
    np.testing.assert_array_equal(opened.logits("m0"), LOGITS)
    assert read_record(pool, "quora", "m0") == opened.record("m0")
    assert sorted(pool.rglob("*")) == before
    with pytest.raises(type(error)):
        write_member(pool, opened.record("m0"), {})


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.EROFS, "read-only")])
def test_left_overs_that_cannot_be_mended_are_left(pool, monkeypatch, error):
    shutil.copytree(pool / "quora" / "m0", pool / "quora" / ".old.m0")

    def rmtree(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    np.testing.assert_array_equal(TaskPool(pool, "quora").logits("m0"), LOGITS)


def test_reading_writes_nothing(tmp_path):
    """Not even a lock, least of all in a folder that is no pool."""
    (tmp_path / "Documents" / "letters").mkdir(parents=True)
    with refused("letters", "half-written"):
        TaskPool(tmp_path, "Documents")
    assert read_record(tmp_path, "Documents", "x") is None
    assert read_record(tmp_path, "nowhere", "x") is None
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "Documents", tmp_path / "Documents" / "letters"]


def test_what_a_kill_leaves_is_mended_though_the_folder_was_looked_at_before(pool):
    """A reader that found nothing to mend does not look again until something was renamed in the folder."""
    home = pool / "quora"
    os.utime(home, (1e9, 1e9))
    TaskPool(pool, "quora").logits("m1")
    os.rename(home / "m1", home / ".old.m1")  # the kill came between the two renames
    os.utime(home, (1.1e9, 1.1e9))
    assert "m1" in [r.name for r in TaskPool(pool, "quora").members]
    assert not (home / ".old.m1").exists()
