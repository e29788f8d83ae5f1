"""Several labels of a text end to end, from training to a pipeline of transformers; their loss and metrics."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import save_tiny
from fastapi.testclient import TestClient
from pool_factory import refused
from scipy.special import expit
from sklearn.metrics import f1_score
from torchmetrics import classification
from trained_pool import WORDS, peft_logits

from lora_ensemble import Ensemble, pool
from lora_ensemble.bank.lora import Member
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.ensemble.options import Limits
from lora_ensemble.ensemble.serve.app import make_app
from lora_ensemble.main import main
from lora_ensemble.tasks import Task
from lora_ensemble.text.readers import Split
from lora_ensemble.train.batches import ExampleWeights
from lora_ensemble.train.evaluation import History, check_metrics, member_losses, metric, step_losses
from lora_ensemble.train.runs.halving import _correlation

NAMES = ["good", "slow", "night"]


def task(**fields: Any) -> Task:
    return Task(name="t", kind="multilabel", text=["x"], label_names=["a", "b", "c"], **fields)


# The loss


@pytest.mark.parametrize("positives", [None, [1.0, 4.0, 0.5]])
def test_the_loss_is_torchs(positives: list[float] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 7, 3, generator=generator), torch.randint(2, (7, 3), generator=generator)
    weight = None if positives is None else torch.tensor(positives)
    torchs = torch.nn.BCEWithLogitsLoss(pos_weight=weight)
    found = member_losses(logits, labels, "multilabel", 0.0, positives)
    assert found.shape == (4, 7)
    for m in range(4):
        torch.testing.assert_close(found[m].mean(), torchs(logits[m], labels.float()))
    smooth = member_losses(logits, labels, "multilabel", 0.2, positives)
    torch.testing.assert_close(smooth[1].mean(), torchs(logits[1], labels * 0.8 + 0.1))
    torch.testing.assert_close(step_losses(logits, {"labels": labels, "size": 7}, task(class_weights=positives), 1)[2],
                               torchs(logits[2], labels.float()))  # fmt: skip
    assert member_losses(logits[:, :0], labels[:0], "multilabel").shape == (4, 0)


def test_a_binary_loss_is_what_it_was_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 50, 1, generator=generator, requires_grad=True)
    labels = torch.randint(2, (50,), generator=generator)
    before = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[..., 0], labels.float().expand(3, 50), reduction="none"
    )
    now = member_losses(logits, labels, "binary")
    assert torch.equal(before, now)
    (a,), (b,) = (torch.autograd.grad(x.sum(), logits) for x in (before, now))
    assert torch.equal(a, b)
    values = torch.randn(50, generator=generator)
    assert torch.equal(member_losses(logits, values, "regression"), (logits[..., 0] - values).square())


def test_weights_of_labels_are_none_of_examples() -> None:
    split = Split(np.array(["1", "2"]), [["x", "y"]], np.array([[1, 0, 0], [0, 1, 1]]))
    assert not ExampleWeights(task(class_weights=[1, 2, 3]), split, [Member()]).anything
    own = Split(split.ids, split.texts, split.labels, weights=np.array([1.0, 3.0]))
    assert ExampleWeights(task(class_weights=[1, 2, 3]), own, [Member()]).of(np.array([1, 0])).tolist() == [[3, 1]]


# Metrics and correlations


@pytest.mark.parametrize("name", ["F1Score", "AUROC", "HammingDistance", "ExactMatch", "RankingLoss"])
def test_metrics_are_torchmetrics(name: str) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 3)), rng.integers(2, size=(30, 3))
    assert check_metrics([name], task()) == [name]
    theirs = getattr(classification, f"Multilabel{name}")(num_labels=3)
    expected = float(theirs(torch.from_numpy(expit(logits)), torch.from_numpy(labels)))
    assert metric(name, task(), logits, labels) == pytest.approx(expected, abs=1e-7)


def test_no_metric_of_others() -> None:
    with refused("metrics: 'MatthewsCorrCoef2' is no class of torchmetrics that gives one number for task 't'"):
        check_metrics(["MatthewsCorrCoef2"], task())


def test_logits_of_labels_are_not_centred_as_classes_are() -> None:
    """A member that says more of all labels of some texts is unlike one that does not."""
    x = np.random.default_rng(0).normal(size=(1, 20, 3))
    both = np.concatenate([x, x + 5 * np.random.default_rng(1).normal(size=(1, 20, 1))]).astype(np.float32)
    history = History(["m", "n"], [task()])
    evaluation: Any = type("E", (), {"logits": both, "scores": [0.5, 0.5]})
    history.add({"t": evaluation}, [True, True])
    expected = np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1]
    assert _correlation(history.logits_at(1))[0, 1] == pytest.approx(expected, abs=1e-3)
    assert expected < 0.5


# The whole path


def sentences(n: int, seed: int) -> list[tuple[str, list[str]]]:
    """Texts of two to eight words, and those of the names that stand in them."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(n)]
    return [(text, [name for name in NAMES if name in text.split()]) for text in texts]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained and predicted: train.csv with names in a cell, test.csv the same; dev is a share of train."""
    folder = tmp_path_factory.mktemp("several")
    base = save_tiny(folder / "base", "bert", WORDS)
    for split, n in (("train", 150), ("test", 40)):
        with (folder / f"{split}.csv").open("w", newline="") as f:
            rows = [[f"{split}{i}", t, ", ".join(s)] for i, (t, s) in enumerate(sentences(n, len(split)))]
            csv.writer(f).writerows([["id", "text", "tags"], *rows])
    mine = {
        "name": "mine", "kind": "multilabel", "text": ["text"], "label": "tags", "label_names": NAMES, "id": "id",
        "train": "train.csv", "dev": 0.3, "test": "test.csv", "class_weights": [2.0, 2.0, 1.0], "label_smoothing": 0.02,
        "metrics": ["F1Score"],
    }  # fmt: skip
    config = {
        "data": {"root": str(folder), "tasks": [mine], "batch_size": 8},
        "model": {
            "base_model": str(base),
            "members": [
                {"rank": [2, 4], "targets": "all-linear", "lr": 1e-2},
                {"rank": 3, "targets": "qkv", "lr": 5e-3, "bag": True},
                {"targets": "none", "lr": 1e-2},
            ],
        },
        "pool": {"dir": str(folder / "pool")},
        "trainer": {"default_root_dir": str(folder), "accelerator": "cpu", "max_epochs": 6,
                    "enable_progress_bar": False, "logger": False},
    }  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    for command in ("fit", "predict"):
        assert main([command, "--config", str(folder / "mine.yaml")]) == 0
    select = ["select", "--pool", str(folder / "pool"), "--task", "mine", "--output", str(folder / "dicor.json")]
    assert dicor(select) == 0
    return folder


def truth(of: list[tuple[str, list[str]]]) -> np.ndarray:
    return np.array([[int(name in names) for name in NAMES] for _, names in of])


def test_the_pool(home: Path) -> None:
    opened = pool.TaskPool(home / "pool", "mine")
    labels = opened.examples().labels
    assert labels is not None
    train = dict(zip((f"train{i}" for i in range(150)), truth(sentences(150, 5)), strict=True))
    assert (labels == np.stack([train[i] for i in opened.examples().ids])).all()
    assert labels.shape == (45, 3)
    assert (opened.kind, opened.labels, opened.scored_by) == ("multilabel", NAMES, "f1_micro")
    scores = []
    for r in opened.members:
        logits = opened.logits(r.name)
        epochs = opened.epochs(r.name)
        assert logits.shape == (45, 3)
        assert epochs is not None
        assert epochs.shape == (6, 45, 3)
        assert r.score == pytest.approx(f1_score(labels, logits > 0, average="micro"), abs=1e-9)
        assert r.best_epoch == 1 + int(np.argmax([s or 0 for s in r.epoch_scores]))
        assert (r.settings["class_weights"], r.settings["label_smoothing"]) == ([2.0, 2.0, 1.0], 0.02)
        scores.append(r.score or 0)
    assert max(scores) > 0.65  # it has learned something
    test = pool.TaskPool(home / "pool", "mine", split="test").examples()
    assert test.labels is not None
    assert (test.labels == truth(sentences(40, 4))).all()


def test_a_member_is_a_peft_folder(home: Path) -> None:
    """Its logits are PEFT's, of a head of three outputs."""
    opened = pool.TaskPool(home / "pool", "mine", split="test")
    name = next(r.name for r in opened.members if r.name.startswith("r4"))
    texts = [text for text, _ in sentences(40, 4)]
    theirs = peft_logits(pool.member_folder(home / "pool", "mine", name), home / "base", texts, 3)
    np.testing.assert_allclose(opened.logits(name), theirs, atol=1e-4)


def test_apply_on_test(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.csv"
    assert dicor(["apply", "--ensemble", str(home / "dicor.json"), "--output", str(out)]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    decided = np.array([[int(row[name]) for name in NAMES] for row in rows])
    expected = f1_score(truth(sentences(40, 4)), decided, average="micro")
    assert f"mine test micro F1 {expected:.4f}" in capsys.readouterr().out
    ensemble = Ensemble.load(home / "dicor.json")
    assert (ensemble.decision([text for text, _ in sentences(40, 4)]) == decided).all()


@pytest.fixture(scope="module")
def ensemble(home: Path) -> Ensemble:
    return Ensemble.load(home / "dicor.json")


def expected(ensemble: Ensemble, texts: list[str]) -> tuple[list[list[str]], np.ndarray]:
    """The names that are there, and each label's probability, by the record's weights, scale and offsets."""
    chosen, z = ensemble.record, ensemble.logits(texts)
    weights = np.array([row["weight"] for row in chosen.rows()])
    p = np.tensordot(weights, expit(z.astype(float)), axes=1)
    moved = chosen.scale * np.log(p / (1 - p)) + (np.zeros(3) if chosen.offsets is None else chosen.offsets)
    return [[n for n, x in zip(NAMES, row, strict=True) if x > 0] for row in moved], expit(moved)


def test_an_ensemble_answers(ensemble: Ensemble) -> None:
    texts = ["the good film", "a slow night", "the", "good slow night"]
    names, p = expected(ensemble, texts)
    assert ensemble.record.strategy == "weighted"
    assert ensemble.predict(texts).tolist() == names
    assert ensemble.predict_proba(texts).shape == (4, 3)
    np.testing.assert_allclose(ensemble.predict_proba(texts), p, atol=1e-6)
    assert ensemble.predict(["the", "a"]).shape == (2,)


@pytest.mark.parametrize("form", ["csv", "jsonl", "txt", "parquet"])
def test_infer(form: str, home: Path, ensemble: Ensemble, tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from pyarrow import Table

    texts = ["the good film", "a slow night", "the", "good slow night"]
    names, p = expected(ensemble, texts)
    given, out = tmp_path / f"in.{form}", tmp_path / f"out.{form}"
    rows = [{"text": text} for text in texts]
    if form == "parquet":
        pq.write_table(Table.from_pylist(rows), given)
    elif form == "jsonl":
        given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        given.write_text("".join(f"{line}\n" for line in (["text"] if form == "csv" else []) + texts))
    more = [] if form == "txt" else ["--probabilities"]
    args = ["--ensemble", str(home / "dicor.json"), "--input", str(given), "--output", str(out), *more]
    assert main(["infer", *args]) == 0
    if form == "txt":
        assert out.read_text().split("\n") == [*(",".join(one) for one in names), ""]
        return
    if form == "csv":
        found: list[dict[str, Any]] = list(csv.DictReader(out.read_text().splitlines()))
        for row in found:
            row["prediction"] = row["prediction"].split(",") if row["prediction"] else []
    else:
        lines = out.read_text().splitlines() if form == "jsonl" else []
        found = [json.loads(line) for line in lines] or pq.read_table(out).to_pylist()
    assert [row["prediction"] for row in found] == names
    np.testing.assert_allclose([[float(row[f"p_{n}"]) for n in NAMES] for row in found], p, atol=2e-6)


def test_serve(ensemble: Ensemble) -> None:
    texts = ["the good film", "a slow night", "the"]
    names, p = expected(ensemble, texts)
    with TestClient(make_app(ensemble, ["text"], Limits()), base_url="http://localhost") as client:
        about = client.get("/ensemble").json()
        assert (about["kind"], about["labels"]) == ("multilabel", NAMES)
        answers = client.post("/predict", json={"texts": texts, "members": True}).json()["answers"]
        described = client.get("/openapi.json").json()["components"]["schemas"]["Answer"]["properties"]["decision"]
    assert {"type": "array", "items": {"type": "string"}} in described["anyOf"]
    assert [one["decision"] for one in answers] == names
    np.testing.assert_allclose([list(one["probabilities"].values()) for one in answers], p, atol=1e-6)
    logits = ensemble.logits(texts)
    for m, name in enumerate(ensemble.members):
        for n, one in enumerate(answers):
            own = one["members"][m]
            assert own["name"] == name
            assert own["decision"] == [label for label, x in zip(NAMES, logits[m, n], strict=True) if x > 0]
            likely = [own["probabilities"][label] for label in NAMES]
            np.testing.assert_allclose(likely, expit(logits[m, n].astype(float)), atol=1e-6)


def test_export_and_transformers_pipeline(home: Path, ensemble: Ensemble, tmp_path: Path) -> None:
    from transformers import pipeline

    texts = ["the good film", "a slow night", "the"]
    name = ensemble.members[0]
    one = ["--member", name, "--pool", str(home / "pool"), "--task", "mine"]
    assert main(["export", *one, "--format", "merged", "--output", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    said = pipeline("text-classification", str(tmp_path / "one"), device="cpu")(texts, top_k=None)
    found = np.array([[{x["label"]: x["score"] for x in row}[n] for n in NAMES] for row in said])
    np.testing.assert_allclose(found, expit(ensemble.logits(texts)[0].astype(float)), atol=1e-5)
    assert "top_k=None" in (tmp_path / "one" / "README.md").read_text()
    assert main(["export", "--ensemble", str(home / "dicor.json"), "--output", str(tmp_path / "all")]) == 0
    card = (tmp_path / "all" / "README.md").read_text()
    assert "any of `good`, `slow`, `night`" in card
    assert "the log-odds are offset by label: good" in card
    assert Ensemble.load(tmp_path / "all").predict(texts).tolist() == ensemble.predict(texts).tolist()
    assert main(["export", *one, "--format", "peft", "--output", str(tmp_path / "peft")]) == 0
    assert "num_labels=3" in (tmp_path / "peft" / "README.md").read_text()


def test_distill(home: Path) -> None:
    """A student learns from each label's probability."""
    text = yaml.safe_load((home / "mine.yaml").read_text())
    del text["data"]["tasks"][0]["class_weights"]
    text["model"] = {"members": [{"rank": 4, "targets": "all-linear", "lr": 1e-2}]}
    (home / "student.yaml").write_text(yaml.safe_dump(text))
    args = ["--ensemble", str(home / "dicor.json"), "--config", str(home / "student.yaml")]
    assert main(["distill", *args, "--trainer.max_epochs=3"]) == 0
    (student,) = (r for r in pool.TaskPool(home / "pool", "mine").members if "distilled" in r.settings)
    assert (student.score or 0) > 0.5


def test_what_it_is_named_after_stays() -> None:
    """A run of another kind keeps the name that it had before there was a separator."""
    from lora_ensemble.train.options import run_name

    own = {"name": "t", "kind": "binary", "text": ["x"], "label": "y"}
    groups = {"model": {"members": []}, "trainer": {}}

    def name(**more: Any) -> str:
        return run_name("t", {**groups, "data": {"tasks": [own | more], "truncation": "head"}})

    assert name() == name(label_separator=",")
    assert name() != name(label_separator="|")


def test_folds_of_several_labels(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Out of fold, (N, L); each label in its share in every fold; chosen on it, judged on dev, and answered with."""
    config = ["--config", str(home / "mine.yaml"), "--data.folds=3", f"--pool.dir={tmp_path}"]
    members = "[{rank: 2, targets: all-linear, lr: 1e-2}, {targets: none, lr: 1e-2}]"
    assert main(["fit", *config, f"--model.members={members}"]) == 0
    opened = pool.TaskPool(tmp_path, "mine", split="oof")
    labels = opened.examples().labels
    assert labels is not None
    assert labels.shape == (105, 3)
    first = opened.members[0]
    decided = opened.logits(first.name) > 0
    assert first.score == pytest.approx(f1_score(labels, decided, average="micro"))
    record = tmp_path / "e.json"
    select = ["select", "--pool", str(tmp_path), "--task", "mine", "--on", "oof", "--output", str(record)]
    capsys.readouterr()
    assert dicor([*select, "--method", "omni"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("omni  ")]
    ensemble, dev = Ensemble.load(record), pool.TaskPool(tmp_path, "mine").examples()
    lines = {row[0]: row[1] for row in csv.reader((home / "train.csv").read_text().splitlines())}
    answers = ensemble.predict_proba([lines[i] for i in dev.ids.tolist()]) > 0.5
    assert line.split()[-1] == f"{f1_score(dev.labels, answers, average='micro'):.4f}"
