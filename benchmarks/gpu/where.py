"""Where the time of a step goes: torch's profile of a few steps of a bank, in groups, as shares of the wall time."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.setting import Setting
from machine import synchronize
from sides import bare_steps

# The first that one of an operation's names, or of those that it is part of, begins with.
_GROUPS = {
    "optimiser": ("Optimizer.",),
    "attention": ("aten::scaled_dot_product", "aten::_scaled_dot_product", "aten::_flash", "aten::_efficient",
                  "aten::_cudnn_attention", "ScaledDotProduct", "_InRows"),
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::linear", "aten::matmul"),
    "norms": ("aten::layer_norm", "aten::native_layer_norm", "NativeLayerNorm"),
    "dropout": ("aten::dropout", "aten::native_dropout", "NativeDropout", "_Dropped", "_AddDropped", "aten::bernoulli"),
    "activations": ("aten::gelu", "aten::tanh", "Gelu", "Tanh"),
    "moving and casting": ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::index", "aten::clone", "PadRow",
                           "PackRow", "aten::fill_", "aten::zero_", "Memcpy", "Memset"),
}  # fmt: skip
REST = "other elementwise work and sums"
UNKNOWN = "on the device, of no known operation"
GAPS = "nothing on the device (launching, loading, Python)"
_ENGINE = "autograd::engine::evaluate_function: "
_WARMUP, _TIMED, _PROFILED = 10, 10, 5


def profiled(setting: Setting, members: int) -> dict[str, Any]:
    """Shares of a step's wall time, which is taken without the profiler: it makes launches slower, not kernels."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    warmup, timed, watched = setting.size((_WARMUP, _TIMED, _PROFILED), (1, 2, 2))
    work = setting.workload("random:bert-base", steps=timed + watched, warmup=warmup)
    steps = bare_steps(work, members)

    def run(count: int) -> float:
        synchronize(work.device)
        start = time.perf_counter()
        for _ in range(count):
            next(steps)
        synchronize(work.device)
        return (time.perf_counter() - start) / count

    run(warmup)
    wall = run(timed)
    cuda = work.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        slowed = run(watched)
    seconds = {name: s / watched for name, s in by_group(found.events() or [], cuda=cuda).items()}
    # The CPU's own times hold the profiler's cost; a GPU's kernels do not.
    base = wall if cuda else slowed
    seconds[GAPS] = max(0.0, base - sum(seconds.values()))
    return {
        "members": members,
        "wall_s": wall,
        "shares": {name: s / base for name, s in sorted(seconds.items(), key=lambda item: -item[1])},
        "kernels": _longest(found.events() or [], cuda=cuda, of=base * watched),
    }


def by_group(events: Iterable[Any], *, cuda: bool) -> dict[str, float]:
    """Seconds of each group: of kernels on a GPU, else an operation's own time."""
    seconds: dict[str, float] = defaultdict(float)
    events = list(events)
    for event in events:
        if event.device_type == DeviceType.CPU:
            time_us = sum(k.duration for k in event.kernels) if cuda else event.self_cpu_time_total
            if time_us and not event.is_async:
                seconds[group(event)] += time_us / 1e6
    if cuda:
        seconds[UNKNOWN] = max(0.0, _busy(events) - sum(seconds.values()))
    return dict(seconds)


def group(event: Any) -> str:
    """Of an operation, by its name and the names of those that it is part of."""
    names = []
    while event is not None:
        names.append(event.name.removeprefix(_ENGINE))
        event = event.cpu_parent
    for found, starts in _GROUPS.items():
        if any(name.startswith(starts) for name in names):
            return found
    return REST


def _on_device(events: Iterable[Any]) -> list[Any]:
    # Named ranges are shown on the device too, around their kernels.
    return [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]


def _busy(events: Iterable[Any]) -> float:
    """Seconds in which anything ran on the device."""
    total = end = 0.0
    for span in sorted((e.time_range.start, e.time_range.end) for e in _on_device(events)):
        total += max(0.0, span[1] - max(span[0], end))
        end = max(end, span[1])
    return total / 1e6


def _longest(events: Iterable[Any], *, cuda: bool, of: float) -> list[tuple[str, float]]:
    """The ten kernels (on a CPU: operations) that take most, with their shares."""
    seconds: dict[str, float] = defaultdict(float)
    for event in _on_device(events) if cuda else events:
        took = event.time_range.end - event.time_range.start if cuda else event.self_cpu_time_total
        seconds[event.name[:80]] += took / 1e6
    return [(name, s / of) for name, s in sorted(seconds.items(), key=lambda item: -item[1])[:10]]
