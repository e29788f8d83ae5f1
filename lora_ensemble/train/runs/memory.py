"""How much memory a device has free, how much a piece of work takes, and how many members that lets into a bank.

No lightning. Axes: M members, B examples in a batch, L tokens, H hidden width, P trained numbers per member.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The rest is for fragments that no allocation fits into, and for what the probe does not see. More of it on the host,
# where other programs live too.
_USABLE = {"cuda": 0.9, "cpu": 0.75}
_UNLIMITED = 2**60


@dataclass(frozen=True)
class Need:
    """Bytes that a bank takes: ``shared`` + M · ``each``."""

    shared: float
    each: float

    @classmethod
    def through(cls, points: Sequence[tuple[int, int]]) -> Need:
        """The line through two measurements (M, bytes)."""
        (m, a), (n, b) = points
        each = max((b - a) / (n - m), 0.0)
        return cls(max(a - m * each, 0.0), each)

    def of(self, members: int) -> float:
        """Bytes for a bank of so many."""
        return self.shared + members * self.each

    def fits(self, free: float) -> int:
        """How many members fit into ``free`` bytes."""
        return max(int((free - self.shared) / self.each), 0) if self.each else _UNLIMITED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    known = ("DefaultCPUAllocator", "not enough memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in known)
    )


def measurable(device: torch.device) -> bool:
    """Whether memory can be measured on this kind of device; a host's not on Windows, which lacks ``os.sysconf``."""
    return device.type in _USABLE and (device.type != "cpu" or hasattr(os, "sysconf"))


def usable_memory(device: torch.device) -> int:
    """Bytes that a bank may take: a safe share of what is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps in reserve and nobody uses is free as well.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = free_host_memory()
    return int(free * _USABLE[device.type])


def free_host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still get: the least of the machine's, its control groups' and its own limit's."""
    import resource  # Unix alone has it

    limits = [_UNLIMITED]
    if (proc / "meminfo").is_file():
        limits.append(1024 * _field(proc / "meminfo", "MemAvailable"))
    else:  # not Linux
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    groups = proc / "self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += _group_limits(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            limits += _group_limits(cgroups / "memory", path, *names)
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    if own != resource.RLIM_INFINITY and (proc / "self/status").is_file():
        limits.append(own - 1024 * _field(proc / "self/status", "VmSize"))
    return max(min(limits), 0)


def _group_limits(root: Path, path: str, limit: str, usage: str, cache: str) -> list[int]:
    """What a control group and those above it leave; in a container the path may be the host's, the root ours."""
    limits, group = [], root / path.lstrip("/")
    for folder in [group, *group.parents]:
        try:
            # The page cache counts as used, and is given back when it is wanted.
            most, cached = (folder / limit).read_text().strip(), _field(folder / "memory.stat", cache)
            limits += [] if most == "max" else [int(most) - int((folder / usage).read_text()) + cached]
        except (OSError, ValueError, StopIteration):
            continue
    return limits


def _field(file: Path, name: str) -> int:
    """The number beside ``name``; ``StopIteration`` where there is none."""
    lines = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return next(int(words[1]) for words in lines if len(words) > 1 and words[0] == name)


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """The most that torch held at once while ``work`` ran, above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Not the resident size: it keeps what was freed, so a second measurement in one process would see nothing.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events: Any = profile.profiler
    now = peak = 0
    memory = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(memory, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def cautious_need(
    config: Any, *, width: int, tokens: int, longest: int, number: int = 4, dropout: bool = False
) -> Need:
    """More than a member takes in training, from shapes alone.

    ``config``: the encoder's; ``width``: P; ``tokens``: B·L of the largest step, padding counted; ``longest``: L;
    ``number``: bytes of a number. ``dropout``: whether a member has LoRA's.
    """
    h = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * h
    # What autograd keeps of a layer for a token, generously: DeBERTa's positions and adapters on every layer included.
    per_token = 14 * h + 3 * inner + 12 * config.num_attention_heads * longest
    # A mask, and what it leaves, before each adapter of a layer: five of width H, one of the inner width.
    per_token += 2 * (5 * h + inner) if dropout else 0
    # Weights, gradient, two moments, two temporaries of a step and two of the backward pass.
    state = 8 * width
    layers = config.num_hidden_layers + 1  # the embeddings, as one more
    return Need(0.0, float(number * (state + tokens * layers * per_token)))
