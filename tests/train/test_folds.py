"""Folds: each member is several models, trained without a part each, and their word on that part decides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from scipy.stats import binomtest
from test_cli import Program
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_ensemble import Ensemble, pool
from lora_ensemble.bank import optim
from lora_ensemble.bank.lora import Member, derived_seed
from lora_ensemble.bank.member_files import weight_files
from lora_ensemble.bank.model import Bank
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.main import main
from lora_ensemble.tasks import PRESETS, Task
from lora_ensemble.text.readers import Split, read_split
from lora_ensemble.train.batches import ExampleWeights, Folds
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule

EXACT = (
    *("--model.head_dropout=0", "--model.encoder_dropout=0", "--trainer.precision=64-true", "--bank_size=null"),
    *("--data.batch_size=4", "--trainer.max_epochs=3"),
)
FOLDS = (*EXACT, "--data.folds=3")
ENTRIES = ["{rank: 2, lr: 1e-2}", "{rank: 3, lr: 3e-3, layers: [1], bag: true}", "{targets: none, lr: 1e-2, seed: 5}"]
NAMES = ["r2-c1-qv-lr1e-2-s11711-f3", "r3-c1-qv-l1-lr3e-3-s11711-bag-f3", "head-lr1e-2-s5-f3"]
ALL = f"[{', '.join(ENTRIES)}]"


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    """A program that has trained three members with three folds, and with dev and test predictions of them."""
    program = Program(tmp_path_factory.mktemp("folded"), tiny("bert"), demo_root)
    assert program("fit", *FOLDS, members=ALL) == 0
    assert program("predict", *FOLDS, members=ALL) == 0
    return program


def fold_of(program: Program) -> np.ndarray:
    """The fold of each training example."""
    data = BankData(base_model=str(program.base), root=str(program.root), tasks=("sst",), folds=3)
    data.setup("fit")
    return data.fold["sst"]


def texts(program: Program, split: str) -> list[str]:
    return read_split(PRESETS["sst"], split, program.root, need_labels=split != "test").texts[0]


def by_peft(program: Program, folder: Path, asked: list[str]) -> np.ndarray:
    """Logits (N, C) that PEFT gives, of a folder in the pool and without anything of ours."""
    base: Any = AutoModelForSequenceClassification.from_pretrained(program.base, num_labels=5)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokens = AutoTokenizer.from_pretrained(program.base)(asked, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).logits.numpy()


def matrix(program: Program) -> np.ndarray:
    """The weights, a row for each model, at the end of the only run."""
    (file,) = (program.folder / "runs").glob("*/checkpoint/last.ckpt")
    return torch.load(file, weights_only=True)["state_dict"]["bank.weights"].numpy()


def test_out_of_fold_is_whoever_has_not_seen_it(folded: Program) -> None:
    """By PEFT, from the folder of each fold; on dev and test it is the mean of the three."""
    fold, opened = fold_of(folded), pool.TaskPool(folded.pool, "sst", split="oof")
    truth = read_split(PRESETS["sst"], "train", folded.root, need_labels=True)
    assert opened.examples().ids.tolist() == truth.ids.tolist()
    assert sorted(np.bincount(fold)) == [20, 20, 20]
    for name in NAMES:
        models = [folded.pool / "sst" / name / f"fold-{k}" for k in range(3)]
        own = np.stack([by_peft(folded, m, truth.texts[0]) for m in models])
        assert np.abs(own[0] - own[1]).max() > 1e-3
        np.testing.assert_allclose(opened.logits(name), own[fold, np.arange(60)], atol=1e-5)
        for split in ("dev", "test"):
            mean = np.mean([by_peft(folded, m, texts(folded, split)) for m in models], axis=0)
            np.testing.assert_allclose(pool.TaskPool(folded.pool, "sst", split=split).logits(name), mean, atol=1e-5)


def test_nothing_of_a_fold_reaches_whoever_leaves_it_out(folded: Program, tmp_path: Path) -> None:
    """With other texts and labels in fold 1 that model is the same but for rounding, and the others are not."""
    fold = fold_of(folded)
    other = Program(tmp_path, folded.base, tmp_path / "data")
    shutil.copytree(folded.root, other.root)
    file = other.root / "ids-sst-train.csv"
    header, *lines = file.read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    moved = [
        f"{i}\t{c[1]}\tgood good bad\t{(int(c[3]) + 1) % 5}" if fold[i] == 1 else lines[i] for i, c in enumerate(cells)
    ]
    file.write_text("\n".join([header, *moved]) + "\n")
    assert (fold_of(other) == fold).mean() < 1  # they are stratified by the labels, which are others now
    data: dict[str, Any] = {"_dealt": lambda self, task, examples: fold}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in data.items():
            patched.setattr(BankData, name, value)
        assert other("fit", *FOLDS, members=ALL) == 0
    moved = np.abs(matrix(folded) - matrix(other)).max(1).reshape(3, 3)
    assert moved[:, 1].max() < 1e-10
    assert moved[:, [0, 2]].min() > 1e-4


def test_epochs_are_chosen_out_of_fold(folded: Program) -> None:
    """By hand, though there is a dev file; what dev said of other epochs is not kept, for nothing was chosen on it."""
    opened = pool.TaskPool(folded.pool, "sst", split="oof")
    labels = opened.examples().labels
    for name in NAMES:
        record, epochs = opened.record(name), opened.epochs(name)
        assert epochs is not None
        scores = (epochs.argmax(2) == labels).mean(1)
        assert record.epoch_scores == pytest.approx(scores.tolist())
        assert record.best_epoch == int(scores.argmax()) + 1
        assert (record.folds, record.refit, sorted(record.examples)) == (3, None, ["dev", "oof", "test"])
        np.testing.assert_allclose(epochs[record.best_epoch - 1], opened.logits(name), atol=2e-3)
        assert "dev.epochs.npy" not in record.files


def fresh(program: Program, **more: Any) -> BankModule:
    """The module of that run before training, or with other settings."""
    still: Any = {"base_model": str(program.base), "head_dropout": 0.0, "encoder_dropout": 0.0, **more}
    layers: Any = [1]
    entries = (
        Member(rank=2, lr=1e-2),
        Member(rank=3, lr=3e-3, layers=layers, bag=True),
        Member(targets="none", lr=1e-2, seed=5),
    )
    return BankModule([PRESETS["sst"]], members=entries, **still).double()


@pytest.mark.parametrize("member", [0, 1])
def test_a_model_is_pefts_trained_on_the_rest(folded: Program, member: int, tmp_path: Path) -> None:
    """The same first A and head, the same order of batches, those of the fold left out; torch's losses and AdamW."""
    fold, begun, ended = fold_of(folded), fresh(folded).bank, fresh(folded, folds=3).bank
    ended.weights.data[:] = torch.from_numpy(matrix(folded))
    data = BankData(base_model=str(folded.base), root=str(folded.root), tasks=("sst",), batch_size=4)
    data.setup("fit")
    loader, split = data.train_dataloader(), data.splits["train"]["sst"]
    lr, at = float(begun.rates[member]), 3 * member
    drawn = np.random.default_rng(derived_seed(11711, "bag/sst")).integers(60, size=60)
    counts = np.bincount(drawn, minlength=60) if member == 1 else np.ones(60)
    files = weight_files(begun, member, PRESETS["sst"], base_model=str(folded.base), revision=None)
    pool.write_member(tmp_path, pool.MemberRecord(name="m", task="sst", kind="multiclass"), files)
    tokenizer = AutoTokenizer.from_pretrained(folded.base)
    for k in range(3):
        base: Any = AutoModelForSequenceClassification.from_pretrained(
            folded.base, num_labels=5, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
        )
        model = PeftModel.from_pretrained(base, tmp_path / "sst" / "m", is_trainable=True).double()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        for epoch in range(3):
            for step in range(len(loader)):
                rows = loader.rows(epoch, step)["sst"]
                rows = rows[(fold[rows] != k) & (counts[rows] > 0)]
                if not len(rows):
                    continue
                tokens = tokenizer([split.source.texts[0][i] for i in rows], padding=True, return_tensors="pt")
                labels, times = torch.from_numpy(split.labels[rows]), torch.from_numpy(counts[rows])
                losses = F.cross_entropy(model(**tokens).logits, labels, reduction="none")
                optimizer.zero_grad()
                ((losses * times).sum() / times.sum()).backward()
                optimizer.step()
        theirs = {n.split("base_model.model.")[-1].replace(".default", ""): p for n, p in model.named_parameters()}
        # In float64; member_state would round.
        ours, others = (ended._own_views(row, ended.weights[row].detach()) for row in (at + k, at + (k + 1) % 3))
        adapted = [name for name in ours if "/" not in name]
        assert adapted
        for name in adapted:
            path, side = name.rsplit(".", 1)
            expected = theirs[f"bert.{path}.lora_{side}.weight"].detach()
            torch.testing.assert_close(ours[name], expected, atol=1e-10, rtol=0)
            assert (others[name] - expected).abs().max() > 1e-4


def test_each_is_computed_once(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an evaluation: each training example by the one model of each member that has not seen it, dev by all."""
    asked: list[tuple[int, int, bool]] = []
    forward = Bank.forward

    def counted(bank: Bank, batches: Any, states: Any = None, members: Any = None) -> Any:
        (batch,) = batches.values()
        asked.append((batch["examples"], len(bank.members) if members is None else len(members), bank.training))
        return forward(bank, batches, states, members)

    monkeypatch.setattr(Bank, "forward", counted)
    assert program("fit", *FOLDS, "--trainer.max_epochs=1", "--data.refit=true", members=ALL) == 0
    evaluated = [(examples, models) for examples, models, training in asked if not training]
    assert sum(examples * models for examples, models in evaluated) == (60 + 30) * 3
    assert sum(examples * models for examples, models, training in asked if training) == 60 * 3 * 4


def test_a_refit_is_the_member_without_folds(program: Program, folded: Program, tmp_path: Path) -> None:
    """At the epoch that the folds chose; it answers alone, and the pool has no other weights."""
    assert program("fit", *FOLDS, "--data.refit=true", members=ALL) == 0
    refitted, rows = pool.TaskPool(program.pool, "sst", split="oof"), matrix(program)
    plain = Program(tmp_path / "plain", program.base, program.root)
    assert plain("fit", *EXACT, members=ALL) == 0
    np.testing.assert_allclose(rows.reshape(3, 4, -1)[:, 3], matrix(plain), atol=1e-10, rtol=0)
    np.testing.assert_allclose(rows.reshape(3, 4, -1)[:, :3], matrix(folded).reshape(3, 3, -1), atol=1e-10, rtol=0)
    without, differ = pool.TaskPool(plain.pool, "sst"), 0
    for name in NAMES:
        record = refitted.record(f"{name}-refit")
        assert (record.folds, record.refit, record.models) == (3, True, [""])
        same = pool.TaskPool(folded.pool, "sst", split="oof").logits(name)
        np.testing.assert_allclose(refitted.logits(record.name), same, atol=1e-6)
        epochs = without.epochs(name.removesuffix("-f3"))
        assert epochs is not None
        dev = pool.TaskPool(program.pool, "sst").logits(record.name)
        np.testing.assert_allclose(dev, epochs[record.best_epoch - 1], atol=2e-3)
        np.testing.assert_allclose(
            by_peft(program, program.pool / "sst" / record.name, texts(program, "dev")), dev, atol=1e-5
        )
        differ += record.best_epoch != without.record(name.removesuffix("-f3")).best_epoch
    assert differ  # dev would have chosen otherwise


def test_without_a_dev_file(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, chosen and judged by out-of-fold predictions; there is nothing to validate on."""
    own = {**vars(PRESETS["sst"]), "dev": None, "name": "own"}
    tasks = json.dumps([{key: value for key, value in own.items() if value}])
    assert program("fit", *EXACT, tasks=tasks, members=ALL) == 2
    assert "it names no dev file; set dev:" in capsys.readouterr().err
    assert program("fit", *FOLDS, tasks=tasks, members=ALL) == 0
    assert "own oof (accuracy)" in capsys.readouterr().out
    assert program("validate", *FOLDS, tasks=tasks, members=ALL) == 2
    assert "it names no dev file" in capsys.readouterr().err
    record = program.folder / "own.json"
    assert (
        dicor(["select", "--pool", str(program.pool), "--task", "own", "--method", "omni", "--output", str(record)])
        == 0
    )
    out = capsys.readouterr().out
    assert "own: 3 members on 60 oof examples" in out
    assert "accuracy on oof" in out
    assert "oof: the training examples, each predicted by a model that was trained without its fold" in out


@pytest.mark.parametrize("refit", [False, True])
def test_an_ensemble_of_means_answers(
    program: Program, folded: Program, refit: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen on out-of-fold predictions and judged on dev, by the pool, from text, exported, and by PEFT."""
    options = (*FOLDS, f"--data.refit={str(refit).lower()}")
    if refit:
        assert program("fit", *options, members=ALL) == 0
        assert program("predict", *options, members=ALL) == 0
    else:
        program.pool = folded.pool
    select = ["select", "--pool", str(program.pool), "--task", "sst", "--on", "oof", "--method", "weighted"]
    assert dicor([*select, "--output", str(tmp_path / "e.json")]) == 0
    out = capsys.readouterr().out
    chosen = json.loads((tmp_path / "e.json").read_text())
    assert (chosen["chosen_on"], set(chosen["members"][0]) & {"dev_logits", "oof_logits"}) == ("oof", {"oof_logits"})
    dev = read_split(PRESETS["sst"], "dev", program.root, need_labels=True)
    ensemble = Ensemble.load(tmp_path / "e.json")
    right = float((ensemble.decision(dev.texts[0]) == dev.labels).mean())
    (line,) = [line for line in out.splitlines() if line.startswith("weighted  ")]
    assert line.split()[-1] == f"{right:.4f}"
    wilson = binomtest(round(30 * right), 30).proportion_ci(0.9, method="wilson")
    interval = f"90% interval {wilson.low:.4f} to {wilson.high:.4f}"
    assert f"weighted on dev, on which nothing was chosen: {right:.4f} ({interval})" in out
    for place, member in enumerate(chosen["members"]):
        there = pool.TaskPool(program.pool, "sst").logits(member["name"])
        np.testing.assert_allclose(ensemble.logits(dev.texts[0])[place], there, atol=1e-5)
    for split in ("dev", "test", "oof"):
        apply = ["apply", "--ensemble", str(tmp_path / "e.json"), "--split", split]
        assert dicor([*apply, "--output", str(tmp_path / f"{split}.csv")]) == 0
        assert ("In-sample" in capsys.readouterr().out) == (split == "oof")
    assert main(["export", "--ensemble", str(tmp_path / "e.json"), "--output", str(tmp_path / "out")]) == 0
    moved = Ensemble.load(tmp_path / "out")
    np.testing.assert_array_equal(moved.logits(dev.texts[0]), ensemble.logits(dev.texts[0]))
    one = ["export", "--member", chosen["members"][0]["name"], "--pool", str(program.pool), "--task", "sst"]
    assert main([*one, "--output", str(tmp_path / "one")]) == (0 if refit else 2)
    said = capsys.readouterr().err
    assert ("the mean of 3 models; export an ensemble of it" in said) != refit
    if refit:
        found = by_peft(program, tmp_path / "one", dev.texts[0])
        np.testing.assert_allclose(found, ensemble.logits(dev.texts[0])[0], atol=1e-5)


def test_on_dev_is_the_default_where_there_is_one(folded: Program, capsys: pytest.CaptureFixture[str]) -> None:
    compare = ["compare", "--pool", str(folded.pool), "--task", "sst", "--method", "omni"]
    assert dicor(compare) == 0
    out = capsys.readouterr().out
    assert "3 members on 30 dev examples" in out
    assert "oof" not in out
    assert dicor([*compare, "--on", "oof", "--split", "test"]) == 2  # the course's test labels are nobody's
    assert "the test examples have no labels" in capsys.readouterr().err


def test_members_without_folds_are_left_out(
    program: Program, folded: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folded.pool, program.pool)
    assert program("fit", *EXACT, members="[{rank: 2}]") == 0
    compare = ["compare", "--pool", str(program.pool), "--task", "sst", "--method", "omni"]
    capsys.readouterr()
    assert dicor([*compare, "--on", "oof"]) == 0
    assert "3 members on 60 oof examples; 1 left out (1 without oof predictions)" in capsys.readouterr().out
    assert dicor(compare) == 0
    assert "4 members on 30 dev examples; 0 left out" in capsys.readouterr().out
    record = pool.TaskPool(program.pool, "sst").record(NAMES[0])
    del record.examples["dev"]
    pool.write_member(program.pool, record, {}, keep=pool.read_record(program.pool, "sst", NAMES[0]))
    assert dicor(compare) == 0
    assert "3 members on 30 dev examples; 1 left out (1 without dev predictions)" in capsys.readouterr().out
    for name in NAMES:
        shutil.rmtree(program.pool / "sst" / name)
    assert dicor([*compare, "--on", "oof"]) == 2
    assert "no member has out-of-fold predictions; train some with --data.folds 5" in capsys.readouterr().err


def test_a_student_of_what_was_chosen_out_of_fold(
    program: Program, folded: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has seen nothing of dev, and is trained on all examples."""
    select = ["select", "--pool", str(folded.pool), "--task", "sst", "--method", "omni", "--output"]
    learn = ("--model.base_model", "--data.tasks")
    for on in ("oof", "dev"):
        record = tmp_path / f"{on}.json"
        assert dicor([*select, str(record), "--on", on]) == 0
        given = program.arguments("distill", f"--ensemble={record}", "--trainer.max_epochs=1", members="[{rank: 2}]")
        given = [word for word in given if not word.startswith(learn)]
        capsys.readouterr()
        assert main(given) == 0
        out = capsys.readouterr().out
        assert ("a student has seen something of dev" in out) == (on == "dev")
        assert dicor(["compare", "--pool", str(program.pool), "--task", "sst", "--method", "omni"]) == 0
        assert ("distilled from an ensemble that was chosen on dev" in capsys.readouterr().err) == (on == "dev")
    assert main([*given, "--data.folds=3"]) == 2
    assert "data.folds: a student learns from soft labels on all examples" in capsys.readouterr().err


def test_a_run_that_was_cut_goes_on_bit_for_bit(program: Program, folded: Program) -> None:
    assert program("fit", *FOLDS, "--trainer.max_steps=20", members=ALL) == 0
    assert program("fit", *FOLDS, "--ckpt_path=last", members=ALL) == 0
    same_pool(program, folded)


@pytest.mark.parametrize("command", [pytest.param("fit", marks=pytest.mark.slow), "sweep"])
def test_smaller_banks_train_the_same(
    program: Program, folded: Program, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All models of a member are in one bank; what a sweep shows of it is what decides."""
    assert program(command, *FOLDS, "--bank_size=1", members=ALL) == 0
    shown = capsys.readouterr().out
    assert "oof (accuracy)\n" in shown
    assert "dev (accuracy)" not in shown
    same_pool(program, folded, tolerance=1e-6)


def test_a_split_bank_goes_on(program: Program, folded: Program) -> None:
    assert program("fit", *FOLDS, "--trainer.max_steps=15", members=ALL) == 0
    assert program("fit", *FOLDS, "--ckpt_path=last", "--bank_size=2", members=ALL) == 0
    same_pool(program, folded, tolerance=1e-6)


def same_pool(program: Program, other: Program, tolerance: float = 0.0) -> None:
    ours, theirs = (pool.TaskPool(p.pool, "sst", split="oof") for p in (program, other))
    for name in NAMES:
        assert ours.record(name).epoch_scores == theirs.record(name).epoch_scores
        np.testing.assert_allclose(ours.logits(name), theirs.logits(name), atol=tolerance, rtol=0)
        np.testing.assert_allclose(ours.epochs(name), theirs.epochs(name), atol=tolerance and 2e-3, rtol=0)
        dev = [pool.TaskPool(p.pool, "sst").logits(name) for p in (program, other)]
        np.testing.assert_allclose(*dev, atol=tolerance, rtol=0)


def test_patience_is_about_all_of_a_member(program: Program) -> None:
    """Counted by hand on the out-of-fold scores; whoever is out of it leaves with all its models."""
    entries = "[{rank: 2, lr: 3e-2, patience: 1}, {rank: 3, lr: 1e-3}]"
    assert program("fit", *FOLDS, "--trainer.max_epochs=6", members=entries) == 0
    patient, other = pool.TaskPool(program.pool, "sst", split="oof").members
    patient, other = (patient, other) if patient.patience else (other, patient)
    scores = [s or 0.0 for s in patient.epoch_scores]
    stop = next((e for e in range(2, 7) if max(scores[: e - 1]) >= scores[e - 1]), 6)
    assert (patient.epochs_done, other.epochs_done) == (stop, 6)
    assert stop < 6, scores


def test_folds_are_stratified_and_keep_groups(program: Program) -> None:
    """By ids alone: in another order of the file they are the same."""
    fold = fold_of(program)
    train = read_split(PRESETS["sst"], "train", program.root, need_labels=True)
    for label in range(5):
        counts = np.bincount(fold[train.labels == label], minlength=3)
        assert np.ptp(counts) <= 1
    groups = np.array([f"g{i % 13}" for i in range(60)])
    data = BankData(base_model=str(program.base), root=str(program.root), tasks=("sst",), folds=3)
    whole = Split(train.ids, train.texts, train.labels, groups=groups)
    dealt = data._dealt("sst", whole)
    assert all(len(set(dealt[groups == g])) == 1 for g in set(groups))
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(data._dealt("sst", whole.take(order, [])), dealt[order])


def test_weights_of_models_by_hand() -> None:
    split = Split(np.arange(4).astype(str), [["x"] * 4], np.array([0, 0, 0, 1]), weights=np.array([1.0, 2.0, 3.0, 4.0]))
    task = Task(name="t", kind="binary", text=["text"], weight="w")
    fold = np.array([0, 1, 0, 1])
    own = ExampleWeights(task, split, [Member(), Member()], Folds(2, refit=True), fold)
    expected = [[0, 2, 0, 4], [1, 0, 3, 0], [1, 2, 3, 4]] * 2
    np.testing.assert_array_equal(own.of(np.arange(4)), expected)
    assert own.anything
    assert Folds(2, refit=True).rows(2, 1) == [1, 4]
    assert Folds(2, refit=True).rows(2, None) == [2, 5]
    assert Folds(2).rows(2, None) == [0, 1, 2, 3]
    assert Folds().rows(3, None) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.folds=1"], "data.folds: 1; expected at least 2, or 0 for none"),
        (["--data.folds=-1"], "data.folds: -1; expected at least 2"),
        (["--data.refit=true"], "data.refit: there are no folds after which to train once more; set data.folds"),
        (["--data.folds=61"], "data.folds: 61; task 'sst' has 60 training examples"),
        (
            ["--data.folds=2", "--model.finetune=full"],
            "data.folds: with finetune: full each model would need an encoder",
        ),
    ],
)
def test_bad_settings(program: Program, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("fit", *options, members="[{lr: 1e-3}]") == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_other_folds_are_another_member(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one name, given by hand: neither replaced nor answered with."""
    named = "[{rank: 2, name: a}]"
    assert program("fit", *EXACT, "--data.folds=2", members=named) == 0
    assert program("fit", *FOLDS, members=named) == 2
    assert "folds was 2, is now 3" in capsys.readouterr().err
    assert program("validate", *FOLDS, members=named) == 2
    assert "'a' is 2 models; give the data.folds it was trained with" in capsys.readouterr().err
    assert program("validate", *EXACT, "--data.folds=2", members=named) == 0
    score = pool.TaskPool(program.pool, "sst").logits("a").argmax(1)
    labels = read_split(PRESETS["sst"], "dev", program.root, need_labels=True).labels
    assert f"{(score == labels).mean():.4f}" in capsys.readouterr().out


def test_one_model_that_diverged_is_enough(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fifth of nine models: of the second member."""
    monkeypatch.setattr(optim, "finite_members", lambda bank, optimizer: [row != 4 for row in range(9)])
    assert program("fit", *FOLDS, members=ALL) == 0
    assert f"{NAMES[1]} has diverged" in capsys.readouterr().out
    assert sorted(r.name for r in pool.TaskPool(program.pool, "sst", split="oof").members) == sorted(NAMES[::2])
