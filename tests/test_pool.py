"""The pool on disk: what is written is read, whole or not at all, and everything else is refused in words.

Nothing is trained here and torch is not needed.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool_factory import add_member, make_pool
from safetensors.numpy import load_file

import lora_ensemble.pool as pool_module
from lora_ensemble.dicor import from_pool
from lora_ensemble.errors import UserError
from lora_ensemble.pool import (
    MemberRecord,
    TaskPool,
    check_name,
    fingerprint,
    read_array,
    read_examples,
    read_record,
    read_tensors,
    swap,
    task_names,
    write_examples,
    write_member,
)

PAGE = Path(__file__).parent.parent / "checkpoints" / "README.md"
WEIGHTS = "adapter_model.safetensors"
IDS = ["a", "b", "c", "d"]
LABELS = np.array([0, 1, 1, 0])
LOGITS = np.array([[-1.5], [2.0], [0.25], [-3.0]], np.float32)  # (N, C)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """One binary task with two finished members, ``m0`` and ``m1``."""
    for name, sign in (("m0", 1), ("m1", -1)):
        add_member(tmp_path / "pool", "quora", "binary", name, {"dev": sign * LOGITS}, {"dev": IDS}, {"dev": LABELS})
    return tmp_path / "pool"


def edit(pool: Path, member: str, /, **changes: object) -> Path:
    """Change keys of a member.json by hand; a key set to ``...`` is removed."""
    path = pool / "quora" / member / "member.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return path


def sha256(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def put(pool: Path, name: str, array: np.ndarray, file: str = "dev.logits.npy") -> Path:
    """Another array and the checksum that goes with it: not tampered with, but wrong."""
    path = pool / "quora" / name / file
    np.save(path, array)
    return sign(pool, name, path)


def sign(pool: Path, name: str, path: Path) -> Path:
    files = json.loads((path.parent / "member.json").read_text())["files"]
    edit(pool, name, files={**files, path.name: sha256(path)})
    return path


def refused(*says: object) -> pytest.RaisesExc[UserError]:
    """Exactly one line that holds all of ``says``, in order."""
    return pytest.raises(UserError, match="(?s)^[^\n]*" + "[^\n]*".join(re.escape(str(s)) for s in says) + "[^\n]*$")


def open_and_read(pool: Path) -> None:
    opened = TaskPool(pool, "quora")
    opened.examples()
    for record in opened.members:
        opened.logits(record.name)


# What is written is read


@pytest.mark.parametrize(
    "labels",
    [None, np.array([3, 0, 4, 1]), np.array([0.5, 5.0, 0.1 + 0.2, 1e-300])],
    ids=["unknown", "classes", "values"],
)
def test_examples_come_back_to_the_last_bit(tmp_path, labels):
    ids = np.array(["dev-1", "é", "日本", "a b\tc"])
    print_ = write_examples(tmp_path, "sst", "dev", ids, labels)
    assert [p.name for p in (tmp_path / "sst" / "examples").iterdir()] == [f"dev-{print_}.npz"]
    found = read_examples(tmp_path, "sst", "dev", print_)
    assert found.ids.tolist() == ids.tolist()
    if labels is None:
        assert found.labels is None
    else:
        assert found.labels.dtype == labels.dtype
        assert found.labels.tolist() == labels.tolist()


def test_fingerprint_by_hand():
    ids, labels = np.array(["a", "bc"]), np.array([1, 0], np.int32)
    told = b"a\0bc" + b"\1" + b"\1" + b"\0" * 7 + b"\0" * 8  # int64, little-endian
    assert fingerprint(ids, labels) == hashlib.sha256(told).hexdigest()[:16]
    assert fingerprint(ids, None) == hashlib.sha256(b"a\0bc").hexdigest()[:16]


def test_fingerprint_knows_order_labels_and_their_absence():
    prints = {
        fingerprint(np.array(ids), None if labels is None else np.array(labels))
        for ids in (["a", "b"], ["b", "a"])
        for labels in ([0, 1], [1, 0], [0.0, 1.0], None)
    }
    assert len(prints) == 8


def test_examples_are_written_once(tmp_path):
    print_ = write_examples(tmp_path, "quora", "dev", np.array(IDS), LABELS)
    path = tmp_path / "quora" / "examples" / f"dev-{print_}.npz"
    before = path.stat()
    assert write_examples(tmp_path, "quora", "dev", np.array(IDS), LABELS) == print_
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_ids_and_labels_may_be_lists_and_numbers(tmp_path):
    """What a user of another program has at hand."""
    print_ = write_examples(tmp_path, "quora", "dev", [10, 11], [0, 1])
    found = read_examples(tmp_path, "quora", "dev", print_)
    assert found.ids.tolist() == ["10", "11"]
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("ids", "labels", "says"),
    [
        (["a", "b", "a"], [0, 1, 0], "id 'a' is there twice, in rows 0 and 2"),
        (["a", "b", "c"], [0, 1], "3 ids, but labels of shape (2,)"),
        (["a", "b", "c"], [[0], [1], [1]], "3 ids, but labels of shape (3, 1)"),
        ([["a"], ["b"]], None, "ids of shape (2, 1)"),
        (["a", "b"], [0.5, float("nan")], "label is nan in row 1"),
        (["a", "b"], ["yes", "no"], "labels are <U3"),
    ],
)
def test_examples_that_no_reader_could_use_are_not_written(tmp_path, ids, labels, says):
    with refused("quora", "dev", says):
        write_examples(tmp_path, "quora", "dev", ids, labels)
    assert list(tmp_path.rglob("*.npz")) == []


def test_a_member_comes_back_with_all_its_files(tmp_path):
    record = MemberRecord(
        name="r4-c1-qv-lr1e-4-s1", task="sst", kind="multiclass", labels=["0", "1"], finished=True, score=0.1 + 0.2,
        best_epoch=2, epochs_done=3, epoch_scores=[0.25, None, 1.0], examples={"dev": "0" * 16}, train_fingerprint="f",
        base_model="google-bert/bert-base-uncased", revision="abc", finetune="lora", rank=4, scaling=1.0, targets="qv",
        lr=1e-4, seed=1, settings={"epochs": 3, "nested": {"é": [1, None]}}, run="sst-1", versions={"torch": "2"},
    )  # fmt: skip
    tensors = {"x.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones(1, np.float64)}
    files = {
        "dev.logits.npy": np.eye(4, 2, dtype=np.float32),
        "dev.epochs.npy": np.ones((3, 4, 2), np.float16),
        "adapter_model.safetensors": tensors,
        "adapter_config.json": {"r": 4},
    }
    written = write_member(tmp_path, record, files)
    found = read_record(tmp_path, "sst", record.name)
    assert found == written
    assert dataclasses.replace(found, files={}) == record

    folder = tmp_path / "sst" / record.name
    assert found.files == {p.name: sha256(p) for p in folder.iterdir() if p.name != "member.json"}
    assert set(found.files) == set(files)
    for name in ("dev.logits.npy", "dev.epochs.npy"):
        np.testing.assert_array_equal(np.load(folder / name), files[name])
        np.testing.assert_array_equal(read_array(tmp_path, found, name), files[name])
        assert read_array(tmp_path, found, name).dtype == files[name].dtype
    for read in (load_file(folder / "adapter_model.safetensors"), read_tensors(tmp_path, found, WEIGHTS)):
        assert read.keys() == tensors.keys()
        for key, value in tensors.items():
            np.testing.assert_array_equal(read[key], value)
    assert json.loads((folder / "adapter_config.json").read_text()) == {"r": 4}
    assert json.loads((folder / "member.json").read_text())["schema"] == 1


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_whoever_may_read_one_file_may_read_all(tmp_path):
    """A pool is shared by the umask; safetensors' own writer would hide the weights from everybody else."""
    before = os.umask(0o027)
    try:
        files = {"dev.logits.npy": LOGITS, "adapter_config.json": {}, WEIGHTS: {"A": LOGITS}}
        write_member(tmp_path, MemberRecord(name="m", task="t", kind="binary"), files)
        write_examples(tmp_path, "t", "dev", IDS, LABELS)
    finally:
        os.umask(before)
    paths = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.stat().st_mode & 0o777 for p in paths} == {0o640}
    assert len(paths) == 6


def test_checksums_are_those_of_sha256sum(pool):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    folder = pool / "quora" / "m0"
    told = subprocess.run(["sha256sum", folder / "dev.logits.npy"], capture_output=True, text=True, check=True).stdout
    assert read_record(pool, "quora", "m0").files == {"dev.logits.npy": f"sha256:{told.split()[0]}"}


def test_logits_are_memory_mapped_and_read_only(pool):
    logits = TaskPool(pool, "quora").logits("m1")
    assert isinstance(logits, np.memmap)
    np.testing.assert_array_equal(logits, -LOGITS)
    assert logits.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        logits[0] = 0


def test_logits_that_find_no_room_are_opened_again(pool, monkeypatch):
    monkeypatch.setattr(from_pool, "SMALL", LOGITS.nbytes)  # room for one of two members
    files = from_pool.Files(TaskPool(pool, "quora"))
    for _ in range(3):
        np.testing.assert_array_equal(files[0], LOGITS)
        np.testing.assert_array_equal(files[1], -LOGITS)
    assert files[0] is files[0]
    assert files[1] is not files[1]
    with pytest.raises(ValueError, match="read-only"):
        files[1][0] = 0


def test_replacing_a_member_leaves_nothing_of_the_old(pool):
    new = MemberRecord(name="m0", task="quora", kind="binary", rank=3)
    write_member(pool, new, {"test.logits.npy": LOGITS})
    assert sorted(p.name for p in (pool / "quora" / "m0").iterdir()) == ["member.json", "test.logits.npy"]
    assert read_record(pool, "quora", "m0").rank == 3
    assert sorted(p.name for p in (pool / "quora").iterdir()) == [".lock", "examples", "m0", "m1"]


def test_keep_takes_the_other_files_over(pool):
    old = read_record(pool, "quora", "m0")
    before = (pool / "quora" / "m0" / "dev.logits.npy").read_bytes()
    new = write_member(pool, dataclasses.replace(old, rank=7), {"test.logits.npy": LOGITS + 1}, keep=old)
    assert (pool / "quora" / "m0" / "dev.logits.npy").read_bytes() == before
    assert new.files.keys() == {"dev.logits.npy", "test.logits.npy"}
    assert new.files["dev.logits.npy"] == old.files["dev.logits.npy"]
    np.testing.assert_array_equal(read_array(pool, new, "test.logits.npy"), LOGITS + 1)
    # A file that is given is replaced, not written through the link into what an older reader still maps.
    mapped = read_array(pool, new, "dev.logits.npy")
    newer = write_member(pool, new, {"dev.logits.npy": LOGITS * 2}, keep=new)
    np.testing.assert_array_equal(mapped, LOGITS)
    np.testing.assert_array_equal(read_array(pool, newer, "dev.logits.npy"), LOGITS * 2)


def test_keep_works_without_hard_links(pool, monkeypatch):
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    old = read_record(pool, "quora", "m0")
    new = write_member(pool, old, {"test.logits.npy": LOGITS}, keep=old)
    np.testing.assert_array_equal(read_array(pool, new, "dev.logits.npy"), LOGITS)


@pytest.mark.parametrize("meanwhile", ["replaced", "deleted"])
def test_keep_refuses_files_that_are_no_longer_those(pool, meanwhile):
    """Otherwise the old checksums would be written beside the new files, and the member be lost for good."""
    old = read_record(pool, "quora", "m0")
    if meanwhile == "replaced":
        newer = write_member(pool, old, {"dev.logits.npy": LOGITS * 2})
    else:
        shutil.rmtree(pool / "quora" / "m0")
    with refused(pool / "quora" / "m0", "another process"):
        write_member(pool, old, {"test.logits.npy": LOGITS}, keep=old)
    if meanwhile == "replaced":
        assert read_record(pool, "quora", "m0") == newer
        np.testing.assert_array_equal(TaskPool(pool, "quora").logits("m0"), LOGITS * 2)


def test_what_cannot_be_written_leaves_the_old_member_as_it_is(pool):
    old = read_record(pool, "quora", "m0")
    with pytest.raises(ValueError, match="Object arrays"):
        write_member(pool, old, {"dev.logits.npy": np.array([{}, []], dtype=object)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_member(pool, dataclasses.replace(old, score=float("nan")), {"dev.logits.npy": LOGITS * 2})
    assert read_record(pool, "quora", "m0") == old
    np.testing.assert_array_equal(TaskPool(pool, "quora").logits("m0"), LOGITS)
    assert [p.name for p in (pool / "quora").iterdir() if p.name.startswith((".new", ".old"))] == []


def test_task_names(tmp_path):
    make_pool(tmp_path, "sst", "multiclass", members=1)
    make_pool(tmp_path, "quora", "binary", members=1)
    (tmp_path / "plots").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert task_names(tmp_path) == ["quora", "sst"]
    assert task_names(str(tmp_path)) == ["quora", "sst"]
    with refused(tmp_path / "nowhere", "no such folder", "--pool.dir"):
        task_names(tmp_path / "nowhere")


# Names

GOOD = ["r12-c3-qv-lr1e-4-s11711", "r4-c0.5-qkv+pooler-lr2.5e-5-s0", "head", "a", "-", "9", "Ünïcode", "x" * 150]
BAD = ["", ".", "..", ".hidden", ".new.x", ".old.x", "_x", "examples", "a/b", "a\\b", "../x", "/x", "a b", "a\n", "a\0"]
BAD += ["a:b", "a*", "x" * 151, "日" * 51]


@pytest.mark.parametrize("name", GOOD)
def test_good_names(tmp_path, name):
    check_name(name)
    write_member(tmp_path, MemberRecord(name=name, task="t", kind="binary"), {})
    assert read_record(tmp_path, "t", name).name == name


@pytest.mark.parametrize("name", BAD)
def test_bad_names(tmp_path, name):
    with refused("member name", "expected up to 150"):
        check_name(name)
    with refused("member name"):
        write_member(tmp_path, MemberRecord(name=name, task="t", kind="binary"), {})
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.one_of(st.sampled_from("ab.-_+/"), st.characters()), max_size=60))
def test_a_name_that_passes_makes_a_folder_of_that_name(tmp_path, name):
    try:
        check_name(name)
    except UserError:
        return
    write_member(tmp_path, MemberRecord(name=name, task="t", kind="binary"), {})
    assert [p.name for p in tmp_path.glob("t/*") if not p.name.startswith(".")] == [name]
    assert read_record(tmp_path, "t", name).name == name
    shutil.rmtree(tmp_path / "t" / name)


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
            if torn and writing and os.path.exists(writing):
                os.truncate(writing, os.path.getsize(writing) // 2)
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
pool, how, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
record = read_record(pool, "quora", "m0")
print("ready", flush=True)
for i in range(1, times + 1):
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
    run = [sys.executable, "-c", REPLACE, str(pool), how, "200"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        seen = set()
        while writer.poll() is None:
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
    assert len(seen) > 5, "the two never met"


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

    monkeypatch.setattr(swap, "_locked", locked)
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


# Refusals


def test_half_written_member_without_its_record(pool):
    (pool / "quora" / "m1" / "member.json").unlink()
    with refused(pool / "quora" / "m1", "half-written member: member.json is missing"):
        TaskPool(pool, "quora")


def test_half_written_member_without_a_file(pool):
    (pool / "quora" / "m1" / "dev.logits.npy").unlink()
    with refused(pool / "quora" / "m1", "half-written member: dev.logits.npy is missing"):
        open_and_read(pool)


def test_tampered_file_of_the_same_size(pool):
    path = pool / "quora" / "m1" / "dev.logits.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with refused(path, "tampered with, or damaged", sha256(path)[:19], "member.json says"):
        open_and_read(pool)


def test_tampered_weights(tmp_path):
    record = MemberRecord(name="m", task="t", kind="binary")
    record = write_member(tmp_path, record, {WEIGHTS: {"A": np.zeros(3, np.float32)}})
    path = tmp_path / "t" / "m" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with refused(path, "tampered with"):
        read_tensors(tmp_path, record, WEIGHTS)


def test_a_file_that_the_record_does_not_list_does_not_count(pool):
    shutil.copy(pool / "quora" / "m0" / "dev.logits.npy", pool / "quora" / "m0" / "test.logits.npy")
    with refused(pool / "quora" / "m0", "this member has no test.logits.npy"):
        read_array(pool, read_record(pool, "quora", "m0"), "test.logits.npy")


def examples_path(pool: Path) -> Path:
    (path,) = (pool / "quora" / "examples").glob("dev-*.npz")
    return path


@pytest.mark.parametrize("cut", ["half", "nothing", "middle", "text", "an array"])
def test_damaged_examples(pool, cut):
    path = examples_path(pool)
    raw = path.read_bytes()
    middle = raw[: len(raw) // 3] + b"garbage!" + raw[len(raw) // 3 + 8 :]
    path.write_bytes({"half": raw[: len(raw) // 2], "nothing": b"", "middle": middle, "text": b"hello\n"}.get(cut, raw))
    if cut == "an array":
        with open(path, "wb") as f:
            np.save(f, LABELS)
    with refused(path, "cannot be read", "copy it again"):
        open_and_read(pool)


@pytest.mark.parametrize(
    "arrays",
    [
        {"ids": np.array(IDS)},
        {"ids": np.array(IDS), "labels": 1 - LABELS},
        {"ids": np.array(IDS[::-1]), "labels": LABELS},
        {"ids": np.array(IDS), "labels": LABELS.astype(float)},
    ],
    ids=["no labels", "labels", "order", "type"],
)
def test_examples_other_than_their_name_says(pool, arrays):
    path = examples_path(pool)
    np.savez(path, **arrays)
    with refused(path, "its content is not what its name says"):
        open_and_read(pool)


@pytest.mark.parametrize(
    "arrays",
    [{"labels": LABELS}, {"ids": np.arange(4), "labels": LABELS}, {"ids": np.array(IDS), "labels": np.array(IDS)}],
    ids=["no ids", "numbers for ids", "words for labels"],
)
def test_examples_of_other_arrays(pool, arrays):
    path = examples_path(pool)
    np.savez(path, **arrays)
    with refused(path, "cannot be read"):
        open_and_read(pool)


def test_missing_examples(pool):
    path = examples_path(pool)
    path.unlink()
    with refused(path, "missing, though members of this pool refer to it"):
        open_and_read(pool)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_the_bomb_goes_off_where_pickles_are_allowed(tmp_path):
    np.save(tmp_path / "bomb.npy", np.array([[Bomb(tmp_path / "boom")]], dtype=object), allow_pickle=True)
    np.load(tmp_path / "bomb.npy", allow_pickle=True)
    assert (tmp_path / "boom").is_dir()


@pytest.mark.parametrize("whole", [False, True], ids=["object array", "bare pickle"])
def test_pickled_logits_are_refused_and_never_loaded(pool, tmp_path, whole):
    bomb = np.array([[Bomb(tmp_path / "boom")]] * 4, dtype=object)
    path = pool / "quora" / "m1" / "dev.logits.npy"
    if whole:
        path.write_bytes(pickle.dumps(bomb))
    else:
        np.save(path, bomb, allow_pickle=True)
    sign(pool, "m1", path)
    with refused(path, "not an array file"):
        open_and_read(pool)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("key", ["ids", "labels"])
def test_pickled_examples_are_refused_and_never_loaded(pool, tmp_path, key):
    bomb = np.array([Bomb(tmp_path / "boom")] * 4, dtype=object)
    np.savez(examples_path(pool), **{"ids": np.array(IDS), "labels": LABELS, key: bomb})
    with refused(examples_path(pool), "cannot be read"):
        open_and_read(pool)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"hello", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x05\x00{'a':"])
def test_logits_that_are_no_array_file(pool, content):
    path = pool / "quora" / "m1" / "dev.logits.npy"
    path.write_bytes(content)
    sign(pool, "m1", path)
    with refused(path, "not an array file"):
        open_and_read(pool)


def test_an_archive_in_place_of_logits(pool):
    path = pool / "quora" / "m1" / "dev.logits.npy"
    with open(path, "wb") as f:
        np.savez(f, LOGITS)
    sign(pool, "m1", path)
    with refused(path, "not an array file"):
        open_and_read(pool)


def test_logits_shorter_than_their_header_says(pool):
    path = pool / "quora" / "m1" / "dev.logits.npy"
    path.write_bytes(path.read_bytes()[:-4])
    sign(pool, "m1", path)
    with refused(path, "not an array file"):
        open_and_read(pool)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_name_the_row(pool, value):
    bad = LOGITS.copy()
    bad[2:] = value
    path = put(pool, "m1", bad)
    with refused(path, "NaN or infinite, first in row 2;"):
        open_and_read(pool)


def test_the_row_of_epoch_logits_is_that_of_the_example(pool):
    bad = np.zeros((3, 4, 1), np.float16)
    bad[1, 3, 0] = np.nan
    record = read_record(pool, "quora", "m1")
    record = write_member(pool, record, {"dev.epochs.npy": bad}, keep=record)
    with refused("dev.epochs.npy", "first in row 3;"):
        read_array(pool, record, "dev.epochs.npy")


@pytest.mark.parametrize("shape", [(3, 1), (5, 1), (4, 2), (1, 4), (2, 4, 1), (0, 1)])
def test_wrong_shape(pool, shape):
    path = put(pool, "m1", np.zeros(shape, np.float32))
    with refused(path, f"shape {shape}; expected (4, 1)"):
        open_and_read(pool)


def test_a_flat_array(pool):
    path = put(pool, "m1", np.zeros(4, np.float32))
    with refused(path, "float32 of shape (4,); expected floats of shape (..., N, C)"):
        open_and_read(pool)


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64, "<U1"])
def test_wrong_dtype(pool, dtype):
    path = put(pool, "m1", np.zeros((4, 1), dtype))
    with refused(path, f"{np.dtype(dtype)} of shape (4, 1); expected floats"):
        open_and_read(pool)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_wrong_schema(pool, schema):
    path = edit(pool, "m1", schema=schema)
    with refused(path, f"schema {schema!r}; this version reads schema 1"):
        TaskPool(pool, "quora")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '["schema"]', "3", '"schema"', "null", "{}", '{"name": "m1"}', "\xff"]
)
def test_no_member_record(pool, content):
    path = pool / "quora" / "m1" / "member.json"
    path.write_bytes(content.encode("latin-1"))
    with refused(path, "not a member record", "expected JSON and a schema"):
        TaskPool(pool, "quora")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("name", 3, "str"),
        ("task", None, "str"),
        ("kind", "ordinal", "Literal['multiclass', 'binary', 'regression']"),
        ("kind", ["binary"], "Literal['multiclass', 'binary', 'regression']"),
        ("labels", "01", "list[str]"),
        ("labels", None, "list[str]"),
        ("labels", [0, 1], "list[str]"),
        ("finished", "yes", "bool"),
        ("finished", 1, "bool"),
        ("finished", None, "bool"),
        ("score", "0.5", "float | None"),
        ("score", True, "float | None"),
        ("score", float("nan"), "float | None"),
        ("score", float("inf"), "float | None"),
        ("best_epoch", 1.0, "int | None"),
        ("best_epoch", True, "int | None"),
        ("epoch_scores", {}, "list[float | None]"),
        ("epoch_scores", ["0.5"], "list[float | None]"),
        ("examples", [], "dict[str, str]"),
        ("examples", {"dev": 5}, "dict[str, str]"),
        ("rank", "4", "int | None"),
        ("rank", [4], "int | None"),
        ("scaling", "1", "float | None"),
        ("lr", [], "float | None"),
        ("seed", 0.5, "int | None"),
        ("settings", [], "dict[str, typing.Any]"),
        ("run", 1, "str | None"),
        ("versions", {"torch": 2}, "dict[str, str]"),
        ("files", ["dev.logits.npy"], "dict[str, str]"),
        ("files", {"dev.logits.npy": None}, "dict[str, str]"),
    ],
)
def test_wrong_type_of_a_key(pool, key, value, expected):
    path = edit(pool, "m1", **{key: value})
    with refused(path, f"{key} is {value!r}; expected {expected}"):
        open_and_read(pool)


def test_a_whole_number_is_a_float_too(pool):
    edit(pool, "m1", score=1, lr=1, scaling=3, epoch_scores=[1, None])
    assert read_record(pool, "quora", "m1").score == 1


def test_unknown_key(pool):
    path = edit(pool, "m1", colour="red")
    with refused(path, "unexpected keyword argument 'colour'"):
        TaskPool(pool, "quora")


@pytest.mark.parametrize("key", ["name", "task", "kind"])
def test_missing_key(pool, key):
    path = edit(pool, "m1", **{key: ...})
    with refused(path, "missing", f"'{key}'"):
        TaskPool(pool, "quora")


def test_name_other_than_the_folder(pool):
    path = edit(pool, "m1", name="m0")
    with refused(path, "name is 'm0', but the folder is 'm1'"):
        TaskPool(pool, "quora")
    with refused("name is 'm0'"):
        read_record(pool, "quora", "m1")


def test_task_other_than_the_folder(pool):
    """A member that was copied into another task's folder would be looked for in its own."""
    path = edit(pool, "m1", task="sst")
    with refused(path, "task is 'sst', but the folder is 'quora'"):
        TaskPool(pool, "quora")
    os.rename(pool / "quora", pool / "paraphrase")
    with refused("task is 'quora', but the folder is 'paraphrase'"):
        TaskPool(pool, "paraphrase")


@pytest.mark.parametrize("name", ["../m0/dev.logits.npy", "/etc/passwd", "a\\b", "sub/x.npy"])
def test_a_path_among_the_files(pool, name):
    path = edit(pool, "m1", files={name: "sha256:0"})
    with refused(path, "files holds a path; expected names of files in the same folder"):
        TaskPool(pool, "quora")


def with_dev(pool: Path, ids: list[str], labels: np.ndarray | None, logits: np.ndarray = LOGITS) -> None:
    """Member m1 again, of other dev examples."""
    add_member(pool, "quora", "binary", "m1", {"dev": logits}, {"dev": ids}, {"dev": labels})


@pytest.mark.parametrize(
    ("ids", "labels", "says"),
    [
        (["a", "b", "d", "c"], LABELS, "dev ids differ, first in row 2: 'c' against 'd'"),
        (["x", "b", "c", "d"], LABELS, "dev ids differ, first in row 0: 'a' against 'x'"),
        (["a", "b"], LABELS[:2], "4 dev examples against 2"),
        (IDS, np.array([0, 1, 0, 0]), "dev labels differ, first in row 2 ('c'): 1 against 0"),
        (IDS, None, "one has labels for dev, the other has none"),
        (IDS, LABELS.astype(float), "dev labels are int64 in one and float64 in the other"),
    ],
    ids=["swapped", "other", "fewer", "label", "no labels", "type"],
)
def test_members_of_other_examples_are_not_mixed(pool, ids, labels, says):
    with_dev(pool, ids, labels, LOGITS[: len(ids)])
    both = f"{pool / 'quora' / 'm0'} and {pool / 'quora' / 'm1'} do not belong together"
    with refused(both, says):
        TaskPool(pool, "quora")


def test_members_of_other_examples_are_seen_behind_one_that_has_none(pool):
    """m0 has no test logits; m1 and m2 have them, of different examples."""
    for name, ids in (("m1", ["t0", "t1", "t2", "t3"]), ("m2", ["t0", "t1", "t3", "t2"])):
        add_member(pool, "quora", "binary", name, {"test": LOGITS}, {"test": ids}, {})
    with refused("m1 and", "m2 do not belong together", "test ids differ, first in row 2"):
        TaskPool(pool, "quora", split="test")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("labels", ["1", "0"], "labels is ['0', '1'] in one and ['1', '0'] in the other"),
        ("labels", ["no", "yes"], "labels is ['0', '1'] in one and ['no', 'yes'] in the other"),
        ("kind", "regression", "kind is 'binary' in one and 'regression' in the other"),
    ],
)
def test_members_of_other_labels_are_not_mixed(pool, key, value, says):
    edit(pool, "m1", **{key: value})
    with refused(pool / "quora" / "m0", pool / "quora" / "m1", says):
        TaskPool(pool, "quora")


def test_unfinished_and_diverged_members_are_left_out(pool):
    edit(pool, "m1", finished=False)
    for name, diverged in (("m2", True), ("m3", False)):
        write_member(pool, MemberRecord(name=name, task="quora", kind="binary", diverged=diverged), {})
    opened = TaskPool(pool, "quora")
    assert [r.name for r in opened.members] == ["m0"]
    assert opened.left_out == {"m1": "not finished", "m2": "diverged", "m3": "not finished"}
    with refused(pool / "quora", "member 'm2' is diverged; finished members: 1"):
        opened.record("m2")
    with refused(pool / "quora", "member 'm9' is not there"):
        opened.logits("m9")


def test_no_finished_member(pool):
    for name in ("m0", "m1"):
        edit(pool, name, finished=False)
    with refused(pool / "quora", "no finished member (2 not finished)", f"--pool.dir {pool}"):
        TaskPool(pool, "quora")
    for name in ("m0", "m1"):
        shutil.rmtree(pool / "quora" / name)
    with refused(pool / "quora", "no finished member; train some"):
        TaskPool(pool, "quora")


def test_no_such_task(pool):
    with refused(pool, "no task 'sst' in this pool; tasks found: quora"):
        TaskPool(pool, "sst")
    (pool.parent / "empty").mkdir()
    with refused("no task 'sst' in this pool; tasks found: none"):
        TaskPool(pool.parent / "empty", "sst")
    with refused(pool.parent / "nowhere", "no such folder"):
        TaskPool(pool.parent / "nowhere", "sst")


def test_a_split_that_some_members_lack(pool):
    record = read_record(pool, "quora", "m1")
    prints = {**record.examples, "test": write_examples(pool, "quora", "test", np.array(["t0"]), None)}
    write_member(pool, dataclasses.replace(record, examples=prints), {"test.logits.npy": LOGITS[:1]}, keep=record)
    opened = TaskPool(pool, "quora", split="test")
    says = "no logits for the test split (1 of 2 members lack them); run lora-ensemble predict first"
    with refused(pool / "quora" / "m0", says):
        opened.examples()
    np.testing.assert_array_equal(opened.logits("m1"), LOGITS[:1])
    with refused(pool / "quora" / "m0", "this member has no test.logits.npy"):
        opened.logits("m0")


def test_a_member_replaced_after_the_pool_was_opened(pool):
    opened = TaskPool(pool, "quora")
    write_member(pool, opened.record("m1"), {"dev.logits.npy": LOGITS})
    with refused(pool / "quora" / "m1", "was replaced while it was being read; run the command again"):
        opened.logits("m1")
    shutil.rmtree(pool / "quora" / "m0")
    with refused(pool / "quora" / "m0", "half-written member: dev.logits.npy is missing"):
        opened.logits("m0")


# The page


def page_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def test_the_page_documents_every_key_and_no_other():
    table = PAGE.read_text(encoding="utf-8").split("## member.json", 1)[1].split("\n## ", 1)[0]
    documented = [key for row in re.findall(r"^\| (`.*?) \|", table, re.M) for key in re.findall(r"`(\w+)`", row)]
    assert documented == ["schema", *(f.name for f in dataclasses.fields(MemberRecord))]


def test_the_member_on_the_page_is_read(tmp_path):
    (example,) = page_blocks("json")
    raw = json.loads(example)
    assert list(raw) == ["schema", *(f.name for f in dataclasses.fields(MemberRecord))]
    folder = tmp_path / raw["task"] / raw["name"]
    folder.mkdir(parents=True)
    (folder / "member.json").write_text(example)
    assert dataclasses.asdict(read_record(tmp_path, raw["task"], raw["name"])) == {
        k: v for k, v in raw.items() if k != "schema"
    }


def test_the_page_names_the_files_that_are_written():
    text = PAGE.read_text(encoding="utf-8")
    constants = ("RECORD", "ADAPTER_CONFIG", "ADAPTER", "FULL_CONFIG", "FULL", "EPOCHS")
    for name in [*(getattr(pool_module, c) for c in constants), "dev.logits.npy", "test.logits.npy", ".lock"]:
        assert f"{name}" in text


def test_the_pages_foreign_member_can_be_selected(pool, monkeypatch):
    (code,) = (c for c in page_blocks("python") if "write_member" in c)
    monkeypatch.chdir(pool.parent)
    (pool / "quora").rename(pool / "before")
    exec(compile(code, str(PAGE), "exec"), {})
    (task,) = (t for t in task_names(Path("checkpoints/pool")))
    opened = TaskPool("checkpoints/pool", task)
    assert len(opened.members) == 1
    assert opened.logits(opened.members[0].name).shape[0] == len(opened.examples().ids)


def test_what_a_kill_leaves_is_mended_though_the_folder_was_looked_at_before(pool):
    """A reader that found nothing to mend does not look again until something was renamed in the folder."""
    home = pool / "quora"
    os.utime(home, (1e9, 1e9))
    TaskPool(pool, "quora").logits("m1")
    os.rename(home / "m1", home / ".old.m1")  # the kill came between the two renames
    os.utime(home, (1.1e9, 1.1e9))
    assert "m1" in [r.name for r in TaskPool(pool, "quora").members]
    assert not (home / ".old.m1").exists()
