"""Which precision a device computes fast."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch


def computes_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 matrices itself.

    ``device``: its type: cpu, cuda, ... False where nobody knows. On a CPU that does not, torch does it in software:
    many times slower than float32 (seen on an AMD EPYC with AVX2 and no AVX-512).
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    has: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    # ARM's instructions are of use only with the library that torch has on Linux.
    names = ["amx_bf16", "avx512_bf16", "avx10_2", *(["bf16"] if sys.platform == "linux" else [])]
    return any(has.get(name) for name in names)


def fast_precision(device: str) -> str:
    """The Trainer's precision that trains fastest: bf16-mixed where the device multiplies bf16, else 32-true."""
    return "bf16-mixed" if computes_bf16(device) else "32-true"


def advice(precision: object, device: str, *, instead: str) -> str | None:
    """What to tell a user who asked for bf16 on a device where it is slow; ``instead``: the option that is not."""
    if not str(precision).startswith("bf16") or computes_bf16(device):
        return None
    return f"note: {device} has no bf16 of its own here, so this is many times slower than float32; use {instead}"
