"""What needs processes of its own: a kill, two devices, a terminal, Weights & Biases, and a quick start."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from pool_factory import add_member, random_labels, random_logits
from test_cli import MEMBERS, Program, different_files

from lora_ensemble import pool

STILL = ("--model.head_dropout=0", "--model.encoder_dropout=0")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "lora_ensemble", *arguments]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


def checkpoint_times(program: Program) -> list[int]:
    """When the run's checkpoint was last written."""
    return [p.stat().st_mtime_ns for p in (program.folder / "runs").glob("*/checkpoint/last.ckpt")]


@pytest.fixture
def two_programs(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> tuple[Program, Program]:
    """Two folders of the same program, to be compared."""
    one, two = (Program(tmp_path / name, tiny("bert"), demo_root) for name in ("one", "two"))
    return one, two


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_in_mid_training_and_resumed(two_programs: tuple[Program, Program], kills: int) -> None:
    """SIGKILL: the pool holds whole members only, and the run ends as one that was never disturbed."""
    undisturbed, killed = two_programs
    epochs = (f"--trainer.max_epochs={8 * kills}", "--data.batch_size=2")
    assert undisturbed("fit", *epochs) == 0
    resume: list[str] = []
    task = killed.pool / "sst"
    for _ in range(kills):
        process = subprocess.Popen(command(killed.arguments("fit", *epochs, *resume)), env=environment())
        try:
            written = set(checkpoint_times(killed))
            wait_for(lambda seen=written: len(seen.update(checkpoint_times(killed)) or seen) >= 3, process)  # type: ignore
            time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        for folder in (p for p in task.iterdir() if p.is_dir() and p.name[0] != "." and p.name != pool.EXAMPLES):
            record = pool.MemberRecord.read(folder / pool.RECORD)
            assert not record.finished
            for name in record.files:
                digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
                assert record.files[name] == f"sha256:{digest}"
        resume = ["--ckpt_path=last"]
    assert killed("fit", *epochs, *resume) == 0
    assert different_files(undisturbed.pool, killed.pool) == []


def test_control_c_says_how_to_go_on(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> None:
    program = Program(tmp_path, tiny("bert"), demo_root)
    process = subprocess.Popen(
        command(program.arguments("fit", "--trainer.max_epochs=1000")),
        env=environment(),
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            wait_for(lambda: len(checkpoint_times(program)) > 0, process)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"--ckpt_path last goes on" in said
    assert not pool.MemberRecord.read(next((program.pool / "sst").glob("head*/member.json"))).finished


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_two_devices_end_at_the_same_step(two_programs: tuple[Program, Program], number: signal.Signals) -> None:
    """One of them is told; both save the step that they are at, and go on from it bit for bit."""
    undisturbed, told = two_programs
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=6")
    subprocess.run(command(undisturbed.arguments("fit", *ddp)), env=environment(), check=True)
    with subprocess.Popen(
        command(told.arguments("fit", *ddp)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            wait_for(lambda: len(checkpoint_times(told)) > 0, process)
            process.send_signal(number)
            said, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 128 + number, err.decode()
    assert said.count(b"--ckpt_path last goes on") == 1
    assert b"Traceback" not in err
    subprocess.run(command(told.arguments("fit", *ddp, "--ckpt_path=last")), env=environment(), check=True)
    assert different_files(undisturbed.pool, told.pool) == []


def test_nothing_of_several_devices_is_left_to_the_end_of_the_process(two_programs: tuple[Program, Program]) -> None:
    """What gloo's threads still hold when the interpreter ends may abort it: seen as exit code -6 instead of 143."""
    code = """
import sys, torch
from lora_ensemble.main import main
assert main(sys.argv[1:]) == 0
assert torch.distributed.is_available() and not torch.distributed.is_initialized()
"""
    program = [sys.executable, "-c", code, *two_programs[0].arguments("fit", "--trainer.strategy=ddp")]
    subprocess.run([*program, "--trainer.devices=1"], env=environment(), check=True)


@pytest.mark.parametrize("folds", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_two_devices_train_the_same_members_as_one(two_programs: tuple[Program, Program], folds: int) -> None:
    """Dropout off: the same dev scores, and the same logits row for row (float64, kept as float32: to 1e-6)."""
    one, two = two_programs
    # A bag: a weighted mean, whose weights the devices share unequally.
    which = {"tasks": "[sst, sts]", "members": MEMBERS[:-1] + ", {rank: 2, lr: 3e-3, bag: true}]"}
    # 7 does not divide by 2, nor 60 by 7: uneven shares, and a last batch of 4.
    common = (*STILL, "--trainer.precision=64-true", "--data.batch_size=7", "--trainer.gradient_clip_val=0.5")
    common += (f"--data.folds={folds}",)
    assert one("fit", *common, **which) == 0
    assert one("predict", *common, **which) == 0
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp")
    for verb in ("fit", "predict"):
        subprocess.run(command(two.arguments(verb, *common, *ddp, **which)), env=environment(), check=True)
    for task in ("sst", "sts"):
        for split in ("dev", "test", "oof") if folds else ("dev", "test"):
            a, b = (pool.TaskPool(p.pool, task, split=split) for p in (one, two))
            assert a.examples().ids.tolist() == b.examples().ids.tolist()
            for record in a.members:
                np.testing.assert_allclose(b.logits(record.name), a.logits(record.name), atol=1e-6, rtol=0)
                other = b.record(record.name)
                assert (other.best_epoch, other.finished) == (record.best_epoch, True)
                assert other.epoch_scores == pytest.approx(record.epoch_scores, abs=1e-6)
    decided_by = pool.epochs_file("oof" if folds else "dev")
    moved = pool.read_array(one.pool, pool.TaskPool(one.pool, "sst").members[0], decided_by)
    assert float(np.abs(moved[1] - moved[0]).max()) > 1e-2


def test_what_the_tests_start_listens_to_signals_whoever_started_them() -> None:
    """As in ``make test &``, whose shell lets its children ignore Ctrl-C."""
    child = "import signal; print(*(signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGINT, signal.SIGQUIT)))"
    code = f"import subprocess, sys; import conftest; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    shell = f"trap '' INT QUIT; {sys.executable} -c {shlex.quote(code)}"
    done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY / "tests", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("verb", ["fit", pytest.param("sweep", marks=pytest.mark.slow)])
def test_two_devices_train_several_banks(
    two_programs: tuple[Program, Program], capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Both processes follow one plan; what is printed of scores and further metrics is what one device prints."""
    one, two = two_programs
    common = (*STILL, "--trainer.precision=64-true", "--data.batch_size=7", "--model.metrics=[F1Score]")
    assert one("fit", *common, "--bank_size=null") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[-1].startswith("0.")]
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", "--bank_size=2")
    result = subprocess.run(command(two.arguments(verb, *common, *ddp)), env=environment(), capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.count(b"4 members in 2 banks of 2") == 1
    assert len(rows) == 4
    printed = [line.split() for line in result.stdout.decode().splitlines()]
    assert all(printed.count(row) == 1 for row in rows)
    a, b = (pool.TaskPool(p.pool, "sst") for p in (one, two))
    assert len(a.members) == 4
    for record in a.members:
        np.testing.assert_allclose(b.logits(record.name), a.logits(record.name), atol=1e-6, rtol=0)
        assert (b.record(record.name).best_epoch, b.record(record.name).finished) == (record.best_epoch, True)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["3", "null"])
def test_two_devices_let_the_same_members_leave(two_programs: tuple[Program, Program], size: str) -> None:
    """Early exit in one bank, and in banks that are compared with those before them; and nobody comes back."""
    one, two = two_programs
    members = "[{rank: [2, 3, 4], scaling: [1, 2], targets: all-linear, lr: 3e-3}]"
    common = (*STILL, "--trainer.precision=64-true", "--data.batch_size=7", "--trainer.max_epochs=4")
    early = (f"--bank_size={size}", "--early_exit.rungs=[1, 2]", "--early_exit.reserve=0.2", "--trainer.logger=false")
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp")

    def swept(program: Program, *how: str) -> tuple[list[str], dict[str, Any]]:
        """What was said about exits, and the plan."""
        given = program.arguments("sweep", *common, *early, *how, tasks="[sst, sts]", members=members)
        done = subprocess.run(command(given), env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stdout.splitlines() if line.startswith(("early exit", "bank "))]
        return said, json.loads((program.run_dir() / "banks.json").read_text())

    (said, plan), (said_by_two, plan_of_two) = swept(one), swept(two, *ddp)
    assert said_by_two == said
    assert len(plan["left"]) >= 2
    assert plan_of_two["left"] == plan["left"]
    assert [(b["members"], b["rung"]) for b in plan_of_two["banks"]] == [
        (b["members"], b["rung"]) for b in plan["banks"]
    ]
    for task in ("sst", "sts"):
        a, b = (pool.TaskPool(p.pool, task) for p in (one, two))
        assert sorted(a.left_out) == sorted(b.left_out) == sorted(plan["left"])
        for record in a.members:
            np.testing.assert_allclose(b.logits(record.name), a.logits(record.name), atol=1e-6, rtol=0)
            other = b.record(record.name)
            assert (other.best_epoch, other.epochs_done) == (record.best_epoch, record.epochs_done)
            assert other.epoch_scores == pytest.approx(record.epoch_scores, abs=1e-6)
    before = checkpoint_times(two)
    assert [line for line in swept(two, *ddp)[0] if line.startswith("bank ")] == []
    assert checkpoint_times(two) == before


def test_killed_in_the_second_bank(two_programs: tuple[Program, Program], capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL: the first bank stays as it is, the second goes on from its own checkpoint."""
    undisturbed, killed = two_programs
    long = ("--trainer.max_epochs=6", "--data.batch_size=2", "--bank_size=2")
    assert undisturbed("fit", *long) == 0
    process = subprocess.Popen(command(killed.arguments("fit", *long)), env=environment())

    def plan() -> list[dict[str, Any]]:
        return [b for p in (killed.folder / "runs").glob("*/banks.json") for b in json.loads(p.read_text())["banks"]]

    try:
        wait_for(lambda: any(b["finished"] for b in plan()), process)
        wait_for(lambda: len(list((killed.folder / "runs").glob("*/checkpoint/*/last.ckpt"))) == 2, process)
    finally:
        process.kill()
        process.wait()
    assert [b["finished"] is not None for b in plan()] == [True, False]
    first = {p: p.stat().st_mtime_ns for name in plan()[0]["members"] for p in (killed.pool / "sst" / name).iterdir()}
    capsys.readouterr()
    assert killed("fit", *long, "--ckpt_path=last") == 0
    said = capsys.readouterr().out
    assert "bank 1 of 2" not in said
    assert "bank 2 of 2" in said
    assert len(first) > 5
    assert all(p.stat().st_mtime_ns == at for p, at in first.items())
    assert different_files(undisturbed.pool, killed.pool) == []


# Leaves 0.6 of what a step of the bank takes when its second epoch begins: enough for half of it, and for what Python
# and the loops need beside it.
WITH_A_LIMIT = """
import resource, sys, threading
import torch
from lora_ensemble.main import main
from lora_ensemble.train.module import BankModule
from lora_ensemble.train.runs.memory import peak_bytes

threading.stack_size(1 << 18)  # transformers loads a model in several threads, each with 8 MiB of addresses otherwise
original, limited = BankModule.training_step, []

def step(self, batch, batch_idx):
    if self.current_epoch == 1 and not limited:
        peak = peak_bytes(lambda: original(self, batch, batch_idx).backward(), torch.device("cpu"))
        self._loss_sum, self._loss_steps, self.bank.weights.grad = None, 0, None
        (size,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")]
        resource.setrlimit(resource.RLIMIT_AS, (1024 * int(size) + int(0.6 * peak), resource.RLIM_INFINITY))
        limited.append(peak)
        print("a step takes", peak, flush=True)
    return original(self, batch, batch_idx)

BankModule.training_step = step
sys.exit(main(sys.argv[1:]))
"""


def test_memory_that_really_runs_out(two_programs: tuple[Program, Program]) -> None:
    """The system refuses what the whole bank's step asks for, and gives what a half's does (RLIMIT_AS)."""
    calm, tight = two_programs
    members = f"[{{rank: 2, lr: 1e-3, seed: {list(range(24))}}}]"
    common = (*STILL, "--trainer.max_epochs=3", "--data.batch_size=60", "--bank_size=null", "--trainer.logger=false")
    assert calm("fit", *common, members=members) == 0
    # What is freed goes back to the system at once, where malloc would keep it.
    env = environment(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    start = [sys.executable, "-c", WITH_A_LIMIT]
    result = subprocess.run(
        [*start, *tight.arguments("fit", *common, members=members)], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    said = "the bank of 24 members is split into banks of 12 and 12, which go on from the last checkpoint"
    assert f"out of memory in epoch 2: {said}" in result.stdout
    assert int(result.stdout.split("a step takes")[1].split()[0]) > 50e6  # large beside what else is allocated
    found, expected = (pool.TaskPool(p.pool, "sst") for p in (tight, calm))
    assert len(found.members) == 24
    for record in expected.members:
        # float32: half a bank's sums are rounded in another order.
        np.testing.assert_allclose(found.logits(record.name), expected.logits(record.name), atol=1e-5, rtol=0)


def entries(folder: Path) -> list[dict[str, Any]]:
    """Entries of the one offline run below ``folder``, read by W&B's own reader."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    out = subprocess.run(
        [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", str(file)],
        env=environment(WANDB_MODE="offline"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_curves_in_weights_and_biases(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> None:
    """An offline run read back: a curve of train loss and dev score for each member, and the CSV beside it."""
    program = Program(tmp_path, tiny("bert"), demo_root)
    result = subprocess.run(
        command(program.arguments("fit", "--trainer.log_every_n_steps=2")),
        env=environment(WANDB_MODE="offline", HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "wandb sync" in result.stdout
    read = entries(program.run_dir())
    text = json.dumps([e for e in read if e["type"] == "history"])
    config = json.dumps([e for e in read if e["type"] == "config"])
    assert str(program.base) in config
    assert '"batch_size": 8' in config
    assert [e["run"]["run_group"] for e in read if e["type"] == "run"] == ["sst"]
    (table,) = program.run_dir().glob("wandb/offline-run-*/files/media/table/members_*.json")
    opened = pool.TaskPool(program.pool, "sst")
    csv = next(program.run_dir().glob("csv/version_0/metrics.csv")).read_text()
    rows = {row[0]: row[1:] for row in json.loads(table.read_text())["data"]}
    for record in opened.members:
        assert rows[record.name] == [str(record.best_epoch), record.score]
        assert text.count(f"train_loss/sst/{record.name}") == 8  # 8 steps an epoch, 2 epochs, every second one
        assert text.count(f"dev_score/sst/{record.name}") == 2
        for score in record.epoch_scores:
            assert score is not None
            assert str(score)[:6] in text
        assert f"dev_score/sst/{record.name}" in csv.splitlines()[0]
    assert (program.run_dir() / "config.yaml").is_file()


def test_no_key_and_a_terminal_asks_nothing(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> None:
    program = Program(tmp_path, tiny("bert"), demo_root)
    env = environment(HOME=str(tmp_path), WANDB_MODE="", WANDB_API_KEY="", TERM="xterm", NETRC=str(tmp_path / "none"))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(program.arguments("fit")), env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    said, end = b"", time.monotonic() + 120
    try:
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            assert time.monotonic() < end, said.decode(errors="replace")
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    said += os.read(ours, 4096)
                except OSError:  # the terminal's other end was closed
                    break
        assert process.wait(30) == 0, said.decode(errors="replace")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        os.close(ours)
    assert b"Weights & Biases offline" in said
    assert b"Enter your choice" not in said


def test_a_key_without_a_network_does_not_wait(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> None:
    """W&B by itself would wait 105 seconds and fail."""
    program = Program(tmp_path, tiny("bert"), demo_root)
    env = environment(HOME=str(tmp_path), WANDB_MODE="", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    fit = program.arguments("fit", "--trainer.max_epochs=1", members="[{targets: none}]")
    result = subprocess.run(command(fit), env=env, capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stderr
    assert "Weights & Biases offline" in result.stdout


def test_logger_false_writes_no_curves(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(tmp_path, tiny("bert"), demo_root)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert program("fit", "--trainer.logger=false") == 0
    assert sorted(p.name for p in program.run_dir().iterdir()) == ["banks.json", "checkpoint", "config.yaml"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from lora_ensemble.main import main; code = main(sys.argv[1:]);"
        "bad = {'torch', 'numpy', 'transformers', 'lightning', 'wandb'} & set(sys.modules);"
        "sys.exit(code or ', '.join(bad) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_installed_command_and_dash_m() -> None:
    script = Path(sys.executable).parent / "lora-ensemble"
    for start in ([str(script)], [sys.executable, "-m", "lora_ensemble"]):
        result = subprocess.run([*start, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout.startswith("lora-ensemble 0.")


def test_a_report_in_weights_and_biases(tmp_path: Path) -> None:
    """An offline run read back: in the group of the members' run, with the table of methods, the plots and the page."""
    labels = random_labels("binary", 60)
    for m, logits in enumerate(random_logits("binary", labels, 3, noise=3)):
        ids = {"dev": [f"e{i}" for i in range(60)]}
        add_member(
            tmp_path / "pool", "mine", "binary", f"m{m}", {"dev": logits}, ids, {"dev": labels}, run="my-group-0123abcd"
        )
    where = ["--pool", str(tmp_path / "pool"), "--task", "mine", "--output", str(tmp_path / "report.html")]
    result = subprocess.run(
        [sys.executable, "-m", "lora_ensemble.dicor", "report", *where, "--wandb"],
        env=environment(WANDB_MODE="offline", HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"wandb sync {tmp_path}/wandb/offline-run-" in result.stdout
    (run,) = [e["run"] for e in entries(tmp_path) if e["type"] == "run"]
    assert (run["run_group"], run["job_type"]) == ("my-group", "report")
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/methods_*.json")
    rows = {row[0]: row for row in json.loads(table.read_text())["data"]}
    best = max(((logits > 0)[:, 0] == labels).mean() for logits in random_logits("binary", labels, 3, noise=3))
    assert rows["best"][1:3] == [1, pytest.approx(best)]
    plots = tmp_path.glob("wandb/offline-run-*/files/media/html/plots/*.html")
    assert sorted(p.name.split("_")[0] for p in plots) == ["calibration", "diversity", "methods", "similarity", "size"]
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/report_*.html")
    assert page.read_text() == (tmp_path / "report.html").read_text()
