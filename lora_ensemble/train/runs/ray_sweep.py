"""A sweep's banks as tasks of a Ray cluster: one bank a task, tried again when its worker dies.

A task runs ``lora-ensemble sweep --bank N`` on the worker, with the driver's settings. The driver holds the pool's lock
and alone writes the plan. Data, pool and runs lie on storage that all nodes share, as a cluster has it.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ensemble.errors import UserError
from lora_ensemble.train.runs.plan import Plan, PlannedBank
from lora_ensemble.train.runs.progress import duration

_ANSWER_WITHIN_S = 10.0
_PASSED_ON = ("OMP_", "WANDB_", "HF_")


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where and how a sweep's banks run on a Ray cluster."""

    address: str = "auto"
    """auto (the cluster that this machine belongs to), HOST:PORT of its head, or local: one is started here."""
    cpus: float = 1
    """CPUs that a bank takes of its node."""
    gpus: float = 0
    """GPUs that a bank takes of its node."""
    tries: int = 3
    """How often a bank whose worker dies is begun; each time it goes on from its last checkpoint."""

    def check(self) -> None:
        """``UserError`` for values out of range."""
        if self.tries < 1:
            raise UserError(f"--ray.tries: {self.tries}; expected at least 1")


def planned(plan: Plan, numbers: list[int], folder: Callable[[PlannedBank], Path]) -> None:
    """Says what there is to train: ``--plan_only``."""
    print(f"{len(plan.banks)} banks, to be trained: {', '.join(map(str, numbers)) or 'none'}", flush=True)


def train(
    options: RayOptions, settings: str, plan: Plan, numbers: list[int], folder: Callable[[PlannedBank], Path]
) -> None:
    """Train these banks of the plan on a Ray cluster, and say what was lost to workers that died.

    ``settings``: the sweep's, as ``--config`` takes them. ``UserError`` where ray is missing or the cluster does not
    answer, where a bank fails by itself, and where its workers have died ``tries`` times.
    """
    if not numbers:
        return
    ray = _connected(options)
    # A worker process for each task: what a bank leaves in memory goes with it.
    task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=0, max_calls=1)(train_bank)
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    died, lost = dict.fromkeys(numbers, 0), 0.0

    def submit(number: int) -> tuple[Any, tuple[int, float]]:
        return task.remote([f"--config={settings}", f"--bank={number}"], passed, os.getcwd()), (number, time.time())

    running = dict(map(submit, numbers))
    print(f"{len(numbers)} banks on a Ray cluster of {len(ray.nodes())} nodes", flush=True)
    while running:
        (done,), _ = ray.wait(list(running))
        number, since = running.pop(done)
        try:
            code = ray.get(done)
        except ray.exceptions.RayError as e:
            last = (p.stat().st_mtime for p in folder(plan.banks[number - 1]).rglob("last.ckpt"))
            lost_here = time.time() - max([since, *last])
            lost += lost_here
            died[number] += 1
            what = f"bank {number}: its worker died ({type(e).__name__}); {duration(lost_here)} lost"
            if died[number] == options.tries:
                raise UserError(f"{what}, for the {options.tries}th time; the same command goes on") from e
            print(f"{what}; it goes on from its last checkpoint elsewhere", flush=True)
            running.update([submit(number)])
            continue
        if code:
            raise UserError(f"bank {number} failed (exit code {code}; its words are above); the same command goes on")
        print(f"bank {number} of {len(plan.banks)} is trained", flush=True)
    print(f"{sum(died.values())} workers died; {duration(lost)} of training lost", flush=True)


def _connected(options: RayOptions) -> Any:
    """The module ``ray``, connected to the cluster; ``UserError`` where there is none."""
    try:
        import ray
    except ImportError as e:
        raise UserError(f"--ray.address needs ray ({e}); run: pip install 'lora-ensemble[ray]'") from e
    local, (host, _, port) = options.address == "local", options.address.rpartition(":")
    try:
        if host and port.isdigit() and "/" not in host:  # where nobody listens, ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=_ANSWER_WITHIN_S).close()
        address, dashboard = (None, False) if local else (options.address, None)
        ray.init(address=address, log_to_driver=True, ignore_reinit_error=True, include_dashboard=dashboard)
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(f"--ray.address {options.address}: no cluster ({' '.join(str(e).split())[:200]})") from e
    return ray


def train_bank(arguments: list[str], environment: dict[str, str], folder: str) -> int:
    """On a worker: the exit code of ``lora-ensemble sweep`` with these arguments.

    ``folder``: the driver's, to which paths may be relative.
    """
    os.environ.update(environment)
    with contextlib.chdir(folder):
        sys.argv = ["lora-ensemble", "sweep", *arguments]
        try:
            runpy.run_module("lora_ensemble", run_name="__main__")
        except SystemExit as e:
            return e.code if isinstance(e.code, int) else int(e.code is not None)
    return 0
