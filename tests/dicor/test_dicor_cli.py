"""The program ``dicor`` itself, called in-process: select, compare, apply and the files they write."""

import csv
import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from pool_factory import IDS, TRUTH, add_member, make_pool, random_labels, random_logits, two_members
from scipy.special import softmax
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score

import lora_ensemble
from lora_ensemble.dicor.apply import predict
from lora_ensemble.dicor.choose.methods import Weighted
from lora_ensemble.dicor.choose.settings import MethodName
from lora_ensemble.dicor.cli import main
from lora_ensemble.dicor.record import read
from lora_ensemble.pool import TaskPool, checksum
from lora_ensemble.scores import decisions
from lora_ensemble.tasks import PRESETS


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """All three presets, 6 members each, and an unfinished and a diverged member of sst."""
    folder = tmp_path_factory.mktemp("pools") / "pool"
    for task, preset in PRESETS.items():
        make_pool(folder, task, preset.kind)
    for name, record in (("m06", {"finished": False}), ("m07", {"finished": False, "diverged": True})):
        ids = [f"dev{i}" for i in range(60)]
        labels = TaskPool(folder, "sst").examples().labels
        add_member(
            folder, "sst", "multiclass", name, {"dev": np.zeros((60, 5))}, {"dev": ids}, {"dev": labels}, **record
        )
    return folder


def run(*args):
    return main([str(a) for a in args])


def selected(pool, output, *args, task="sst"):
    method = [] if "--method" in args else ["--method", "dicor"]
    assert run("select", "--pool", pool, "--task", task, "--output", output, *method, *args) == 0
    return json.loads(output.read_text())


def test_select_writes_a_record_of_everything(pool, tmp_path, capsys):
    record = selected(pool, tmp_path / "dicor.json", "--size", 3, "--top-k", 4)
    assert list(record) == [
        "schema", "version", "task", "kind", "labels", "method", "settings", "strategy", "size", "members", "estimate",
        "best", "omni", "folds", "repeats", "considered", "left_out", "notices", "examples", "pool", "scale", "offsets",
        "score", "chosen_on",
    ]  # fmt: skip
    assert record["schema"] == 2
    assert record["version"] == lora_ensemble.__version__
    assert (record["task"], record["kind"], record["labels"]) == ("sst", "multiclass", list("01234"))
    assert (record["method"], record["strategy"]) == ("dicor", "majority")
    expected = {
        "size": 3,
        "top_k": 4,
        "similarity": "cosine",
        "strategy": "majority",
        "trade_off": 1,
        "temperature": False,
    }
    assert record["settings"] == expected
    assert (record["size"], record["considered"], record["folds"]) == (3, 6, 3)
    assert record["left_out"] == {"m06": "not finished", "m07": "diverged"}
    assert (tmp_path / record["pool"]).resolve() == pool.resolve()
    assert not record["pool"].startswith("/")

    task_pool = TaskPool(pool, "sst")
    examples = task_pool.examples()
    decided = {r.name: task_pool.logits(r.name).argmax(-1) for r in task_pool.members}
    assert record["examples"] == task_pool.members[0].examples["dev"]
    before = []
    for member in record["members"]:
        on_disk = task_pool.record(member["name"])
        assert (member["rank"], member["scaling"], member["targets"]) == (
            on_disk.rank,
            on_disk.scaling,
            on_disk.targets,
        )
        assert member["score"] == accuracy_score(examples.labels, decided[member["name"]])
        similarities = [accuracy_score(decided[b], decided[member["name"]]) for b in before]
        assert member["similarities"] == pytest.approx(similarities, abs=1e-15)
        if before:
            assert member["mean_similarity"] == pytest.approx(np.mean(similarities), abs=1e-15)
        else:
            assert member["mean_similarity"] is None
        assert member["dev_logits"] == checksum(pool / "sst" / member["name"] / "dev.logits.npy")
        assert (member["weight"], member["temperature"]) == (1 / 3, None)
        before.append(member["name"])
    scores = {name: accuracy_score(examples.labels, d) for name, d in decided.items()}
    assert (record["best"]["name"], record["best"]["in_sample"]) == (max(scores, key=scores.get), max(scores.values()))
    assert record["omni"]["members"] == 6
    out = capsys.readouterr().out
    assert "6 members on 60 dev examples; 2 left out (1 diverged, 1 not finished)" in out
    assert "In-sample" in out
    assert "within noise" in out
    honest = record["estimate"]["honest"]
    assert honest["low"] < honest["value"] < honest["high"]
    assert record["estimate"]["optimism"] == record["estimate"]["in_sample"] - honest["value"]


def test_members_json_is_not_believed_about_the_score(tmp_path):
    """The scores come from the logits: a record that boasts changes nothing."""
    make_pool(tmp_path / "pool", "sst", "multiclass")
    before = selected(tmp_path / "pool", tmp_path / "a.json")
    path = tmp_path / "pool" / "sst" / "m05" / "member.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "score": 0.99}))
    assert selected(tmp_path / "pool", tmp_path / "b.json") == before


def test_defaults_and_notice(pool, tmp_path, capsys):
    assert selected(pool, tmp_path / "a.json")["size"] == 6
    assert "dicor: notice: task sst: size is 6 instead of the default 11" in capsys.readouterr().err
    quora = selected(pool, tmp_path / "b.json", task="quora")
    assert (quora["size"], quora["settings"]["similarity"], quora["strategy"]) == (4, "cosine", "majority")
    sts = selected(pool, tmp_path / "c.json", task="sts")
    assert (sts["size"], sts["settings"]["similarity"], sts["strategy"]) == (6, "pearson", "mean")


def test_the_ensembles_score_is_that_of_applying_it_to_dev(pool, tmp_path, capsys):
    record = selected(pool, tmp_path / "d.json", "--size", 4, task="sts")
    assert run("apply", "--ensemble", tmp_path / "d.json", "--split", "dev", "--output", tmp_path / "p.csv") == 0
    rows = [line.split(" , ") for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    task_pool = TaskPool(pool, "sts")
    values = np.mean([task_pool.logits(m["name"])[:, 0].astype(float) for m in record["members"]], axis=0)
    assert [i for i, _ in rows] == task_pool.examples().ids.tolist()
    np.testing.assert_allclose([float(v) for _, v in rows], values, rtol=1e-12)
    score = record["estimate"]["in_sample"]
    assert score == pytest.approx(pearsonr(values, task_pool.examples().labels).statistic, abs=1e-12)
    out = capsys.readouterr().out
    assert f"sts dev Pearson r {score:.4f}" in out
    assert "In-sample" in out.split("sts dev Pearson r")[1]


def test_the_record_travels_with_the_pool(pool, tmp_path, monkeypatch):
    """The pool's path is relative to the record's folder, wherever dicor is called from."""
    shutil.copytree(pool, tmp_path / "a" / "pool")
    (tmp_path / "a" / "chosen").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert run("select", "--pool", "pool", "--task", "sst", "--output", "chosen/dicor.json") == 0
    assert json.loads((tmp_path / "a/chosen/dicor.json").read_text())["pool"] == "../pool"
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    apply = ("apply", "--ensemble", "b/chosen/dicor.json", "--output", "p.csv")
    assert run(*apply) == 0
    (tmp_path / "b" / "pool").rename(tmp_path / "elsewhere")
    assert run(*apply) == 2
    assert run(*apply, "--pool", "elsewhere") == 0


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_labels_of_one_class_only_are_told(kind, tmp_path, capsys):
    """By select, compare, report and the record; by import; of the test split by compare and apply."""
    said = "task mine: all {} {} labels are the same (1), so a score on them says nothing of how good a member is"
    labels = {"dev": np.ones(20, int), "test": np.ones(12, int)}
    ids = {split: [f"{split}{i}" for i in range(len(found))] for split, found in labels.items()}
    for m in range(3):
        logits = {s: random_logits(kind, found, 3, noise=0.1)[m] for s, found in labels.items()}
        add_member(tmp_path / "pool", "mine", kind, f"m{m}", logits, ids, labels)
    assert (
        "all 20 dev labels are the same (1)"
        in selected(tmp_path / "pool", tmp_path / "d.json", task="mine")["notices"][0]
    )
    assert said.format(20, "dev") in capsys.readouterr().err
    where = ("--pool", tmp_path / "pool", "--task", "mine")
    assert run("compare", *where) == 0
    assert said.format(20, "dev") in capsys.readouterr().err
    assert run("compare", *where, "--split", "test") == 0
    assert said.format(12, "test") in capsys.readouterr().err
    assert run("report", *where, "--output", tmp_path / "r.html", "--split", "test") == 0
    page = (tmp_path / "r.html").read_text()
    assert "all 20 dev labels are the same (1)" in page
    assert "all 12 test labels are the same (1)" in page
    capsys.readouterr()
    assert run("apply", "--ensemble", tmp_path / "d.json", "--output", tmp_path / "p.csv") == 0
    assert said.format(12, "test") in capsys.readouterr().err
    (tmp_path / "dev.csv").write_text("id,label\na,yes\nb,yes\n")
    (tmp_path / "m.csv").write_text("id,p_yes,p_no\na,0.9,0.1\nb,0.4,0.6\n")
    given = ("--task", "new", "--task-kind", kind, "--label-names", "no", "yes", "--labels", tmp_path / "dev.csv")
    assert run("import", tmp_path / "m.csv", "--pool", tmp_path / "pool", *given) == 0
    assert "notice: all 2 dev labels are the same (yes)" in capsys.readouterr().err


TO_THE_LETTER = {
    # What the course's code writes: f.write(f"id \t Predicted_Sentiment \n"), then f.write(f"{p} , {s} \n").
    "sst": "id \t Predicted_Sentiment \ntest0 , 4 \ntest1 , 0 \ntest2 , 2 \n",
    "quora": "id \t Predicted_Is_Paraphrase \ntest0 , 1.0 \ntest1 , 0.0 \ntest2 , 1.0 \n",
    "sts": "id \t Predicted_Similiary \ntest0 , 4.25 \ntest1 , -0.5 \ntest2 , 0.0 \n",
}
SAID = {
    "multiclass": np.eye(5)[[4, 0, 2]],
    "binary": np.array([[0.5], [-0.5], [2.0]]),
    "regression": np.array([[4.25], [-0.5], [0.0]]),
}
LABELS = {"multiclass": [4, 0, 1], "binary": [1, 0, 0], "regression": [4.0, 0.0, 1.0]}


def one_member(folder, task, kind, *, test_labels=None, ids=("test0", "test1", "test2"), **record):
    ids = {"dev": ["a", "b", "c"], "test": ids}
    labels = {"dev": np.array(LABELS[kind]), "test": test_labels}
    add_member(folder, task, kind, "only", {"dev": SAID[kind], "test": SAID[kind]}, ids, labels, **record)
    selected(folder, folder / "dicor.json", task=task)
    assert run("apply", "--ensemble", folder / "dicor.json", "--split", "test", "--output", folder / "p.csv") == 0
    return (folder / "p.csv").read_bytes().decode()


@pytest.mark.parametrize("task", ["sst", "quora", "sts"])
def test_the_leaderboard_file_to_the_letter(task, tmp_path):
    assert one_member(tmp_path, task, PRESETS[task].kind) == TO_THE_LETTER[task]


@pytest.mark.parametrize(
    ("kind", "labels", "values"),
    [
        ("multiclass", ["awful", "bad, not awful", 'so "so"', "good", "great"], ["great", "awful", 'so "so"']),
        ("binary", ["no", "yes"], ["yes", "no", "yes"]),
        ("binary", ["1", "0"], ["0", "1", "0"]),
        ("binary", ["0", "1"], ["1", "0", "1"]),
        ("regression", [], ["4.25", "-0.5", "0.0"]),
    ],
)
@pytest.mark.parametrize("task", ["mine", "sst"])
def test_predictions_of_a_users_own_task_are_plain_csv_with_its_labels(kind, labels, values, task, tmp_path):
    """A task that is called as the course's one, but is another, is the user's own too."""
    found = one_member(tmp_path, task, kind, labels=labels, ids=["test0", "a, b", 'c "d"'])
    assert found.splitlines()[:2] == ["id,prediction", f"test0,{values[0]}"]
    rows = list(csv.reader(io.StringIO(found)))
    assert rows == [["id", "prediction"], *([i, v] for i, v in zip(["test0", "a, b", 'c "d"'], values, strict=True))]


@pytest.mark.parametrize(("task", "form"), [("sst", "decisions"), ("quora", "decisions"), ("sts", "auto")])
@pytest.mark.parametrize("blanks", [True, False])
def test_a_leaderboard_file_comes_back_as_a_member(task, form, blanks, tmp_path):
    """To the letter as the course writes it, and as an editor leaves it that takes blanks at a line's end."""
    kind = PRESETS[task].kind
    lines = [line if blanks else line.rstrip() for line in TO_THE_LETTER[task].splitlines()]
    (tmp_path / "said.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "dev.csv").write_text(
        f"id,{PRESETS[task].label}\n" + "".join(f"test{i},{v}\n" for i, v in enumerate(LABELS[kind]))
    )
    pool = tmp_path / "pool"
    given = ["--pool", pool, "--task", task, "--labels", tmp_path / "dev.csv", "--from", form]
    assert run("import", tmp_path / "said.csv", *given) == 0
    decided = decisions(TaskPool(pool, task).logits("said"), kind)
    np.testing.assert_array_equal(decided, decisions(SAID[kind], kind))
    assert TaskPool(pool, task).examples().ids.tolist() == ["test0", "test1", "test2"]
    # And its own predictions of a task that is none of the course's.
    (tmp_path / "own").mkdir()
    text = one_member(tmp_path / "own", "mine", kind, labels=PRESETS[task].labels)
    (tmp_path / "plain.csv").write_text(text)
    assert run("import", tmp_path / "plain.csv", *given) == 0
    np.testing.assert_array_equal(decisions(TaskPool(pool, task).logits("plain"), kind), decided)


@pytest.mark.parametrize(
    ("a", "b", "winner"),
    [
        ({"decided": "1110", "rank": 4}, {"decided": "0100", "rank": 8}, "b"),
        ({"decided": "1110", "rank": 8}, {"decided": "0111", "rank": 4}, "a"),
        ({"decided": "0100", "rank": 8}, {"decided": "0111"}, "a"),
        ({"decided": "1000", "rank": 4}, {"decided": "0111", "rank": 4}, "b"),
        ({"decided": "1110", "rank": 4}, {"decided": "0111", "rank": 4}, "a"),
    ],
    ids=["rank", "rank of the other", "no rank", "score", "name"],
)
def test_ties_of_two_members_end_to_end(a, b, winner, tmp_path):
    """Two members tie wherever they differ, so the ensemble is the one that wins the ties; the labels are 1111."""
    ids = {"dev": list("wxyz"), "test": list("WXYZ")}
    decided = {"a": a["decided"], "b": b["decided"]}
    for name, member in (("a", a), ("b", b)):
        logits = np.array([[float(c) - 0.5] for c in decided[name]])
        ranked = {"rank": member.get("rank")}
        both = {"dev": logits, "test": logits}
        add_member(tmp_path / "pool", "quora", "binary", name, both, ids, {"dev": np.ones(4, int)}, **ranked)
    record = selected(tmp_path / "pool", tmp_path / "d.json", task="quora")
    assert record["estimate"]["in_sample"] == decided[winner].count("1") / 4
    assert run("apply", "--ensemble", tmp_path / "d.json", "--output", tmp_path / "p.csv") == 0
    rows = (tmp_path / "p.csv").read_text().splitlines()[1:]
    assert rows == [f"{i} , {float(d)} " for i, d in zip("WXYZ", decided[winner], strict=True)]


def test_apply_prints_the_score_only_where_the_labels_are_known(tmp_path, capsys):
    one_member(tmp_path / "a", "sst", "multiclass")
    assert "accuracy 0" not in capsys.readouterr().out.split("dicor.json")[-1]
    one_member(tmp_path / "b", "sst", "multiclass", test_labels=np.array([4, 1, 2]))
    out = capsys.readouterr().out.split("dicor.json")[-1]
    assert "sst test accuracy 0.6667" in out
    assert "In-sample" not in out


def rows_of(out, task):
    """Method to the numbers of its row in what compare printed."""
    block = out[out.index(f"{task}: 6 members") :]
    lines = itertools.takewhile(str.strip, block[block.index(" on dev ") :].splitlines()[1:])
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_compare_prints_all_methods_per_task_and_the_overall_score(pool, tmp_path, capsys):
    methods = ["dicor", "greedy"]
    asked = [word for method in methods for word in ("--method", method)]
    assert run("compare", "--pool", pool, *asked) == 0
    out = capsys.readouterr().out
    records = {(t, m): selected(pool, tmp_path / "d.json", "--method", m, task=t) for t in PRESETS for m in methods}
    for (task, method), record in records.items():
        rows = rows_of(out, task)
        assert list(rows) == ["best", "omni", "dicor", "greedy"]
        for name, found in ((method, record["estimate"]), ("best", record["best"]), ("omni", record["omni"])):
            assert rows[name][1:4:1] == [
                f"{found['in_sample']:.4f}",
                f"{found['honest']['value']:.4f}",
                f"{found['honest']['low']:.4f}",
            ]
        assert rows[method][0] == str(record["size"])
    for key, column in (("in_sample", 1), ("honest", 2)):
        three = [records[t, "dicor"]["estimate"][key] for t in ("sst", "quora", "sts")]
        sst, quora, sts = (x if key == "in_sample" else x["value"] for x in three)
        line = next(x for x in out[out.index("overall:") :].splitlines() if x.startswith("dicor"))
        assert line.split()[column] == f"{(sst + quora + (sts + 1) / 2) / 3:.4f}"
    assert "In-sample" in out
    assert "2 left out (1 diverged, 1 not finished)" in out


def test_compare_takes_all_methods(pool, capsys):
    assert run("compare", "--pool", pool, "--task", "quora") == 0
    assert list(rows_of(capsys.readouterr().out, "quora")) == list(get_args(MethodName))


def test_the_test_split_is_scored_with_what_was_chosen_on_dev(tmp_path, capsys):
    rng = np.random.default_rng(0)
    dev, test = (random_labels("binary", n, seed=n) for n in (60, 50))
    ids = {"dev": [f"d{i}" for i in range(60)], "test": [f"t{i}" for i in range(50)]}
    said = {}
    for m in range(4):
        logits = {s: (y[:, None] * 2.0 - 1 + rng.normal(0, 2, (len(y), 1))) for s, y in (("dev", dev), ("test", test))}
        add_member(tmp_path / "pool", "mine", "binary", f"m{m}", logits, ids, {"dev": dev, "test": test})
        said[f"m{m}"] = {s: (x[:, 0].astype(np.float32) > 0).astype(int) for s, x in logits.items()}
    assert run("compare", "--pool", tmp_path / "pool", "--method", "best", "--split", "test") == 0
    out = capsys.readouterr().out
    best = max(said, key=lambda name: accuracy_score(dev, said[name]["dev"]))
    row = next(line for line in out.splitlines() if line.startswith("best "))
    assert row.split()[2] == f"{accuracy_score(dev, said[best]['dev']):.4f}"
    assert row.split()[-1] == f"{accuracy_score(test, said[best]['test']):.4f}"


@pytest.mark.parametrize("method", ["weighted", "weighted-offset", "greedy", "dicor-auto"])
def test_a_record_with_weights_applies_to_what_was_scored(method, pool, tmp_path, capsys):
    args = ["--temperature"] if method == "weighted" else []
    record = selected(pool, tmp_path / "d.json", "--method", method, *args)
    assert run("apply", "--ensemble", tmp_path / "d.json", "--split", "dev", "--output", tmp_path / "p.csv") == 0
    assert f"sst dev accuracy {record['estimate']['in_sample']:.4f}" in capsys.readouterr().out
    # By hand, with scipy's softmax.
    pool_of = TaskPool(pool, "sst")
    each = [
        softmax(pool_of.logits(m["name"]).astype(float) / (m["temperature"] or 1), axis=1) for m in record["members"]
    ]
    mean = sum(m["weight"] * p for m, p in zip(record["members"], each, strict=True))
    assert (record["offsets"] is not None) is (method == "weighted-offset")
    decided = (record["scale"] * np.log(mean) + (record["offsets"] or [0] * 5)).argmax(1)
    rows = (tmp_path / "p.csv").read_text().splitlines()[1:]
    assert [int(row.split(" , ")[1]) for row in rows] == decided.tolist()
    assert sum(m["weight"] for m in record["members"]) == pytest.approx(1)


@pytest.mark.parametrize("task", ["sst", "quora", "sts"])
def test_a_record_with_offsets_applies_as_the_method_predicts(task, pool, tmp_path, capsys):
    record = selected(pool, tmp_path / "d.json", "--method", "weighted-offset", task=task)
    printed = capsys.readouterr().out
    ensemble, pool_of = read(tmp_path / "d.json"), TaskPool(pool, task)
    names = [m.name for m in pool_of.members]
    logits = {s: np.stack([TaskPool(pool, task, split=s).logits(n) for n in names]) for s in ("dev", "test")}
    examples, ranks = pool_of.examples(), [m.rank for m in pool_of.members]
    fitted = Weighted(offset=True).fit(
        logits["dev"], examples.labels, kind=pool_of.kind, names=names, ranks=ranks, ids=examples.ids.tolist()
    )
    for split, each in logits.items():
        _, found, _ = predict(ensemble, pool, split)
        if task == "sts":
            np.testing.assert_allclose(found, fitted.predict(each), rtol=1e-9)
        else:
            np.testing.assert_array_equal(found, fitted.predict(each))
    if task == "sts":
        assert record["offsets"] is None
        assert "offset by class" not in printed
    else:
        assert record["offsets"] == pytest.approx(fitted.choice_.offsets)
        assert (
            f"multiplied by {record['scale']:.3f}, then offset by class: 0 {record['offsets'][0]:+.3f}, 1 " in printed
        )


@pytest.mark.parametrize(("name", "decided"), [("majority", "0100"), ("weighted", "0110")])
def test_a_record_that_an_earlier_version_wrote_is_read_as_it_stands(name, decided, tmp_path):
    """With temperatures, offsets and similarities: version 0.1.0 wrote it of the three members made here."""
    text = (Path(__file__).parent / "records" / f"{name}.json").read_text(encoding="utf-8")
    (tmp_path / "dicor.json").write_text(text, encoding="utf-8")
    two_members(tmp_path / "pool")
    third = {"dev": np.array([[-0.5], [0.75], [-0.25], [-1.0]])}
    lora = {"rank": 4, "scaling": 3.0, "targets": "qv"}
    add_member(tmp_path / "pool", "quora", "binary", "m2", third, {"dev": IDS}, {"dev": TRUTH}, **lora)
    args = ("--ensemble", tmp_path / "dicor.json", "--split", "dev", "--output", tmp_path / "p.csv")
    assert run("apply", *args) == 0
    rows = (tmp_path / "p.csv").read_text().splitlines()[1:]
    assert rows == [f"{i} , {float(d)} " for i, d in zip(IDS, decided, strict=True)]
    unsaid = ',\n "score": "accuracy",\n "chosen_on": "dev"\n}\n'
    assert read(tmp_path / "dicor.json").to_json() == text.removesuffix("\n}\n") + unsaid


def test_a_record_from_before_offsets_is_read(pool, tmp_path, capsys):
    record = selected(pool, tmp_path / "d.json", "--method", "weighted")
    assert (record.pop("scale"), record.pop("offsets")) == (1, None)
    (tmp_path / "d.json").write_text(json.dumps(record))
    assert run("apply", "--ensemble", tmp_path / "d.json", "--split", "dev", "--output", tmp_path / "p.csv") == 0
    assert f"sst dev accuracy {record['estimate']['in_sample']:.4f}" in capsys.readouterr().out


def test_exact_copies_are_left_out_with_a_notice(pool, tmp_path, capsys):
    shutil.copytree(pool, tmp_path / "pool")
    before = selected(tmp_path / "pool", tmp_path / "a.json", task="quora")
    capsys.readouterr()
    examples, source = TaskPool(pool, "quora").examples(), TaskPool(pool, "quora").logits("m01")
    truth, ids = {"dev": examples.labels}, {"dev": examples.ids.tolist()}
    for name in ("twin", "triplet"):
        add_member(tmp_path / "pool", "quora", "binary", name, {"dev": source}, ids, truth)
    after = selected(tmp_path / "pool", tmp_path / "b.json", task="quora")
    assert [m["name"] for m in after["members"]] == [m["name"] for m in before["members"]]
    assert after["estimate"] == before["estimate"]
    assert after["considered"] == before["considered"]
    assert "task quora: 2 members with the very logits of m01 left out: triplet, twin" in capsys.readouterr().err


def test_a_useless_member_of_a_regression_is_left_out_with_a_notice(pool, tmp_path, capsys):
    shutil.copytree(pool, tmp_path / "pool")
    before = selected(tmp_path / "pool", tmp_path / "a.json", task="sts")
    examples = TaskPool(pool, "sts").examples()
    flat, ids = np.full((60, 1), 2.5), {"dev": examples.ids.tolist()}
    add_member(tmp_path / "pool", "sts", "regression", "flat", {"dev": flat}, ids, {"dev": examples.labels})
    after = selected(tmp_path / "pool", tmp_path / "b.json", task="sts")
    assert (after["members"], after["estimate"]) == (before["members"], before["estimate"])
    assert "member flat: its dev predictions are constant (all 2.5)" in capsys.readouterr().err


def test_compare_without_all_three_presets_has_no_overall_score(pool, tmp_path, capsys):
    shutil.copytree(pool, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "quora")
    assert run("compare", "--pool", tmp_path / "two", "--task", "sts") == 0
    assert "overall" not in capsys.readouterr().out


def test_written_files_replace_old_ones_whole_and_leave_nothing_beside(pool, tmp_path):
    (tmp_path / "dicor.json").write_text("old")
    selected(pool, tmp_path / "dicor.json")
    assert run("select", "--pool", pool, "--task", "nope", "--output", tmp_path / "dicor.json") == 2
    assert json.loads((tmp_path / "dicor.json").read_text())["task"] == "sst"
    assert [p.name for p in tmp_path.iterdir()] == ["dicor.json"]


def test_a_device_can_be_written_to(pool, tmp_path):
    assert run("select", "--pool", pool, "--task", "sst", "--output", "/dev/null") == 0


@pytest.mark.parametrize(
    "args", [["--help"], ["select", "--help"], ["compare", "--help"], ["apply", "--help"], ["--version"]]
)
def test_help_and_version_leave_with_zero(args, capsys):
    assert main(args) == 0
    assert "dicor" in capsys.readouterr().out


def test_options_are_called_as_their_fields(capsys):
    assert main(["import", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in ("--from", "--task-kind", "--member-columns", "--by-row"))


def test_as_a_process(pool, tmp_path):
    program = [sys.executable, "-m", "lora_ensemble.dicor"]
    done = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"dicor {lora_ensemble.__version__}\n"
    output = tmp_path / "d.json"
    args = ["select", "--pool", pool, "--task", "sst", "--output", output]
    done = subprocess.run([*program, *args], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"saved {output}\n")
    done = subprocess.run([*program, "select"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("dicor: error: ")
    assert done.stderr.count("\n") == 1
