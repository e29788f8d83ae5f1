"""The parts in their order: what each runs, its share of the time, and the code that its figures depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One process: a function of a part's module, by name, so that the parent need not import it."""

    name: str
    function: str
    """``module.function`` in this package; it takes a :class:`setting.Setting` and the arguments."""
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A table of the page."""

    name: str
    title: str
    minutes: float
    """Its share; what it leaves goes to those after it."""
    rows: list[Row]
    code: list[str]
    """Files whose change makes its figures old."""


_OWN = "benchmarks/gpu/"
_SIDES = [_OWN + "setting.py", *(f"benchmarks/{name}.py" for name in ("machine", "sides", "workload"))]
_BANK = [
    f"lora_ensemble/bank/{n}.py"
    for n in ("attention", "dropout", "encode", "families", "heads", "lora", "model", "optim")
]
_TRAIN = [f"lora_ensemble/train/{n}.py" for n in ("evaluation", "frozen", "module")]
_STEP = [*_BANK, "lora_ensemble/text/packing.py", *_TRAIN]
_BATCHES = ["lora_ensemble/train/batches.py", "lora_ensemble/train/data.py"]


def parts(*, tiny: bool) -> list[Part]:
    """In the order in which each is worth having if those after it are cut off."""
    # The size that the target is about first.
    sizes = [2, 1, 3] if tiny else [64, 1, 8, 32, 128]
    many = 2 if tiny else 64
    return [
        Part(
            name="exact",
            title="Exactness",
            minutes=2,
            rows=[Row(name=f, function=f"exact.{f}") for f in ("bank_alone", "against_peft", "isolation", "answers")],
            code=[
                _OWN + "exact.py",
                *_SIDES,
                "benchmarks/one_pass.py",
                *_STEP,
                *_BATCHES,
                "lora_ensemble/ensemble/restored.py",
            ],
        ),
        Part(
            name="speed",
            title="Speed",
            minutes=2.5,
            rows=[
                Row(name="matrix peak", function="speed.peak"),
                Row(name="PEFT + Trainer", function="speed.peft"),
                *(Row(name=f"bank of {m}", function="speed.bank", arguments=(m,)) for m in sizes),
            ],
            code=[_OWN + "speed.py", *_SIDES, *_STEP, *_BATCHES],
        ),
        Part(
            name="memory",
            title="Memory",
            minutes=1.25,
            rows=[Row(name=f, function=f"taken.{f}") for f in ("foretold", "planned", "failure")],
            code=[
                _OWN + "taken.py",
                *_SIDES,
                *_STEP,
                *_BATCHES,
                *(f"lora_ensemble/train/runs/{n}.py" for n in ("banks", "memory", "plan", "probe", "subset")),
                "lora_ensemble/train/restart.py",
            ],
        ),
        Part(
            name="grid",
            title="Tolkunov's SST grid",
            minutes=2.5,
            rows=[Row(name="grid", function="grid.grid")],
            code=[_OWN + "grid.py", *_SIDES, *_STEP, *_BATCHES, "configs/tolkunov/sst.yaml"],
        ),
        Part(
            name="profile",
            title="Where the time goes",
            minutes=0.75,
            rows=[Row(name=f"bank of {many}", function="where.profiled", arguments=(many,))],
            code=[_OWN + "where.py", *_SIDES, *_STEP, *_BATCHES],
        ),
    ]
