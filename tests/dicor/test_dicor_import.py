"""``dicor import``: anyone's predictions become the members that they should, or one line says why not.

Expected logits come from scipy and from hand-worked numbers.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool_factory import add_member, make_pool, random_labels
from scipy.special import expit, log_softmax, logit, softmax

from lora_ensemble.dicor.cli import main
from lora_ensemble.dicor.options import Form
from lora_ensemble.pool import TaskPool, read_record
from lora_ensemble.tasks import PRESETS

IDS = ["q7", "q2", "q9", "q4", "é5"]
LABELS = [1, 0, 1, 1, 0]  # binary
CLASSES = ["neg", "neu", "pos", "neu", "neg"]  # multiclass
VALUES = [0.5, 3.0, 4.5, 1.0, 2.25]  # regression
P = np.array([0.9, 0.2, 0.4, 0.75, 0.5])  # of the positive class
P3 = np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.05, 0.05, 0.9], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
NAMES = ["neg", "neu", "pos"]

Importer = Callable[..., tuple[str, str]]


def run(*args: object) -> int:
    return main([str(a) for a in args])


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """A file of these rows in the format of its ending."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(table(path.with_suffix(""), header, rows).read_bytes()))
        path.with_suffix("").unlink()
        return path
    if path.suffix == ".parquet":
        pq.write_table(pa.table({n: [r[i] for r in rows] for i, n in enumerate(header)}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, r, strict=True))) + "\n" for r in rows), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as f:
            writer = csv.writer(f, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([header, *rows])
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Labels of three tasks."""
    table(tmp_path / "binary.csv", ["id", "label"], list(zip(IDS, LABELS, strict=True)))
    table(tmp_path / "multiclass.csv", ["id", "label"], list(zip(IDS, CLASSES, strict=True)))
    table(tmp_path / "regression.csv", ["id", "label"], list(zip(IDS, VALUES, strict=True)))
    return tmp_path


@pytest.fixture
def importing(home: Path, capsys: pytest.CaptureFixture[str]) -> Importer:
    """Import files as a task of a kind, which has the kind's name; what it printed."""

    def go(kind: str, *args: object) -> tuple[str, str]:
        capsys.readouterr()
        first = ["--task-kind", kind, "--labels", home / f"{kind}.csv"]
        assert run("import", "--pool", home / "pool", "--task", kind, *first, *args) == 0
        return capsys.readouterr()

    return go


@pytest.fixture
def fails(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Import files; it must fail with one line that holds all of ``says``, and write nothing."""

    def go(kind: str, *args: object, says: Sequence[object], labels: str | None = None) -> str:
        before = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
        capsys.readouterr()
        first = ["--task-kind", kind, "--labels", home / (labels or f"{kind}.csv")]
        assert run("import", "--pool", home / "pool", "--task", kind, *first, *args) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("dicor: error: ")
        for words in says:
            assert str(words) in line
        assert {p: p.stat().st_mtime_ns for p in home.rglob("*")} == before
        return line

    return go


def logits(home: Path, kind: str, name: str, split: str = "dev") -> np.ndarray:
    """What the pool holds, in the order of ``IDS``."""
    opened = TaskPool(home / "pool", kind, split=split)
    order = opened.examples().ids.tolist()
    assert set(order) == set(IDS)
    return np.asarray(opened.logits(name))[[order.index(i) for i in IDS]]


# Formats, shuffled.

SHUFFLED = [3, 0, 4, 2, 1]


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.parquet", "m.csv.gz", "m.parquet.gz"])
def test_tables_of_probabilities_are_matched_by_id(home: Path, importing: Importer, name: str) -> None:
    table(home / name, ["id", "p"], [(IDS[i], P[i]) for i in SHUFFLED])
    out, err = importing("binary", home / name)
    assert out == f"m  dev accuracy 0.8000, 5 examples (probabilities from {name})\n"  # 0.4 is wrong, 0.5 is no yes
    assert err == ""
    np.testing.assert_allclose(logits(home, "binary", "m"), logit(P)[:, None], rtol=1e-6, atol=1e-7)
    table(home / f"three{name}", ["id", "p_pos", "p_neg", "p_neu"], [(IDS[i], *P3[i, [2, 0, 1]]) for i in SHUFFLED])
    importing("multiclass", home / f"three{name}")
    found = logits(home, "multiclass", "threem")
    np.testing.assert_allclose(found, np.log(P3), rtol=1e-6)
    np.testing.assert_allclose(softmax(found, axis=1), P3, rtol=1e-6)


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.parquet"])
def test_tables_of_values(home: Path, importing: Importer, name: str) -> None:
    said = np.array([0.25, 3.0, 5.0, -1.5, 2.0])
    table(home / name, ["id", "guess"], [(IDS[i], said[i]) for i in SHUFFLED])
    out, _ = importing("regression", home / name)
    np.testing.assert_array_equal(logits(home, "regression", "m"), said[:, None])
    assert f"Pearson r {np.corrcoef(said, VALUES)[0, 1]:.4f}" in out


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_arrays_without_ids_are_in_the_order_of_the_labels(home: Path, importing: Importer, dtype: type) -> None:
    raw = np.array([[2.0, -1, 0.5], [0, 1, 0], [-3, 0, 3], [1, 1, 0], [0, 0, 0.25]], dtype)
    np.save(home / "m.npy", raw)
    _, err = importing("multiclass", home / "m.npy")
    assert "m.npy: no ids; its rows are taken in the order of multiclass.csv" in err
    assert "its columns are taken in the order of the labels: neg, neu, pos" in err
    np.testing.assert_array_equal(logits(home, "multiclass", "m"), raw)


@pytest.mark.parametrize("key", ["ids", "id"])
def test_archives_with_ids(home: Path, importing: Importer, key: str) -> None:
    ids = np.array(IDS)[SHUFFLED]
    np.savez(home / "both.npz", **{key: ids, "forest": P3[SHUFFLED], "boosted": np.log(P3[SHUFFLED]) + 5})
    out, _ = importing("multiclass", home / "both.npz", "--from", "logits")
    assert [line.split()[0] for line in out.splitlines()] == ["forest", "boosted"]
    np.testing.assert_allclose(logits(home, "multiclass", "forest"), P3, rtol=1e-6)
    np.testing.assert_allclose(logits(home, "multiclass", "boosted"), np.log(P3) + 5, rtol=1e-6)
    record = read_record(home / "pool", "multiclass", "boosted")
    assert record.settings["imported"]["dev"]["model"] == "boosted"


def test_an_archive_of_one_array_is_called_after_the_file(home: Path, importing: Importer) -> None:
    np.savez(home / "svm.npz", ids=np.array([i.encode() for i in IDS]), labels=LABELS, scores=-P)
    importing("binary", home / "svm.npz")
    np.testing.assert_allclose(logits(home, "binary", "svm"), -P[:, None], rtol=1e-6)


def test_a_table_in_long_format_is_several_members(home: Path, importing: Importer) -> None:
    rows = [(m, i, p * s) for m, s in (("a 1", 1), ("b", 0.5)) for i, p in zip(IDS, P, strict=True)]
    random.Random(0).shuffle(rows)
    table(home / "long.csv", ["model", "id", "p"], rows)
    importing("binary", home / "long.csv")
    np.testing.assert_allclose(logits(home, "binary", "a-1"), logit(P)[:, None], atol=1e-6)
    np.testing.assert_allclose(logits(home, "binary", "b"), logit(P / 2)[:, None], atol=1e-6)
    table(home / "named.csv", ["fold", "id", "p"], rows)
    importing("binary", home / "named.csv", "--model-column", "fold", "--name", *("y" if r[0] == "b" else "x" for r in
              {r[0]: r for r in rows}.values()))  # fmt: skip
    np.testing.assert_array_equal(logits(home, "binary", "y"), logits(home, "binary", "b"))


def test_a_table_in_wide_format_is_several_members(home: Path, importing: Importer, fails: Callable[..., str]) -> None:
    wide = table(home / "wide.csv", ["id", "xgb", "rf", "age"], [(IDS[i], P[i], P[i] / 2, 40) for i in SHUFFLED])
    importing("binary", wide, "--member-columns", "xgb", "rf", "--from", "probabilities")
    np.testing.assert_allclose(logits(home, "binary", "xgb"), logit(P)[:, None], atol=1e-6)
    np.testing.assert_allclose(logits(home, "binary", "rf"), logit(P / 2)[:, None], atol=1e-6)
    assert read_record(home / "pool", "binary", "rf").settings["imported"]["dev"]["model"] == "rf"
    fails("binary", wide, "--member-columns", "svm", says=["wide.csv: no column 'svm'; columns found: 'id', 'xgb'"])
    fails("binary", wide, "--member-columns", "rf", "--columns", "rf", says=["give one of them"])
    fails(
        "binary", wide, says=["columns xgb, rf, age may be outputs", "or, where each is another model, with --member"]
    )
    long = table(home / "long.csv", ["model", "id", "p"], [("a", i, 0.5) for i in IDS])
    fails("binary", long, "--member-columns", "p", says=["long.csv: model 'a': the rows name models already"])


@pytest.mark.parametrize("labels", ["binary.csv", "whole.parquet"])
def test_whole_numbers_that_became_floats_are_ids_still(home: Path, importing: Importer, labels: str) -> None:
    table(home / "binary.csv", ["id", "label"], list(enumerate(LABELS)))
    table(home / "whole.parquet", ["id", "label"], [(float(k), v) for k, v in enumerate(LABELS)])
    table(home / "f.parquet", ["id", "p"], [(float(k), p) for k, p in enumerate(P)])
    importing("binary", home / "f.parquet", "--labels", home / labels)
    opened = TaskPool(home / "pool", "binary")
    assert opened.examples().ids.tolist() == ["0", "1", "2", "3", "4"]
    np.testing.assert_allclose(opened.logits("f"), logit(P)[:, None], atol=1e-6)


def test_lists_in_json_and_parquet(home: Path, importing: Importer) -> None:
    raw = np.log(P3) * 2
    for name in ("l.jsonl", "l.parquet"):
        table(home / name, ["id", "logits"], [(IDS[i], raw[i].tolist()) for i in SHUFFLED])
        importing("multiclass", home / name)
        np.testing.assert_allclose(logits(home, "multiclass", "l"), raw, rtol=1e-6)


def test_the_ids_of_pandas_index(home: Path, importing: Importer) -> None:
    (home / "frame.csv").write_text(",proba,length\n" + "".join(f"{IDS[i]},{P[i]},9\n" for i in SHUFFLED))
    importing("binary", home / "frame.csv")
    np.testing.assert_allclose(logits(home, "binary", "frame"), logit(P)[:, None], atol=1e-6)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(6)),
    ids=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=8),
        min_size=6,
        max_size=6,
        unique=True,
    ),
    raw=st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6),
    name=st.sampled_from(["x.csv", "x.tsv", "x.jsonl", "x.parquet", "x.npz"]),
)
def test_whatever_the_order_a_row_goes_to_its_id(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], ids: list[str], raw: list[float], name: str
) -> None:
    home = tmp_path_factory.mktemp("shuffled")
    table(home / "labels.jsonl", ["id", "label"], [(i, 1.5 * n) for n, i in enumerate(ids)])
    if name == "x.npz":
        np.savez(home / name, ids=np.array(ids)[order], x=np.array(raw)[order])
    else:
        table(home / name, ["id", "value"], [(ids[i], raw[i]) for i in order])
    first = ["import", home / name, "--task", "t", "--task-kind", "regression", "--labels", home / "labels.jsonl"]
    assert run(*first, "--pool", home / "pool") == 0
    opened = TaskPool(home / "pool", "t")
    assert opened.examples().ids.tolist() == ids
    assert opened.logits("x")[:, 0].tolist() == raw


# What the numbers are


def test_certain_probabilities_are_kept_from_infinity(home: Path, importing: Importer) -> None:
    table(home / "sure.csv", ["id", "p"], list(zip(IDS, [1, 0, 1e-9, 0.5, 1 - 1e-5], strict=True)))
    _, err = importing("binary", home / "sure.csv")
    assert "sure.csv: 3 of 5 rows hold certain" in err
    edge = 13.815510  # ln((1 - 1e-6) / 1e-6)
    found = logits(home, "binary", "sure")[:, 0]
    np.testing.assert_allclose(found, [edge, -edge, -edge, 0, logit(1 - 1e-5)], atol=2e-6)
    np.save(home / "hard.npy", np.array([[1, 0, 0.0], [0.5, 0.5, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]))
    importing("multiclass", home / "hard.npy")
    low = -13.815511  # ln(1e-6)
    np.testing.assert_allclose(logits(home, "multiclass", "hard")[1], [np.log(0.5), np.log(0.5), low], rtol=1e-6)


@pytest.mark.parametrize("names", [["p_0", "p_1"], ["1", "0"], ["prob.1", "prob.0"]], ids=str)
def test_two_columns_of_a_binary_task(home: Path, importing: Importer, names: list[str]) -> None:
    two = {"0": 1 - P, "1": P}
    table(home / "m.csv", ["id", *names], [(i, *(two[n[-1]][k] for n in names)) for k, i in enumerate(IDS)])
    importing("binary", home / "m.csv")
    np.testing.assert_allclose(logits(home, "binary", "m"), logit(P)[:, None], atol=1e-6)
    raw = np.array([[-1.0, 2], [3, 0], [0.5, 0.25], [0, 0], [1, -1]])
    np.save(home / "raw.npy", raw)
    assert "its columns are taken in the order of the labels: 0, 1" in importing("binary", home / "raw.npy")[1]
    found = logits(home, "binary", "raw")[:, 0]
    np.testing.assert_allclose(expit(found), softmax(raw, axis=1)[:, 1], rtol=1e-6)


def test_rounded_probabilities_are_made_to_sum_to_one(home: Path, importing: Importer) -> None:
    rounded = np.tile([0.33, 0.33, 0.33], (5, 1))
    np.save(home / "r.npy", rounded)
    importing("multiclass", home / "r.npy")
    np.testing.assert_allclose(logits(home, "multiclass", "r"), np.log(np.full((5, 3), 1 / 3)), rtol=1e-6)


def test_decisions_are_taken_only_when_said(home: Path, importing: Importer, fails: Callable[..., str]) -> None:
    table(home / "votes.csv", ["id", "prediction"], list(zip(IDS, CLASSES, strict=True)))
    fails("multiclass", home / "votes.csv", says=["votes.csv: column 'prediction' holds class labels only",
                                                 "say --from decisions"])  # fmt: skip
    out, err = importing("multiclass", home / "votes.csv", "--from", "decisions")
    assert "accuracy 1.0000" in out
    assert "a majority counts them fully, an average of logits or probabilities hardly" in err
    np.testing.assert_array_equal(logits(home, "multiclass", "votes"), np.eye(3)[[0, 1, 2, 1, 0]])
    np.save(home / "yes.npy", np.array([1, 0, 0, 1, 1]))
    fails("binary", home / "yes.npy", says=["yes.npy: it holds class labels only", "--from decisions"])
    importing("binary", home / "yes.npy", "--from", "decisions")
    np.testing.assert_array_equal(logits(home, "binary", "yes")[:, 0], [1, -1, -1, 1, 1])
    fails("multiclass", home / "yes.npy", "--from", "decisions", says=["yes.npy: row 0: found 1; expected one of neg"])


@pytest.mark.parametrize(
    ("header", "column", "expected"),
    [
        ("logit", [0.5, 0.1, 0.2, 0.3, 0.9], "logits"),
        ("proba", [0.5, 0.1, 0.2, 0.3, 0.9], "probabilities"),
        ("P_1", [0.5, 0.1, 0.2, 0.3, 0.9], "probabilities"),
        ("out", [0.5, 0.1, -0.2, 0.3, 0.9], "logits"),
        ("prediction", [0.5, 0.1, 0.2, 0.3, 0.9], None),
        ("prediction", [0.5, 10.0, 20.0, 3.0, 9.0], None),
        ("proba", [0.5, 0.1, -0.2, 0.3, 0.9], None),
    ],
    ids=str,
)
def test_auto_asks_where_it_could_be_mistaken(
    home: Path, importing: Importer, fails: Callable[..., str], header: str, column: list[float], expected: str | None
) -> None:
    table(home / "m.csv", ["id", header], list(zip(IDS, column, strict=True)))
    if expected:
        assert f"({expected} from m.csv)" in importing("binary", home / "m.csv")[0]
        return
    fails("binary", home / "m.csv", says=["m.csv", "say --from probabilities or --from logits"])
    importing("binary", home / "m.csv", "--from", "logits")
    np.testing.assert_array_equal(logits(home, "binary", "m")[:, 0], np.float32(column))


def test_auto_of_several_columns(home: Path, importing: Importer, fails: Callable[..., str]) -> None:
    for name, values, expected in (
        ("sum.npy", P3, "probabilities"),
        ("logs.npy", log_softmax(P3, axis=1), "logits"),
        ("half.npy", P3 / 2, "do not sum to 1"),
        ("percent.npy", P3 * 100, "logits, or percentages or counts of votes?"),
    ):
        np.save(home / name, values)
        if expected in get_args(Form):
            assert f"({expected} from {name})" in importing("multiclass", home / name)[0]
        else:
            fails("multiclass", home / name, says=[name, expected])
    table(home / "named.csv", ["id", *(f"logit_{n}" for n in NAMES)], [(i, *P3[k]) for k, i in enumerate(IDS)])
    fails("multiclass", home / "named.csv", says=["called 'logit_neg', but their rows sum to 1"])
    assert "(logits from" in importing("multiclass", home / "named.csv", "--from", "logits")[0]


# Members beside others


def test_a_boosted_tree_is_selected_beside_trained_members(tmp_path: Path) -> None:
    """scikit-learn's classifier as it comes: predict_proba in a CSV, its classes in the header."""
    from sklearn.datasets import make_classification
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.metrics import accuracy_score

    x, y = make_classification(260, 8, n_informative=6, n_classes=5, n_clusters_per_class=1, random_state=0)
    model = GradientBoostingClassifier(n_estimators=10, random_state=0).fit(x[:200], y[:200])
    make_pool(tmp_path / "pool", "sst", "multiclass", n=60)
    # The pool's examples are what they are: the features of its rows are found by their label.
    truth = random_labels("multiclass", 60)
    rng = np.random.default_rng(0)
    features = x[200:][[rng.choice(np.flatnonzero(y[200:] == label)) for label in truth]]
    proba = model.predict_proba(features)
    order = rng.permutation(60)
    rows = [(f"dev{i}", *proba[i]) for i in order]
    table(tmp_path / "boosted-dev.csv", ["id", *model.classes_], rows)
    (tmp_path / "boosted-test.npz").touch()
    np.savez(tmp_path / "boosted-test.npz", ids=[f"test{i}" for i in range(30)], p=proba[:30])
    first = ["import", "--pool", tmp_path / "pool", "--task", "sst"]
    assert run(*first, tmp_path / "boosted-dev.csv") == 0
    assert run(*first, tmp_path / "boosted-test.npz", "--split", "test") == 0
    record = read_record(tmp_path / "pool", "sst", "boosted")
    assert record.score == accuracy_score(truth, model.predict(features))
    assert record.examples == TaskPool(tmp_path / "pool", "sst").record("m01").examples
    output = tmp_path / "dicor.json"
    assert (
        run(
            "select", "--pool", tmp_path / "pool", "--task", "sst", "--method", "dicor", "--size", 7, "--output", output
        )
        == 0
    )
    assert "boosted" in [m["name"] for m in json.loads(output.read_text())["members"]]
    assert run("apply", "--ensemble", output, "--output", tmp_path / "test.csv") == 0
    assert len((tmp_path / "test.csv").read_text().splitlines()) == 31


def test_the_record_says_where_it_came_from(home: Path, importing: Importer) -> None:
    (home / "deep").mkdir()
    path = table(home / "deep" / "xgb.dev.csv", ["id", "p"], list(zip(IDS, P, strict=True)))
    importing("binary", path)
    record = read_record(home / "pool", "binary", "xgb")
    assert record.finished
    assert record.labels == ["0", "1"]
    assert record.score == 0.8
    assert (record.rank, record.base_model, record.best_epoch, record.lr) == (None, None, None, None)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    origin = {"file": "xgb.dev.csv", "sha256": digest, "model": None, "from": "probabilities"}
    assert record.settings == {"imported": {"dev": origin}}
    assert str(home) not in (home / "pool" / "binary" / "xgb" / "member.json").read_text()
    assert sorted(record.files) == ["dev.logits.npy"]


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if p.is_file()}


def test_the_same_again_changes_nothing_and_other_content_needs_overwrite(
    home: Path, importing: Importer, fails: Callable[..., str]
) -> None:
    first = table(home / "m.csv", ["id", "p"], list(zip(IDS, P, strict=True)))
    importing("binary", first)
    assert len(list((home / "pool" / "binary" / "examples").iterdir())) == 1
    before = snapshot(home / "pool")
    assert "unchanged" in importing("binary", first)[0]
    table(home / "m.parquet", ["id", "p"], list(zip(IDS, P, strict=True)))
    assert "unchanged" in importing("binary", home / "m.parquet")[0]  # the same numbers out of another file
    assert snapshot(home / "pool") == before
    table(first, ["id", "p"], list(zip(IDS, P[::-1], strict=True)))
    way = "(from m.csv); replace them with --overwrite, or give another name with --name"
    fails("binary", first, says=["pool/binary/m: already there with other dev predictions", way])
    assert snapshot(home / "pool") == before
    importing("binary", first, "--overwrite")
    np.testing.assert_allclose(logits(home, "binary", "m"), logit(P[::-1])[:, None], atol=1e-6)
    importing("binary", home / "m.parquet", "--name", "other")
    assert [m.name for m in TaskPool(home / "pool", "binary").members] == ["m", "other"]


def test_overwriting_the_only_member_may_change_the_labels(home: Path, importing: Importer) -> None:
    path = table(home / "m.csv", ["id", "p"], list(zip(IDS, P, strict=True)))
    importing("binary", path)
    table(home / "binary.csv", ["id", "label"], list(zip(IDS, [0, 1, 0, 0, 1], strict=True)))
    assert "accuracy 0.2000" in importing("binary", path, "--overwrite")[0]
    assert read_record(home / "pool", "binary", "m").score == 0.2


def test_test_predictions_are_added(home: Path, importing: Importer, fails: Callable[..., str]) -> None:
    dev = table(home / "m-dev.csv", ["id", "p"], list(zip(IDS, P, strict=True)))
    test = table(home / "m-test.csv", ["id", "p"], list(zip(IDS, P[::-1], strict=True)))
    table(home / "ids.csv", ["id"], [[i] for i in reversed(IDS)])
    more = ("--split", "test", "--labels", home / "ids.csv")
    fails("binary", test, *more, says=["pool/binary/m: no such member; import its dev predictions first"])
    importing("binary", dev)
    old = read_record(home / "pool", "binary", "m")
    out, _ = importing("binary", test, *more)
    assert out == "m  test no labels, 5 examples (probabilities from m-test.csv)\n"
    np.testing.assert_allclose(logits(home, "binary", "m", "test"), logit(P[::-1])[:, None], atol=1e-6)
    new = read_record(home / "pool", "binary", "m")
    assert (new.score, new.files["dev.logits.npy"]) == (old.score, old.files["dev.logits.npy"])
    assert set(new.settings["imported"]) == {"dev", "test"}
    before = snapshot(home / "pool")
    assert "unchanged" in importing("binary", test, *more)[0]
    assert snapshot(home / "pool") == before
    other = table(home / "other.csv", ["id", "p"], list(zip(IDS, P / 2, strict=True)))
    fails("binary", other, *more, "--name", "m", says=["other test predictions (from m-test.csv)", "--overwrite"])
    importing("binary", other, *more, "--name", "m", "--overwrite")
    np.testing.assert_allclose(logits(home, "binary", "m", "test"), logit(P / 2)[:, None], atol=1e-6)
    # Another model under the name: the old one's test predictions are not its own.
    _, err = importing("binary", other, "--name", "m", "--overwrite")
    assert "m: its test predictions went with the old ones; import them again" in err
    assert sorted(read_record(home / "pool", "binary", "m").files) == ["dev.logits.npy"]


def test_trained_members_are_never_replaced_but_may_be_added_to(home: Path, capsys: pytest.CaptureFixture) -> None:
    make_pool(home / "pool", "sst", "multiclass", n=4)
    for split, n in (("dev", 4), ("test", 2)):
        np.savez(home / f"m01-{split}.npz", ids=[f"{split}{i}" for i in range(n)], m=np.full((n, 5), 0.2))
        args = ["import", home / f"m01-{split}.npz", "--pool", home / "pool", "--task", "sst", "--split", split]
        before = snapshot(home / "pool")
        capsys.readouterr()
        assert run(*args, "--overwrite") == 2
        err = capsys.readouterr().err
        assert f"m01: this member was trained, and has its own {split} predictions; give another name" in err
        assert snapshot(home / "pool") == before


def test_the_order_and_the_ids_are_the_pools(home: Path, importing: Importer) -> None:
    """A labels file in another order makes no other examples, and rows without ids are still in its order."""
    importing("binary", table(home / "a.csv", ["id", "p"], list(zip(IDS, P, strict=True))))
    back = [(i, k) for i, k in reversed(list(zip(IDS, LABELS, strict=True)))]
    table(home / "binary.csv", ["id", "label"], back)
    np.save(home / "b.npy", -P[::-1])
    importing("binary", home / "b.npy")
    np.testing.assert_allclose(logits(home, "binary", "b"), -P[:, None], rtol=1e-6)
    importing("binary", table(home / "c.csv", ["p"], [[v] for v in P[::-1]]), "--by-row")
    np.testing.assert_array_equal(logits(home, "binary", "c"), logits(home, "binary", "a"))
    assert len(list((home / "pool" / "binary" / "examples").iterdir())) == 1


def test_unfinished_members_do_not_say_what_the_task_is_unless_they_are_alone(home: Path, importing: Importer) -> None:
    ids, truth = {"dev": IDS[::-1]}, {"dev": np.array(LABELS[::-1])}
    unfinished = {"finished": False, "labels": ["0", "1"]}
    add_member(home / "pool", "binary", "binary", "a", {"dev": np.ones((5, 1))}, ids, truth, **unfinished)
    path = table(home / "m.csv", ["id", "p"], list(zip(IDS, P, strict=True)))
    importing("binary", path)
    assert TaskPool(home / "pool", "binary").examples().ids.tolist() == IDS[::-1]
    left = {"finished": False, "labels": ["1", "0"]}
    add_member(
        home / "pool", "binary", "binary", "a", {"dev": np.ones((4, 1))}, {"dev": IDS[1:]}, {"dev": None}, **left
    )
    importing("binary", path, "--name", "n")
    np.testing.assert_array_equal(logits(home, "binary", "n"), logits(home, "binary", "m"))


def test_labels_out_of_arrays_and_out_of_the_pool_itself(home: Path, importing: Importer) -> None:
    np.save(home / "y.npy", np.array(LABELS))
    np.save(home / "p.npy", P)
    first = ["import", home / "p.npy", "--from", "probabilities", "--pool", home / "new"]
    assert run(*first, "--task", "t", "--task-kind", "binary", "--labels", home / "y.npy") == 0
    opened = TaskPool(home / "new", "t")
    assert opened.examples().ids.tolist() == ["0", "1", "2", "3", "4"]
    assert opened.examples().labels.tolist() == LABELS
    (examples,) = (home / "new" / "t" / "examples").iterdir()
    assert run(*first, "--task", "u", "--task-kind", "binary", "--labels", examples) == 0
    np.testing.assert_array_equal(TaskPool(home / "new", "u").logits("p"), opened.logits("p"))


def test_labels_are_named_by_the_file_by_option_and_by_preset(home: Path, importing: Importer) -> None:
    np.save(home / "m.npy", P3)
    _, err = importing("multiclass", home / "m.npy")
    assert "multiclass.csv: the labels are neg, neu, pos, in this order; --label-names says others" in err
    assert TaskPool(home / "pool", "multiclass").labels == NAMES
    numbers = table(home / "n.csv", ["key", "y"], list(zip(IDS, ["10", "9", "10.0", " 2", "9.0"], strict=True)))
    more = ["--id", "key", "--label", "y", "--labels", numbers, "--task", "n"]
    importing("multiclass", home / "m.npy", *more)
    assert TaskPool(home / "pool", "n").labels == ["2", "9", "10"]
    assert TaskPool(home / "pool", "n").examples().labels.tolist() == [2, 1, 2, 0, 1]
    words = table(home / "w.csv", ["id", "label"], list(zip(IDS, ["yes", "no", "yes", "yes", "no"], strict=True)))
    names = ["--labels", words, "--task", "w", "--label-names", "no", "yes"]
    importing("binary", table(home / "w1.csv", ["id", "p_yes", "p_no"], list(zip(IDS, P, 1 - P, strict=True))), *names)
    assert TaskPool(home / "pool", "w").record("w1").score == 0.8
    sst = table(home / "sst.tsv", ["id", "sentence", "sentiment"], [(i, "x", k % 5) for k, i in enumerate(IDS)])
    np.savez(home / "s.npz", ids=IDS, s=np.eye(5) * 3 - 1)
    assert run("import", home / "s.npz", "--pool", home / "pool", "--task", "sst", "--labels", sst) == 0
    assert TaskPool(home / "pool", "sst").labels == PRESETS["sst"].label_names
    assert TaskPool(home / "pool", "sst").record("s").score == 1.0


def test_columns_by_number_and_by_choice(home: Path, importing: Importer) -> None:
    rows = [(i, *P3[k], *-P3[k], CLASSES[k]) for k, i in enumerate(IDS)]
    table(home / "m.csv", ["id", "p0", "p1", "p2", "a", "b", "c", "label"], rows)
    _, err = importing("multiclass", home / "m.csv")
    assert "m.csv: columns p0, p1, p2 are taken in the order of the labels: neg, neu, pos" in err
    np.testing.assert_allclose(logits(home, "multiclass", "m"), np.log(P3), rtol=1e-6)
    importing("multiclass", home / "m.csv", "--columns", "c", "a", "b", "--name", "n")
    np.testing.assert_allclose(logits(home, "multiclass", "n"), -P3[:, [2, 0, 1]], rtol=1e-6)


def test_the_columns_go_to_the_labels_that_they_are_called_after(
    home: Path, importing: Importer, fails: Callable[..., str]
) -> None:
    names = ["pos", "neg", "neu"]  # neither sorted nor as the columns are
    table(home / "m.csv", ["id", *NAMES], [(i, *P3[k]) for k, i in enumerate(IDS)])
    importing("multiclass", home / "m.csv", "--label-names", *names)
    assert TaskPool(home / "pool", "multiclass").labels == names
    np.testing.assert_allclose(logits(home, "multiclass", "m"), np.log(P3[:, [2, 0, 1]]), rtol=1e-6)
    two = table(home / "two.csv", ["id", "model_0", "model_1"], [(i, -p, p) for i, p in zip(IDS, P, strict=True)])
    fails("binary", two, says=["two.csv: columns model_0, model_1 may be outputs; expected one of predictions"])


def test_the_true_labels_beside_the_predictions_are_no_predictions(home: Path, importing: Importer) -> None:
    rows = list(zip(IDS, VALUES, P, strict=True))
    importing("regression", table(home / "m.csv", ["id", "label", "xgb"], rows))
    np.testing.assert_allclose(logits(home, "regression", "m"), P[:, None], rtol=1e-6)
    table(home / "regression.csv", ["id", "stars"], list(zip(IDS, VALUES, strict=True)))
    table(home / "n.csv", ["id", "stars", "xgb"], rows)
    importing("regression", home / "n.csv", "--label", "stars")
    np.testing.assert_array_equal(logits(home, "regression", "n"), logits(home, "regression", "m"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused(home: Path, fails: Callable[..., str]) -> None:
    os.mkfifo(home / "pipe")
    fails("binary", home / "pipe", says=["pipe: a pipe or a device; save it to a file first"])


def test_whoever_needs_test_predictions_says_who_has_none(
    home: Path, importing: Importer, capsys: pytest.CaptureFixture[str]
) -> None:
    importing("binary", table(home / "m.csv", ["id", "p"], list(zip(IDS, P, strict=True))))
    output = home / "dicor.json"
    assert run("select", "--pool", home / "pool", "--task", "binary", "--output", output) == 0
    assert run("apply", "--ensemble", output, "--output", home / "out.csv") == 2
    err = capsys.readouterr().err
    assert "pool/binary/m: no logits for the test split" in err
    assert "or dicor import --split test for one that was imported" in err


def test_constant_values_are_told(home: Path, importing: Importer) -> None:
    out, err = importing("regression", table(home / "c.csv", ["id", "v"], [(i, 2) for i in IDS]))
    assert "Pearson r undefined" in out
    assert "c: its predictions are constant, so that it has no score" in err
    assert "never wrong" not in err
    assert read_record(home / "pool", "regression", "c").score is None


# Mistakes


def lines(*rows: str) -> str:
    return "".join(f"{row}\n" for row in rows)


GOOD = [f"{i},{p}" for i, p in zip(IDS, P, strict=True)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lines("id,p", *GOOD[:3]), "m.csv: no row for 2 of the 5 dev examples, the first with id 'q4'; every"),
        (lines("id,p", *GOOD, "zz,0.5"), "m.csv:7: id 'zz' is not one of the 5 dev examples; remove it, or give"),
        (lines("id,p", "zz,0.5", *GOOD, "yy,1"), "m.csv:2: id 'zz' is not one of the 5 dev examples; remove it, or "
         "give labels that have it (2 such rows)"),
        (lines("id,p", "a,0.5", "b,0.4"), "m.csv: none of its ids is one of the 5 dev examples: 'a' here, 'q7' there"),
        (lines("id,p", *GOOD, "q9,0.5"), "m.csv:7: id 'q9' is already at"),
        (lines("id,p", *GOOD, ",0.5"), "m.csv:7: the id is empty; each example needs its own"),
        (lines("id,p", *GOOD[:4], "é5,nan"), "m.csv:6: column 'p' is 'nan'; expected a finite number"),
        (lines("id,p", *GOOD[:4], "é5,inf"), "m.csv:6: column 'p' is 'inf'; expected a finite number"),
        (lines("id,p", *GOOD[:4], "é5,"), "m.csv:6: column 'p' is empty; expected a finite number"),
        (lines("id,p", *GOOD[:4], "é5,high"), "m.csv:6: column 'p' is 'high'; expected a finite number"),
        (lines("id;p", "q7;0,5", "q2;0,4"), "m.csv:2: column 'p' is '0,5'; expected a finite number; write 0,5 as 0.5"),
        (lines("id,p", *GOOD[:4], "é5,1.5"), "m.csv:6: column 'p' is 1.5; expected a probability, from 0 to 1"),
        (lines("id,p", "q7,55", "q2,1", "q9,1", "q4,99"), "m.csv:2: column 'p' is 55; expected a probability, from 0 "
         "to 1; divide percentages by 100; or say --from logits (2 such rows)"),
        (lines("id,p", *GOOD[:4], "é5,-0.5"), "m.csv:6: column 'p' is negative, which no probability is"),
        (lines("id,p", *GOOD[:4], "é5"), "m.csv:6: 1 fields instead of 2; mend it: every row counts"),
        (lines("id,p"), "m.csv: no rows; expected a header line and a row for each example"),
        ("", "m.csv: empty file; expected predictions"),
        (lines("0.25,0.75", "0.5,0.5"), "m.csv: its first line holds numbers (0.25, 0.75); expected a header line"),
        (lines("key,p", *GOOD), "m.csv: no column of ids; columns found: 'key', 'p'; name it with --id, or"),
        (lines("id,a,b", "q7,1,2"), "m.csv: columns a, b may be outputs; expected one of predictions; say which with"),
        (lines("id,a,b", "q7,x,y"), "m.csv: no column of outputs; expected one of predictions; say"),
        (lines("id,0", *GOOD), "m.csv: the one column of numbers, '0', is called after the negative label; give"),
        (lines("id,p,p", "q7,1,2"), "m.csv: column 'p' is there 2 times; name each column once"),
        (lines("id,p_0,p_1", "q7,0.5,0.4"), "m.csv:2: the probabilities sum to 0.9; expected 1: one for each class"),
        (b"id,p\nq7,\xff\n", "m.csv:2: byte 0xff is not UTF-8 (byte offset 8); save it as UTF-8 text"),
        ("id,p\nq7,0.5\n".encode("utf-16"), "m.csv:1: byte 0xff is not UTF-8"),
        (gzip.compress(b"id,p\n", mtime=0), "m.csv: no rows; expected a header"),
        (gzip.compress(b"id,p\n", mtime=0)[:-9], "m.csv: damaged gzip file ("),
        (gzip.compress(b"\x93NUMPY", mtime=0), "m.csv: an array, compressed with gzip; unpack it first: gunzip m.csv"),
        (pickle.dumps({"a": 1}), "m.csv: a pickle, which is never loaded; save the numbers with numpy.save, or as CSV"),
        ('{"id": "q7", "p": [0.5, 0.5]}\n{"id": "q2", "p": [1]}\n', "m.csv:2: column 'p' is [1]; expected 2 numbers"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_table_that_is_wrong(home: Path, fails: Callable[..., str], content: str | bytes, says: str) -> None:
    (home / "m.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    fails("binary", home / "m.csv", says=[str(home), says])


def test_a_repeated_id_may_mean_several_models(home: Path, fails: Callable[..., str]) -> None:
    rows = [(m, i, p) for m in "ab" for i, p in zip(IDS, P, strict=True)]
    says = ["m.csv:7: id 'q7' is already at", "m.csv:2", "name their column with --model-column"]
    fails("binary", table(home / "m.csv", ["fold", "id", "p"], rows), says=says)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (P3[:4], "m.npy: 4 rows without ids; expected 5, one for each of the dev examples in the order of the labels"),
        (P3[:, :2], "m.npy: 2 columns of outputs; expected 3, one for each label (neg, neu, pos); if there are others"),
        (P, "m.npy: 1 column of outputs; expected 3"),
        (np.stack([P3, P3]), "m.npy: float64 of shape (2, 5, 3); expected (N,) or (N, C)"),
        (np.array([["a"] * 3] * 5), "m.npy: row 0: found ['a', 'a', 'a']; expected finite numbers (5 such rows)"),
        (np.where(np.arange(15).reshape(5, 3) == 7, np.nan, P3), "m.npy: row 2: found [0.05, nan, 0.9]; expected"),
        (P3 - [1e39, 0, 0], "m.npy: row 0: found [-1e+39, 0.2, 0.1]; expected finite numbers, at most 1e+38"),
        (P3 * [[1], [1], [1], [1], [0.5]], "m.npy: row 4: the probabilities sum to 0.5; expected 1"),
        (np.zeros((0, 3)), "m.npy: float64 of shape (0, 3); expected (N,) or (N, C) numbers: a row for each example"),
        (np.zeros(5, [("id", int), ("p", float)]), "m.npy: [('id', '<i8'), ('p', '<f8')] of shape (5,)"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_an_array_that_is_wrong(home: Path, fails: Callable[..., str], array: np.ndarray, says: str) -> None:
    np.save(home / "m.npy", array)
    more = ["--from", "probabilities"] if "row 4" in says else []
    fails("multiclass", home / "m.npy", *more, says=[says])


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["m.npy", "m.npz", "ids.npz", "m.pkl", "m.csv"])
def test_a_pickle_is_never_loaded(home: Path, fails: Callable[..., str], name: str) -> None:
    bomb = np.array([[Bomb(home / "boom")]] * 5, dtype=object)
    if name == "m.npy":
        np.save(home / name, bomb, allow_pickle=True)
    elif name.endswith(".npz"):
        np.savez(home / name, **({"ids": IDS, "m": bomb} if name == "m.npz" else {"ids": bomb[:, 0], "m": P}))
    else:
        (home / name).write_bytes(pickle.dumps(bomb))
    fails("binary", home / name, says=[name, "never loaded"])
    assert not (home / "boom").exists()
    if name != "m.csv":
        fails("binary", table(home / "p.csv", ["id", "p"], list(zip(IDS, P, strict=True))), "--labels", home / name,
              says=[name, "never loaded"])  # fmt: skip
        assert not (home / "boom").exists()
    (home / "loaded").mkdir()
    if name == "m.npy":  # the bomb is one
        np.load(home / name, allow_pickle=True)
        assert (home / "boom").is_dir()


def test_archives_that_are_wrong(home: Path, fails: Callable[..., str]) -> None:
    path = home / "m.npz"
    np.savez(path, ids=IDS, m=P[:4])
    fails("binary", path, says=["m.npz: array 'm': 4 rows, but 5 ids; expected one for each"])
    np.savez(path, ids=IDS, labels=LABELS)
    fails("binary", path, says=["m.npz: no array but ids and labels; expected one for each model"])
    np.savez(path, ids=np.array(P), m=P)
    fails("binary", path, says=["m.npz: array 'ids' holds 0.9; expected ids: text or whole numbers"])
    np.savez(path, ids=IDS, a=-P, b=P * np.nan)
    fails("binary", path, says=["m.npz: array 'b': row 0: found nan; expected a finite number (5 such rows)"])
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    fails("binary", path, says=["m.npz: cannot be read as an .npz archive ("])
    with zipfile.ZipFile(home / "book.xlsx", "w") as f:
        f.writestr("xl/workbook.xml", "<x/>")
    fails("binary", home / "book.xlsx", says=["a zip archive, but no .npz: it holds 'xl/workbook.xml'; save", "CSV"])


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("binary", "id,label\nq7,1\nq2,2\n", "l.csv: labels '1' and '2': which is positive? say --label-names 1 2"),
        ("binary", "id,label\nq7,a\nq2,b\nq9,c\n", "l.csv: column 'label' has 3 different labels (a, b, c); expected"),
        ("multiclass", "id,label\nq7,a\nq2,a\n", "l.csv: column 'label' has one label only (a); name all with"),
        ("multiclass", "id,label\nq7,1\nq2,1.0\n", "l.csv: column 'label' has one label only (1, 1.0); name all with"),
        ("multiclass", "id,label\nq7,a\nq2,\n", "l.csv:3: no label (1 of 2 rows have none); add it, or leave"),
        ("regression", "id,label\nq7,1\nq2,high\n", "l.csv:3: label 'high'; expected a finite number"),
        ("regression", "id,label\nq7,1\nq2,inf\n", "l.csv:3: label 'inf'; expected a finite number"),
        ("regression", "id,label\nq7,\nq2,\n", "l.csv: all labels are empty; dev needs them"),
        ("regression", "id,label\nq7,1\nq7,2\n", "l.csv:3: id 'q7' is already at"),
        ("regression", "id,y\nq7,1\n", "l.csv: no labels: no column 'label'; columns found: 'id', 'y'; name it"),
        ("regression", "key,label\nq7,1\n", "l.csv: no column of ids; columns found: 'key', 'label'; name it"),
        ("regression", "id,label\n", "l.csv: no rows; expected a header line"),
        ("regression", "", "l.csv: empty file; expected predictions or labels"),
    ],
    ids=str,
)  # fmt: skip
def test_labels_that_are_wrong(home: Path, fails: Callable[..., str], kind: str, content: str, says: str) -> None:
    (home / "l.csv").write_text(content)
    fails(kind, table(home / "m.csv", ["id", "v"], list(zip(IDS, -P, strict=True))), labels="l.csv", says=[says])


def test_a_truth_of_several_columns_is_no_label(home: Path, fails: Callable[..., str]) -> None:
    """One-hot, or a list: a row of it is not one label."""
    np.save(home / "y.npy", np.eye(3, dtype=int)[[0, 1, 2, 1, 0]])
    np.save(home / "m.npy", P3)
    fails("multiclass", home / "m.npy", labels="y.npy", says=["y.npy: row 0: found [1, 0, 0]; expected one label"])
    table(home / "y.jsonl", ["id", "label"], [(i, [k]) for i, k in zip(IDS, LABELS, strict=True)])
    fails("multiclass", home / "m.npy", labels="y.jsonl", says=["y.jsonl:1: column 'label' is [1]; expected one label"])


def test_labels_out_of_range(home: Path, fails: Callable[..., str]) -> None:
    path = table(home / "m.csv", ["id", *NAMES[:2]], [(i, 1, 2) for i in IDS])
    says = ["multiclass.csv:4: column 'label' is 'pos'; expected one of neg, neu; if", "name all with --label-names"]
    fails("multiclass", path, "--label-names", "neg", "neu", says=says)


def test_labels_that_the_pool_knows_otherwise(home: Path, importing: Importer, fails: Callable[..., str]) -> None:
    path = table(home / "m.csv", ["id", "p"], list(zip(IDS, P, strict=True)))
    importing("binary", path)
    for name, rows, says in (
        ("differ", list(zip(IDS, LABELS[::-1], strict=True)), "differ.csv:2: the label of 'q7' is 0, but 1 in"),
        ("more", [*zip(IDS, LABELS, strict=True), ("x", 1)], "more.csv:7: id 'x' is not one of the 5 dev examples of"),
        ("fewer", list(zip(IDS, LABELS, strict=True))[1:], "fewer.csv: no row for 1 of the 5 dev examples of"),
    ):
        table(home / f"{name}.csv", ["id", "label"], rows)
        fails("binary", path, "--name", "n", labels=f"{name}.csv", says=[says, "leave out --labels: the pool has them"])
    fails("binary", path, "--label-names", "no", "yes", says=["--label-names no yes, but the task has 0 1"])


def test_what_the_command_lacks_or_has_twice(
    home: Path, importing: Importer, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(home / "m.csv", ["id", "p"], list(zip(IDS, P, strict=True)))
    (home / "two").mkdir()
    again = table(home / "two" / "m.csv", ["id", "p"], list(zip(IDS, P, strict=True)))
    says = [f"{again} and {path} would both be member 'm'; name them with --name"]
    fails("binary", path, again, says=says)
    fails("binary", path, "--name", "a", "b", says=["--name: 2 names for 1 models (m.csv); give one for each"])
    fails("binary", path, "--name", "a/b", says=["member name 'a/b': expected", "name it with --name"])
    (home / "list.json").write_text('[{"id": "q7"}]')
    fails("binary", home / "list.json", says=["list.json:1: a JSON list; expected one JSON object per line"])
    fails("binary", home / "no.csv", says=["no.csv: cannot be read (No such file or directory)"])
    fails("binary", home / "two", says=["two: cannot be read (Is a directory)"])
    fails("binary", path, "--columns", "q", says=["m.csv: no column 'q'; columns found: 'id', 'p'"])
    fails("binary", path, "--model-column", "q", says=["m.csv: no column 'q'; columns found: 'id', 'p'"])
    fails("regression", path, "--from", "probabilities", says=["a regression has values"])
    fails("regression", path, "--label-names", "a", "b", says=["--label-names has no meaning for regression"])
    fails("binary", path, "--label-names", "a", "a", says=["--label-names a a: expected two different names"])
    fails("binary", path, "--label-names", "a", "b", "c", says=["--label-names a b c: expected two different names"])
    fails("multiclass", path, "--label-names", "a", says=["--label-names a: expected two names or more, all different"])
    fails("binary", path, "--task", "../x", says=["task '../x': a task's name is a folder's name"])
    assert run("import", path, "--pool", home / "pool", "--task", "t", "--labels", home / "binary.csv") == 2
    assert "pool/t: a new task; say --task-kind multiclass, binary, multilabel or regression" in capsys.readouterr().err
    assert run("import", path, "--pool", home / "pool", "--task", "t", "--task-kind", "binary") == 2
    assert "no dev examples in this pool yet; give a file of their ids and labels with --labels" in (
        capsys.readouterr().err
    )
    importing("binary", path)
    assert run("import", path, "--pool", home / "pool", "--task", "binary", "--task-kind", "regression") == 2
    assert "--task-kind regression, but its member m is binary" in capsys.readouterr().err


def test_one_bad_file_of_several_and_nothing_is_written(home: Path, fails: Callable[..., str]) -> None:
    good = table(home / "good.csv", ["id", "p"], list(zip(IDS, P, strict=True)))
    bad = table(home / "bad.csv", ["id", "p"], list(zip(IDS[1:], P[1:], strict=True)))
    fails("binary", good, bad, says=["bad.csv: no row for 1 of the 5"])


def test_a_large_file_is_read_in_a_time_that_grows_with_its_rows(home: Path, importing: Importer) -> None:
    """16 times the rows; processor time, which other processes hardly change. Quadratic, it would be 256 times."""

    def seconds(n: int) -> float:
        ids = [f"r{i}" for i in range(n)]
        table(home / "regression.csv", ["id", "label"], [(i, k) for k, i in enumerate(ids)])
        table(home / f"m{n}.csv", ["id", "v"], [(i, 2 * k) for k, i in enumerate(reversed(ids))])
        start = time.process_time()
        importing("regression", home / f"m{n}.csv", "--task", f"t{n}")
        return time.process_time() - start

    small = max(seconds(2000), 0.001)
    assert seconds(32000) < 60 * small


def test_the_readmes_command_works_as_it_is_written(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Predictions from anywhere", 1)[1].split("\n## ", 1)[0]
    joined = section.replace("\\\n", " ").splitlines()
    commands = [line.strip() for line in joined if line.startswith("    dicor ")]
    assert [c.split()[1] for c in commands] == ["import", "import", "select"]
    rng = np.random.default_rng(0)
    dev = [(f"d{i}", k) for i, k in enumerate(rng.integers(3, size=40))]
    names = ["billing", "delivery", "returns"]
    table(tmp_path / "dev.csv", ["id", "queue"], [(i, names[k]) for i, k in dev])
    table(tmp_path / "test.csv", ["id"], [(f"t{i}",) for i in range(9)])
    p = rng.dirichlet([1, 1, 1], 40)
    table(tmp_path / "forest-dev.csv", ["id", *(f"p_{n}" for n in names)], [(i, *p[k]) for k, (i, _) in enumerate(dev)])
    np.save(tmp_path / "svm-dev.npy", rng.normal(size=(40, 3)))
    table(tmp_path / "forest-test.csv", ["id", *(f"p_{n}" for n in names)], [(f"t{i}", *p[i]) for i in range(9)])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for command in commands:
        words = [sys.executable, "-m", "lora_ensemble.dicor", *command.split("#")[0].split()[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    pool = TaskPool(tmp_path / "checkpoints" / "pool", "tickets")
    assert [m.name for m in pool.members] == ["forest", "svm"]
    assert set(pool.record("forest").examples) == {"dev", "test"}


# Nothing is dropped


def test_a_column_of_a_class_that_dev_lacks_is_not_dropped(
    home: Path, importing: Importer, fails: Callable[..., str]
) -> None:
    """The dev set has no "pos", so that the labels are neg and neu; whatever the columns are called."""
    labels = ["neg", "neu", "neg", "neu", "neg"]
    table(home / "multiclass.csv", ["id", "label"], list(zip(IDS, labels, strict=True)))
    for prefix, values in (("p_", P3), ("logit_", np.log(P3)), ("", P3), ("logit ", np.log(P3)), ("prob", P3)):
        table(home / "m.csv", ["id", *(prefix + n for n in NAMES)], [(i, *P3[k]) for k, i in enumerate(IDS)])
        says = [f"m.csv: column {prefix}pos is called after no label (neg, neu)", "--label-names", f"{prefix}neu"]
        fails("multiclass", home / "m.csv", says=says)
        table(home / "m.csv", ["id", *(prefix + n for n in NAMES)], [(i, *values[k]) for k, i in enumerate(IDS)])
        fails("multiclass", home / "m.csv", "--from", "logits", says=says)
    # By number, and where the class that is not there is the first.
    table(home / "n.csv", ["id", "p0", "p1", "p2"], [(i, *P3[k]) for k, i in enumerate(IDS)])
    fails("multiclass", home / "n.csv", says=["n.csv: column p2 is called after no label (neg, neu)", "--label-names"])
    table(home / "multiclass.csv", ["id", "label"], list(zip(IDS, [1, 2, 1, 2, 1], strict=True)))
    fails("multiclass", home / "n.csv", says=["n.csv: column p0 is called after no label (1, 2)", "--label-names"])
    fails("binary", home / "n.csv", says=["n.csv: column p2 is called after no label (0, 1)", "--label-names"])
    # Votes for it.
    table(home / "v.csv", ["id", "said"], list(zip(IDS, [1, 0, 1, 1, 2], strict=True)))
    fails("multiclass", home / "v.csv", "--from", "decisions", says=["v.csv:3", "expected one of 1, 2; if there are"])
    importing("multiclass", home / "n.csv", "--label-names", "0", "1", "2")
    np.testing.assert_allclose(logits(home, "multiclass", "n"), np.log(P3), rtol=1e-6)


def test_columns_that_are_no_outputs_may_stand_beside_them(
    home: Path, importing: Importer, fails: Callable[..., str]
) -> None:
    header = ["id", "text", "p_neg", "p_neu", "p_pos", "p_says", "length", "margin", "label"]
    rows = [(i, "a, b", *P3[k], "neg", k, k + 0.5, CLASSES[k]) for k, i in enumerate(IDS)]
    importing("multiclass", table(home / "m.csv", header, rows))
    np.testing.assert_allclose(logits(home, "multiclass", "m"), np.log(P3), rtol=1e-6)
    bare = [name.removeprefix("p_") for name in header]
    fails("multiclass", table(home / "n.csv", bare, rows), says=["n.csv: column margin is called after no label"])
    importing("multiclass", home / "n.csv", "--columns", *NAMES)
    np.testing.assert_allclose(logits(home, "multiclass", "n"), np.log(P3), rtol=1e-6)


@pytest.mark.parametrize("truth", ["label_", "", "is_", "xgb_"])
@pytest.mark.parametrize("numbers", [False, True])
def test_the_truth_as_columns_beside_the_predictions(
    home: Path, importing: Importer, fails: Callable[..., str], truth: str, numbers: bool
) -> None:
    """Two sets of columns that could be outputs, one of them 0 and 1: both are named, none is taken."""
    said = [f"p_{k}" if numbers else f"p_{name}" for k, name in enumerate(NAMES)]
    one_hot = [truth + name for name in NAMES]
    rows = [(i, *(int(c == n) for n in NAMES), *P3[k]) for k, (i, c) in enumerate(zip(IDS, CLASSES, strict=True))]
    table(home / "m.csv", ["id", *one_hot, *said], rows)
    fails("multiclass", home / "m.csv", says=[", ".join(one_hot), ", ".join(said), "say which with --columns"])
    importing("multiclass", home / "m.csv", "--columns", *said)
    np.testing.assert_allclose(logits(home, "multiclass", "m"), np.log(P3), rtol=1e-6)


@pytest.mark.parametrize("form", ["auto", "logits", "decisions"])
@pytest.mark.parametrize("kind", ["multiclass", "binary", "regression"])
def test_predictions_that_are_the_truth_are_told(home: Path, importing: Importer, kind: str, form: str) -> None:
    """Never wrong and always certain, votes included; a model that is never wrong but doubts is not."""
    if kind == "regression":
        form, truth, doubts = "auto", [[v] for v in VALUES], [[v + 0.01 * k] for k, v in enumerate(VALUES)]
    elif kind == "binary":
        truth, doubts = [[v] for v in LABELS], [[0.9 if v else 0.1 * k] for k, v in enumerate(LABELS)]
    else:
        truth = [[int(c == n) for n in NAMES] for c in CLASSES]
        doubts = [[0.9 - 0.01 * k if c == n else 0.05 + 0.005 * k for n in NAMES] for k, c in enumerate(CLASSES)]
    how = ["--from", "probabilities" if form == "auto" and kind == "binary" else form]
    if form == "decisions":
        cells = CLASSES if kind == "multiclass" else LABELS
        table(home / "m.csv", ["id", "said"], list(zip(IDS, cells, strict=True)))
    else:
        header = ["id", *(f"out_{k}" for k in range(len(truth[0])))]
        how += ["--columns", *header[1:]]
        if form == "logits" and kind == "binary":
            truth = [[2 * v - 1] for (v,) in truth]
        table(home / "m.csv", header, [(i, *v) for i, v in zip(IDS, truth, strict=True)])
        table(home / "d.csv", header, [(i, *v) for i, v in zip(IDS, doubts, strict=True)])
        assert "never wrong" not in importing(kind, home / "d.csv", *how)[1]
    err = importing(kind, home / "m.csv", *how)[1]
    assert "notice: m: never wrong and always certain on 5 dev examples" in err
