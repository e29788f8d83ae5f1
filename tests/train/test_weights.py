"""Examples that do not count alike: class weights, a column of weights, smoothed labels, and bags of a member's own."""

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
from sklearn.utils.class_weight import compute_class_weight
from test_cli import Program

from lora_ensemble import pool
from lora_ensemble.bank.lora import Member, derived_seed, expand_members
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import Task
from lora_ensemble.text.readers import Split, fingerprint, read_split
from lora_ensemble.train.batches import ExampleWeights
from lora_ensemble.train.data import BankData
from lora_ensemble.train.evaluation import member_losses
from lora_ensemble.train.module import BankModule

STILL = ("--model.head_dropout=0", "--model.encoder_dropout=0", "--trainer.precision=64-true", "--bank_size=null")
BAGS = "{rank: 2, lr: 3e-3, bag: true, seed: [1, 2]}"


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    """With a task of three classes, one of them rare, in files that have a column of weights."""
    root = tmp_path / "data"
    root.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 41), ("dev", 20)):
        texts = [line.split("\t")[2] for line in (demo_root / f"ids-sst-{split}.csv").read_text().splitlines()[1:]]
        rows = [
            {"text": text, "label": "abc"[min(int(rng.integers(8)) // 3, 2)], "w": round(float(rng.gamma(1.0)), 3)}
            | {"writer": f"{split if i % 4 else 'both'}{i % 11}"}
            for i, text in enumerate(texts[:n])
        ]
        rows[3]["w"] = 0
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Program(tmp_path, tiny("bert"), root)


def task(**more: Any) -> Task:
    files = {"train": "train.jsonl", "dev": "dev.jsonl"}
    return Task(name="t", kind="multiclass", text=["text"], label_names=["a", "b", "c"], **files, **more)


def given(**more: Any) -> str:
    """The task as the command line has it."""
    of = {**vars(task(**more)), "label_names": ["a", "b", "c"]}
    return json.dumps([{key: value for key, value in of.items() if value}])


def weights(program: Program) -> dict[str, np.ndarray]:
    """Each member's row of numbers at the end, from the checkpoint of its bank."""
    (file,) = (program.folder / "runs").glob("*/checkpoint/last.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    names = [m["name"] for m in checkpoint["bank"]["members"]]
    rows = checkpoint["state_dict"]["bank.weights"]
    shutil.rmtree(program.folder / "runs")
    return dict(zip(names, rows.numpy(), strict=True))


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_member_in_a_bank_is_the_member_alone(program: Program, tmp_path: Path, accumulated: int) -> None:
    """Two bags beside two members without one; batches of two, so that some hold nothing of a bag."""
    entries = [BAGS.replace("[1, 2]", "1"), BAGS.replace("[1, 2]", "2"), "{rank: 2, lr: 3e-3}", "{rank: 2, lr: 1e-2}"]
    options = (*STILL, "--data.batch_size=2", f"--trainer.accumulate_grad_batches={accumulated}")
    tasks = given(class_weights="balanced", weight="w", label_smoothing=0.1)
    assert program("fit", *options, tasks=tasks, members=f"[{', '.join(entries)}]") == 0
    together = weights(program)
    assert len(together) == 4
    for entry in entries:
        program.pool = tmp_path / "alone"
        assert program("fit", *options, tasks=tasks, members=f"[{entry}]") == 0
        ((name, row),) = weights(program).items()
        np.testing.assert_allclose(together[name], row, atol=1e-10, rtol=0)
        assert all(np.abs(row - other).max() > 1e-3 for n, other in together.items() if n != name)


@pytest.mark.parametrize(("accumulated", "finetune"), [(1, "lora"), (2, "lora"), (1, "full")])
def test_training_is_torchs(program: Program, accumulated: int, finetune: Any) -> None:
    """By hand: the weighted mean of torch's losses over a step, torch's AdamW, and no step where nothing counts."""
    member = "{lr: 3e-3, bag: true}" if finetune == "full" else "{rank: 2, lr: 3e-3, bag: true}"
    batches = ("--data.batch_size=2", f"--trainer.accumulate_grad_batches={accumulated}")
    asked = {"class_weights": [1.0, 0.5, 3.0], "weight": "w", "label_smoothing": 0.2}
    options = (*STILL, *batches, f"--model.finetune={finetune}")
    assert program("fit", *options, tasks=given(**asked), members=f"[{member}]") == 0
    ((_, found),) = weights(program).items()

    (entry,) = expand_members([Member(rank=2, lr=3e-3, bag=True)], finetune=finetune)
    still: Any = {"head_dropout": 0.0, "encoder_dropout": 0.0, "finetune": finetune}
    module = BankModule([task()], base_model=str(program.base), members=(entry,), **still).double()
    data = BankData(base_model=str(program.base), root=str(program.root), tasks=(task(),), batch_size=2)
    data.setup("fit")
    loader, split = data.train_dataloader(), data.splits["train"]["t"]
    rows = [json.loads(line) for line in (program.root / "train.jsonl").read_text().splitlines()]
    labels = torch.tensor(["abc".index(row["label"]) for row in rows])
    n = len(rows)
    drawn = np.random.default_rng(derived_seed(11711, "bag/t")).integers(n, size=n)
    counts = np.array([row["w"] * (drawn == i).sum() * [1.0, 0.5, 3.0][labels[i]] for i, row in enumerate(rows)])
    trained = [p for p in module.bank.parameters() if p.requires_grad]
    optimizer, idle = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0), 0
    for epoch in range(2):
        steps = [loader.rows(epoch, step)["t"] for step in range(len(loader))]
        for first in range(0, len(steps), accumulated):
            total, summed = 0.0, torch.zeros((), dtype=torch.float64)
            for of_step in steps[first : first + accumulated]:
                logits = module.bank({"t": split.batch(of_step)})["t"][0]
                w = torch.tensor(counts[of_step])
                summed = (
                    summed + (w * F.cross_entropy(logits, labels[of_step], label_smoothing=0.2, reduction="none")).sum()
                )
                total += float(w.sum())
            idle += total == 0
            if total > 0:
                optimizer.zero_grad()
                (summed / total).backward()
                optimizer.step()
    assert idle > 0 or accumulated > 1
    np.testing.assert_allclose(found, module.bank.weights[0].detach().numpy(), atol=1e-10, rtol=0)


def test_a_binary_label_is_smoothed_over_both() -> None:
    logits, labels = torch.tensor([[[0.3], [-2.0]]], dtype=torch.float64), torch.tensor([1, 0])
    two = torch.cat([torch.zeros(1, 2, 1), logits], dim=-1)  # the same probabilities as those of two classes
    expected = F.cross_entropy(two[0], labels, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(member_losses(logits, labels, "binary", 0.3)[0], expected)
    assert (member_losses(logits, labels, "binary")[0] - expected).abs().min() > 0.01


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_run_that_was_cut_goes_on_bit_for_bit(program: Program, tmp_path: Path, precision: str) -> None:
    """Which steps a member was idle in is in the checkpoint. Nothing of it is rounded on the way back."""
    options = ("--data.batch_size=2", "--trainer.max_epochs=3", f"--trainer.precision={precision}")
    tasks, members = given(weight="w"), f"[{BAGS}]"
    assert program("fit", *options, tasks=tasks, members=members) == 0
    whole = weights(program)
    program.pool = tmp_path / "cut"
    assert program("fit", *options, "--trainer.max_steps=30", tasks=tasks, members=members) == 0
    (file,) = (program.folder / "runs").glob("*/checkpoint/last.ckpt")
    (state,) = torch.load(file, weights_only=True)["optimizer_states"][0]["state"].values()
    assert max(state["missed"]) > 0
    assert len(set(state["missed"])) > 1
    assert program("fit", *options, "--ckpt_path=last", tasks=tasks, members=members) == 0
    cut = weights(program)
    for name in whole:
        np.testing.assert_array_equal(cut[name], whole[name])


def test_a_bag_outlives_who_leaves_its_bank(program: Program, tmp_path: Path) -> None:
    """A member without patience, then, has a smaller bank, and still its own bag and its own count of steps."""
    first, last = "{rank: 2, lr: 3e-2, bag: true, seed: 1, patience: 1}", "{rank: 2, lr: 3e-3, bag: true, seed: 2}"
    options = (*STILL, "--data.batch_size=2", "--trainer.max_epochs=8")
    assert program("fit", *options, tasks=given(), members=f"[{first}, {last}]") == 0
    ended = {r.name: r.epochs_done for r in pool.TaskPool(program.pool, "t").members}
    assert sorted(ended.values())[1] == 8
    assert sorted(ended.values())[0] < 8, ended
    together = pool.TaskPool(program.pool, "t")
    program.pool = tmp_path / "alone"
    assert program("fit", *options, tasks=given(), members=f"[{last}]") == 0
    (alone,) = pool.TaskPool(program.pool, "t").members
    np.testing.assert_allclose(
        pool.TaskPool(program.pool, "t").epochs(alone.name), together.epochs(alone.name), atol=1e-3, rtol=0
    )


def test_balanced_is_scikit_learns() -> None:
    labels = np.array([0, 0, 0, 2, 2, 1, 0, 0])
    split = Split(np.arange(8).astype(str), [["x"] * 8], labels, weights=np.arange(8.0))
    own = ExampleWeights(task(class_weights="balanced"), split, [Member(), Member()])
    each = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    rows = np.array([5, 1, 4])
    np.testing.assert_allclose(own.of(rows), [each[labels[rows]] * rows] * 2)
    assert own.anything
    assert not ExampleWeights(task(), Split(split.ids, split.texts, labels), [Member()]).anything


def test_a_class_that_nobody_has_weighs_on_nobody() -> None:
    split = Split(np.arange(4).astype(str), [["x"] * 4], np.array([0, 0, 0, 1]))
    own = ExampleWeights(task(class_weights="balanced"), split, [Member()])
    np.testing.assert_allclose(own.of(np.arange(4)), [[4 / 9, 4 / 9, 4 / 9, 4 / 3]])


def test_a_bag_is_a_bootstrap() -> None:
    """As many examples as there are, each member's own, the same in every task of the same seed and name."""
    split = Split(np.arange(500).astype(str), [["x"] * 500], np.zeros(500, int))
    members = expand_members([Member(bag=True, seed=[1, 2], rank=[2, 4]), Member()])
    drawn = ExampleWeights(task(), split, members).of(np.arange(500))
    assert drawn.sum(1).tolist() == [500.0] * 5
    assert (drawn[4] == 1).all()
    assert 0.55 < (drawn[0] > 0).mean() < 0.71  # 1 - 1/e
    assert np.array_equal(drawn[0], drawn[2])  # seed 1, ranks 2 and 4
    assert not np.array_equal(drawn[0], drawn[1])


def test_weights_belong_to_the_training_data(program: Program) -> None:
    """Other weights are other training data; dev has none, and needs no such column."""
    with_weights = read_split(task(weight="w"), "train", program.root, need_labels=True)
    assert with_weights.weights is not None
    assert with_weights.weights[3] == 0
    without = read_split(task(), "train", program.root, need_labels=True)
    assert fingerprint(with_weights) != fingerprint(without)
    dev = program.root / "dev.jsonl"
    dev.write_text(dev.read_text().replace('"w":', '"other":'))
    assert read_split(task(weight="w"), "dev", program.root, need_labels=True).weights is None


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('"heavy"', "w is 'heavy'; expected a weight, a number of at least 0"),
        ("-1", "w is -1; expected a weight"),
        ("null", "w is None; expected a weight"),
        ("NaN", "expected a weight"),
    ],
)
def test_weights_that_are_none(program: Program, capsys: pytest.CaptureFixture[str], cell: str, message: str) -> None:
    file = program.root / "train.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = lines[4][: lines[4].index('"w":')] + f'"w": {cell}, "writer": "x"}}'
    file.write_text("\n".join(lines) + "\n")
    assert program("fit", tasks=given(weight="w")) == 2
    err = capsys.readouterr().err
    assert f"{file}:5: " in err
    assert message in err
    assert len(err.splitlines()) == 1


def test_no_such_column_of_weights(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("fit", tasks=given(weight="importance")) == 2
    assert (
        "no column 'importance'; columns found: text, label, w, writer; set weight: of task 't'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"class_weights": "equal"}, "class_weights is 'equal'; expected balanced, or 3 numbers of at least 0"),
        ({"class_weights": [1.0, 2.0]}, "expected balanced, or 3 numbers"),
        ({"class_weights": [1.0, -2.0, 1.0]}, "expected balanced, or 3 numbers"),
        ({"class_weights": [0.0, 0.0, 0.0]}, "expected balanced, or 3 numbers"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; expected a share from 0 to below 1"),
    ],
)
def test_settings_that_are_none(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        task(**more)


@pytest.mark.parametrize("more", [{"class_weights": "balanced"}, {"label_smoothing": 0.1}])
def test_a_regression_has_no_classes(more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"(is|are) for classes"):
        Task(name="t", kind="regression", text=["a"], **more)


def test_groups_go_from_the_files_into_the_pool_and_to_dicor(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("fit", tasks=given(group="writer"), members="[{name: a}, {name: b, seed: 2}]") == 0
    rows = [json.loads(line) for line in (program.root / "dev.jsonl").read_text().splitlines()]
    torn = sum(row["writer"].startswith("both") for row in rows)
    assert f"{torn} of 20 examples are of groups that are also in train" in capsys.readouterr().out
    groups = pool.TaskPool(program.pool, "t").examples().groups
    assert groups is not None
    assert groups.tolist() == [row["writer"] for row in rows]
    assert dicor(["compare", "--pool", str(program.pool), "--task", "t"]) == 0
    assert f"the {len(set(groups))} groups, which no split tears apart" in capsys.readouterr().out


def test_what_decides_the_loss_is_recorded(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """A member of the same name with another loss is another member."""
    assert program("fit", tasks=given(class_weights="balanced"), members="[{name: a}]") == 0
    (record,) = pool.TaskPool(program.pool, "t").members
    assert record.settings["class_weights"] == "balanced"
    assert program("fit", tasks=given(), members="[{name: a}]") == 2
    assert "class_weights was 'balanced', is now None" in capsys.readouterr().err
    assert program("fit", tasks=given(class_weights="balanced"), members="[{name: a, bag: true}]") == 2
    assert "bag was None, is now True" in capsys.readouterr().err


def test_a_student_has_soft_labels(program: Program) -> None:
    data = BankData(base_model=str(program.base), root=str(program.root), tasks=(task(class_weights="balanced"),))
    data.setup("fit")
    with pytest.raises(UserError, match="a student learns from soft labels; leave out class_weights"):
        data.teach("t", np.ones((41, 3)) / 3, data.splits["train"]["t"].source, {})
