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
from test_sweep import TWELVE, contents

from lora_ensemble.main import main
from lora_ensemble.ray_sweep import _without_ray

CLUSTER = """
import subprocess, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

runs, *driver = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
process = subprocess.Popen([sys.executable, "-m", "lora_ensemble", *driver, f"--ray.address={cluster.address}"])
while process.poll() is None and len(list(Path(runs).glob("*/checkpoint/*/last.ckpt"))) < 2:
    time.sleep(0.02)
cluster.remove_node(other, allow_graceful=False)
print("a node was killed", flush=True)
code = process.wait()
cluster.shutdown()
sys.exit(code)
"""


def test_a_node_dies(tmp_path: Path, tiny: Callable[[str], Path], demo_root: Path) -> None:
    """Three banks on two nodes; the sweep ends complete, with the pool of one that ran without Ray."""
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    program = Program(tmp_path, tiny("bert"), demo_root)
    how = ("--bank_size=4", "--trainer.logger=false", "--trainer.max_epochs=40")
    assert program("sweep", *how, members=TWELVE) == 0
    undisturbed, program.pool = contents(program.pool), tmp_path / "ray"
    shutil.rmtree(tmp_path / "runs")
    driver = program.arguments("sweep", *how, members=TWELVE)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(tmp_path / "runs"), *driver],
        capture_output=True, text=True, timeout=600, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    print(f"{time.monotonic() - started:.0f} s\n{done.stdout}\n{done.stderr}")
    assert done.returncode == 0
    assert "its worker died" in done.stdout
    assert "1 workers died; " in done.stdout
    assert contents(program.pool) == undisturbed


def test_what_a_worker_is_told() -> None:
    given = [
        "sweep",
        "--ray.address=auto",
        "--config",
        "a.yaml",
        "--ray.cpus",
        "2",
        "--ray",
        "{address: auto}",
        "--x=1",
    ]
    assert _without_ray(given) == ["sweep", "--config", "a.yaml", "--x=1"]


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
