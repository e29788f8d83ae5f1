"""A bank that is trained where the driver's files are not: without Ray, in this process, the files out of reach."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pool_factory import make_pool
from test_banks import EXACT, FIVE, fail_once
from test_cli import Program
from test_sweep import THREE, contents
from test_sweep import steps as steps

from lora_ensemble import pool, ray_sweep
from lora_ensemble.away import BROUGHT, Home, pack_named, pack_trained, scratch, take_in, unpack_named
from lora_ensemble.errors import UserError
from lora_ensemble.plan import FILE, Plan, PlannedBank

AWAY = ("--ray.shared=false", "--trainer.logger=false")


@pytest.fixture
def program(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Program]:
    """With data and a base model of its own. Away, neither is there, nor the pool, nor the runs."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    at_home = tmp_path / "home"
    base, root = (shutil.copytree(p, at_home / n) for p, n in ((tiny("bert"), "base"), (demo_root, "data")))

    def train(
        options: ray_sweep.RayOptions,
        settings: str,
        home: Home,
        plan: Plan,
        numbers: list[int],
        folder: Callable[[PlannedBank], Path],
    ) -> None:
        named = pack_named(home.named)
        for number in numbers:
            bank = plan.banks[number - 1]
            at, packed = folder(bank).relative_to(home.run_dir).as_posix(), home.pack(plan, bank, folder)
            at_home.rename(tmp_path / "elsewhere")
            try:
                what = [f"--config={settings}", f"--bank={number}"]
                code, files = ray_sweep.train_away(what, {}, named, packed, bank, at)
                assert not at_home.exists()
            finally:
                (tmp_path / "elsewhere").rename(at_home)
            assert code == 0
            home.bring(folder(bank), files)

    monkeypatch.setattr(ray_sweep, "train", train)
    yield Program(at_home, base, root)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("how", "given"),
    [
        (("--bank_size=2",), {"members": THREE}),
        (("--bank_size=null",), {"members": FIVE, "tasks": "[sst, sts]"}),
        (("--model.finetune=full",), {"members": "[{lr: 1e-4}]"}),
        (("--bank_size=1",), {"members": "[{rank: 2, lr: 3e-3}, {rank: 2, lr: 1e30}, {rank: 3, lr: 3e-3}]"}),
    ],
    ids=["banks", "tasks", "full", "diverged"],
)
def test_the_same_pool(program: Program, how: tuple[str, ...], given: dict[str, str]) -> None:
    assert program("sweep", *how, **given) == 0
    undisturbed, program.pool = contents(program.pool), program.folder / "away"
    shutil.rmtree(program.folder / "runs")
    assert program("sweep", *how, *AWAY, **given) == 0
    assert contents(program.pool) == undisturbed
    assert not list(program.run_dir().rglob(BROUGHT))
    assert (program.run_dir() / "config.yaml").is_file()


def test_relative_paths_and_curves(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(program.folder)
    program.base, program.root, program.pool, program.folder = Path("base"), Path("data"), Path("pool"), Path(".")
    assert program("sweep", "--bank_size=2", members=THREE) == 0
    undisturbed = contents(program.pool)
    shutil.rmtree("runs")
    shutil.rmtree("pool")
    assert program("sweep", "--bank_size=2", "--ray.shared=false", members=THREE) == 0
    assert contents(program.pool) == undisturbed
    assert len(list(Path("runs").glob("*/checkpoint/bank-*/csv/version_0/metrics.csv"))) == 2


def test_more_epochs_go_on_from_what_came_home(program: Program, steps: list[list[str]]) -> None:
    """As do a bank that was begun at home, and one that came home and goes on there."""
    longer = "--trainer.max_epochs=3"
    assert program("sweep", "--bank_size=2", longer, members=THREE) == 0
    undisturbed, program.pool = contents(program.pool), program.folder / "away"
    shutil.rmtree(program.folder / "runs")
    steps.clear()
    assert program("sweep", "--bank_size=2", *AWAY, members=THREE) == 0
    assert program("sweep", "--bank_size=2", *AWAY, longer, members=THREE) == 0
    assert len(steps) == 2 * 8 * 3
    assert contents(program.pool) == undisturbed
    assert program("sweep", "--bank_size=2", longer, members=THREE) == 0
    assert program("sweep", "--bank_size=2", *AWAY, "--trainer.max_epochs=4", members=THREE) == 0
    assert len(steps) == 2 * 8 * 4
    assert program("sweep", "--bank_size=2", "--trainer.max_epochs=5", members=THREE) == 0
    assert len(steps) == 2 * 8 * 5


def test_out_of_memory_away(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves come home in the bank's place, and go on from their own checkpoints later."""
    with monkeypatch.context() as patch:
        fail_once(patch, "training_step", (1, 3))
        assert program("sweep", *EXACT, *AWAY, "--bank_size=null", members=FIVE) == 0
    assert len(pool.TaskPool(program.pool, "sst").members) == 5
    more = [e for e in EXACT if "max_epochs" not in e]
    assert program("sweep", *more, *AWAY, "--trainer.max_epochs=4", "--bank_size=null", members=FIVE) == 0
    assert {r.epochs_done for r in pool.TaskPool(program.pool, "sst").members} == {4}


def test_members_leave_away(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("--early_exit.rungs=[1]", "--early_exit.reserve=0", "--bank_size=2")
    assert program("sweep", *how, members=THREE) == 0
    undisturbed, program.pool = contents(program.pool), program.folder / "away"
    shutil.rmtree(program.folder / "runs")
    capsys.readouterr()
    assert program("sweep", *how, *AWAY, members=THREE) == 0
    assert "1 of 3 members left; 17% of the member epochs saved" in capsys.readouterr().out
    assert contents(program.pool) == undisturbed


def test_what_is_named(tmp_path: Path) -> None:
    for at, text in (("a/data.csv", "1"), ("b/data.csv", "2"), ("model/config.json", "3"), ("blob", "4")):
        (tmp_path / at).parent.mkdir(exist_ok=True)
        (tmp_path / at).write_text(text)
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "blob")  # as in the hub's cache
    (tmp_path / "link.csv").symlink_to(tmp_path / "blob")
    (tmp_path / "model" / ".git").mkdir()
    (tmp_path / "model" / ".git" / "pack").touch()
    names = [str(tmp_path / n) for n in ("a/data.csv", "b/data.csv", "a/../model", "link.csv", "a/data.csv")]
    places = unpack_named(tmp_path / "there", pack_named(names))
    assert sorted(places) == sorted(set(names))
    a, b, model, link = (Path(places[n]) for n in names[:4])
    assert (link.name, link.read_text()) == ("link.csv", "4")
    assert (a.name, a.read_text(), b.read_text()) == ("data.csv", "1", "2")
    assert {p.name: p.read_text() for p in model.iterdir()} == {"config.json": "3", "weights": "4"}


def test_the_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed in the end; a killed worker's by the next one, one in use by nobody else."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import time\nfrom lora_ensemble.away import scratch\nwith scratch() as f: print(f, flush=True); time.sleep(99)"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert killed.stdout
    with killed:
        left = Path(killed.stdout.readline().strip())
        with scratch() as mine, scratch() as other:
            (mine / "deep").mkdir()
            assert left.is_dir()
            assert len({left, mine, other}) == 3
        killed.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == [left]
    with scratch() as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


# As in test_pool.py: the child is killed at its k-th step on the file system, once as it is and once with the file that
# it was writing cut in half.
KILL_EVERYWHERE = """
import json, os, shutil, signal, sys, traceback
from pathlib import Path
from lora_ensemble.away import Home, pack_trained
from lora_ensemble.plan import PlannedBank

STEPS = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}
trained, start, out = map(Path, sys.argv[1:])
FILES = pack_trained(trained, PlannedBank(members=["m00", "m01"]), "checkpoint/bank-1")

def killed_at(home, k, torn):
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if status not in (0, signal.SIGKILL):
            sys.exit(f"{home}: step {k} failed")
        return status != 0
    count, writing = 0, None
    def hook(event, args):
        nonlocal count, writing
        if event not in STEPS or (event == "open" and not str(args[0]).startswith(str(home))):
            return
        count += 1
        if count == k:
            if torn and writing and os.path.exists(writing):
                os.truncate(writing, os.path.getsize(writing) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and not str(args[0]).endswith(".lock")
        writing = args[0] if writes else None
    sys.addaudithook(hook)
    try:
        run = home / "runs" / "r"
        Home(run_dir=run, pool=home / "pool", tasks=["sst"], named=[]).bring(run / "checkpoint" / "bank-1", FILES)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

made = []
for torn in (False, True):
    k, going = 1, True
    while going:
        home = out / f"{torn}-{k}"
        shutil.copytree(start, home)
        going = killed_at(home, k, torn)
        k += 1
        made.append(str(home))
print(json.dumps(made))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_driver_is_killed_at_any_step(tmp_path: Path) -> None:
    """Only whole members are ever in the pool, and the next start has the rest, or the bank is trained again."""
    trained, start, bank = tmp_path / "trained", tmp_path / "start", PlannedBank(members=["m00", "m01"])
    make_pool(trained / "pool", "sst", "multiclass", members=2, n=4)
    at = "checkpoint/bank-1"
    for name in (FILE, f"{at}/{FILE}", f"{at}/last.ckpt"):
        (trained / "runs" / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (trained / "runs" / "r" / name).write_text(f"the new {name}")
    # One of the two is in the pool already, of another time; and so is a member of another bank.
    make_pool(start / "pool", "sst", "multiclass", members=3, n=4, noise=0.5)
    shutil.rmtree(start / "pool" / "sst" / "m01")
    (start / "runs" / "r" / at).mkdir(parents=True)
    (start / "runs" / "r" / at / "last.ckpt").write_text("the old")
    old, new = contents(start / "pool"), contents(trained / "pool")
    assert old["sst/m00/dev.logits.npy"] != new["sst/m00/dev.logits.npy"]
    (tmp_path / "out").mkdir()
    run = [sys.executable, "-W", "error", "-c", KILL_EVERYWHERE, str(trained), str(start), str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left_whole = left_in_part = 0
    for home in map(Path, json.loads(done.stdout)):
        run_dir = home / "runs" / "r"
        for record in pool.read_records(home / "pool", "sst"):
            for name, checksum in record.files.items():
                assert pool.checksum(home / "pool" / "sst" / record.name / name) == checksum
        for brought in run_dir.rglob(BROUGHT):
            left_whole += (whole := (brought / FILE).is_file())
            left_in_part += not whole
            take_in(brought, run_dir, home / "pool")
            assert (run_dir / at / FILE).is_file() or not whole
        if not (run_dir / at / FILE).is_file():  # nothing of it came through
            assert contents(home / "pool") == old
            Home(run_dir=run_dir, pool=home / "pool", tasks=["sst"], named=[]).bring(
                run_dir / at, pack_trained(trained, bank, at)
            )
        assert contents(home / "pool") == old | new
        found = {str(p.relative_to(run_dir)): p.read_text() for p in run_dir.rglob("*") if p.is_file()}
        assert found == {f"{at}/{name}": f"the new {at}/{name}" for name in (FILE, "last.ckpt")}
    assert left_whole > 2 * 20
    assert left_in_part > 2 * 10


def test_what_came_home_damaged(tmp_path: Path) -> None:
    brought = tmp_path / "runs" / "r" / "checkpoint" / BROUGHT
    make_pool(brought / "pool", "sst", "multiclass", members=2, n=4)
    (brought / FILE).write_text("{}")
    logits = brought / "pool" / "sst" / "m01" / "dev.logits.npy"
    logits.write_bytes(logits.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"dev\.logits\.npy: damaged on its way home; delete "):
        take_in(brought, tmp_path / "runs" / "r", tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
