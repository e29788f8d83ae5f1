"""Sweeps: what is finished is not trained again, early exit, and whatever may happen to a run of hours."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_banks import EXACT, FIVE, NAMES, fail_once
from test_cli import Program

from lora_ensemble import pool
from lora_ensemble.files import sole_process
from lora_ensemble.main import main
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.runs.sweep import Sweep

TWO = "[{rank: [2, 3], lr: 3e-3}]"
THREE = "[{rank: [2, 3, 4], lr: 3e-3}]"
SIX = "[{rank: [1, 2, 3], scaling: [1, 2], targets: all-linear, lr: 3e-3}]"
TWELVE = "[{rank: [1, 2, 3, 4], scaling: [1, 2, 3], targets: all-linear, lr: 3e-3}]"


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


@pytest.fixture(scope="module")
def two_swept(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    """A whole sweep of TWO, not to be changed."""
    program = Program(tmp_path_factory.mktemp("two"), tiny("bert"), demo_root)
    assert program("sweep", members=TWO) == 0
    return program


@pytest.fixture
def swept(tmp_path: Path, two_swept: Program) -> Program:
    """A copy of it: run, pool and all."""
    folder = shutil.copytree(two_swept.folder, tmp_path / "swept")
    return Program(folder, two_swept.base, two_swept.root)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The members of each training step that was made."""
    made: list[list[str]] = []
    step = BankModule.training_step

    def counted(self: BankModule, *args: Any) -> Any:
        made.append([m.name for m in self.members])
        return step(self, *args)

    monkeypatch.setattr(BankModule, "training_step", counted)
    return made


@contextlib.contextmanager
def at_step(number: int, happens: Callable[[], object]) -> Iterator[list[int]]:
    """Let something happen at the start of a training step, counted from 1; gives the steps that were begun."""
    begun: list[int] = []
    step = BankModule.training_step

    def patched(self: BankModule, *args: Any) -> Any:
        begun.append(len(begun) + 1)
        if len(begun) == number:
            happens()
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BankModule, "training_step", patched)
        yield begun


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in a pool, locks aside."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", ".sweep")]
    assert not [p for p in files if p.name[0] == "." or ".new." in str(p) or ".old." in str(p)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_a_sweep_trains_what_fit_does(program: Program) -> None:
    assert program("fit") == 0
    fitted, program.pool = program.pool, program.folder / "swept"
    shutil.rmtree(program.run_dir())
    assert program("sweep") == 0
    assert contents(program.pool) == contents(fitted)


def test_what_is_finished_is_not_trained_again(
    swept: Program, steps: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    program = swept
    before = contents(program.pool)
    assert program("sweep", members=TWO) == 0  # the plan says so
    shutil.rmtree(program.folder / "runs")
    assert program("sweep", members=TWO) == 0  # the pool says so
    assert steps == []
    out = capsys.readouterr().out
    assert "2 of 2 members are finished" in out
    assert out.count("r3-c1-qv-lr3e-3-s11711") == 2  # the table, both times
    assert contents(program.pool) == before
    assert program("sweep", members=THREE) == 0  # a larger grid: a run of its own
    assert steps == [["r4-c1-qv-lr3e-3-s11711"]] * 16
    assert before.items() <= contents(program.pool).items()


def test_a_member_that_is_gone_is_trained_again(program: Program, steps: list[list[str]]) -> None:
    assert program("sweep", "--bank_size=2", members=THREE) == 0
    before, last = contents(program.pool), "r4-c1-qv-lr3e-3-s11711"
    shutil.rmtree(program.pool / "sst" / last)
    steps.clear()
    assert program("sweep", "--bank_size=2", members=THREE) == 0
    assert steps == [[last]] * 16
    again = contents(program.pool)
    assert {k: v for k, v in again.items() if last not in k} == {k: v for k, v in before.items() if last not in k}
    assert f"sst/{last}/member.json" in again


def test_a_pool_that_is_gone_is_made_again(program: Program, two_swept: Program) -> None:
    """Deleted while the sweep was interrupted, whose checkpoint remembers better scores than any to come."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    with at_step(9, interrupted):  # in the second epoch
        assert program("sweep", members=TWO) == 130
    assert len(list((program.pool / "sst").glob("r*"))) == 2
    shutil.rmtree(program.pool)
    assert program("sweep", members=TWO) == 0
    assert contents(program.pool) == contents(two_swept.pool)


def test_a_folder_that_is_there_is_not_a_member_that_is_finished(swept: Program, steps: list[list[str]]) -> None:
    """The same settings and data, but training was interrupted."""
    program = swept
    record = pool.read_record(program.pool, "sst", "r2-c1-qv-lr3e-3-s11711")
    assert record is not None
    record.finished = False
    pool.write_member(program.pool, record, {}, keep=record)
    shutil.rmtree(program.folder / "runs")
    assert program("sweep", members=TWO) == 0
    assert steps == [["r2-c1-qv-lr3e-3-s11711"]] * 16


def test_more_epochs_go_on_from_where_it_ended(swept: Program, steps: list[list[str]]) -> None:
    program = swept
    assert program("sweep", "--trainer.max_epochs=3", members=TWO) == 0
    assert len(steps) == 8
    longer, program.pool = contents(program.pool), program.folder / "other"
    shutil.rmtree(program.folder / "runs")
    assert program("sweep", "--trainer.max_epochs=3", members=TWO) == 0
    assert contents(program.pool) == longer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model.head_dropout=0.5", "r2-c1-qv-lr3e-3-s11711: holds a member of this name with other settings"),
        ("--data.root=", "train_fingerprint was"),
    ],
)
def test_another_member_of_that_name(
    swept: Program, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    program = swept
    before = contents(program.pool)
    if change == "--data.root=":
        other = shutil.copytree(program.root, program.folder / "data")
        train = other / "ids-sst-train.csv"
        train.write_text("".join(train.read_text().splitlines(keepends=True)[:-1]))
        change += str(other)
    capsys.readouterr()
    assert program("sweep", change, members=TWO) == 2
    assert message in capsys.readouterr().err
    assert contents(program.pool) == before


def test_a_sweep_overwrites_nothing(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("sweep", "--pool.overwrite=true", members=TWO) == 2
    assert "--pool.overwrite: a sweep trains what is not finished" in capsys.readouterr().err


def test_a_member_that_diverged_is_not_tried_again(
    program: Program, steps: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    members = "[{rank: 2, lr: 3e-3}, {rank: 2, lr: 1e30}]"
    assert program("sweep", members=members) == 0
    assert "r2-c1-qv-lr1e30-s11711  diverged    nan" in capsys.readouterr().out
    steps.clear()
    assert program("sweep", members=members) == 0
    assert steps == []


def test_two_sweeps_at_once(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    with pool.sole_sweep(program.pool, ["sst"]):
        assert program("sweep", members=TWO) == 2
        err = capsys.readouterr().err
        assert f"pool/sst: process {os.getpid()} on " in err
        assert "sweeps here; wait until it has ended" in err
        assert "choose another --pool.dir" in err
        assert not (program.pool / "sst" / "r2-c1-qv-lr3e-3-s11711").exists()
        assert program("sweep", members=TWO, tasks="[sts]") == 0  # another task's folder
    assert program("sweep", members=TWO) == 0


# Banks that are trained by processes of their own


def test_an_array_of_jobs(program: Program, steps: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """The plan, then a job for each bank in any order, then a sweep that finds them all: the same pool."""
    assert program("sweep", "--bank_size=2", members=THREE) == 0
    undisturbed, program.pool = contents(program.pool), program.folder / "jobs"
    shutil.rmtree(program.folder / "runs")
    assert program("sweep", "--bank_size=2", "--plan_only=true", members=THREE) == 0
    assert "2 banks, to be trained: 1, 2" in capsys.readouterr().out
    assert not list((program.pool / "sst").glob("r*"))
    steps.clear()
    for bank in ("2", "1", "2"):
        assert program("sweep", "--bank_size=2", f"--bank={bank}", members=THREE) == 0
    assert [len(s) for s in steps] == [1] * 16 + [2] * 16
    assert contents(program.pool) == undisturbed
    assert program("sweep", "--bank_size=2", members=THREE) == 0
    assert len(steps) == 32
    assert contents(program.pool) == undisturbed
    shutil.rmtree(program.pool / "sst" / "r4-c1-qv-lr3e-3-s11711")  # the whole of the second bank
    assert program("sweep", "--bank_size=2", members=THREE) == 0
    assert len(steps) == 48
    assert contents(program.pool) == undisturbed


def test_members_leave_a_bank_that_is_a_job(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("--early_exit.rungs=[1]", "--early_exit.reserve=0", "--bank_size=2")
    assert program("sweep", *how, "--plan_only=true", members=THREE) == 0
    for bank in ("1", "2"):
        assert program("sweep", *how, f"--bank={bank}", members=THREE) == 0
    capsys.readouterr()
    assert program("sweep", *how, members=THREE) == 0
    assert "1 of 3 members left; 17% of the member epochs saved" in capsys.readouterr().out  # 1 of 6
    assert len(pool.TaskPool(program.pool, "sst").members) == 2


def test_a_job_whose_members_all_diverge(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """One bank of several: it is said, and the others go on, as in a sweep by one process."""
    members = "[{rank: 2, lr: 3e-3}, {rank: 2, lr: 1e30}]"
    assert program("sweep", "--bank_size=1", members=members) == 0
    undisturbed, program.pool = contents(program.pool), program.folder / "jobs"
    shutil.rmtree(program.folder / "runs")
    assert program("sweep", "--bank_size=1", "--plan_only=true", members=members) == 0
    for bank in ("1", "2"):
        assert program("sweep", "--bank_size=1", f"--bank={bank}", members=members) == 0
    capsys.readouterr()
    assert program("sweep", "--bank_size=1", members=members) == 0
    assert "r2-c1-qv-lr1e30-s11711  diverged    nan" in capsys.readouterr().out
    assert contents(program.pool) == undisturbed


def test_jobs_that_make_no_sense(
    program: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program("sweep", "--bank=1", members=TWO) == 2
    assert "there is no plan" in capsys.readouterr().err
    assert program("sweep", "--plan_only=true", members=TWO) == 0
    assert program("sweep", "--bank=2", members=TWO) == 2
    assert "--bank 2: the plan has 1 banks" in capsys.readouterr().err
    assert program("sweep", "--bank=0", members=TWO) == 2  # not the last one
    assert "--bank 0: the plan has 1 banks" in capsys.readouterr().err
    monkeypatch.setattr("lora_ensemble.train.runs.sweep._WAIT", 0.0)
    with sole_process(program.run_dir() / "checkpoint", "trains this bank"):
        assert program("sweep", "--bank=1", members=TWO) == 2
    assert f"process {os.getpid()} on " in capsys.readouterr().err


# Early exit


def test_members_leave_and_the_others_are_what_they_would_have_been(
    program: Program, steps: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without dropout: the members that stay are those of a run in which nobody leaves, and the saving is counted."""
    exact = [e for e in EXACT if "max_epochs" not in e]
    arguments: dict[str, str] = {"members": FIVE, "tasks": "[sst, sts]"}
    assert program("sweep", *exact, "--trainer.max_epochs=4", **arguments) == 0
    whole, program.pool = program.pool, program.folder / "early"
    shutil.rmtree(program.folder / "runs")
    steps.clear()
    capsys.readouterr()
    exits = ("--early_exit.rungs=[1,2]", "--early_exit.keep=0.5", "--early_exit.reserve=0.2")
    assert program("sweep", *exact, "--trainer.max_epochs=4", *exits, **arguments) == 0
    out = capsys.readouterr().out
    # 3 of 5 stay for their score and one for being unlike them; then 2 of 4, and one.
    assert [len(s) for s in steps] == [5] * 8 + [4] * 8 + [3] * 16
    assert "early exit after epoch 1: 1 of 5 members leave the bank" in out
    assert "early exit after epoch 2: 1 of 4 members leave the bank" in out
    assert "2 of 5 members left; 25% of the member epochs saved" in out  # (3 + 2) of 20
    stayed = steps[-1]
    for task in ("sst", "sts"):
        found, expected = pool.TaskPool(program.pool, task), pool.TaskPool(whole, task)
        assert sorted(r.name for r in found.members) == sorted(stayed)  # who left is not finished
        for name in stayed:
            np.testing.assert_allclose(found.logits(name), expected.logits(name), atol=1e-7, rtol=0)
            assert found.record(name).epoch_scores == pytest.approx(expected.record(name).epoch_scores, abs=1e-4)
        for name in set(NAMES) - set(stayed):
            record = pool.read_record(program.pool, task, name)
            assert record is not None
            assert not record.finished
    steps.clear()
    assert program("sweep", *exact, "--trainer.max_epochs=4", *exits, **arguments) == 0
    assert steps == []  # who left does not come back
    assert program("sweep", *exact, "--trainer.max_epochs=4", **arguments) == 0
    assert {name for s in steps for name in s} == set(NAMES) - set(stayed)  # unless nobody has to leave
    for task in ("sst", "sts"):
        assert len(pool.TaskPool(program.pool, task).members) == 5


def test_a_kill_before_the_members_left(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is written, the smaller bank is not: the same members leave when the sweep goes on."""
    how = ("--early_exit.rungs=[1]", "--early_exit.reserve=0", "--bank_size=null", "--data.tasks=[sst, sts]")
    assert program("sweep", *how, members=FIVE) == 0
    undisturbed, program.pool = contents(program.pool), program.folder / "killed"
    assert 0 < len(pool.TaskPool(program.folder / "pool", "sst").members) < 5
    shutil.rmtree(program.folder / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_cut", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert program("sweep", *how, members=FIVE) == 130
    assert program("sweep", *how, members=FIVE) == 0
    assert contents(program.pool) == undisturbed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--early_exit.rungs=[]", "--early_exit.rungs: []; expected numbers of dev evaluations"),
        ("--early_exit={rungs: [1], keep: 1.5}", "--early_exit.keep: 1.5; expected a share between 0 and 1"),
        ("--early_exit={rungs: [1], reserve: -1}", "--early_exit.reserve: -1"),
    ],
)
def test_an_early_exit_that_makes_no_sense(
    program: Program, capsys: pytest.CaptureFixture[str], wrong: str, message: str
) -> None:
    assert program("sweep", wrong, members=TWO) == 2
    assert message in capsys.readouterr().err


# Whatever happens


def test_out_of_memory(program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_once(monkeypatch, "training_step", (1, 3))
    assert program("sweep", *EXACT, "--bank_size=null", members=FIVE, tasks="[sst, sts]") == 0
    assert "the bank of 5 members is split into banks of 3 and 2" in capsys.readouterr().out
    assert sorted(r.name for r in pool.TaskPool(program.pool, "sst").members) == sorted(NAMES)


def test_a_lost_device(program: Program, two_swept: Program, capsys: pytest.CaptureFixture[str]) -> None:
    def lost() -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")

    with at_step(12, lost):
        assert program("sweep", members=TWO) == 2
    assert "the device failed (CUDA error: unspecified launch failure); the same command goes on" in (
        capsys.readouterr().err
    )
    assert program("sweep", members=TWO) == 0
    assert contents(program.pool) == contents(two_swept.pool)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 120 kB large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(program: Program, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("sweep", "--bank_size=2", members=SIX) == 0
    undisturbed, program.pool = contents(program.pool), small_disk / "pool"
    shutil.rmtree(program.folder / "runs")
    capsys.readouterr()
    assert program("sweep", "--bank_size=2", members=SIX) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert len(err.strip().splitlines()) == 1
    finished = [r.name for r in pool.read_records(program.pool, "sst") if r.finished]
    assert 0 < len(finished) < 6
    assert {k: v for k, v in contents(program.pool).items() if k.split("/")[1] in finished}.items() <= (
        undisturbed.items()
    )
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert program("sweep", "--bank_size=2", members=SIX) == 0
    assert contents(program.pool) == undisturbed


def test_a_pool_that_cannot_be_written(
    program: Program, two_swept: Program, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mounted read-only after half of the members were trained."""
    program.pool = shutil.copytree(two_swept.pool, small_disk / "pool")
    before = contents(program.pool)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    capsys.readouterr()
    assert program("sweep", members=THREE) == 2
    err = capsys.readouterr().err
    assert "Read-only file system" in err
    assert len(err.strip().splitlines()) == 1
    assert contents(program.pool) == before


FORKS = multiprocessing.get_context("forkserver")
"""Starts from a process that has imported torch already: a start takes a second, not ten."""
FORKS.set_forkserver_preload(["lora_ensemble.train.cli"])


def start(log: Path, arguments: list[str], *kill: Any) -> Any:
    # The path as an argument: the fork server may have been started before, with another environment.
    process = FORKS.Process(target=run, args=(log, arguments, *kill))
    process.start()
    return process


def run(log_file: Path, arguments: list[str], event: str = "", number: int = 0) -> None:
    """In a process of its own, its words in a file; it kills itself before the event happens for the number-th time."""
    counted = itertools.count(1)

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kw: Any) -> Any:
            if next(counted) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kw)

        return counting

    if event == "step":
        BankModule.training_step = deadly(BankModule.training_step)  # type: ignore[method-assign]
    elif event == "rename":
        os.rename, os.replace = deadly(os.rename), deadly(os.replace)
    with open(log_file, "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os._exit(main(arguments))


def test_sigterm(program: Program, two_swept: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """In the fourth step of the second epoch: the checkpoint is of that step, and the sweep goes on bit for bit."""
    with at_step(12, lambda: os.kill(os.getpid(), signal.SIGTERM)) as begun:
        assert program("sweep", members=TWO) == 128 + signal.SIGTERM
    assert begun[-1] == 12
    assert "interrupted: the same command goes on" in capsys.readouterr().out
    checkpoint = program.run_dir() / "checkpoint" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 12
    assert program("sweep", members=TWO) == 0
    assert contents(program.pool) == contents(two_swept.pool)


SWEPT_IN_BANKS = ("--model.schedule=linear", "--trainer.logger=false")


def test_four_kills(program: Program) -> None:
    """Before there is a checkpoint, while the pool is written, in the second epoch, and in the second bank."""
    log = program.folder / "log"
    how = (*SWEPT_IN_BANKS, "--bank_size=3")
    assert program("sweep", *how, members=SIX) == 0
    undisturbed, program.pool = contents(program.pool), program.folder / "killed"
    shutil.rmtree(program.folder / "runs")
    for kill in (("step", 5), ("rename", 4), ("step", 13), ("step", 12), ()):
        process = start(log, program.arguments("sweep", *how, members=SIX), *kill)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill else 0), log.read_text()[-3000:]
    assert contents(program.pool) == undisturbed


@pytest.mark.slow
def test_kills_at_any_moment(program: Program) -> None:
    """Twelve members in three banks, killed twenty times and begun again: always the pool of an undisturbed sweep."""
    log = program.folder / "log"
    how = (*SWEPT_IN_BANKS, "--bank_size=4")
    started = time.monotonic()
    undisturbed = start(log, program.arguments("sweep", *how, members=TWELVE))
    undisturbed.join()
    takes = time.monotonic() - started
    assert undisturbed.exitcode == 0
    expected = contents(program.pool)
    assert len([name for name in expected if name.endswith("member.json")]) == 12
    random_ = random.Random(0)
    kills = rounds = 0
    while kills < 20:
        rounds += 1
        shutil.rmtree(program.folder / "runs")
        program.pool = program.folder / f"pool-{rounds}"
        while True:
            process = start(log, program.arguments("sweep", *how, members=TWELVE))
            process.join(random_.uniform(0, takes) if kills < 20 else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        assert process.exitcode == 0, log.read_text()[-3000:]
        assert contents(program.pool) == expected
