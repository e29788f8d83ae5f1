"""A sweep on a Ray cluster: two nodes on this machine, of which one dies in mid-bank."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import Program
from test_sweep import THREE, TWELVE, contents

from lora_ensemble.main import main
from lora_ensemble.train.runs import ray_sweep
from lora_ensemble.train.runs.plan import Plan

CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(other, allow_graceful=False)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_dies(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> None:
    """Three banks on two nodes; the sweep ends complete, with the pool of one that ran without Ray."""
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    program = Program(tmp_path, tiny("bert"), demo_root)
    how = ("--bank_size=4", "--trainer.logger=false", "--trainer.max_epochs=40")
    assert program("sweep", *how, members=TWELVE) == 0
    undisturbed, program.pool = contents(program.pool), tmp_path / "ray"
    shutil.rmtree(tmp_path / "runs")
    # Workers as urgent as all else here: niced, as they usually are, they would starve beside other tests.
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp", "RAY_worker_niceness": "0"}
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    with cluster:
        assert cluster.stdin
        assert cluster.stdout
        address = next(line for line in cluster.stdout if ":" in line).split()[-1]
        arguments = program.arguments("sweep", *how, f"--ray.address={address}", members=TWELVE)
        driver = subprocess.Popen(
            [sys.executable, "-m", "lora_ensemble", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )  # fmt: skip
        try:
            until = time.monotonic() + 900
            while driver.poll() is None and len(list(tmp_path.glob("runs/*/checkpoint/*/last.ckpt"))) < 2:
                assert time.monotonic() < until
                time.sleep(0.02)
            cluster.stdin.write("\n")
            cluster.stdin.flush()
            said, _ = driver.communicate(timeout=900)
        finally:
            driver.kill()
        cluster.communicate("\n", timeout=120)
    print(said)
    assert driver.returncode == 0
    assert "its worker died" in said
    assert "it goes on from its last checkpoint elsewhere" in said
    assert "1 workers died; " in said
    assert contents(program.pool) == undisturbed


def test_what_a_worker_is_told(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of a file and of arguments, relative paths: the worker's run is the driver's."""
    monkeypatch.chdir(tmp_path)
    program = Program(Path("."), tiny("bert"), demo_root)
    Path("some.yaml").write_text("bank_size: 2\ntrainer:\n  logger: false\n")
    assert program("sweep", "--config=some.yaml", members=THREE) == 0
    undisturbed = contents(program.pool)
    shutil.rmtree("runs")
    shutil.rmtree("pool")
    trained = []

    def train(options: ray_sweep.RayOptions, settings: str, plan: Plan, numbers: list[int], _: object) -> None:
        Path("some.yaml").unlink()
        monkeypatch.chdir("/")
        for number in numbers:
            what = [f"--config={settings}", f"--bank={number}"]
            trained.append(ray_sweep.train_bank(what, {}, str(tmp_path)))
        monkeypatch.chdir(tmp_path)

    monkeypatch.setattr(ray_sweep, "train", train)
    assert program("sweep", "--config=some.yaml", "--ray.address=auto", members=THREE) == 0
    assert trained == [0, 0]
    assert contents(program.pool) == undisturbed
    assert len(list(Path("runs").iterdir())) == 1


def test_no_cluster(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    program = Program(tmp_path, tiny("bert"), demo_root)
    # In a process of its own: ray leaves threads and warnings behind.
    arguments = program.arguments("sweep", "--ray.address=127.0.0.1:1")
    done = subprocess.run(
        [sys.executable, "-m", "lora_ensemble", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "--ray.address 127.0.0.1:1: no cluster" in done.stderr
    assert main(program.arguments("sweep", "--ray.address=auto", "--ray.tries=0")) == 2
    assert "--ray.tries: 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--ray.shared=false", "--ray={shared: false}"])
def test_what_was_asked_for_of_old_is_told_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    program = Program(tmp_path, tmp_path, tmp_path)
    with pytest.raises(SystemExit) as e:
        main(program.arguments("sweep", "--ray.address=auto", option))
    assert e.value.code == 2
    assert "a cluster needs storage that all its nodes share" in capsys.readouterr().err


def test_a_bank_on_ray_has_one_device(
    tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = Program(tmp_path, tiny("bert"), demo_root)
    assert main(program.arguments("sweep", "--ray.address=auto", "--trainer.devices=2")) == 2
    assert "--ray: each bank is a task on one device, but the Trainer has 2" in capsys.readouterr().err
