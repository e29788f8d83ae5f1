"""A sweep's banks as tasks of a Ray cluster: one bank a task, tried again when its worker dies.

A task runs ``lora-ensemble sweep ... --bank N`` on the worker, with the driver's own arguments. The pool and the runs
lie on storage that all nodes share; the driver holds the pool's lock and alone writes the plan.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ensemble.errors import UserError
from lora_ensemble.plan import Plan, PlannedBank
from lora_ensemble.progress import duration

_ANSWER_WITHIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where and how a sweep's banks run on a Ray cluster."""

    address: str
    """auto (the cluster that this machine belongs to), HOST:PORT of its head, or local: one is started here."""
    cpus: float = 1
    """CPUs that a bank takes of its node."""
    gpus: float = 0
    """GPUs that a bank takes of its node."""
    tries: int = 3
    """How often a bank whose worker dies is begun; each time it goes on from its last checkpoint."""


def planned(plan: Plan, numbers: list[int], folder: Callable[[PlannedBank], Path]) -> None:
    """Says what there is to train: ``--plan_only``."""
    print(f"{len(plan.banks)} banks, to be trained: {', '.join(map(str, numbers)) or 'none'}", flush=True)


class Cluster:
    """Runs the banks of a plan on a Ray cluster. ``arguments``: the driver's, of ``lora-ensemble``."""

    def __init__(self, options: RayOptions, arguments: Sequence[str]) -> None:
        self._options, self._arguments = options, _without_ray(arguments)
        if options.tries < 1:
            raise UserError(f"--ray.tries: {options.tries}; expected at least 1")

    def train(self, plan: Plan, numbers: list[int], folder: Callable[[PlannedBank], Path]) -> None:
        """Train these banks of the plan, and say what was lost to workers that died.

        ``UserError`` where ray is missing or the cluster does not answer, where a bank fails by itself, and where its
        workers have died ``tries`` times.
        """
        if not numbers:
            return
        try:
            import ray
        except ImportError as e:
            raise UserError(f"--ray.address needs ray ({e}); run: pip install 'lora-ensemble[ray]'") from e
        o = self._options
        try:
            _reach(o.address)
            ray.init(
                address=None if o.address == "local" else o.address,
                log_to_driver=True,
                ignore_reinit_error=True,
                include_dashboard=False if o.address == "local" else None,
            )
        except (OSError, RuntimeError, ValueError) as e:
            raise UserError(f"--ray.address {o.address}: no cluster ({' '.join(str(e).split())[:200]})") from e
        # A worker process for each task: what a bank leaves in memory goes with it.
        task = ray.remote(num_cpus=o.cpus, num_gpus=o.gpus, max_retries=0, max_calls=1)(_train_bank)
        environment = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "WANDB_", "HF_"))}
        tried = dict.fromkeys(numbers, 0)
        lost = 0.0

        def submit(number: int) -> Any:
            tried[number] += 1
            return task.remote([*self._arguments, f"--bank={number}"], os.getcwd(), environment)

        begun = {submit(number): (number, time.time()) for number in numbers}
        print(f"{len(numbers)} banks on a Ray cluster of {len(ray.nodes())} nodes", flush=True)
        while begun:
            (done,), _ = ray.wait(list(begun))
            number, since = begun.pop(done)
            try:
                code = ray.get(done)
            except ray.exceptions.RayError as e:
                since = max(since, _last_checkpoint(folder(plan.banks[number - 1])))
                lost += time.time() - since
                what = f"bank {number}: its worker died ({type(e).__name__}); {duration(time.time() - since)} lost"
                if tried[number] == o.tries:
                    raise UserError(f"{what}, for the {o.tries}th time; the same command goes on") from e
                print(f"{what}; it goes on from its last checkpoint elsewhere", flush=True)
                again = submit(number)
                begun[again] = (number, time.time())
                continue
            if code:
                raise UserError(
                    f"bank {number} failed (exit code {code}; its words are above); the same command goes on"
                )
            print(f"bank {number} of {len(plan.banks)} is trained", flush=True)
        died = sum(tried.values()) - len(numbers)
        print(f"{died} workers died; {duration(lost)} of training lost", flush=True)


def _reach(address: str) -> None:
    """``OSError`` where nobody listens at HOST:PORT: ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_ANSWER_WITHIN_S).close()


def _without_ray(arguments: Sequence[str]) -> list[str]:
    """The arguments without ``--ray...``, with or without a value of its own."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--ray" or argument.startswith(("--ray.", "--ray=")):
            skip = "=" not in argument
        else:
            kept.append(argument)
    return kept


def _last_checkpoint(folder: Path) -> float:
    return max((p.stat().st_mtime for p in folder.rglob("last.ckpt")), default=0.0)


def _train_bank(arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    """On a worker: the exit code of ``lora-ensemble`` with these arguments."""
    os.environ.update(environment)
    os.chdir(folder)  # paths may be relative to it
    from lora_ensemble.main import main

    return main(arguments)
