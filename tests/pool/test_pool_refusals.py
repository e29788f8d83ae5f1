"""The pool on disk: whatever is not as it was written is refused, in one line that says what and where."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from pool_factory import (
    IDS,
    LOGITS,
    TRUTH,
    add_member,
    edit,
    open_and_read,
    put,
    refused,
    sha256,
    sign,
    two_members,
)

from lora_ensemble.pool import (
    MemberRecord,
    TaskPool,
    read_array,
    read_record,
    read_tensors,
    write_examples,
    write_member,
)

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return two_members(tmp_path / "pool")


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
            np.save(f, TRUTH)
    with refused(path, "cannot be read", "copy it again"):
        open_and_read(pool)


@pytest.mark.parametrize(
    "arrays",
    [
        {"ids": np.array(IDS)},
        {"ids": np.array(IDS), "labels": 1 - TRUTH},
        {"ids": np.array(IDS[::-1]), "labels": TRUTH},
        {"ids": np.array(IDS), "labels": TRUTH.astype(float)},
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
    [{"labels": TRUTH}, {"ids": np.arange(4), "labels": TRUTH}, {"ids": np.array(IDS), "labels": np.array(IDS)}],
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
    np.savez(examples_path(pool), **{"ids": np.array(IDS), "labels": TRUTH, key: bomb})
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
        ("kind", "ordinal", "Literal['multiclass', 'binary', 'multilabel', 'regression']"),
        ("kind", ["binary"], "Literal['multiclass', 'binary', 'multilabel', 'regression']"),
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
        (["a", "b", "d", "c"], TRUTH, "dev ids differ, first in row 2: 'c' against 'd'"),
        (["x", "b", "c", "d"], TRUTH, "dev ids differ, first in row 0: 'a' against 'x'"),
        (["a", "b"], TRUTH[:2], "4 dev examples against 2"),
        (IDS, np.array([0, 1, 0, 0]), "dev labels differ, first in row 2 ('c'): 1 against 0"),
        (IDS, None, "one has labels for dev, the other has none"),
        (IDS, TRUTH.astype(float), "dev labels are int64 in one and float64 in the other"),
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
