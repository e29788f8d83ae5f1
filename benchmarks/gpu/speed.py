"""BERT-base's shape in bf16: PEFT in the HF Trainer, and banks, as ``bank.py`` measures them; one repeat."""

from __future__ import annotations

from typing import Any

from gpu.setting import Setting
from machine import peak_flops
from sides import Run, run_bank, run_peft_trainer
from workload import Workload, useful_flops


def work_of(setting: Setting) -> Workload:
    """What all sides train."""
    return setting.workload("random:bert-base", steps=setting.size(100, 3), warmup=setting.size(20, 1))


def peak(setting: Setting) -> dict[str, Any]:
    """FLOP/s of the fastest matrix product."""
    return {"flops": peak_flops(setting.device, "bf16", setting.threads)}


def peft(setting: Setting) -> dict[str, Any]:
    """One member by PEFT and the HF Trainer; all members cost the same there."""
    work = work_of(setting)
    return _row(work, 1, run_peft_trainer(work, work.members(1)[0]))


def bank(setting: Setting, members: int) -> dict[str, Any]:
    """A bank of so many."""
    work = work_of(setting)
    return _row(work, members, run_bank(work, work.members(members)))


def _row(work: Workload, members: int, run: Run) -> dict[str, Any]:
    lengths = work.timed_lengths()
    return {
        "members": members,
        "seconds": run.seconds,
        "steps": work.steps,
        "peak_bytes": run.peak_bytes,
        "tokens": int(lengths.sum()),
        "useful_flops": sum(useful_flops(work, lengths)),  # of one member
    }
