"""A student learns what its ensemble says on average: held against PEFT, torch's own losses and scipy."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool_factory import LABELS, make_pool, random_labels, random_logits
from scipy.special import expit, log_softmax, softmax
from test_cli import Program, different_files
from test_processes import command, environment
from trained_pool import peft_logits, texts_of, write_pool

from lora_ensemble import pool
from lora_ensemble.bank.base_model import load_classifier
from lora_ensemble.bank.lora import Member, expand_members
from lora_ensemble.bank.member_files import head_names, peft_tensors
from lora_ensemble.bank.model import Bank
from lora_ensemble.dicor import record
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.ensemble.restored import Ensemble
from lora_ensemble.main import main
from lora_ensemble.studies.distill import averaged, mixed
from lora_ensemble.tasks import Kind, Task
from lora_ensemble.train.data import BankData
from lora_ensemble.train.evaluation import member_losses

STILL = ("--model.head_dropout=0", "--model.encoder_dropout=0", "--trainer.precision=64-true")
KINDS: list[Kind] = ["multiclass", "binary", "regression"]


def select(folder: Path, task: str, file: Path, *args: str) -> Path:
    assert dicor(["select", "--pool", str(folder), "--task", task, "--output", str(file), *args]) == 0
    return file


# The loss


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_labels_make_the_sum_of_both_losses(kind: Kind, weight: float) -> None:
    """The gradient of λ · soft + (1 - λ) · label, by torch's own losses (float64), and of soft alone where none is."""
    rng = np.random.default_rng(3)
    n, u, m = 7, 4, 3
    soft = softmax(rng.normal(size=(n + u, 5)), axis=1) if kind == "multiclass" else rng.random(n + u)
    labels = random_labels(kind, n)
    logits = torch.from_numpy(rng.normal(size=(m, n + u, 5 if kind == "multiclass" else 1))).requires_grad_()
    found = member_losses(logits, torch.from_numpy(mixed(soft, labels, kind, weight)), kind)
    assert found.shape == (m, n + u)
    (gradient,) = torch.autograd.grad(found.sum(), logits)

    s, y = torch.from_numpy(soft), torch.from_numpy(labels)
    for i in range(m):
        z = logits[i]
        loss: Any
        if kind == "multiclass":
            loss = torch.nn.CrossEntropyLoss(reduction="none")
            towards_label = loss(z[:n], y)
        else:
            loss = {"binary": torch.nn.BCEWithLogitsLoss, "regression": torch.nn.MSELoss}[kind](reduction="none")
            z = z[:, 0]
            towards_label = loss(z[:n], y.double())
        towards_soft = loss(z, s)
        both = torch.cat([weight * towards_soft[:n] + (1 - weight) * towards_label, towards_soft[n:]])
        (expected,) = torch.autograd.grad(both.sum(), logits)
        torch.testing.assert_close(gradient[i], expected[i], rtol=0, atol=1e-12)
        if kind != "regression":  # there a constant is left out
            torch.testing.assert_close(found[i], both, rtol=0, atol=1e-12)


# What the ensemble says


def of_all(tmp_path: Path, kind: Kind, *args: str) -> record.Ensemble:
    make_pool(tmp_path / "pool", "mine", kind, members=4)
    return record.read(select(tmp_path / "pool", "mine", tmp_path / "dicor.json", *args))


@pytest.mark.parametrize("strategy", ["mean", "mean-probability", "majority"])
@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_averaged_predictions(tmp_path: Path, kind: Kind, strategy: str) -> None:
    """By scipy. A majority's are the mean of probabilities, for the shares of four votes are coarse."""
    ensemble = of_all(tmp_path, kind, "--method", "dicor", "--size", "4", "--strategy", strategy)
    logits = random_logits(kind, random_labels(kind, 20), 4, seed=8).astype(np.float64)
    if kind == "binary":
        each, mean = expit(logits)[..., 0], expit(logits.mean(0))[:, 0]
    else:
        each, mean = softmax(logits, axis=2), softmax(logits.mean(0), axis=1)
    found = averaged(logits, ensemble)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, mean if strategy == "mean" else each.mean(0), rtol=0, atol=1e-6)
    assert np.abs(mean - each.mean(0)).max() > 1e-3


def test_averaged_predictions_with_weights_and_offsets(tmp_path: Path) -> None:
    ensemble = of_all(tmp_path, "multiclass", "--method", "weighted-offset")
    assert ensemble.offsets is not None
    logits = random_logits("multiclass", random_labels("multiclass", 20), ensemble.size, seed=8)
    mean = np.tensordot([row["weight"] for row in ensemble.rows()], softmax(logits.astype(np.float64), axis=2), 1)
    expected = np.exp(log_softmax(ensemble.scale * np.log(mean) + ensemble.offsets, axis=1))
    np.testing.assert_allclose(averaged(logits, ensemble), expected, rtol=0, atol=1e-6)


def test_averaged_values(tmp_path: Path) -> None:
    ensemble = of_all(tmp_path, "regression", "--method", "weighted")
    logits = random_logits("regression", random_labels("regression", 20), ensemble.size, seed=8)
    expected = np.tensordot([row["weight"] for row in ensemble.rows()], logits[..., 0].astype(np.float64), 1)
    np.testing.assert_allclose(averaged(logits, ensemble), expected, rtol=0, atol=1e-6)


# The command


class School:
    """A pool of random members of task "mine", its ensemble, training and dev files, and unlabelled text."""

    def __init__(self, folder: Path, base: Path, kind: Kind, *args: str, columns: int = 1) -> None:
        self.folder, self.base, self.kind = folder, base, kind
        self.task = Task(name="mine", kind=kind, text=["one", "two"][:columns], label_names=LABELS[kind])
        write_pool(folder / "teachers", base, kind, columns=columns)
        self.ensemble = select(folder / "teachers", "mine", folder / "dicor.json", *args)
        self.texts = {name: texts_of(n, columns, seed=i) for i, (name, n) in enumerate({"train": 12, "dev": 9}.items())}
        self.labels = {name: random_labels(kind, len(t), seed=5) for name, t in self.texts.items()}
        for name, texts in self.texts.items():
            self.write(name, texts, self.labels[name].tolist())
        self.config = folder / "mine.yaml"
        self.config.write_text(
            f"data:\n  root: {folder}\n  tasks:\n    - {{name: mine, kind: {kind}, text: {self.task.text}, "
            f"label_names: {json.dumps(LABELS[kind])}, train: train.jsonl, dev: dev.jsonl, test: dev.jsonl}}\n"
        )

    def write(self, name: str, texts: list[Any], labels: list[Any] | None = None) -> Path:
        rows = [dict(zip(self.task.text, [t] if isinstance(t, str) else t, strict=True)) for t in texts]
        if labels is not None:
            rows = [{**r, "label": label} for r, label in zip(rows, labels, strict=True)]
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return file

    def arguments(self, *extra: str) -> list[str]:
        return [
            "distill",
            f"--config={self.config}",
            f"--ensemble={self.ensemble}",
            f"--pool.dir={self.folder}/students",
            f"--trainer.default_root_dir={self.folder}",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=3",
            "--trainer.enable_progress_bar=false",
            *extra,
        ]

    def __call__(self, *extra: str) -> int:
        return main(self.arguments(*extra))

    def students(self) -> list[pool.MemberRecord]:
        return pool.TaskPool(self.folder / "students", "mine").members

    def asked(self, texts: list[Any]) -> np.ndarray:
        """What PEFT and scipy say that the ensemble of all members says on average."""
        outputs = self.task.num_outputs
        folders = [p for p in (self.folder / "teachers/mine").iterdir() if (p / "member.json").is_file()]
        logits = np.stack([peft_logits(f, self.base, texts, outputs) for f in folders]).astype(np.float64)
        if self.kind == "multiclass":
            return softmax(logits, axis=2).mean(0)
        return (expit(logits) if self.kind == "binary" else logits)[..., 0].mean(0)


def trained_by_peft(school: School, entry: Member, soft: np.ndarray, weight: float, epochs: int) -> np.ndarray:
    """(N, C) dev logits of PEFT's member after some steps on all texts at once: both losses by torch, AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    sizes = {"num_labels": school.task.num_outputs, "head_dropout": 0.0, "encoder_dropout": 0.0}
    classifier, fresh = load_classifier(str(school.base), **sizes)
    bank = Bank(classifier, members=expand_members([entry]), tasks=[school.task], fresh=fresh)
    adapter, heads = bank.member_state(0)
    paths = [f"{bank.prefix}.{p}" for p in bank.paths[0]]
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=12, target_modules=paths, modules_to_save=head_names(bank.heads[0])
    )
    model = get_peft_model(load_classifier(str(school.base), **sizes)[0], config).double()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    given = peft_tensors(adapter, heads["mine"], prefix=bank.prefix)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name.replace(".default", "").replace(".modules_to_save", "")])

    tokenizer = AutoTokenizer.from_pretrained(school.base)

    def logits(texts: list[Any]) -> torch.Tensor:
        columns = [list(c) for c in zip(*texts, strict=True)] if len(school.task.text) == 2 else [texts]
        tokens = tokenizer(*columns, padding=True, return_tensors="pt", return_token_type_ids=True)
        return model(**tokens).logits

    texts, n = school.texts["train"] + school.texts["extra"], len(school.texts["train"])
    s, y = torch.from_numpy(soft), torch.from_numpy(school.labels["train"])
    optimizer = torch.optim.AdamW(own.values(), lr=entry.lr, weight_decay=0.0)  # type: ignore[arg-type]
    for _ in range(epochs):
        model.train()
        z = logits(texts)
        if school.kind == "multiclass":
            towards_soft, towards_label = (
                F.cross_entropy(z, s, reduction="none"),
                F.cross_entropy(z[:n], y, reduction="none"),
            )
        else:
            loss = F.binary_cross_entropy_with_logits if school.kind == "binary" else F.mse_loss
            towards_soft = loss(z[:, 0], s, reduction="none")
            towards_label = loss(z[:n, 0], y.double(), reduction="none")
        both = torch.cat([weight * towards_soft[:n] + (1 - weight) * towards_label, towards_soft[n:]])
        optimizer.zero_grad()
        both.mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return logits(school.texts["dev"]).numpy()


@pytest.mark.parametrize(
    ("kind", "strategy", "weight", "columns"),
    [
        ("multiclass", "mean-probability", 1.0, 1),
        ("multiclass", "majority", 0.3, 2),
        ("binary", "mean-probability", 0.6, 1),
        ("regression", "mean", 0.6, 2),
    ],
)
def test_a_student_is_what_peft_trains(
    tiny: Callable[[str], Path], tmp_path: Path, kind: Kind, strategy: str, weight: float, columns: int
) -> None:
    """Dropout off, float64, 20 steps on everything at once: the same dev logits, to 1e-4 (it asks in float32)."""
    base = tiny("bert")
    school = School(tmp_path, base, kind, "--method=dicor", "--size=4", f"--strategy={strategy}", columns=columns)
    school.texts["extra"] = texts_of(5, columns, seed=77)
    # Texts of train, repeated and empty ones are left out.
    blank: Any = "" if columns == 1 else ("good", " ")
    extra = school.write("extra", [*school.texts["extra"], school.texts["train"][3], school.texts["extra"][0], blank])
    entry = Member(rank=4, scaling=3.0, lr=1e-2, targets="qv", seed=6)
    members = "--model.members=[{rank: 4, scaling: 3, lr: 1e-2, targets: qv, seed: 6}, {targets: none, lr: 1e-2}]"
    options = (f"--unlabelled={extra}", f"--soft_weight={weight}", "--data.batch_size=100", members)
    # Evaluated once, at the end: what the pool has is the last step's.
    once = ("--trainer.max_epochs=20", "--trainer.check_val_every_n_epoch=20")
    assert school(*options, *STILL, *once) == 0
    student = next(r for r in school.students() if r.rank)
    found = pool.TaskPool(tmp_path / "students", "mine").logits(student.name)
    soft = school.asked(school.texts["train"] + school.texts["extra"])
    np.testing.assert_allclose(found, trained_by_peft(school, entry, soft, weight, 20), rtol=0, atol=1e-4)
    assert np.abs(trained_by_peft(school, entry, soft, 0.0, 20) - found).max() > 1e-2  # it matters what is learned


def test_without_weight_it_is_fit(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """λ = 0 and no other text, every setting taken from the best member, dropout on: its twin, bit for bit."""
    program = Program(tmp_path, tiny("bert"), demo_root)
    settings = ("--data.batch_size=4", "--model.schedule=cosine", "--data.max_length=20", "--data.seed=3")
    for seed in (5, 6):  # not in one bank, for which dropout is drawn as a whole
        assert program("fit", *settings, members=f"[{{rank: 2, targets: all-linear, lr: 3e-3, seed: {seed}}}]") == 0
    file = select(program.pool, "sst", tmp_path / "dicor.json", "--method", "omni")
    best = max(pool.TaskPool(program.pool, "sst").members, key=lambda r: r.score or 0.0)
    run = ["distill", f"--ensemble={file}", f"--data.root={demo_root}", f"--trainer.default_root_dir={tmp_path}"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main([*run, *quiet, "--soft_weight=0"]) == 0
    assert "the ensemble was chosen on dev" in capsys.readouterr().out
    (student,) = [r for r in pool.TaskPool(program.pool, "sst").members if "distilled" in r.name]
    assert student.name.startswith(f"{best.name}-distilled-")
    assert student.files == best.files  # checksums of weights, and of logits of every epoch
    assert (student.epoch_scores, student.base_model) == (best.epoch_scores, best.base_model)
    own = dict(student.settings)
    assert own.pop("distilled") == {"ensemble": own_digest(file), "soft_weight": 0.0, "unlabelled": []}
    assert own == best.settings  # and no member that fit trains knows of distilling

    # The same command again is refused; what is taught otherwise has another name.
    assert main([*run, *quiet, "--soft_weight=0"]) == 2
    assert "already trained with these very settings and finished" in capsys.readouterr().err
    assert main([*run, *quiet, "--soft_weight=0.5", "--trainer.max_epochs=1"]) == 0
    assert len(pool.TaskPool(program.pool, "sst").members) == 4
    # Under a student's name no other member is trained.
    capsys.readouterr()
    namesake = f"[{{rank: 2, targets: all-linear, lr: 3e-3, seed: {best.seed}, name: {student.name}}}]"
    assert program("fit", *settings, members=namesake) == 2
    assert "other settings (distilled was" in capsys.readouterr().err
    # dicor takes it like any other, and says what it is.
    assert dicor(["compare", "--pool", str(program.pool), "--task", "sst", "--method", "best"]) == 0
    assert "2 members were distilled from an ensemble that was chosen on dev" in capsys.readouterr().err


def own_digest(file: Path) -> str:
    """What a student's record calls its ensemble."""
    import hashlib

    raw = json.loads(file.read_text())
    keys = ("task", "kind", "labels", "strategy", "scale", "offsets")
    members = [[m["name"], m["weight"], m["temperature"], m["dev_logits"]] for m in raw["members"]]
    return hashlib.sha256(json.dumps([*(raw[k] for k in keys), members]).encode()).hexdigest()[:16]


def test_the_ensemble_is_asked_once(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another λ, and a run that goes on, find what was kept; other text, or a damaged file, is asked about."""
    school = School(tmp_path, tiny("bert"), "binary", "--method=omni")
    times: list[int] = []
    original = Ensemble.logits

    def counted(ensemble: Ensemble, texts: Any, **kw: Any) -> np.ndarray:
        times.append(len(texts))
        return original(ensemble, texts, **kw)

    monkeypatch.setattr(Ensemble, "logits", counted)
    monkeypatch.setattr("lora_ensemble.studies.distill._BLOCK", 8)
    assert school("--trainer.max_epochs=1") == 0
    assert times == [8, 4]  # 12 texts in blocks
    assert school("--soft_weight=0.9") == 0
    assert school("--ckpt_path=last") == 0
    assert len(times) == 2
    (kept,) = (tmp_path / "soft").glob("*.npy")
    soft = np.load(kept, allow_pickle=False)
    np.testing.assert_allclose(soft, school.asked(school.texts["train"]), rtol=0, atol=1e-2)
    kept.write_bytes(kept.read_bytes()[:-5])
    assert school("--soft_weight=0.8", "--trainer.max_epochs=1") == 0
    assert len(times) == 4
    np.testing.assert_array_equal(np.load(kept, allow_pickle=False), soft)
    for seed in (9, 10):  # as many, but others
        extra = school.write("extra", texts_of(3, 1, seed=seed))
        assert school(f"--unlabelled=[{extra}]", "--trainer.max_epochs=1") == 0
    assert times[4:] == [8, 7, 8, 7]
    school.ensemble = select(tmp_path / "teachers", "mine", tmp_path / "dicor.json", "--method=best")
    assert school("--trainer.max_epochs=1") == 0
    assert times[8:] == [8, 4]
    assert len({r.name for r in school.students()}) == 6


def test_students_that_read_a_frozen_encoder(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unlabelled texts are read once too; a student that runs into NaN is frozen, and changes no other by one bit."""
    school = School(tmp_path, tiny("bert"), "multiclass", "--method=omni")
    extra = school.write("extra", texts_of(5, 1, seed=77))
    read: list[int] = []
    original = Bank.frozen_states

    def counted(bank: Bank, batch: dict[str, Any]) -> dict[int, torch.Tensor]:
        read.extend([batch["examples"]] if bank.frozen_layers else [])
        return original(bank, batch)

    members = "--model.members=[{{targets: none, lr: 1e-2}}, {{rank: 2, lr: {}, name: other}}]"
    with monkeypatch.context() as patch:
        patch.setattr(Bank, "frozen_states", counted)
        assert school(f"--unlabelled={extra}", members.format("1e-3"), f"--pool.dir={tmp_path}/calm") == 0
        teacher, student = 12 + 5, 12 + 5 + 9  # the teacher has a member that leaves the encoder as it is, too
        assert sum(read) == teacher + student
        assert school(f"--unlabelled={extra}", members.format("1e30")) == 0
    assert sum(read) <= 2 * teacher + student  # what the student reads was there
    assert "other has diverged" in capsys.readouterr().out
    (student,) = school.students()
    assert student.files == pool.TaskPool(tmp_path / "calm", "mine").record(student.name).files


@pytest.mark.parametrize("bank_size", ["auto", "1"])
def test_interrupted_and_resumed(tiny: Callable[[str], Path], tmp_path: Path, bank_size: str) -> None:
    """From a checkpoint in mid-epoch, dropout on: the same students, bit for bit; and in banks of one."""
    school = School(tmp_path, tiny("bert"), "multiclass", "--method=omni")
    members = "--model.members=[{rank: [2, 3], lr: 3e-3}]"
    options = ("--data.batch_size=2", members, f"--bank_size={bank_size}")
    if bank_size == "1":
        options += ("--model.head_dropout=0", "--model.encoder_dropout=0")  # masks are drawn for a bank as a whole
        assert school(*options) == 0
        assert school(*options, "--bank_size=auto", f"--pool.dir={tmp_path}/together") == 0
        for r in school.students():
            a, b = (pool.TaskPool(tmp_path / p, "mine").logits(r.name) for p in ("students", "together"))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        return
    often = (
        "--trainer.callbacks+=ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path}/often",
        "--trainer.callbacks.every_n_train_steps=4",
        "--trainer.callbacks.save_top_k=-1",
    )
    assert school(*options, *often) == 0
    (middle,) = (tmp_path / "often").glob("*step=4.ckpt")
    assert school(*options, *often, f"--ckpt_path={middle}", f"--pool.dir={tmp_path}/resumed") == 0
    assert different_files(tmp_path / "students", tmp_path / "resumed") == []


@pytest.mark.slow
def test_two_devices(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The second process finds what the first one asked; uneven shares: the same logits (float64, to 1e-6)."""
    school = School(tmp_path, tiny("bert"), "multiclass", "--method=omni")
    options = (f"--unlabelled={school.write('extra', texts_of(5, 1, seed=77))}", "--data.batch_size=7", *STILL)
    assert school(*options) == 0
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", f"--pool.dir={tmp_path}/two")
    subprocess.run(command(school.arguments(*options, *ddp)), env=environment(), check=True)
    (one,), (two,) = school.students(), pool.TaskPool(tmp_path / "two", "mine").members
    assert (one.name, one.best_epoch) == (two.name, two.best_epoch)
    a, b = (pool.TaskPool(tmp_path / p, "mine").logits(one.name) for p in ("students", "two"))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert len(list((tmp_path / "soft").glob("*.npy"))) == 1


# Mistakes


BAD = [
    (["--ensemble=/nowhere/dicor.json"], "/nowhere/dicor.json"),
    (["--soft_weight=1.5"], "--soft_weight: 1.5; expected 0"),
    (["--soft_weight=nan"], "soft_weight"),
    (["--unlabelled=/nowhere/texts.csv"], "/nowhere/texts.csv"),
    (["--unlabelled={folder}"], "Is a directory"),
    (["--unlabelled={folder}/other.csv"], "other.csv: no column 'one'; columns found: subject"),
    (["--unlabelled={folder}/empty.csv"], "empty.csv: no usable texts; empty.csv: 1 row skipped: empty one"),
    (["--ensemble_pool=/nowhere"], "/nowhere: the ensemble's pool is not there; say where it is with --pool"),
    (["--data.tasks=[sst]"], "decides about 'mine', data.tasks is sst"),
    (["--data.tasks=[{name: mine, kind: regression, text: [one], train: a, dev: b}]"], "its kind 'binary' are not"),
    (["--model.members=[]"], "model.members: the list is empty"),
    (["--trainer.precision=16-mixed"], "use bf16-mixed"),
]


def test_mistakes_get_one_line_and_code_2(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    school = School(tmp_path, tiny("bert"), "binary", "--method=omni")
    (tmp_path / "other.csv").write_text("subject,queue\nlate,rail\n")
    (tmp_path / "empty.csv").write_text('one,two\n"",b\n')
    for extra, message in BAD:
        capsys.readouterr()
        try:
            code = school(*(e.replace("{folder}", str(tmp_path)) for e in extra))
        except SystemExit as e:  # argparse's way
            code = int(e.code or 0)
        assert code == 2, message
        err = capsys.readouterr().err
        (line,) = [line for line in err.splitlines() if line.startswith("lora-ensemble: error:")]
        assert message in line
        assert "Traceback" not in err
    assert not (tmp_path / "students").exists()


def test_members_without_weights_cannot_teach(
    tmp_path: Path, demo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predictions made elsewhere say nothing of the training texts."""
    make_pool(tmp_path / "pool", "sst", "multiclass")
    file = select(tmp_path / "pool", "sst", tmp_path / "dicor.json")
    where = (f"--data.root={demo_root}", f"--trainer.default_root_dir={tmp_path}")
    assert main(["distill", f"--ensemble={file}", *where, "--trainer.accelerator=cpu"]) == 2
    assert "have no weights, only predictions" in capsys.readouterr().err


def test_only_texts_that_are_new(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is left out, and what stands in dev, is counted and said."""
    school = School(tmp_path, tiny("bert"), "binary", "--method=omni")
    new, known, dev = texts_of(4, 1, seed=50), school.texts["train"][:2], school.texts["dev"][:1]
    first = school.write("first", [*new[:2], *known, *new[:1]])
    second = school.write("second", [*new, *dev, "  "])
    seen: list[Any] = []
    original = BankData.teach

    def kept(data: BankData, task: str, labels: np.ndarray, unlabelled: Any, how: Any) -> None:
        seen.append(unlabelled)
        original(data, task, labels, unlabelled, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BankData, "teach", kept)
        assert school(f"--unlabelled=[{first}, {second}]", "--trainer.max_epochs=1") == 0
    (unlabelled,) = seen
    assert unlabelled.texts == [[*new, *dev]]
    assert unlabelled.ids.tolist() == [
        "first.jsonl:0",
        "first.jsonl:1",
        "second.jsonl:2",
        "second.jsonl:3",
        "second.jsonl:4",
    ]
    out = capsys.readouterr().out
    assert "3 of 5 texts left out: they stand in train, or came before" in out
    assert "2 of 5 texts left out" in out
    assert "1 of 5 texts also stand in dev" in out
    assert "1 row skipped: empty one" in out
