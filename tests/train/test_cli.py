"""The program end to end, in this process, on tiny random encoders: fit, validate, test, predict, then dicor."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from conftest import FAMILY_NAMES, REPOSITORY
from safetensors.torch import load_file, save_file

from lora_ensemble import Ensemble, pool
from lora_ensemble.bank.lora import Member
from lora_ensemble.bank.model import Bank
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.main import STUDIES, TRAINING, main
from lora_ensemble.tasks import PRESETS
from lora_ensemble.text.readers import read_split
from lora_ensemble.train.cli import CLI
from lora_ensemble.train.module import BankModule

MEMBERS = (
    "[{rank: [2, 3], targets: all-linear, lr: 3e-3}, {targets: none, lr: 1e-2}, {rank: 4, targets: qkv, lr: 1e-3}]"
)


class Program:
    """The command line with a tiny model, a small data set and a folder of its own."""

    def __init__(self, folder: Path, base: Path, root: Path) -> None:
        self.folder, self.base, self.root = folder, base, root
        self.pool = folder / "pool"

    def arguments(self, command: str, *extra: str, tasks: str = "[sst]", members: str = MEMBERS) -> list[str]:
        given = {e.split("=")[0].split()[0] for e in extra}
        defaults = {
            "--data.root": str(self.root),
            "--data.tasks": tasks,
            "--model.base_model": str(self.base),
            "--model.members": members,
            "--pool.dir": str(self.pool),
            "--trainer.default_root_dir": str(self.folder),
            "--trainer.accelerator": "cpu",
            "--trainer.max_epochs": "2",
            "--trainer.enable_progress_bar": "false",
        }
        return [command, *(f"{k}={v}" for k, v in defaults.items() if k not in given), *extra]

    def __call__(self, command: str, *extra: str, **kw: str) -> int:
        return main(self.arguments(command, *extra, **kw))

    def run_dir(self) -> Path:
        (folder,) = (self.folder / "runs").iterdir()
        return folder


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path], demo_root: Path) -> Path:
    """The folder of a program that has run ``fit``."""
    program = Program(tmp_path_factory.mktemp("fitted"), tiny("bert"), demo_root)
    assert program("fit") == 0
    return program.folder


@pytest.fixture
def trained(program: Program, fitted: Path) -> Program:
    """A program that has run ``fit``, in a folder of its own."""
    shutil.copytree(fitted, program.folder, dirs_exist_ok=True)
    return program


def test_the_whole_path(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("fit") == 0
    out = capsys.readouterr().out
    assert "sst train: 60 examples" in out
    assert "r2-c1-all-linear-lr3e-3-s11711" in out
    names = sorted(p.name for p in (program.pool / "sst").iterdir() if p.is_dir())
    assert names == [
        "examples",
        "head-lr1e-2-s11711",
        "r2-c1-all-linear-lr3e-3-s11711",
        "r3-c1-all-linear-lr3e-3-s11711",
        "r4-c1-qkv-lr1e-3-s11711",
    ]
    opened = pool.TaskPool(program.pool, "sst")
    truth = read_split(PRESETS["sst"], "dev", program.root, need_labels=True)
    assert opened.examples().ids.tolist() == truth.ids.tolist()
    for record in opened.members:
        logits = opened.logits(record.name)
        accuracy = float(np.mean(np.argmax(logits, 1) == truth.labels))
        assert record.score == pytest.approx(accuracy, abs=1e-12)
        epochs = pool.read_array(program.pool, record, pool.epochs_file("dev"))
        assert epochs.shape == (2, 30, 5)
        assert record.best_epoch is not None
        np.testing.assert_allclose(epochs[record.best_epoch - 1], logits, atol=2e-3)
        assert record.score == max(s for s in record.epoch_scores if s is not None)
        assert (record.epochs_done, record.finished, record.base_model) == (2, True, str(program.base))

    config = (program.run_dir() / "config.yaml").read_text()
    assert program("validate") == 0
    out = capsys.readouterr().out
    for record in opened.members:
        assert f"{record.name}  {'' if record.score is None else f'{record.score:.4f}'}".split() == next(
            line.split() for line in out.splitlines() if line.startswith(record.name)
        )
    assert (program.run_dir() / "config.yaml").read_text() == config
    assert program("predict") == 0
    assert pool.TaskPool(program.pool, "sst", split="test").logits("head-lr1e-2-s11711").shape == (20, 5)
    record_file, predictions = program.folder / "dicor.json", program.folder / "p.csv"
    assert (
        dicor(
            [
                "select",
                "--pool",
                str(program.pool),
                "--task",
                "sst",
                "--method",
                "dicor",
                "--size",
                "3",
                "--output",
                str(record_file),
            ]
        )
        == 0
    )
    assert dicor(["compare", "--pool", str(program.pool), "--task", "sst"]) == 0
    assert dicor(["apply", "--ensemble", str(record_file), "--split", "test", "--output", str(predictions)]) == 0
    lines = predictions.read_text().splitlines()
    assert lines[0] == "id \t Predicted_Sentiment "
    assert len(lines) == 21


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_peft_loads_every_member_of_every_family(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """Plain PEFT on plain transformers gives the pool's dev logits (float32: to 2e-5)."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    program = Program(tmp_path, tiny(family), demo_root)
    members = "[{rank: [2, 3], targets: all-linear, lr: 1e-2}, {targets: none, lr: 1e-2}, "
    assert program("fit", tasks="[sts]", members=members + "{rank: 4, scaling: 10, targets: qkv, lr: 2e-2}]") == 0
    padded = "deberta-v2: its relative positions need padded batches; examples share no row"
    assert (padded in capsys.readouterr().out) == (family == "deberta-v2")
    split = read_split(PRESETS["sts"], "dev", demo_root, need_labels=True)
    tokens = AutoTokenizer.from_pretrained(program.base)(
        *split.texts, padding=True, return_tensors="pt", return_token_type_ids=True
    )
    if family != "bert" and family != "electra":
        tokens.pop("token_type_ids", None)
    else:
        assert tokens["token_type_ids"].max() == 1
    opened = pool.TaskPool(program.pool, "sts")
    assert len(opened.members) == 4
    for record in opened.members:
        plain = AutoModelForSequenceClassification.from_pretrained(program.base, num_labels=1)
        model = PeftModel.from_pretrained(plain, str(program.pool / "sts" / record.name)).eval()
        with torch.no_grad():
            logits = model(**tokens).logits.numpy()
        np.testing.assert_allclose(logits, opened.logits(record.name), atol=2e-5, rtol=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.zero_()
            changed = not np.allclose(model(**tokens).logits.numpy(), opened.logits(record.name), atol=1e-4)
        assert changed == (record.rank is not None)  # the adapters matter, but for the head-only member's


def test_a_frozen_encoder_reads_every_example_once(
    program: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two epochs of training and evaluation, beside a member that needs the encoder in every step."""
    read: list[int] = []
    original = Bank.frozen_states

    def counted(bank: Bank, batch: dict[str, Any]) -> dict[int, torch.Tensor]:
        read.extend([batch["examples"]] if bank.frozen_layers else [])
        return original(bank, batch)

    monkeypatch.setattr(Bank, "frozen_states", counted)
    assert program("fit", members="[{targets: none, lr: 1e-2}, {rank: 2, targets: qkv}]") == 0
    assert sum(read) == 60 + 30  # train and dev
    assert "1 of 2 members leave the encoder as it is: without dropout" in capsys.readouterr().out
    # A later run on the same data, with members that start elsewhere too, computes only what is new.
    assert program("fit", members="[{targets: none, lr: 2e-2}, {rank: 2, targets: qkv, layers: [1]}]") == 0
    assert "1 of 2 members leave the encoder as it is below layer 1: without" in capsys.readouterr().out
    assert sum(read) == 2 * (60 + 30)
    assert program("fit", members="[{targets: none, lr: 3e-2}, {rank: 3, targets: qkv, layers: [1]}]") == 0
    assert sum(read) == 2 * (60 + 30)


def test_without_a_place_for_it_all_is_computed_anew(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is kept, by wish or for want of room: the same members, but for rounding."""
    members, logits = "[{targets: none, lr: 1e-2}, {rank: 2, targets: qkv, layers: [1]}]", []
    for size, note in (("20", False), ("0", False), ("1e-7", True)):
        shutil.rmtree(program.folder / "frozen", ignore_errors=True)
        assert program("fit", f"--model.frozen_cache={size}", "--pool.overwrite=true", members=members) == 0
        assert ("(no room; model.frozen_cache): computed in each step" in capsys.readouterr().out) == note
        assert (program.folder / "frozen").exists() == (size != "0")
        members_of = pool.TaskPool(program.pool, "sst")
        logits.append([members_of.logits(r.name).copy() for r in members_of.members])
    for other in logits[1:]:
        for a, b in zip(logits[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_three_tasks_in_every_step(program: Program) -> None:
    assert program("fit", tasks="[sst, quora, sts]") == 0
    records = [pool.TaskPool(program.pool, t).members for t in ("sst", "quora", "sts")]
    for per_task in zip(*records, strict=True):
        assert len({(r.name, r.run, r.best_epoch) for r in per_task}) == 1
        acc_sst, acc_quora, r_sts = (r.epoch_scores for r in per_task)
        overall = [(a + b + (c + 1) / 2) / 3 for a, b, c in zip(acc_sst, acc_quora, r_sts, strict=True)]  # type: ignore[operator]
        assert per_task[0].best_epoch == int(np.argmax(overall)) + 1
    assert program("validate", tasks="[sst, quora, sts]") == 0
    assert program("predict", tasks="[sst, quora, sts]") == 0
    assert pool.TaskPool(program.pool, "quora", split="test").examples().labels is None


def test_full_fine_tuning(program: Program) -> None:
    """A fully fine-tuned member is an ordinary transformers folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    full = ("--model.finetune=full", "--trainer.gradient_clip_val=1.0")
    assert program("fit", *full, members="[{lr: 1e-3}]") == 0
    opened = pool.TaskPool(program.pool, "sst")
    (record,) = opened.members
    model = AutoModelForSequenceClassification.from_pretrained(program.pool / "sst" / record.name).eval()
    split = read_split(PRESETS["sst"], "dev", program.root, need_labels=True)
    tokens = AutoTokenizer.from_pretrained(program.base)(*split.texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens).logits.numpy()
    np.testing.assert_allclose(logits, opened.logits(record.name), atol=2e-5, rtol=0)
    before = AutoModelForSequenceClassification.from_pretrained(program.base).base_model.state_dict()
    key = "encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(before[key], model.base_model.state_dict()[key])
    assert program("predict", *full, members="[{lr: 1e-3}]") == 0


def test_full_fine_tuning_is_clipped_in_bf16_too(program: Program) -> None:
    """Lightning refuses to clip for a fused optimiser in mixed precision."""
    full = ("--model.finetune=full", "--trainer.gradient_clip_val=1.0", "--trainer.precision=bf16-mixed")
    assert program("fit", *full, members="[{lr: 1e-3}]") == 0


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_full_fine_tuning_clips_the_whole_model(program: Program, algorithm: str | None) -> None:
    """By norm, all gradients together have the norm asked for; by value, none is larger."""
    module = BankModule([PRESETS["sst"]], str(program.base), members=(Member(lr=1e-3),), finetune="full")
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.full_like(p, 2.0)
    optimizer = module.configure_optimizers()
    module.configure_gradient_clipping(optimizer, 0.5, algorithm)
    gradients = torch.cat([p.grad.flatten() for p in trained if p.grad is not None]).double()
    expected = 0.5 if algorithm == "value" else 0.5 / len(gradients) ** 0.5
    torch.testing.assert_close(gradients, torch.full_like(gradients, expected), rtol=1e-4, atol=0)
    trained[0].grad = torch.full_like(trained[0], float("inf"))
    module.configure_gradient_clipping(optimizer, 0.5, algorithm)
    assert not trained[0].grad.isfinite().any()  # or a model that has diverged would go on unnoticed


@pytest.mark.parametrize("verb", ["fit", "sweep"])
def test_missing_files_are_found_before_a_run_is_begun(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """A run of Weights & Biases that was made and never used would stay there, empty."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    nowhere = program.folder / "nowhere"
    assert program(verb, f"--data.root={nowhere}") == 2
    said = capsys.readouterr()
    assert f"{nowhere}/ids-sst-train.csv: no such file, nor its folder; set --data.root" in said.err
    assert "curves:" not in said.out
    assert not (program.folder / "runs").exists()


def test_a_task_of_ones_own(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"subject": f"late train {i}", "queue": ["rail", "food", "room"][i % 3]} for i in range(24)]
    rows[3]["queue"] = ""
    for name in ("train", "dev"):
        (program.folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = program.folder / "task.yaml"
    task.write_text(
        "data:\n  tasks:\n    - {name: tickets, kind: multiclass, text: [subject], label: queue,\n"
        "       label_names: [rail, food, room], train: train.jsonl, dev: dev.jsonl}\n"
    )
    arguments = [a for a in program.arguments("fit", f"--data.root={program.folder}") if "--data.tasks" not in a]
    assert main([*arguments, "--config", str(task)]) == 0
    assert "1 row skipped" in capsys.readouterr().out
    assert pool.TaskPool(program.pool, "tickets").labels == ["rail", "food", "room"]
    assert len(pool.TaskPool(program.pool, "tickets").examples().ids) == 23


@pytest.mark.parametrize(
    ("names", "labels"), [("[1, 2]", ["1", "2"]), ("[1.0, 2.5]", ["1.0", "2.5"]), ("['01', x]", ["01", "x"])]
)
def test_label_names_in_yaml_without_quotes(program: Program, names: str, labels: list[str]) -> None:
    for name in ("train", "dev"):
        rows = [f"text {i},{labels[i % 2]}\n" for i in range(16)]
        (program.folder / f"{name}.csv").write_text("".join(["text,label\n", *rows]))
    task = program.folder / "task.yaml"
    task.write_text(
        "data: {tasks: [{name: own, kind: binary, text: [text], train: train.csv, dev: dev.csv, "
        f"label_names: {names}}}]}}"
    )
    arguments = [a for a in program.arguments("fit", f"--data.root={program.folder}") if "--data.tasks" not in a]
    assert main([*arguments, "--config", str(task)]) == 0
    assert pool.TaskPool(program.pool, "own").labels == labels
    kept = yaml.safe_load((program.run_dir() / "config.yaml").read_text())
    assert kept["data"]["tasks"][0]["label_names"] == yaml.safe_load(names)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("label_names: [no, yes]", "{file}: task 'own': label_names holds False, which is what YAML makes of no;"),
        ("label_names: [1, 2, 3]", "{file}: task 'own': label_names has 3 entries; binary needs two or none"),
        ("label: yes", 'Got value: True; write words like no, yes, on and off, and numbers, in quotes: "no"'),
        (
            "label: [a, no]",
            "label\": Expected a <class 'str'>, or a list of them. Got value: ['a', False]; write words",
        ),
    ],
)
def test_what_yaml_makes_of_words(
    program: Program, capsys: pytest.CaptureFixture[str], task: str, message: str
) -> None:
    file = program.folder / "task.yaml"
    file.write_text(f"data: {{tasks: [{{name: own, kind: binary, text: [text], {task}}}]}}")
    arguments = [a for a in program.arguments("fit") if "--data.tasks" not in a]
    try:
        code = main([*arguments, "--config", str(file)])
    except SystemExit as e:  # argparse's way
        code = int(e.code or 0)
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(file=file) in line


def test_accumulation_keeps_its_meaning(program: Program) -> None:
    """Two batches of 4 accumulated are one batch of 8: the same members (60 examples: 7 full batches a pass)."""
    still = ("--model.head_dropout=0", "--model.encoder_dropout=0", "--trainer.max_epochs=1")
    assert program("fit", *still, "--data.steps_per_epoch=7") == 0
    whole = pool.TaskPool(program.pool, "sst")
    program.pool = program.folder / "accumulated"
    half = ("--data.steps_per_epoch=14", "--data.batch_size=4", "--trainer.accumulate_grad_batches=2")
    assert program("fit", *still, *half) == 0
    parts = pool.TaskPool(program.pool, "sst")
    for record in whole.members:
        np.testing.assert_allclose(parts.logits(record.name), whole.logits(record.name), atol=1e-4)


def test_a_diverging_member_is_reported_and_left_out(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    members = "[{rank: 2, lr: 1e-3}, {rank: 2, lr: 1e30, name: wild}]"
    assert program("fit", members=members) == 0
    assert "wild has diverged (NaN or infinity) by epoch 1" in capsys.readouterr().out
    assert [r.name for r in pool.TaskPool(program.pool, "sst").members] == ["r2-c1-qv-lr1e-3-s11711"]


def test_all_members_diverged(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("fit", members="[{lr: 1e30}]") == 2
    assert "every member has diverged" in capsys.readouterr().err


def test_a_pool_is_not_overwritten_by_accident(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    few = "[{rank: 2, lr: 1e-3, name: a}]"
    assert program("fit", members=few) == 0
    before = (program.pool / "sst/a/member.json").read_bytes()
    capsys.readouterr()
    assert program("fit", members=few) == 2
    assert "already trained with these very settings and finished" in capsys.readouterr().err
    assert program("fit", members=few.replace("rank: 2", "rank: 3")) == 2
    assert "other settings (rank was 2, is now 3)" in capsys.readouterr().err
    assert program("fit", "--trainer.max_epochs=1", members=few) == 2
    assert "max_epochs was 2, is now 1" in capsys.readouterr().err
    assert (program.pool / "sst/a/member.json").read_bytes() == before
    assert program("fit", "--trainer.max_epochs=1", "--pool.overwrite=true", members=few) == 0
    assert json.loads((program.pool / "sst/a/member.json").read_text())["epochs_done"] == 1


def different_files(one: Path, two: Path) -> list[Path]:
    names = [sorted(p.relative_to(r) for p in r.rglob("*") if p.is_file() and p.name != ".lock") for r in (one, two)]
    assert len(names[0]) > 10
    assert names[0] == names[1]
    return [n for n in names[0] if (one / n).read_bytes() != (two / n).read_bytes()]


@pytest.mark.parametrize(
    ("epoch", "step", "schedule"),
    [(0, 3, ["--model.schedule=cosine", "--model.warmup=0.2"]), (1, 6, ["--model.warmup=3"])],
)
def test_an_interrupted_epoch_goes_on_as_if_nothing_had_happened(
    program: Program, epoch: int, step: int, schedule: list[str]
) -> None:
    """From a checkpoint in mid-epoch, dropout on, a schedule and accumulation running: the same pool, bit for bit."""
    often = (
        "--trainer.callbacks+=ModelCheckpoint",
        f"--trainer.callbacks.dirpath={program.folder}/often",
        "--trainer.callbacks.every_n_train_steps=3",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.gradient_clip_val=0.5",
        *schedule,
    )
    assert program("fit", *often) == 0
    undisturbed, program.pool = program.pool, program.folder / "resumed"
    (middle,) = (program.folder / "often").glob(f"*step={step}.ckpt")
    content = torch.load(middle, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (epoch, step)  # 8 batches make 4 steps an epoch
    assert list(content["state_dict"]) == ["bank.weights"]  # nothing that was not trained
    if epoch:  # what the first epoch wrote is there in real life
        assert program("fit", *often, "--trainer.max_epochs=1") == 0
    assert program("fit", *often, f"--ckpt_path={middle}") == 0
    assert different_files(undisturbed, program.pool) == []


def test_every_timed_checkpoint_is_one_to_go_on_from(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as often as they ever could be, with accumulation and dev in mid-epoch: the same pool from each."""
    monkeypatch.setattr("lora_ensemble.train.restart.SAVE_EVERY_S", 0.0)
    options = ("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4", "--trainer.max_epochs=1")
    copies, save = program.folder / "copies", pl.Trainer.save_checkpoint

    def saved(trainer: pl.Trainer, filepath: Any, *args: Any, **kw: Any) -> None:
        save(trainer, filepath, *args, **kw)
        copies.mkdir(exist_ok=True)
        shutil.copy(filepath, copies / f"{len(list(copies.iterdir()))}.ckpt")

    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "save_checkpoint", saved)
        assert program("fit", *options) == 0
    contents = {c: torch.load(c, weights_only=True) for c in copies.iterdir()}
    batches = {
        c: content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
        for c, content in contents.items()
    }
    # Of 8 batches every second ends a step; behind the fourth comes a dev evaluation, and the last ends the epoch.
    assert sorted(batches.values()) == [2, 4, 6, 8]
    undisturbed = program.pool
    for checkpoint, at in batches.items():
        program.pool = program.folder / f"resumed-{at}"
        if at > 4:  # what the first evaluation wrote is there in real life
            shutil.copytree(undisturbed, program.pool)
        assert program("fit", *options, f"--ckpt_path={checkpoint}") == 0
        assert different_files(undisturbed, program.pool) == []


def test_checkpoint_of_another_bank(trained: Program, capsys: pytest.CaptureFixture[str]) -> None:
    last = trained.run_dir() / "checkpoint" / "last.ckpt"
    assert trained("validate", f"--ckpt_path={last}") == 0
    assert trained("validate", f"--ckpt_path={last}", members="[{rank: 2}]") == 2
    assert "another bank's (members differs)" in capsys.readouterr().err
    before = sorted((trained.pool / "sst").rglob("test.logits.npy"))
    assert trained("predict", f"--ckpt_path={last}") == 0
    assert sorted((trained.pool / "sst").rglob("test.logits.npy")) == before == []
    assert "not the pool's best weights" in capsys.readouterr().out


def test_checkpoints_that_are_none(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged, another program's, or with a pickle inside: which is refused, not run."""
    trap = program.folder / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (trap,)

    torch.save({"bank": Evil()}, program.folder / "evil.ckpt")
    torch.save({"state_dict": {}}, program.folder / "other.ckpt")
    (program.folder / "damaged.ckpt").write_bytes(b"PK\x03\x04 half a file")
    for name, message in (("evil", "loaded safely"), ("damaged", "loaded safely"), ("other", "not of a bank")):
        assert program("validate", f"--ckpt_path={program.folder}/{name}.ckpt") == 2
        assert message in capsys.readouterr().err
    assert not trap.exists()
    torch.load(program.folder / "evil.ckpt", weights_only=False)
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_runs(program: Program, config: Path) -> None:
    own = {"--data.tasks", "--model.members", "--trainer.max_epochs"}
    arguments = [a for a in program.arguments("fit") if a.split("=")[0] not in own]
    first = [*arguments[:1], "--config", str(config), "--trainer.fast_dev_run=true", "--trainer.precision=32-true"]
    assert main(first + arguments[1:]) == 0


@pytest.mark.parametrize("task", ["sst", "quora", "sts"])
def test_an_ensemble_asked_about_a_split_says_what_apply_says(program: Program, task: str) -> None:
    """Trained, predicted, selected; then the same texts anew, from Python and with infer on the split's own file."""
    # An encoder that tells texts apart: at their usual size, random weights hardly do.
    weights = load_file(program.base / "model.safetensors")
    program.base = shutil.copytree(program.base, program.folder / "base")
    louder = {name: w * 8 if w.ndim == 2 else w for name, w in weights.items()}
    save_file(louder, program.base / "model.safetensors", metadata={"format": "pt"})
    how = {"tasks": f"[{task}]", "members": "[{rank: [2, 3, 4], targets: all-linear, lr: 3e-3}]"}
    assert program("fit", **how) == 0
    assert program("predict", **how) == 0
    record, applied = program.folder / "dicor.json", program.folder / "applied.csv"
    select = ["select", "--pool", str(program.pool), "--task", task, "--method", "dicor", "--size", "3"]
    assert dicor([*select, "--output", str(record)]) == 0
    ensemble, preset = Ensemble.load(record), PRESETS[task]
    assert ensemble.record.size == 3
    for split in ("dev", "test"):
        assert dicor(["apply", "--ensemble", str(record), "--split", split, "--output", str(applied)]) == 0
        rows = [line.split(" , ") for line in applied.read_text().splitlines()[1:]]
        expected = {id_: float(value) for id_, value in rows}
        read = read_split(preset, split, program.root, need_labels=False)
        texts = list(zip(*read.texts, strict=True))
        found = dict(zip(read.ids.tolist(), ensemble.predict(texts).astype(float), strict=True))
        assert found == pytest.approx(expected, rel=0, abs=2e-5 if preset.kind == "regression" else 0)
        saved = np.stack([pool.TaskPool(program.pool, task, split=split).logits(name) for name in ensemble.members])
        assert np.ptp(saved, axis=1).min() > 0.02  # a thousand times the tolerance
        np.testing.assert_allclose(ensemble.logits(texts), saved, rtol=0, atol=2e-5)
        source, target = program.root / getattr(preset, split), program.folder / f"answers-{split}.csv"
        asked = ["infer", "--ensemble", str(record), "--input", str(source), "--output", str(target)]
        assert main(asked) == 0
        with open(target, newline="") as f:
            answers = {row["id"]: float(row["prediction"]) for row in csv.DictReader(f, delimiter="\t")}
        assert answers == pytest.approx(expected, rel=0, abs=2e-5 if preset.kind == "regression" else 0)


def test_an_unlabelled_split_is_for_prediction(trained: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained("test") == 2
    assert "`lora-ensemble predict`" in capsys.readouterr().err
    labelled = f"{{name: sst, kind: multiclass, text: [sentence], label: sentiment, id: id, label_names: ['0', '1', '2', '3', '4'], dev: {PRESETS['sst'].dev}, test: {PRESETS['sst'].dev}}}"  # noqa: E501
    assert trained("test", tasks=f"[{labelled}]") == 0
    assert "sst test (accuracy)" in capsys.readouterr().out


def test_members_of_a_later_config_replace_those_of_an_earlier_one(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, entry in (("first", "{rank: 4, scaling: [1, 3], lr: 1e-3}"), ("second", "{rank: 2}")):
        (program.folder / f"{name}.yaml").write_text(f"model:\n  members:\n    - {entry}\n")
    arguments = [a for a in program.arguments("fit") if "--model.members" not in a]
    both = [f"--config={program.folder}/{name}.yaml" for name in ("first", "second")]
    assert main([*arguments[:1], *both, *arguments[1:]]) == 0
    assert [r.name for r in pool.TaskPool(program.pool, "sst").members] == ["r2-c1-qv-lr1e-4-s11711"]


BAD: list[tuple[list[str], dict[str, str], str]] = [
    (["--data.root=/nowhere"], {}, "/nowhere"),
    ([], {"tasks": "[sst5]"}, "'sst5' is no preset"),
    ([], {"tasks": "[]"}, "data.tasks: the list is empty"),
    ([], {"members": "[]"}, "model.members: the list is empty"),
    ([], {"members": "[{rank: 0}]"}, "model.members[0].rank: 0"),
    ([], {"members": "[{rank: -3}]"}, "model.members[0].rank: -3"),
    ([], {"members": "[{rank: two}]"}, "rank"),
    ([], {"members": "[{rnk: 2}]"}, "rnk"),
    ([], {"members": "[{rank: 8}, {rank: 8}]"}, "are both named 'r8-c1-qv-lr1e-4-s11711'"),
    ([], {"members": "[{targets: qw}]"}, "no linear layer of this bert encoder ends in 'qw'"),
    ([], {"members": "[{lr: [1e-5, 1e-4]}]", "extra": "--model.finetune=full"}, "train one member a run"),
    (["--model.base_model=/nowhere/model"], {}, "model.base_model: '/nowhere/model' cannot be loaded"),
    (["--model.head_dropout=1.5"], {}, "model.head_dropout: 1.5"),
    (["--data.batch_size=0"], {}, "data.batch_size: 0"),
    (["--trainer.precision=16-mixed"], {}, "use bf16-mixed"),
    (["--no.such.option=1"], {}, "no.such.option"),
    (["--config=/nowhere.yaml"], {}, "/nowhere.yaml"),
    (["--ckpt_path=/nowhere.ckpt"], {}, "/nowhere.ckpt"),
    (["--pool.dir=/dev/null/pool"], {}, "/dev/null/pool"),
    (["--trainer.default_root_dir=/dev/null"], {}, "/dev/null"),
    (["--model.warmup=1000"], {}, "model.warmup: 1000 steps, but the run has"),
    (["--model.metrics=[F1Scor]"], {}, "'F1Scor' is no class of torchmetrics that gives one number for task 'sst' "),
    (["--model.metrics=[SpearmanCorrCoef]"], {}, "(multiclass); expected one like MatthewsCorrCoef"),
]


@pytest.mark.parametrize(("extra", "kw", "message"), BAD, ids=[m for _, _, m in BAD])
def test_mistakes_get_one_line_and_code_2(
    program: Program, capsys: pytest.CaptureFixture[str], extra: list[str], kw: dict[str, Any], message: str
) -> None:
    more = [kw.pop("extra")] if "extra" in (kw := dict(kw)) else []
    try:
        code = program("fit", *extra, *more, **kw)
    except SystemExit as e:  # argparse's way
        code = int(e.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("lora-ensemble: error:")]
    assert message in line
    assert "Traceback" not in err


def test_further_metrics_are_curves_and_columns(
    program: Program, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By scikit-learn, of the pool's logits; the run keeps its name, and its members are the same bit for bit."""
    from sklearn.metrics import f1_score

    metrics = "--model.metrics=[F1Score, MatthewsCorrCoef]"
    assert program("fit", metrics) == 0
    said = capsys.readouterr().out
    assert different_files(fitted / "pool", program.pool) == []
    assert program.run_dir().name == next((fitted / "runs").iterdir()).name
    opened = pool.TaskPool(program.pool, "sst")
    truth = opened.examples().labels
    with open(next(program.run_dir().glob("csv/version_0/metrics.csv")), newline="") as f:
        curves = list(csv.DictReader(f))
    for record in opened.members:
        every = pool.read_array(program.pool, record, pool.epochs_file("dev")).argmax(2)
        expected = [f1_score(truth, each, average="macro", labels=range(5), zero_division=0) for each in every]
        values = [row[f"dev_F1Score/sst/{record.name}"] for row in curves]
        assert [float(v) for v in values if v] == pytest.approx(expected, abs=1e-6)
        last = f1_score(truth, opened.logits(record.name).argmax(1), average="macro", labels=range(5), zero_division=0)
        (row,) = [line.split() for line in said.splitlines() if line.split()[0] == record.name]
        assert row[:4] == [record.name, str(record.best_epoch), f"{record.score:.4f}", f"{last:.4f}"]
    assert "sst dev (F1Score)  sst dev (MatthewsCorrCoef)" in said
    assert program("validate", metrics) == 0
    assert "sst dev (accuracy)  sst dev (F1Score)" in capsys.readouterr().out


def test_a_task_has_metrics_of_its_own(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    sts = PRESETS["sts"]
    own = f"text: [sentence1, sentence2], label: {sts.label}, train: {sts.train}, dev: {sts.dev}"
    tasks = f"[sst, {{name: sts, kind: regression, {own}, metrics: [SpearmanCorrCoef]}}]"
    assert program("fit", "--trainer.max_epochs=1", tasks=tasks) == 0
    assert "sts dev (Pearson r)  sts dev (SpearmanCorrCoef)\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fitt", "select"])
def test_a_command_that_is_none_is_told_all_that_there_are(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "somewhere"]) == 2
    said = capsys.readouterr().err
    assert f"lora-ensemble: error: {command}: no such command" in said
    for name in ("fit", "sweep", "predict", "infer", "serve", "export", "reproduce", "data"):
        assert f" {name}," in said or f" {name};" in said


def test_the_fast_door_knows_the_commands_of_training() -> None:
    every: Any = SimpleNamespace(_command="--config=x.yaml")
    assert set(TRAINING) == {*CLI.subcommands(every), *STUDIES}
    assert set(CLI.subcommands(SimpleNamespace(_command="fit"))) == {"fit"}  # type: ignore[arg-type]


@pytest.mark.parametrize("before", [[], ["--config=empty.yaml"]])
def test_what_distill_needs_is_called_as_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], before: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("{}\n")
    with pytest.raises(SystemExit):
        main([*before, "distill"])
    assert "error: --ensemble is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\tid\tsentence\tlabel\n0\ta\tgood\t1\n", "sentiment"),
        ("\tid\tsentence\tsentiment\n", "no usable examples"),
        ("\tid\tsentence\tsentiment\n0\ta\tgood\t7\n", "'7'"),
        (b"\tid\tsentence\tsentiment\n0\ta\tg\xe9od\t1\n", "UTF-8"),
    ],
)
def test_bad_data(program: Program, capsys: pytest.CaptureFixture[str], content: str | bytes, message: str) -> None:
    root = program.folder / "data"
    root.mkdir()
    (root / str(PRESETS["sst"].train)).write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / str(PRESETS["sst"].dev)).write_bytes((program.root / str(PRESETS["sst"].dev)).read_bytes())
    assert program("fit", f"--data.root={root}") == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") - err.count("Loading weights") <= 2


def test_one_file_is_enough(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """A quarter of it is dev: in training, in the pool, and again later."""
    task = (
        "[{name: one, kind: multiclass, text: [sentence], label: sentiment, label_names: [0, 1, 2, 3, 4], id: id, "
        "train: ids-sst-train.csv, dev: 0.25}]"
    )
    assert program("fit", tasks=task) == 0
    out = capsys.readouterr().out
    assert "one train: 45 examples" in out
    assert "one dev: 15 examples\n  0.25 of the training file, kept apart" in out
    task_pool = pool.TaskPool(program.pool, "one")
    whole = read_split(PRESETS["sst"], "train", program.root, need_labels=True)
    assert len(task_pool.examples().ids) == 15
    assert set(task_pool.examples().ids) < set(whole.ids)
    before = [task_pool.logits(r.name) for r in task_pool.members]
    assert program("predict", "--data.predict_split=dev", tasks=task) == 0
    assert program("validate", tasks=task) == 0
    after = pool.TaskPool(program.pool, "one")
    for logits, record in zip(before, after.members, strict=True):
        np.testing.assert_allclose(after.logits(record.name), logits, atol=1e-6)


def test_members_that_are_not_in_the_pool(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("validate") == 2
    assert "no such member; train it first" in capsys.readouterr().err


def test_a_name_with_other_settings_is_not_restored(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights would fit; its scaling would be another."""
    assert program("fit", members="[{rank: 2, lr: 1e-3, name: a}]") == 0
    assert program("predict", members="[{rank: 2, lr: 1e-3, scaling: 3, name: a}]") == 2
    assert "its scaling was 1.0, is now 3.0" in capsys.readouterr().err
    turned = (
        "{name: sst, kind: multiclass, text: [sentence], label: sentiment, id: id, label_names: ['4', '3', '2', '1', "
    )
    files = f"'0'], dev: {PRESETS['sst'].dev}, test: {PRESETS['sst'].test}}}"
    assert program("predict", members="[{rank: 2, lr: 1e-3, name: a}]", tasks=f"[{turned}{files}]") == 2
    assert "its labels was ['0', '1', '2', '3', '4']" in capsys.readouterr().err


def test_tampered_weights(trained: Program, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained.pool / "sst" / "head-lr1e-2-s11711" / pool.ADAPTER
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    assert trained("validate") == 2
    assert "tampered with" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["auto", "1"])
def test_members_that_never_got_into_the_pool_are_left_out(
    trained: Program, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    """A member whose r stayed undefined was never written; the others still validate and predict."""
    gone, *rest = sorted(p.name for p in (trained.pool / "sst").iterdir() if p.name[0] in "rh")
    shutil.rmtree(trained.pool / "sst" / gone)
    capsys.readouterr()
    assert trained("predict", f"--bank_size={size}") == 0
    assert f"not in the pool, and left out: {gone}" in capsys.readouterr().out
    assert all((trained.pool / "sst" / name / "test.logits.npy").is_file() for name in rest)
    for name in rest:
        shutil.rmtree(trained.pool / "sst" / name)
    assert trained("predict", f"--bank_size={size}") == 2
    assert "no such member; train it first" in capsys.readouterr().err


def test_a_name_is_of_one_set_of_settings(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("fit", members="[{rank: 2, name: mine}]") == 0
    new = {"layers": "[1]", "patience": "3", "dropout": "0.1", "init": "kaiming", "lr_b": "0.01", "weight_decay": "0.1"}
    for key, value in new.items():
        entry = f"{{rank: 2, name: mine, {key}: {value}}}"
        capsys.readouterr()
        assert program("fit", members=f"[{entry}]") == 2
        what = f"{key} was None, is now {value if key != 'init' else repr(value)}"
        assert f"holds a member of this name with other settings ({what})" in capsys.readouterr().err
    for key in ("layers", "dropout"):  # only where the layers are others do the weights not fit
        assert program("validate", members=f"[{{rank: 2, name: mine, {key}: {new[key]}}}]") == 2 * (key == "layers")
    assert "its layers was None, is now [1]" in capsys.readouterr().err
    assert program("fit", "--data.truncation=tail", members="[{rank: 2, name: mine}]") == 2
    assert "with other settings (truncation was None, is now 'tail')" in capsys.readouterr().err


def test_settings_of_a_member_and_of_long_texts_reach_the_record(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    """And go on after an interruption as if there had been none, masks included."""
    entry = "{rank: 2, lr: 0.01, lr_b: [null, 2e-2], weight_decay: 0.1, dropout: 0.2, init: kaiming}"
    how = ("--data.truncation=head-tail", "--data.max_length=6", "--model.head_dropout=0")
    assert program("fit", *how, members=f"[{entry}]") == 0
    assert "examples cut to 6 tokens, their heads and tails kept (first ids: " in capsys.readouterr().out
    there = {r.name: r for r in pool.TaskPool(program.pool, "sst").members}
    assert sorted(there) == [f"r2-c1-qv-d0.2-kaiming-lr1e-2-{b}wd0.1-s11711" for b in ("b2e-2-", "")]
    for name, r in there.items():
        assert (r.dropout, r.init, r.weight_decay, r.lr_b) == (0.2, "kaiming", 0.1, 2e-2 if "b2e" in name else None)
        assert r.settings["truncation"] == "head-tail"
        config = json.loads((program.pool / "sst" / name / pool.ADAPTER_CONFIG).read_text())
        assert (config["lora_dropout"], config["init_lora_weights"]) == (0.2, True)
    ends = [torch.load(program.run_dir() / "checkpoint" / "last.ckpt", weights_only=True)["state_dict"]]
    for folder in (program.pool, program.run_dir()):
        shutil.rmtree(folder)
    assert program("fit", *how, "--trainer.max_steps=5", members=f"[{entry}]") == 0
    assert program("fit", *how, "--ckpt_path=last", members=f"[{entry}]") == 0
    ends.append(torch.load(program.run_dir() / "checkpoint" / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(*(end["bank.weights"] for end in ends))


def test_a_config_of_peft_in_the_settings(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["key"], lora_dropout=0.1, task_type="SEQ_CLS")
    config.save_pretrained(program.folder / "config")
    members = f"[{{peft: {program.folder / 'config'}, lr: [0.01, 0.02]}}]"
    assert program("fit", members=members) == 0
    for lr in ("1", "2"):
        name = f"r2-c3-key-d0.1-kaiming-lr{lr}e-2-s11711"
        there = json.loads((program.pool / "sst" / name / pool.ADAPTER_CONFIG).read_text())
        assert (there["r"], there["lora_alpha"], there["lora_dropout"]) == (2, 6, 0.1)
        assert {path.split(".")[-1] for path in there["target_modules"]} == {"key"}
    assert program("predict", members=members) == 0
    LoraConfig(use_dora=True).save_pretrained(program.folder / "config")
    assert program("fit", members=members) == 2
    assert "use_dora is True, which no member here can have; leave it out" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(program: Program) -> None:
    """One that knew none of the later settings."""
    assert program("fit", "--trainer.max_epochs=1") == 0
    (file,) = program.folder.glob("runs/*/checkpoint/last.ckpt")
    content = torch.load(file, weights_only=True)
    for member in content["bank"]["members"]:
        for key in ("layers", "patience", "dropout", "init", "lr_b", "weight_decay"):
            del member[key]
    torch.save(content, file)
    assert program("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    assert {r.epochs_done for r in pool.TaskPool(program.pool, "sst").members} == {2}
