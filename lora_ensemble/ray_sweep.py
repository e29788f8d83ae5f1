"""A sweep's banks as tasks of a Ray cluster: one bank a task, tried again when its worker dies.

A task runs ``lora-ensemble sweep --bank N`` on the worker, with the driver's settings. The driver holds the pool's lock
and alone writes the plan. The pool and the runs lie on storage that all nodes share; or what a bank needs is sent to
its worker, and what it made is brought home.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ensemble import places
from lora_ensemble.away import POOL, Files, Home, pack_named, pack_trained, scratch, unpack, unpack_named
from lora_ensemble.errors import UserError
from lora_ensemble.plan import Plan, PlannedBank
from lora_ensemble.progress import duration

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
    """How often a bank whose worker dies is begun; each time it goes on from its last checkpoint, if shared."""
    shared: bool = True
    """Whether data, pool and checkpoints lie on storage that all nodes have. If not, they are sent to the workers, and
    the members brought home; a bank whose worker dies is then trained from its start."""

    def check(self) -> None:
        """``UserError`` for values out of range."""
        if self.tries < 1:
            raise UserError(f"--ray.tries: {self.tries}; expected at least 1")


def planned(plan: Plan, numbers: list[int], folder: Callable[[PlannedBank], Path]) -> None:
    """Says what there is to train: ``--plan_only``."""
    print(f"{len(plan.banks)} banks, to be trained: {', '.join(map(str, numbers)) or 'none'}", flush=True)


def train(
    options: RayOptions,
    settings: str,
    home: Home,
    plan: Plan,
    numbers: list[int],
    folder: Callable[[PlannedBank], Path],
) -> None:
    """Train these banks of the plan on a Ray cluster, and say what was lost to workers that died.

    ``settings``: the sweep's, as ``--config`` takes them. ``UserError`` where ray is missing or the cluster does not
    answer, where a bank fails by itself, and where its workers have died ``tries`` times.
    """
    if not numbers:
        return
    ray = _connected(options)
    # A worker process for each task: what a bank leaves in memory goes with it.
    remote = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=0, max_calls=1)
    shared, away = remote(train_on_shared_storage), remote(train_away)
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    if not options.shared:
        passed = {name: value for name, value in passed.items() if not os.path.isabs(value)}  # the driver's folders
        named = ray.put(pack_named(home.named))
    tried = dict.fromkeys(numbers, 0)
    lost = 0.0

    def submit(number: int) -> Any:
        tried[number] += 1
        what = [f"--config={settings}", f"--bank={number}"]
        if options.shared:
            return shared.remote(what, passed, os.getcwd())
        bank = plan.banks[number - 1]
        at = folder(bank).relative_to(home.run_dir).as_posix()
        return away.remote(what, passed, named, home.pack(plan, bank, folder), bank, at)

    begun = {submit(number): (number, time.time()) for number in numbers}
    print(f"{len(numbers)} banks on a Ray cluster of {len(ray.nodes())} nodes", flush=True)
    while begun:
        (done,), _ = ray.wait(list(begun))
        number, since = begun.pop(done)
        bank = plan.banks[number - 1]
        try:
            code, files = ray.get(done)
        except ray.exceptions.RayError as e:
            since = max(since, _last_checkpoint(folder(bank))) if options.shared else since
            lost += time.time() - since
            what = f"bank {number}: its worker died ({type(e).__name__}); {duration(time.time() - since)} lost"
            if tried[number] == options.tries:
                raise UserError(f"{what}, for the {options.tries}th time; the same command goes on") from e
            how = "goes on from its last checkpoint" if options.shared else "starts again"
            print(f"{what}; it {how} elsewhere", flush=True)
            begun[submit(number)] = (number, time.time())
            continue
        if code:
            raise UserError(f"bank {number} failed (exit code {code}; its words are above); the same command goes on")
        if files:
            home.bring(folder(bank), files)
        print(f"bank {number} of {len(plan.banks)} is trained", flush=True)
    died = sum(tried.values()) - len(numbers)
    print(f"{died} workers died; {duration(lost)} of training lost", flush=True)


def _connected(options: RayOptions) -> Any:
    """The module ``ray``, connected to the cluster; ``UserError`` where there is none."""
    try:
        import ray
    except ImportError as e:
        raise UserError(f"--ray.address needs ray ({e}); run: pip install 'lora-ensemble[ray]'") from e
    local = options.address == "local"
    try:
        _reach(options.address)
        ray.init(
            address=None if local else options.address,
            log_to_driver=True,
            ignore_reinit_error=True,
            include_dashboard=False if local else None,
        )
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(f"--ray.address {options.address}: no cluster ({' '.join(str(e).split())[:200]})") from e
    return ray


def _reach(address: str) -> None:
    """``OSError`` where nobody listens at HOST:PORT: ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_ANSWER_WITHIN_S).close()


def _last_checkpoint(folder: Path) -> float:
    return max((p.stat().st_mtime for p in folder.rglob("last.ckpt")), default=0.0)


# On a worker: the exit code of ``lora-ensemble sweep`` with these arguments, and the files to be brought home


def train_on_shared_storage(arguments: list[str], environment: dict[str, str], folder: str) -> tuple[int, Files]:
    """Train a bank where the driver's files are. ``folder``: the driver's; paths may be relative to it."""
    from lora_ensemble.main import main

    os.environ.update(environment)
    with contextlib.chdir(folder):
        return main(["sweep", *arguments]), {}


def train_away(
    arguments: list[str],
    environment: dict[str, str],
    named: dict[str, Files],
    files: Files,
    bank: PlannedBank,
    at: str,
) -> tuple[int, Files]:
    """Train a bank where they are not, from ``named`` (``pack_named``) and ``files`` (``Home.pack``).

    ``at``: the bank's folder below the run's.
    """
    from lora_ensemble.main import main

    os.environ.update(environment)
    with scratch() as folder, contextlib.chdir(folder):
        unpack(folder, files)
        with places.sent(unpack_named(folder / "named", named)):
            # Neither is part of the run's name.
            code = main(["sweep", *arguments, f"--pool.dir={POOL}", "--trainer.default_root_dir=."])
        return code, {} if code else pack_trained(folder, bank, at)
