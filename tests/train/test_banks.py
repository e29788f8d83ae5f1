"""Banks that fit: the plan, splitting when memory runs out, and going on after a restart."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from test_cli import Program

from lora_ensemble import pool
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.restart import RunCheckpoint

# Ranks 2, 3 and 4 on different layers, and none: in banks of two each row is as long as it must be, and no longer.
FIVE = (
    "[{rank: 4, targets: all-linear, lr: 3e-3}, {rank: 2, lr: 1e-2}, {targets: none, lr: 1e-2}, "
    "{rank: 3, targets: all-linear, lr: 3e-3}, {rank: 4, targets: qkv, lr: 1e-3, scaling: 3}]"
)
NAMES = [
    "r4-c1-all-linear-lr3e-3-s11711",
    "r2-c1-qv-lr1e-2-s11711",
    "head-lr1e-2-s11711",
    "r3-c1-all-linear-lr3e-3-s11711",
    "r4-c3-qkv-lr1e-3-s11711",
]
# Without dropout, whose masks are drawn for a bank as a whole; in float64, so that what is left of rounding is the last
# bit of the float32 that logits below 1 are kept in (6e-8).
EXACT = (
    *("--model.head_dropout=0", "--model.encoder_dropout=0", "--trainer.precision=64-true"),
    *("--trainer.gradient_clip_val=0.5", "--model.schedule=linear", "--model.warmup=2", "--trainer.max_epochs=3"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    """Five members of two tasks in one bank."""
    program = Program(tmp_path_factory.mktemp("whole"), tiny("bert"), demo_root)
    assert program("fit", *EXACT, "--bank_size=null", members=FIVE, tasks="[sst, sts]") == 0
    return program


@pytest.fixture(scope="module")
def in_twos(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path], demo_root: Path
) -> tuple[Program, str]:
    """The same members in banks of two, and what was said."""
    program, said = Program(tmp_path_factory.mktemp("twos"), tiny("bert"), demo_root), io.StringIO()
    with contextlib.redirect_stdout(said):
        assert program("fit", *EXACT, "--bank_size=2", members=FIVE, tasks="[sst, sts]") == 0
    return program, said.getvalue()


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


def fit(program: Program, *extra: str, members: str = FIVE) -> int:
    return program("fit", *EXACT, *extra, members=members, tasks="[sst, sts]")


def banks(program: Program) -> list[list[str]]:
    return [b["members"] for b in json.loads((program.run_dir() / "banks.json").read_text())["banks"]]


def assert_same_members(program: Program, whole: Program) -> None:
    for task in ("sst", "sts"):
        found, expected = pool.TaskPool(program.pool, task), pool.TaskPool(whole.pool, task)
        assert sorted(r.name for r in found.members) == sorted(NAMES)
        for record in expected.members:
            np.testing.assert_allclose(found.logits(record.name), expected.logits(record.name), atol=1e-7, rtol=0)
            other = found.record(record.name)
            assert (other.best_epoch, other.epochs_done, other.finished) == (record.best_epoch, 3, True)
            # The head alone gives nearly the same value to all (a deviation of 2e-4), which r makes large.
            assert other.epoch_scores == pytest.approx(record.epoch_scores, abs=1e-4)
            epochs = [
                pool.read_array(p.pool, r, pool.epochs_file("dev")) for p, r in ((program, other), (whole, record))
            ]
            np.testing.assert_allclose(*epochs, atol=5e-4)  # half precision
            assert float(np.abs(epochs[0][1] - epochs[0][0]).max()) > 2e-3  # an epoch matters


def fail_once(
    monkeypatch: pytest.MonkeyPatch, name: str, at: tuple[int, int] | None
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Let a step of the module run out of memory, after its forward pass, the first time that it is at (epoch, batch).

    Returns the number of members then, in a list, and (members, epoch, batch) of each step, as they come.
    """
    original = getattr(BankModule, name)
    failed: list[int] = []
    seen: list[tuple[int, int, int]] = []

    def step(self: BankModule, batch: Any, batch_idx: int) -> Any:
        result = original(self, batch, batch_idx)
        seen.append((len(self.members), self.current_epoch, batch_idx))
        if not failed and seen[-1][1:] == at:
            failed.append(len(self.members))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    monkeypatch.setattr(BankModule, name, step)
    return failed, seen


def test_banks_of_two_train_the_same_members_as_one_bank(in_twos: tuple[Program, str], whole: Program) -> None:
    program, out = in_twos
    assert "5 members in 3 banks of 2 to 1 (--bank_size 2)" in out
    assert_same_members(program, whole)
    # What is frozen is where a run in one bank has it: train and dev of two tasks.
    assert len(list((program.folder / "frozen").iterdir())) == len(list((whole.folder / "frozen").iterdir())) == 4
    # The two on all layers together, the two on attention alone, and the head alone by itself.
    assert sorted(map(sorted, banks(program))) == sorted(
        [sorted([NAMES[0], NAMES[3]]), sorted([NAMES[1], NAMES[4]]), [NAMES[2]]]
    )
    # One table over all banks, the same as one bank's.
    table = [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in NAMES]
    assert len(table) == 5
    for row in table:
        for task, score in zip(("sst", "sts"), row[2:], strict=True):
            assert float(score) == pytest.approx(pool.TaskPool(whole.pool, task).record(row[0]).score, abs=1e-4)


@pytest.mark.parametrize(("epoch", "step", "accumulate"), [(0, 0, 1), (2, 5, 1), (1, 6, 3)])
def test_out_of_memory_in_training(
    program: Program,
    whole: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
    epoch: int,
    step: int,
    accumulate: int,
) -> None:
    """In the first step of all, in mid-epoch, and while gradients are accumulated."""
    extra = (f"--trainer.accumulate_grad_batches={accumulate}",)
    if accumulate > 1:
        whole = Program(tmp_path_factory.mktemp("accumulated"), program.base, program.root)
        assert fit(whole, *extra, "--bank_size=null") == 0
    failed, seen = fail_once(monkeypatch, "training_step", (epoch, step))
    assert fit(program, *extra) == 0
    assert failed == [5]
    assert f"out of memory in epoch {epoch + 1}: the bank of 5 members is split into banks of 3 and 2" in (
        capsys.readouterr().out
    )
    assert_same_members(program, whole)
    assert [len(b) for b in banks(program)] == [3, 2]
    # The halves go on from the last checkpoint: the end of the epoch before.
    for members in (3, 2):
        assert [(e, i) for m, e, i in seen if m == members] == [divmod(n, 8) for n in range(epoch * 8, 24)]


def test_out_of_memory_in_validation(program: Program, whole: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second epoch, whose checkpoint is not written yet: the halves train it again."""
    _, steps = fail_once(monkeypatch, "training_step", None)
    failed, _ = fail_once(monkeypatch, "validation_step", (1, 1))
    assert fit(program) == 0
    assert failed == [5]
    assert_same_members(program, whole)
    assert [[s[0] for s in steps].count(m) for m in (5, 3, 2)] == [16, 16, 16]


def test_killed_after_a_split(program: Program, whole: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split in epoch 2, killed in the second half's third: ``--ckpt_path last`` trains only what is missing."""

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        fail_once(patch, "training_step", (1, 4))
        original = BankModule.on_train_epoch_end

        def kill(self: BankModule) -> None:
            original(self)
            if len(self.members) == 2 and self.current_epoch == 2:
                raise Killed

        patch.setattr(BankModule, "on_train_epoch_end", kill)
        with pytest.raises(Killed):
            fit(program)
    plan = json.loads((program.run_dir() / "banks.json").read_text())
    assert [(len(b["members"]), b["finished"] is not None) for b in plan["banks"]] == [(3, True), (2, False)]
    assert plan["splits"] == ["5 members: out of memory"]
    _, seen = fail_once(monkeypatch, "training_step", None)
    assert fit(program, "--ckpt_path=last") == 0
    assert seen == [(2, 2, i) for i in range(8)]  # from the last epoch's end on
    assert_same_members(program, whole)
    seen.clear()
    assert fit(program, "--ckpt_path=last") == 0
    assert seen == []
    longer = [a for a in EXACT if "max_epochs" not in a]
    assert program("fit", *longer, "--trainer.max_epochs=4", "--ckpt_path=last", members=FIVE, tasks="[sst, sts]") == 0
    assert [(m, e) for m, e, i in seen if i == 0] == [(3, 3), (2, 3)]


def test_a_smaller_bank_size_after_a_restart(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one bank's checkpoint is cut to the new size."""
    assert fit(program, "--trainer.max_epochs=2", "--model.schedule=constant", "--model.warmup=0") == 0
    _, seen = fail_once(monkeypatch, "training_step", None)
    arguments = ("--model.schedule=constant", "--model.warmup=0", "--ckpt_path=last")
    assert fit(program, *arguments, "--bank_size=3") == 0
    assert [(m, e) for m, e, i in seen if i == 0] == [(3, 2), (2, 2)]
    other = Program(program.folder / "other", program.base, program.root)
    assert fit(other, *arguments[:2], "--bank_size=null") == 0
    assert_same_members(program, other)


def test_out_of_memory_after_an_optimiser_step(
    program: Program, whole: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights have moved on, counters have not: back to the last checkpoint."""
    original = RunCheckpoint.on_train_batch_end
    failed: list[bool] = []

    def later(self: RunCheckpoint, trainer: pl.Trainer, module: pl.LightningModule, *more: Any) -> None:
        if not failed and (module.current_epoch, more[-1]) == (1, 4):
            failed.append(True)
            raise MemoryError
        original(self, trainer, module, *more)

    monkeypatch.setattr(RunCheckpoint, "on_train_batch_end", later)
    assert fit(program) == 0
    assert failed
    assert "which go on from the last checkpoint" in capsys.readouterr().out
    assert_same_members(program, whole)


def test_a_bank_of_one_cannot_be_split(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_once(monkeypatch, "training_step", (0, 2))
    assert fit(program, members="[{rank: 2, name: a}]") == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lora-ensemble: error:")]
    assert "out of memory with a single member (a) in epoch 1; lower --data.batch_size" in line


def test_another_error_is_no_reason_to_split(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(BankModule, "training_step", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fit(program)


def test_the_first_bank_is_released(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the halves train, nothing of the whole bank is held: weights, moments, fused weights, what is frozen."""
    failed, _ = fail_once(monkeypatch, "training_step", (1, 3))
    held: dict[str, weakref.ref[Any]] = {}
    alive: list[list[str]] = []

    def look(self: BankModule) -> None:
        if not failed:
            state = self.optimizers().optimizer.state[self.bank.weights]  # type: ignore[union-attr]
            tensors = {"weights": self.bank.weights, **{n: state[n] for n in ("exp_avg", "exp_avg_sq")}}
            tensors["fused"] = next(iter(self.bank._encode._fused.values()))[1]
            held["kept"] = weakref.ref(self._frozen)
            held.update({n: weakref.ref(t.untyped_storage()) for n, t in tensors.items()})
            held.update({n: weakref.ref(t) for n, t in tensors.items()})
        else:
            gc.collect()
            alive.append([n for n, ref in held.items() if ref() is not None])

    monkeypatch.setattr(BankModule, "on_train_epoch_end", look)
    assert fit(program) == 0
    assert len(held) == 5
    assert alive == [[]] * 4  # two epochs of each half


def test_all_members_of_one_bank_diverge(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """The other bank is trained all the same; only if none is left is it an error."""
    members = "[{rank: 2, lr: 1e30, name: wild}, {rank: 2, lr: 1e-3, name: tame}]"
    assert program("fit", "--bank_size=1", members=members) == 0
    out = capsys.readouterr().out
    assert [r.name for r in pool.TaskPool(program.pool, "sst").members] == ["tame"]
    assert ["wild", "diverged", "nan"] in [line.split() for line in out.splitlines()]
    assert program("fit", "--bank_size=1", members=members.replace("1e-3, name: tame", "1e30, name: also")) == 2
    assert "every member has diverged" in capsys.readouterr().err


def test_evaluation_in_banks(in_twos: tuple[Program, str], whole: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """validate, test and predict take the setting too: the pool's members a few at a time, the same logits."""
    program, _ = in_twos
    for verb in ("validate", "predict"):
        assert program(verb, *EXACT, "--bank_size=auto", members=FIVE, tasks="[sst, sts]") == 0
    out = capsys.readouterr().out
    assert "sst: test logits of 2 members added" in out
    assert "sst: test logits of 1 members added" in out
    assert whole("predict", *EXACT, "--bank_size=null", members=FIVE, tasks="[sst, sts]") == 0
    for name in NAMES:
        np.testing.assert_allclose(
            pool.TaskPool(program.pool, "sts", split="test").logits(name),
            pool.TaskPool(whole.pool, "sts", split="test").logits(name),
            atol=1e-7,
            rtol=0,
        )


def test_a_plan_that_is_none(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("[{rank: 2, name: b}, {rank: 3, name: c}]", "--trainer.max_epochs=1")
    assert fit(program, few[1], members=few[0]) == 0
    others = '{"banks": [{"members": ["a"], "finished": null}], "why": "", "splits": []}'
    for content, message in (("{", "damaged (JSONDecodeError"), (others, "the plan is for other members (a, b, c)")):
        (program.run_dir() / "banks.json").write_text(content)
        assert fit(program, few[1], "--ckpt_path=last", members=few[0]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_for_several_banks(in_twos: tuple[Program, str], capsys: pytest.CaptureFixture[str]) -> None:
    program, _ = in_twos
    some = next(program.run_dir().glob("checkpoint/*/last.ckpt"))
    assert fit(program, f"--ckpt_path={some}") == 2
    assert "with 3 banks; give last" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1", "many"])
def test_sizes_that_are_none(program: Program, capsys: pytest.CaptureFixture[str], size: str) -> None:
    try:
        code = fit(program, f"--bank_size={size}")
    except SystemExit as e:
        code = int(e.code or 0)
    assert code == 2
    assert "bank_size" in capsys.readouterr().err


def test_a_dry_run_writes_no_plan(program: Program) -> None:
    assert program("fit", "--bank_size=2", "--trainer.fast_dev_run=true") == 0
    assert not list(program.folder.rglob("banks.json"))


def test_several_devices_are_told_what_to_do(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No process splits by itself what another may still be training."""
    fail_once(monkeypatch, "training_step", (1, 2))
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda self: 2))
    assert fit(program) == 2
    assert "go on with --ckpt_path last --bank_size 3" in capsys.readouterr().err
