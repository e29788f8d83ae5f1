"""However training ends, nothing is lost and nothing untrue is said: the Trainer's flags, a signal, a clock."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from test_cli import Program, different_files
from test_sweep import at_step, contents

from lora_ensemble import pool
from lora_ensemble.train.module import BankModule

TWO = "[{rank: 2, lr: 3e-3, targets: all-linear}, {targets: none, lr: 1e-2}]"
BATCHES = 8
"""Steps of an epoch: 60 training examples in batches of 8."""


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path], demo_root: Path) -> Any:
    """From options to the pool that ``fit`` fills with them when nothing disturbs it; trained once."""
    made: dict[tuple[str, ...], Path] = {}

    def get(*how: str) -> Path:
        if how not in made:
            whole = Program(tmp_path_factory.mktemp("whole"), tiny("bert"), demo_root)
            assert fit(whole, *how) == 0
            made[how] = whole.pool
        return made[how]

    return get


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``trainer.max_time`` counts steps instead of seconds: one more at the end of each batch."""
    ticks = [0]
    end = Timer.on_train_batch_end

    def tick(self: Timer, *args: Any, **kw: Any) -> None:
        ticks[0] += 1
        end(self, *args, **kw)

    monkeypatch.setattr(Timer, "on_train_batch_end", tick)
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage=None: float(ticks[0]))
    return ticks


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps after which dev was evaluated."""
    steps: list[int] = []
    end = BankModule.on_validation_epoch_end

    def noted(self: BankModule) -> None:
        if not self.trainer.sanity_checking:
            steps.append(self.global_step)
        end(self)

    monkeypatch.setattr(BankModule, "on_validation_epoch_end", noted)
    return steps


def fit(program: Program, *extra: str, command: str = "fit") -> int:
    return program(command, *extra, members=TWO)


def records(program: Program) -> list[pool.MemberRecord]:
    return pool.read_records(program.pool, "sst")


# Each flag of the Trainer that touches the loops


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        pytest.param(["max_epochs=3"], [8, 16, 24], marks=pytest.mark.slow),
        pytest.param(["max_steps=3"], [3], marks=pytest.mark.slow),
        (["max_steps=11"], [8, 11]),
        pytest.param(["max_steps=16"], [8, 16], marks=pytest.mark.slow),
        pytest.param(["min_epochs=2", "max_epochs=3"], [8, 16, 24], marks=pytest.mark.slow),
        (["min_steps=9", "max_epochs=1"], [8]),
        (["limit_train_batches=5"], [5, 10]),
        pytest.param(["limit_train_batches=0.5", "max_epochs=3"], [4, 8, 12], marks=pytest.mark.slow),
        pytest.param(["limit_val_batches=1.0"], [8, 16], marks=pytest.mark.slow),
        (["val_check_interval=3"], [3, 6, 11, 14, 16]),
        pytest.param(["val_check_interval=0.5", "max_epochs=1"], [4, 8], marks=pytest.mark.slow),
        (["val_check_interval=5", "check_val_every_n_epoch=null"], [5, 10, 15, 16]),
        (["check_val_every_n_epoch=2", "max_epochs=3"], [16, 24]),
        pytest.param(["check_val_every_n_epoch=5"], [16], marks=pytest.mark.slow),
        pytest.param(["accumulate_grad_batches=2"], [4, 8], marks=pytest.mark.slow),
        (["accumulate_grad_batches=3"], [3, 6]),
        (["reload_dataloaders_every_n_epochs=1"], [8, 16]),
        (["num_sanity_val_steps=2"], [8, 16]),
        (["gradient_clip_val=0.5", "detect_anomaly=true", "inference_mode=false"], [8, 16]),
        (["barebones=true"], [8, 16]),
    ],
    ids=lambda v: " ".join(map(str, v)),
)
def test_what_was_trained_is_evaluated_and_offered(
    program: Program, evaluated: list[int], flags: list[str], steps: list[int]
) -> None:
    """Dev is evaluated where the flags say and at the end of training; every member is finished."""
    assert fit(program, *(f"--trainer.{f}" for f in flags)) == 0
    assert evaluated == steps
    for record in records(program):
        assert (record.finished, record.epochs_done) == (True, len(steps))
    # The head alone improves with each evaluation, or the last logits would show nothing.
    logits = pool.read_array(program.pool, records(program)[0], pool.epochs_file("dev"))
    assert len(logits) == len(steps)
    assert len(steps) == 1 or np.abs(logits[-1] - logits[-2]).max() > 1e-3


@pytest.mark.parametrize("steps", [3, pytest.param(11, marks=pytest.mark.slow)])
def test_the_end_of_the_steps_is_the_end_of_an_epoch_of_so_many(
    program: Program, tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, steps: int
) -> None:
    """The last evaluation is of the weights after the last step: those of a run whose one epoch has so many."""
    other = Program(tmp_path / "other", tiny("bert"), demo_root)
    still = ("--model.head_dropout=0", "--model.encoder_dropout=0")
    assert fit(program, f"--trainer.max_steps={steps}", "--data.steps_per_epoch=8", *still) == 0
    assert fit(other, "--trainer.max_epochs=1", f"--data.steps_per_epoch={steps}", *still) == 0
    for ours, expected in zip(records(program), records(other), strict=True):
        a, b = (pool.read_array(p.pool, r, pool.epochs_file("dev")) for p, r in ((program, ours), (other, expected)))
        assert np.array_equal(a[-1], b[-1])


def test_a_limit_on_training_batches_makes_shorter_epochs(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each epoch starts with its own first batch, and a schedule ends where training does."""
    seen: list[tuple[int, int, list[int]]] = []
    step = BankModule.training_step

    def noted(self: BankModule, batch: Any, batch_idx: int) -> Any:
        seen.append((self.current_epoch, batch_idx, batch["sst"]["rows"].tolist()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(BankModule, "training_step", noted)
    assert fit(program, "--trainer.max_epochs=3") == 0
    whole = seen.copy()
    program.pool, seen[:] = program.folder / "limited", []
    limit = ("--trainer.limit_train_batches=5", "--trainer.max_epochs=3", "--model.schedule=linear")
    assert fit(program, *limit) == 0
    assert seen == [s for s in whole if s[1] < 5]
    (run,) = (
        r
        for r in (program.folder / "runs").iterdir()
        if torch.load(r / "checkpoint/last.ckpt", weights_only=True)["global_step"] == 15
    )
    (schedule,) = torch.load(run / "checkpoint/last.ckpt")["lr_schedulers"]
    assert schedule["_last_lr"] == [0.0]


def test_overfitting_sees_the_same_batches_in_every_epoch(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[int]] = []
    step = BankModule.training_step
    monkeypatch.setattr(
        BankModule, "training_step", lambda self, b, i: (seen.append(b["sst"]["rows"].tolist()), step(self, b, i))[1]
    )
    assert fit(program, "--trainer.overfit_batches=2", "--data.eval_batch_size=4") == 0
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]
    said = capsys.readouterr().out
    assert "overfit_batches" in said
    assert not (program.pool / "sst").exists() or records(program) == []


@pytest.mark.parametrize("flag", ["limit_val_batches=0", "limit_val_batches=1"])
def test_what_could_not_be_evaluated_is_said_and_can_be_made_up_for(
    program: Program, undisturbed: Any, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert fit(program, f"--trainer.{flag}", "--data.eval_batch_size=4") == 0
    assert "nothing of this run is in the pool" in capsys.readouterr().out
    assert not (program.pool / "sst").exists() or records(program) == []
    assert fit(program, "--ckpt_path=last") == 0
    whole = pool.TaskPool(undisturbed(), "sst")
    assert len(records(program)) == 2
    for record in records(program):
        assert record.finished
        ours = pool.read_array(program.pool, record, pool.epochs_file("dev"))
        theirs = pool.read_array(undisturbed(), whole.record(record.name), pool.epochs_file("dev"))
        assert np.array_equal(ours[-1], theirs[-1])


def test_nothing_trained_is_said(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("max_steps=0", "max_epochs=0", "limit_train_batches=0"):
        assert fit(program, f"--trainer.{flag}") == 0
        assert "no step was trained" in capsys.readouterr().out


def test_a_dry_run_leaves_nothing(program: Program) -> None:
    assert fit(program, "--trainer.fast_dev_run=2") == 0
    assert not program.pool.exists()
    assert not (program.folder / "runs").exists()


# Cut short, and gone on with

CUTS = [
    ([], 3),
    ([], 8),
    ([], 11),
    (["--trainer.val_check_interval=4"], 4),
    (["--trainer.val_check_interval=4"], 5),
    (["--trainer.check_val_every_n_epoch=2"], 8),
    (["--trainer.check_val_every_n_epoch=2"], 13),
    (["--trainer.limit_train_batches=5"], 5),
    (["--trainer.limit_train_batches=5"], 7),
    (["--trainer.accumulate_grad_batches=2"], 3),
    (["--model.schedule=constant", "--model.warmup=4"], 5),
]
"""Options, and the step of the cut."""


def _name(value: Any) -> str:
    return " ".join(value).replace("--", "") or "plain" if isinstance(value, list) else str(value)


def cuts(*quick: int) -> Any:
    """All cuts; those that are not named by their number are slow tests."""
    every = [pytest.param(*c, marks=() if i in quick else pytest.mark.slow) for i, c in enumerate(CUTS)]
    return pytest.mark.parametrize(("how", "cut"), every, ids=_name)


@cuts(1, 3, 6, 8)
def test_cut_by_steps_and_gone_on_with(program: Program, undisturbed: Any, how: list[str], cut: int) -> None:
    """The same members as without the cut, bit for bit, whatever its own evaluation put into the pool."""
    assert fit(program, *how, f"--trainer.max_steps={cut}") == 0
    assert all(r.finished for r in records(program))
    assert fit(program, *how, "--ckpt_path=last") == 0
    assert different_files(undisturbed(*how), program.pool) == []


@cuts(2, 5, 7, 9)
def test_cut_by_the_clock_and_gone_on_with(
    program: Program,
    undisturbed: Any,
    clock: list[int],
    capsys: pytest.CaptureFixture[str],
    how: list[str],
    cut: int,
) -> None:
    assert fit(program, *how, f"--trainer.max_time=00:00:00:{cut:02}") == 0
    said = capsys.readouterr().out
    assert "trainer.max_time" in said
    assert "not finished" in said
    assert [r.finished for r in records(program)] == [False, False]
    assert fit(program, *how, "--ckpt_path=last") == 0
    assert different_files(undisturbed(*how), program.pool) == []


@cuts(0, 4, 9, 10)
def test_told_to_end_and_gone_on_with(
    program: Program, undisturbed: Any, capsys: pytest.CaptureFixture[str], how: list[str], cut: int
) -> None:
    number = signal.SIGINT if cut == 3 else signal.SIGTERM
    with at_step(cut, lambda: os.kill(os.getpid(), number)) as begun:
        assert fit(program, *how) == 128 + number
    assert begun[-1] <= cut + 1  # with accumulation, the step is ended first
    said = capsys.readouterr().out
    assert "interrupted" in said
    assert "--ckpt_path last goes on" in said
    assert fit(program, *how, "--ckpt_path=last") == 0
    assert different_files(undisturbed(*how), program.pool) == []


def test_told_twice_it_ends_at_once_and_says_what_is_lost(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with at_step(3, twice):
        assert fit(program) == 130
    said = capsys.readouterr().out
    assert "nothing was saved" in said
    assert "goes on" not in said.split("nothing was saved")[1]


def test_interrupted_before_training_it_ends_with_130(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_ensemble.train.data.BankData.setup", setup)
    before = signal.getsignal(signal.SIGINT)
    try:
        for command in ("fit", "validate", "predict", "sweep"):
            assert fit(program, command=command) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on


def scored(monkeypatch: pytest.MonkeyPatch, by_step: dict[int, float]) -> None:
    """Let dev scores be these after a step, and 0.5 after others."""
    end = BankModule.on_validation_epoch_end

    def replaced(self: BankModule) -> None:
        end(self)
        for e in self.evaluations["dev"].values():
            e.scores[:] = [by_step.get(self.global_step, 0.5)] * len(self.members)

    monkeypatch.setattr(BankModule, "on_validation_epoch_end", replaced)


@pytest.mark.parametrize("best", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_the_best_of_a_cut_is_undone_when_the_run_goes_on(
    program: Program, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    """The cut's own evaluation beats all others; it is in the pool until the run goes on, and then as if never made."""
    scored(monkeypatch, {best: 0.7, 11: 0.9})
    assert fit(program, "--trainer.max_steps=24", "--trainer.max_epochs=4") == 0
    undisturbed, program.pool = program.pool, program.folder / "cut"
    shutil.rmtree(program.folder / "runs")
    for _ in range(2):  # the same again changes nothing
        assert fit(program, "--trainer.max_steps=11", "--trainer.max_epochs=4", *(["--ckpt_path=last"] * _)) == 0
        assert [(r.score, r.best_epoch, r.finished) for r in records(program)] == [(0.9, 2, True)] * 2
    assert fit(program, "--trainer.max_steps=24", "--trainer.max_epochs=4", "--ckpt_path=last") == 0
    assert different_files(undisturbed, program.pool) == []


def test_a_run_that_goes_on_into_another_pool_offers_its_members_anew(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best epoch was before; its weights are in the old pool alone."""
    scored(monkeypatch, {8: 0.9})
    assert fit(program, "--trainer.max_epochs=1") == 0
    program.pool = program.folder / "other"
    assert fit(program, "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    assert "offered anew" in capsys.readouterr().out
    assert [(r.score, r.best_epoch, r.finished) for r in records(program)] == [(0.5, 2, True)] * 2


def test_a_member_that_was_deleted_meanwhile_is_said(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(monkeypatch, {8: 0.9})
    with at_step(12, lambda: shutil.rmtree(program.pool / "sst" / "head-lr1e-2-s11711")):
        assert fit(program) == 0
    assert "head-lr1e-2-s11711 is not in the pool: deleted, or written by another run" in capsys.readouterr().out
    assert [r.finished for r in records(program)] == [True]


# A sweep


def test_a_sweep_trains_on_what_the_clock_has_cut(
    program: Program, clock: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(program, "--bank_size=1", command="sweep") == 0
    undisturbed, program.pool = contents(program.pool), program.folder / "cut"
    shutil.rmtree(program.folder / "runs")
    clock[0] = 0
    cut = "--trainer.max_time=00:00:00:03"
    assert fit(program, cut, "--bank_size=1", command="sweep") == 0
    said = capsys.readouterr().out
    assert "stopped by trainer.max_time at step 3" in said
    assert "no step was trained (trainer.max_time)" in said  # both banks have one clock here
    assert [r.finished for r in records(program)] == [False]
    with at_step(99, lambda: None) as begun:
        assert fit(program, "--bank_size=1", command="sweep") == 0
    assert len(begun) == 2 * 2 * BATCHES - 3
    assert contents(program.pool) == undisturbed
    with at_step(99, lambda: None) as begun:
        assert fit(program, "--bank_size=1", command="sweep") == 0
    assert begun == []


def test_a_sweep_without_a_dev_evaluation_is_not_done(program: Program) -> None:
    assert fit(program, "--trainer.limit_val_batches=0", command="sweep") == 0
    assert fit(program, command="sweep") == 0
    assert [r.finished for r in records(program)] == [True, True]


def test_unlimited_training_ends_with_its_time(program: Program, clock: list[int]) -> None:
    """Where nothing else ends a run, its time is its planned end."""
    assert fit(program, "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:11") == 0
    assert [(r.finished, r.epochs_done) for r in records(program)] == [(True, 2)] * 2


def test_early_stopping_is_a_planned_end(program: Program) -> None:
    stop = (
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=loss",
        "--trainer.callbacks.patience=1",
        "--trainer.callbacks.min_delta=9",
    )
    assert fit(program, *stop, "--trainer.max_epochs=9") == 0
    assert [(r.finished, r.epochs_done) for r in records(program)] == [(True, 2)] * 2


# Two runs, one pool


def test_what_another_run_has_finished_meanwhile_is_not_replaced(
    program: Program, tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two different runs with members of the same names: the later one ends with an error, before it has lost much."""
    other = Program(tmp_path / "other", tiny("bert"), demo_root)
    other.pool = program.pool
    with at_step(3, lambda: fit(other, "--data.seed=5")):
        assert fit(program) == 2
    assert "another run" in capsys.readouterr().err
    assert {r.run for r in records(program)} == {other.run_dir().name}
    assert all(r.finished for r in records(program))
    program.pool = tmp_path / "mine"
    assert fit(program, "--ckpt_path=last") in (0, 2)  # before its first checkpoint there is nothing to go on from


def test_the_last_checkpoint_is_what_is_evaluated(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """As if its file had been named; where there is none, it is an error, and no untrained member is scored."""
    assert fit(program) == 0
    for word in ("last", str(program.run_dir() / "checkpoint" / "last.ckpt")):
        capsys.readouterr()
        assert fit(program, f"--ckpt_path={word}", command="validate") == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert all([r.name, f"{r.epoch_scores[-1]:.4f}"] in rows for r in records(program))
    shutil.rmtree(program.folder / "runs")
    for word in ("last", "best"):
        assert fit(program, f"--ckpt_path={word}", command="validate") == 2
        assert f"--ckpt_path {word}: there is no " in capsys.readouterr().err


def test_a_name_that_becomes_a_folder_is_checked(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("../../x", "a/b", "", ".x", "a\\b", "x" * 200):
        assert fit(program, f"--experiment={name}") == 2
        assert "--experiment" in capsys.readouterr().err
    assert not (program.folder / "runs").exists()


def test_a_members_file_says_what_became_of_it(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """The last member diverged: what it was before is in the pool, and its record says so."""
    wild = "[{rank: 2, lr: 1e-2}]"
    nan = torch.full((), float("nan"))
    step = BankModule.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            BankModule,
            "training_step",
            lambda self, b, i: step(self, b, i) * (nan if self.current_epoch else 1),
        )
        assert program("fit", "--trainer.max_epochs=3", members=wild) == 2
    assert "every member has diverged" in capsys.readouterr().err
    (record,) = records(program)
    assert (record.diverged, record.finished) == (True, False)
    assert json.loads((program.pool / "sst" / record.name / "member.json").read_text())["best_epoch"] == 1
