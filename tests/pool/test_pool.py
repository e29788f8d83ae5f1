"""The pool on disk: what is written is read, under which names, and as its page documents it.

Nothing is trained here and torch is not needed.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool_factory import (
    IDS,
    LOGITS,
    TRUTH,
    make_pool,
    refused,
    sha256,
    two_members,
)
from safetensors.numpy import load_file

import lora_ensemble.pool as pool_module
from lora_ensemble.dicor import compare
from lora_ensemble.errors import UserError
from lora_ensemble.pool import (
    MemberRecord,
    TaskPool,
    check_name,
    examples_fingerprint,
    read_array,
    read_examples,
    read_record,
    read_records,
    read_tensors,
    task_names,
    write_examples,
    write_member,
)

PAGE = REPOSITORY / "checkpoints" / "README.md"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return two_members(tmp_path / "pool")


# What is written is read


@pytest.mark.parametrize(
    "labels",
    [None, np.array([3, 0, 4, 1]), np.array([0.5, 5.0, 0.1 + 0.2, 1e-300])],
    ids=["unknown", "classes", "values"],
)
def test_examples_come_back_to_the_last_bit(tmp_path, labels):
    ids = np.array(["dev-1", "é", "日本", "a b\tc"])
    fingerprint = write_examples(tmp_path, "sst", "dev", ids, labels)
    assert [p.name for p in (tmp_path / "sst" / "examples").iterdir()] == [f"dev-{fingerprint}.npz"]
    found = read_examples(tmp_path, "sst", "dev", fingerprint)
    assert found.ids.tolist() == ids.tolist()
    if labels is None:
        assert found.labels is None
    else:
        assert found.labels.dtype == labels.dtype
        assert found.labels.tolist() == labels.tolist()


def test_fingerprint_by_hand():
    ids, labels = np.array(["a", "bc"]), np.array([1, 0], np.int32)
    told = b"a\0bc" + b"\1" + b"\1" + b"\0" * 7 + b"\0" * 8  # int64, little-endian
    assert examples_fingerprint(ids, labels) == hashlib.sha256(told).hexdigest()[:16]
    assert examples_fingerprint(ids, None) == hashlib.sha256(b"a\0bc").hexdigest()[:16]


def test_fingerprint_knows_order_labels_and_their_absence():
    prints = {
        examples_fingerprint(np.array(ids), None if labels is None else np.array(labels))
        for ids in (["a", "b"], ["b", "a"])
        for labels in ([0, 1], [1, 0], [0.0, 1.0], None)
    }
    assert len(prints) == 8


def test_examples_are_written_once(tmp_path):
    fingerprint = write_examples(tmp_path, "quora", "dev", np.array(IDS), TRUTH)
    path = tmp_path / "quora" / "examples" / f"dev-{fingerprint}.npz"
    before = path.stat()
    assert write_examples(tmp_path, "quora", "dev", np.array(IDS), TRUTH) == fingerprint
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_ids_and_labels_may_be_lists_and_numbers(tmp_path):
    """What a user of another program has at hand."""
    fingerprint = write_examples(tmp_path, "quora", "dev", [10, 11], [0, 1])
    found = read_examples(tmp_path, "quora", "dev", fingerprint)
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
        write_examples(tmp_path, "t", "dev", IDS, TRUTH)
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


def test_the_logits_of_a_whole_pool_are_opened_and_not_kept(pool):
    one, two = (compare.Logits(TaskPool(pool, "quora"), name) for name in ("m0", "m1"))
    for _ in range(3):
        np.testing.assert_array_equal(one, LOGITS)
        np.testing.assert_array_equal(two, -LOGITS)
    assert not np.shares_memory(np.asarray(one), np.asarray(one))
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(two)[0] = 0


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


@pytest.mark.parametrize("task", ["../x", "a/b", "", ".x", "/x", "a" * 151])
def test_nothing_is_written_to_or_read_from_a_task_that_is_no_folders_name(tmp_path, task):
    pool = tmp_path / "pool"
    pool.mkdir()
    record = MemberRecord(name="m", task=task, kind="binary")
    for call in (
        lambda: write_member(pool, record, {}),
        lambda: write_examples(pool, task, "dev", ["a"], None),
        lambda: read_record(pool, task, "m"),
        lambda: read_records(pool, task),
        lambda: read_examples(pool, task, "dev", "0"),
        lambda: TaskPool(pool, task),
    ):
        with pytest.raises(UserError, match="a task's name is a folder's name"):
            call()
    assert [p.name for p in tmp_path.rglob("*")] == ["pool"]


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
    constants = ("RECORD", "ADAPTER_CONFIG", "ADAPTER", "FULL_CONFIG", "FULL")
    of_splits = ("dev.logits.npy", "test.logits.npy", "dev.epochs.npy", "oof.logits.npy", "oof.epochs.npy")
    for name in [*(getattr(pool_module, c) for c in constants), *of_splits, ".lock"]:
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
