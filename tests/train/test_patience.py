"""Patience: a member that no longer gains is finished and leaves its bank, and is what it would be alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_banks import EXACT
from test_cli import Program

from lora_ensemble import pool
from lora_ensemble.tasks import PRESETS
from lora_ensemble.train.evaluation import Evaluation, History
from lora_ensemble.train.runs.banks import BankRun

LONG = (*(e for e in EXACT if "max_epochs" not in e and "schedule" not in e and "warmup" not in e), "--bank_size=null")
ENTRIES = [
    "{rank: 2, lr: 3e-2, patience: 1}",
    "{rank: 3, lr: 1e-2, patience: 2, layers: [1]}",
    "{rank: 4, lr: 1e-3, targets: all-linear, patience: 3}",
    "{targets: none, lr: 1e-2, patience: 2}",
    "{rank: 2, lr: 1e-2, bag: true}",
]
ALL = f"[{', '.join(ENTRIES)}]"


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


def finished(program: Program) -> dict[str, pool.MemberRecord]:
    return {r.name: r for r in pool.TaskPool(program.pool, "sst").members}


def assert_same(found: Path, other: Path) -> None:
    got, expected = pool.TaskPool(found, "sst"), pool.TaskPool(other, "sst")
    assert len(got.members) == 5
    for name in [r.name for r in expected.members]:
        a, b = got.record(name), expected.record(name)
        assert (a.best_epoch, a.epochs_done) == (b.best_epoch, b.epochs_done)
        assert a.epoch_scores == pytest.approx(b.epoch_scores, abs=1e-12)
        np.testing.assert_allclose(got.logits(name), expected.logits(name), atol=1e-7, rtol=0)
        np.testing.assert_allclose(got.epochs(name), expected.epochs(name), atol=1e-3, rtol=0)


def stops_at(record: pool.MemberRecord, most: int) -> int:
    """By hand: the first epoch at whose end the patience is over, or the last."""
    best, at = -1.0, 0
    for epoch, score in enumerate(record.epoch_scores, 1):
        if score is not None and score > best:
            best, at = score, epoch
        if record.patience and epoch - at >= record.patience:
            return epoch
    return most


def test_each_is_the_member_alone(program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """float64, no dropout; other layers, targets and patience beside it. All are finished, at epochs of their own."""
    assert program("fit", *LONG, "--trainer.max_epochs=9", members=ALL) == 0
    said = capsys.readouterr().out
    records = finished(program)
    assert len(records) == 5
    ends = {name: record.epochs_done for name, record in records.items()}
    assert ends == {name: stops_at(record, 9) for name, record in records.items()}
    assert len(set(ends.values())) > 2, ends
    assert "out of patience, and finished after epoch" in said
    table = said[said.index("member ") :]
    assert all(f"{name} " in table for name in records)
    together, program.pool = program.pool, tmp_path / "alone"
    for entry in ENTRIES:
        assert program("fit", *LONG, "--trainer.max_epochs=9", members=f"[{entry}]") == 0
    assert_same(program.pool, together)


def test_whoever_is_finished_stays_finished(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep that is begun again, also for longer, trains only those that had patience left."""
    assert program("sweep", *LONG, "--trainer.max_epochs=4", members=ALL) == 0
    before = {name: r.epochs_done for name, r in finished(program).items()}
    capsys.readouterr()
    assert program("sweep", *LONG, "--trainer.max_epochs=4", members=ALL) == 0
    assert "5 of 5 members are finished" in capsys.readouterr().out
    ended = {n for n, r in finished(program).items() if stops_at(r, 99) == r.epochs_done}
    assert 0 < len(ended) < 5
    assert program("sweep", *LONG, "--trainer.max_epochs=6", members=ALL) == 0
    after = {name: r.epochs_done for name, r in finished(program).items()}
    assert {n for n in before if before[n] == after[n]} == ended


@pytest.mark.parametrize("command", ["fit", "sweep"])
def test_a_kill_before_the_members_left(program: Program, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    how = (*LONG, "--trainer.max_epochs=6")
    assert program(command, *how, members=ALL) == 0
    undisturbed, program.pool = program.pool, program.folder / "killed"
    shutil.rmtree(program.folder / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(BankRun, "_cut", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert program(command, *how, members=ALL) == 130
    resume = ("--ckpt_path=last",) if command == "fit" else ()
    assert program(command, *how, *resume, members=ALL) == 0
    assert_same(program.pool, undisturbed)


def test_dev_is_evaluated_more_often_than_a_bank_can_be_cut(program: Program, tmp_path: Path) -> None:
    """Evaluations count, ends of epochs decide; and a run that goes on in mid-epoch decides no sooner."""
    how = (*LONG, "--trainer.max_epochs=6", "--trainer.val_check_interval=0.25")
    assert program("fit", *how, members=ALL) == 0
    whole, program.pool = program.pool, tmp_path / "again"
    assert all(r.epochs_done % 4 == 0 for r in pool.TaskPool(whole, "sst").members)
    shutil.rmtree(program.folder / "runs")
    for steps in (3, 6, 11, 13):
        assert program("fit", *how, f"--trainer.max_steps={steps}", "--ckpt_path=last", members=ALL) == 0
    assert program("fit", *how, "--ckpt_path=last", members=ALL) == 0
    assert_same(program.pool, whole)


def test_it_needs_checkpoints(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("fit", *LONG, "--trainer.enable_checkpointing=false", members=ALL) == 2
    assert "leave --trainer.enable_checkpointing on" in capsys.readouterr().err


def test_evaluations_without_a_gain_by_hand() -> None:
    """Offered anew, a member gets its patience anew."""
    history = History(["a", "b"], [PRESETS["sst"]])
    for first, second in ((0.5, np.nan), (0.4, np.nan), (0.6, 0.1), (0.6, 0.1)):
        logits = np.zeros((2, 3, 5), np.float32)
        history.add({"sst": Evaluation(logits, [first, second], {}, True)}, [True, True])
    assert [history.without_gain(i) for i in (0, 1)] == [1, 1]
    history.forget_best(0)
    assert history.without_gain(0) == 0
