"""Is the honest estimate honest? Many dev sets are drawn from a world where every ensemble's true score is known.

    python benchmarks/honest.py                     # 1,000 dev sets of each world: about ten minutes on one core
    python benchmarks/honest.py --sets 50 --worlds binary

Members say the truth plus noise of which a part is common to all, as with models trained on the same data. On each
dev set the methods choose, are scored in-sample, and are estimated as ``dicor`` does it. The true score of what was
chosen is that on all ``--truth`` examples there are, of which dev sets are samples. The same is done on dev sets of
the choosing part's size, (K - 1) / K of the dev set, which is what the estimate is of. Printed for each method:

    in-sample     the mean score on the dev set that was chosen on, less the true score: the optimism
    held out      the mean score on what was held out, less the true score of what is chosen at that part's size
    uncorrected   the mean score on what was held out, less the true score of what was chosen on the whole dev set
    honest        the mean honest estimate, which is corrected, less the same
    share         that bias as a share of the optimism
    cover         how often the interval holds the true score of what was chosen; and so for the differences
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from lora_ensemble.dicor.choose.combine import Choice, decide
from lora_ensemble.dicor.choose.methods import Best, Dicor, Greedy, Method, Weighted
from lora_ensemble.dicor.estimate.honest import estimate
from lora_ensemble.dicor.estimate.splits import FOLDS
from lora_ensemble.dicor.members import Dev, Members
from lora_ensemble.scores import decisions, score, scored
from lora_ensemble.tasks import Kind


@dataclass(frozen=True)
class World:
    """Where examples come from: n examples in a dev set, each seen by ``members`` members at ``epochs`` epochs."""

    kind: Kind
    n: int
    members: int
    epochs: int = 1
    classes: int = 4
    spread: float = 0.15
    """How much the members' strengths differ, from 1 - spread to 1 + spread."""
    strength: float = 1.0
    common: float = 0.5
    """The part of the noise's variance that is common to all members."""
    own: float = 0.5
    """The part of the rest that is a member's own, the same at all its epochs."""

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits (M, E, N, C) float32 and labels (N,)."""
        m, e, c = self.members, self.epochs, self.classes if self.kind == "multiclass" else 1
        labels: np.ndarray
        known: np.ndarray
        if self.kind == "regression":
            labels = rng.normal(size=n)
            known = labels[:, None]
        else:
            labels = rng.integers(c if self.kind == "multiclass" else 2, size=n)
            known = np.eye(c)[labels] if self.kind == "multiclass" else labels[:, None] * 2.0 - 1
        strength = self.strength * np.linspace(1 + self.spread, 1 - self.spread, m)[:, None, None, None]
        noise = np.sqrt(self.common) * rng.normal(size=(1, 1, n, c))
        rest: np.ndarray | float = np.sqrt(self.own) * rng.normal(size=(m, 1, n, c)) if e > 1 else 0.0
        rest = rest + np.sqrt(1 - self.own if e > 1 else 1.0) * rng.normal(size=(m, e, n, c))
        return (known * strength + noise + np.sqrt(1 - self.common) * rest).astype(np.float32), labels


WORLDS = {
    "binary": World("binary", 400, 30, strength=0.8),
    "multiclass": World("multiclass", 400, 30, strength=1.0),
    "regression": World("regression", 300, 30, strength=1.2),
    "epochs": World("binary", 300, 12, epochs=6, strength=0.8, spread=0.1),
}


def methods(world: World) -> dict[str, Method]:
    """Cheap ones, of each way to choose: by score, by similarity, by a search that ties and by one that does not."""
    return {
        "best": Best(),
        "dicor": Dicor(size=4, top_k=15, similarity="pearson", strategy="mean"),
        "greedy by score": Greedy(steps=10, criterion="score"),
        "greedy by loss": Greedy(steps=10, criterion="loss"),
        "weighted": Weighted(),
        "weighted-offset": Weighted(offset=True),
    }


class Truth:
    """All examples that there are: dev sets are drawn from them, and a true score is that on all of them, exactly."""

    def __init__(self, world: World, rng: np.random.Generator, n: int) -> None:
        self.world = world
        self.logits, self.labels = world.draw(rng, n)

    def drawn(self, rng: np.random.Generator, n: int) -> tuple[Dev, dict[str, int]]:
        """A dev set of n examples, and the epoch that was best on it for each member."""
        rows = rng.choice(len(self.labels), n, replace=False)
        logits, labels = self.logits[:, :, rows], self.labels[rows]
        names = [f"{m:02d}" for m in range(self.world.members)]
        best = [int(np.argmax([score(one, labels, self.world.kind) for one in each])) for each in logits]
        dev = Dev.of(
            np.stack([logits[m, e] for m, e in enumerate(best)]),
            labels,
            kind=self.world.kind,
            names=names,
            epochs=list(logits) if self.world.epochs > 1 else None,
            fingerprints=names,
        )
        return dev, dict(zip(names, best, strict=True))

    def of(self, choice: Choice, names: list[str], epochs: dict[str, int]) -> float:
        """The score of these members, in the order of choice, each at its epoch."""
        logits = np.stack([self.logits[int(name), epochs[name]] for name in names])
        none: list[int | None] = [None] * len(names)
        chosen = Members(logits, self.world.kind, names, none, np.zeros(len(names)))
        return float(scored(decide(chosen, choice), self.labels, self.world.kind))

    def of_all(self, epochs: dict[str, int]) -> float:
        """The score of the mean of all members."""
        total = sum(self.logits[int(name), e].astype(float) for name, e in epochs.items())
        return float(scored(decisions(np.asarray(total), self.world.kind), self.labels, self.world.kind))


def simulate(
    world: World, *, sets: int, truth: int, repeats: int | None, folds: int = FOLDS, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Method to the figures that are printed."""
    rng = np.random.default_rng(seed)
    known = Truth(world, rng, truth)
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(sets):
        dev, epochs = known.drawn(rng, world.n)
        found = estimate(dev, methods(world), folds=folds, repeats=repeats)
        part, part_epochs = known.drawn(rng, world.n - round(world.n / folds))
        chosen = estimate(part, methods(world), repeats=0)
        true = {name: known.of(one.choice, one.names, epochs) for name, one in found.of.items() if name != "omni"}
        true["omni"] = known.of_all(epochs)
        for name, one in found.of.items():
            assert one.honest is not None
            row = seen[name]
            row["optimism"].append(one.in_sample - true[name])
            row["true"].append(true[name])
            smaller = chosen.of[name]
            if name == "omni":
                row["at part"].append(known.of_all(part_epochs))
            else:
                row["at part"].append(known.of(smaller.choice, smaller.names, part_epochs))
            assert one.at_part is not None
            row["estimate"].append(one.at_part)
            row["pessimism"].append(one.honest.value - true[name])
            row["uncorrected"].append(one.at_part - true[name])
            row["width"].append(one.honest.high - one.honest.low)
            row["cover"].append(one.honest.low <= true[name] <= one.honest.high)
            for other, interval in (("best", one.against_best), ("omni", one.against_omni)):
                if interval is not None:
                    row[f"cover {other}"].append(interval.low <= true[name] - true[other] <= interval.high)
    figures = {}
    for name, row in seen.items():
        figures[name] = {key: float(np.mean(values)) for key, values in row.items()}
        figures[name]["bias"] = figures[name]["estimate"] - figures[name]["at part"]
        spread = np.hypot(np.std(row["estimate"]), np.std(row["at part"]))
        figures[name]["bias error"] = float(spread / np.sqrt(sets))
        figures[name]["pessimism error"] = float(np.std(row["pessimism"]) / np.sqrt(sets))
        figures[name]["optimism error"] = float(np.std(row["optimism"]) / np.sqrt(sets))
    return figures


def table(figures: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| method | true score | in-sample - true | held out - true at the part's size | held out - true "
        "| honest - true | share | cover | cover: to best | cover: to Omni |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures.items():
        share = f"{row['pessimism'] / row['optimism']:+.2f}" if row["optimism"] > 4 * row["optimism error"] else "-"
        covers = [f"{row[key]:.1%}" if key in row else "-" for key in ("cover", "cover best", "cover omni")]
        lines.append(
            f"| {name} | {row['true']:.4f} | {row['optimism']:+.4f} | {row['bias']:+.4f} ± {row['bias error']:.4f} "
            f"| {row['uncorrected']:+.4f} | {row['pessimism']:+.4f} ± {row['pessimism error']:.4f} | {share} "
            f"| {' | '.join(covers)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=1000, help="dev sets of each world (default: 1000)")
    parser.add_argument("--truth", type=int, default=20_000, help="examples that there are (default: 20000)")
    parser.add_argument("--repeats", type=int, help="repeats of the folds (default: what dicor takes)")
    parser.add_argument(
        "--folds", type=int, default=FOLDS, help="parts that dev is cut into (default: what dicor takes)"
    )
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    options = parser.parse_args()
    for name in options.worlds:
        start, world = time.perf_counter(), WORLDS[name]
        figures = simulate(world, sets=options.sets, truth=options.truth, repeats=options.repeats, folds=options.folds)
        print(
            f"\n{name}: {options.sets} dev sets of {world.n} examples, {world.members} members"
            f"{f' of {world.epochs} epochs' if world.epochs > 1 else ''} ({time.perf_counter() - start:.0f} s)\n"
        )
        print(table(figures), flush=True)


if __name__ == "__main__":
    main()
