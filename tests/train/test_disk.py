"""What the disk and the loggers may do to a run: no locks, a power cut, a logger that fails."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from pool_factory import make_pool
from test_cli import Program
from test_processes import command, environment

from lora_ensemble import pool


@pytest.fixture
def program(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_at_the_start(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for command_ in ("fit", "sweep"):
        assert program(command_, "--trainer.max_epochs=1", members="[{rank: 2}]") == 0
        said = capsys.readouterr().out
        assert said.index("no locks") < said.index("best epoch")
        assert len(pool.TaskPool(program.pool, "sst").members) == 1
        program.pool = program.folder / "another"


def test_another_error_of_a_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    make_pool(tmp_path, "sst", "multiclass")
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        pool.write_member(tmp_path, pool.MemberRecord(name="m", task="sst", kind="multiclass"), {})


def test_files_are_on_the_disk_before_the_record_that_vouches_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all members together: first their files, then their records, then their names."""
    synced: list[str] = []
    sync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        records = [p.name for p in path.parent.parent.glob(".new.*/member.json")]
        kind = "record" if path.name == pool.RECORD else "names" if path.is_dir() else "file"
        assert kind != "file" or records == [], "a record was written before the files were synced"
        synced.append(kind)
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        synced.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    new = [
        pool.NewMember(
            record=pool.MemberRecord(name=f"m{i}", task="t", kind="binary"), files={"a.json": {}, "b.json": {"i": i}}
        )
        for i in range(3)
    ]
    pool.write_members(tmp_path, new)
    assert synced == ["file"] * 6 + ["record"] * 3 + ["rename"] * 3 + ["names"]


class Failing(CSVLogger):
    """Fails where it is told to."""

    def __init__(self, save_dir: str, where: str) -> None:
        super().__init__(save_dir)
        self._where = where

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self._where == "log_metrics":
            raise PermissionError(13, "Permission denied", "/home/nobody")
        super().log_metrics(metrics, step)

    def finalize(self, status: str) -> None:
        if self._where == "finalize":
            raise RuntimeError("its service\ndied")
        super().finalize(status)


@pytest.mark.parametrize(("where", "reason"), [("log_metrics", "Permission denied"), ("finalize", "its service died")])
def test_a_logger_never_costs_the_training(
    program: Program, capsys: pytest.CaptureFixture[str], where: str, reason: str
) -> None:
    logger = f"{{class_path: test_disk.Failing, init_args: {{save_dir: {program.folder}/own, where: {where}}}}}"
    assert program("fit", f"--trainer.logger={logger}", members="[{rank: 2}]") == 0
    said = capsys.readouterr().out
    assert said.count("training goes on without it") == 1
    assert reason in said
    assert len(pool.TaskPool(program.pool, "sst").members) == 1


def test_a_home_that_cannot_be_written(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> None:
    """Weights & Biases keeps files of its own there, offline too: the curves are kept beside the run instead."""
    program = Program(tmp_path, tiny("bert"), demo_root)
    done = subprocess.run(
        command(program.arguments("fit", members="[{rank: 2}]")),
        env=environment(HOME="/proc/nowhere", WANDB_MODE="offline", MPLCONFIGDIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr
    assert len(pool.TaskPool(program.pool, "sst").members) == 1
    assert len(list(program.run_dir().glob("wandb/offline-run-*"))) == 1
