"""What the benchmarks run on: its description, its matrix peak, a process's peak memory, and processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

T = TypeVar("T")

_PRELOAD = [
    "torch",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "lightning.pytorch",
    "peft",
    "lora_ensemble.train.module",
    "lora_ensemble.train.data",
]
start_method: Literal["forkserver", "spawn"] = "forkserver"
"""How processes begin. ``spawn`` imports everything anew in each of them: for where a library that is imported looks at
the GPU, which then cannot be used after a fork."""
_LARGEST = {"cpu": 4096, "cuda": 16384}
_LONG_ENOUGH_S = 0.3


def choose_device(name: str) -> str:
    """``auto`` is cuda where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def describe(device: str, threads: int) -> str:
    """Processor, cores used, GPU, and the versions that matter, in one line."""
    parts = [f"{_processor()}, {threads} thread{'s' * (threads != 1)} of {os.cpu_count()} cores"]
    if device == "cuda":
        parts.append(torch.cuda.get_device_name())
    libraries = ("torch", "transformers", "peft", "lightning")
    parts.append(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in libraries))
    return "; ".join(parts)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_flops(device: str, precision: str, threads: int) -> float:
    """FLOP/s of the fastest square matrix product at this precision (``32``: torch's default, no TF32; or ``bf16``).

    The sizes double until one product takes long or the largest is reached; the best of several tries at each.
    """
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best, size = 0.0, 512
    while size <= _LARGEST[device]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _fastest_product(a, b, device)
        best = max(best, 2 * size**3 / seconds)
        if seconds > _LONG_ENOUGH_S:
            break
        size *= 2
    return best


def _fastest_product(a: torch.Tensor, b: torch.Tensor, device: str) -> float:
    """Seconds of one product; several in a row between two looks at the clock, so that a GPU's launches overlap."""
    rows, best = (10 if device == "cuda" else 1), float("inf")
    for _ in range(4):  # the first warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(rows):
            torch.mm(a, b)
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / rows)
    return best


class PeakMemory:
    """Peak memory of a fresh process. CUDA: torch's allocations. CPU: growth of the resident size from now on."""

    def __init__(self, device: str) -> None:
        self._device = device
        with contextlib.suppress(OSError):  # elsewhere, the peak since the process began has to do
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status_bytes("VmRSS")

    def bytes(self) -> int:
        """The peak so far."""
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated()
        return _status_bytes("VmHWM") - self._before


def _status_bytes(key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    # Outside Linux: a Mac counts bytes, the others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(function: Callable[..., T], *arguments: Any, seconds: float | None = None) -> T:
    """``function(*arguments)`` in a process that has imported the libraries and done nothing else.

    So that no side inherits another's memory, threads or caches. What it prints is kept from the terminal and shown
    only with an error. Raises ``RuntimeError`` where it fails, ``MemoryError`` where the device's memory is too small,
    ``TimeoutError`` where it takes longer than ``seconds``: it is then killed.
    """
    # Else a look for a GPU while the libraries are imported would keep the processes from using it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context: Any = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="benchmark-", suffix=".log") as log:
        process = context.Process(target=_child, args=(theirs, log.name, function, arguments))
        process.start()
        theirs.close()
        try:
            if not ours.poll(seconds):
                process.kill()
                process.join()
                raise TimeoutError(f"{function.__name__} took longer than {seconds:.0f} s")
            kind, value = ours.recv()
        except EOFError:  # killed
            process.join()
            kind, value = "error", f"the process ended with code {process.exitcode}"
        process.join()
        if kind == "memory":
            raise MemoryError(value)
        if kind == "error":
            raise RuntimeError(f"{function.__name__}: {value}\n{Path(log.name).read_text()[-4000:]}")
        return value


def _child(answer: Connection, log: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    try:
        answer.send(("value", function(*arguments)))
    except torch.OutOfMemoryError as e:
        answer.send(("memory", str(e)))
    except Exception:
        answer.send(("error", traceback.format_exc()))
