"""How strongly ``weighted`` is drawn to equal weights, and ``weighted-offset`` to no offsets, and what else would do.

    python benchmarks/penalties.py                  # 100 dev sets of each world: about ten minutes on one core
    python benchmarks/penalties.py --sets 20 --worlds "ten classes, 100"

The worlds are those of ``honest.py`` and the like, where every ensemble's true score is known: with members of more
uneven strength, with few examples for each class, and with members that all lean to one class (``LEAN`` is added to its
logit). Printed, each with its standard error over the dev sets:

    true score of ``weighted`` with ``SHRINK``, and by how much other values of ``SHRINK`` are above it
    by how much offsets are above it, for values of ``PULL``
    the honest estimate less the true score, of ``weighted`` and with offsets

The standard errors are of other dev sets of the same world; all methods see the same ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from honest import WORLDS, Truth, World
from lora_ensemble.dicor.choose.combine import Choice, vector_scaled
from lora_ensemble.dicor.choose.methods import Weighted
from lora_ensemble.dicor.choose.probabilities import soft_votes
from lora_ensemble.dicor.choose.weights import PULL, SHRINK, convex_weights, scale_and_offsets
from lora_ensemble.dicor.estimate.honest import estimate
from lora_ensemble.dicor.members import Members
from lora_ensemble.scores import decisions, scored

LEAN = 0.6
SHRINKS = (0.1, SHRINK, 3.0, 10.0)
PULLS = (1.0, 5.0, PULL, 30.0)


@dataclass(frozen=True)
class Leaning(World):
    """A world whose members all lean to the last class."""

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """As ``World``."""
        logits, labels = super().draw(rng, n)
        logits[..., -1] += LEAN
        return logits, labels


_FIVE = replace(WORLDS["multiclass"], classes=5)
CASES: dict[str, World] = {
    **{name: WORLDS[name] for name in ("binary", "multiclass", "regression")},
    **{f"{name}, uneven": replace(WORLDS[name], spread=0.6) for name in ("binary", "multiclass", "regression")},
    "five classes, 100": replace(_FIVE, n=100),
    "five classes, 600": replace(_FIVE, n=600),
    "ten classes, 100": replace(_FIVE, n=100, classes=10),
    "two classes, 200, lean": Leaning("binary", 200, 30, strength=0.8),
    "five classes, 100, lean": Leaning("multiclass", 100, 30, classes=5),
    "five classes, 600, lean": Leaning("multiclass", 600, 30, classes=5),
}


@dataclass(kw_only=True)
class Drawn(Weighted):
    """``Weighted`` with other penalties; ``pull`` None: without offsets."""

    shrink: float = SHRINK
    pull: float | None = None

    def _choose(self, members: Members) -> Choice:
        weights = convex_weights(members, shrink=self.shrink)
        scale, offsets = 1.0, None
        if self.pull is not None:
            mean = np.tensordot(weights, members.soft_votes, axes=1)
            scale, offsets = scale_and_offsets(mean, members.labels, members.kind, pull=self.pull)
        return Choice(
            members=list(range(len(members))), strategy="weighted", weights=weights, scale=scale, offsets=offsets
        )


def simulate(world: World, *, sets: int, truth: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True scores and honest estimates (sets, methods): ``SHRINKS``, then, for classifiers, ``PULLS``."""
    methods = {f"shrink {x:g}": Drawn(shrink=x) for x in SHRINKS}
    if world.kind != "regression":
        methods |= {f"pull {x:g}": Drawn(pull=x) for x in PULLS}
    rng = np.random.default_rng(seed)
    known = Truth(world, rng, truth)
    said = soft_votes(known.logits[:, 0], world.kind)
    true, honest = np.empty((2, sets, len(methods)))
    for i in range(sets):
        dev, _ = known.drawn(rng, world.n)
        found = estimate(dev, methods, repeats=1).of
        for j, name in enumerate(methods):
            one = found[name]
            assert one.honest is not None
            assert one.choice.weights is not None
            mean = np.tensordot(one.choice.weights, said[[int(name) for name in one.names]], axes=1)
            if one.choice.offsets is not None:
                mean = vector_scaled(mean, world.kind, one.choice.scale, one.choice.offsets)
            true[i, j] = scored(decisions(mean, world.kind), known.labels, world.kind)
            honest[i, j] = one.honest.value
    return true, honest


def _mean(values: np.ndarray) -> str:
    """Of numbers (sets,), with its standard error."""
    return f"{values.mean():+.4f} ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100, help="dev sets of each world (default: 100)")
    parser.add_argument("--truth", type=int, default=20_000, help="examples that there are (default: 20000)")
    parser.add_argument("--worlds", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    own, drawn = SHRINKS.index(SHRINK), len(SHRINKS) + PULLS.index(PULL)
    shrinks: list[list[str]] = []
    pulls: list[list[str]] = []
    estimates: list[list[str]] = []
    for name in options.worlds:
        start = time.perf_counter()
        true, honest = simulate(CASES[name], sets=options.sets, truth=options.truth)
        base = f"{true[:, own].mean():.4f}"
        above = [_mean(true[:, j] - true[:, own]) for j in range(true.shape[1])]
        shrinks.append([name, base, *(above[j] for j in range(len(SHRINKS)) if j != own)])
        off = [_mean(honest[:, j] - true[:, j]) for j in (own, len(SHRINKS), drawn) if j < true.shape[1]]
        if len(above) > len(SHRINKS):
            pulls.append([name, base, *above[len(SHRINKS) :]])
            estimates.append([name, *off])
        print(f"  {name}: {time.perf_counter() - start:.0f} s", flush=True)
    weighted = f"`weighted`, `SHRINK` {SHRINK:g}"
    print("\n" + _table(["world", weighted, *(f"{x:g}" for x in SHRINKS if x != SHRINK)], shrinks))
    print("\n" + _table(["world", weighted, *(f"offsets, `PULL` {x:g}" for x in PULLS)], pulls))
    said = ["world: honest - true", "`weighted`", f"offsets, `PULL` {PULLS[0]:g}", f"offsets, `PULL` {PULL:g}"]
    print("\n" + _table(said, estimates))


if __name__ == "__main__":
    main()
