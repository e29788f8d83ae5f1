"""dicor's methods beside other libraries' on a pool of real members: how good is what they choose, on other examples?

    python benchmarks/selection.py --pool DIR                     # a pool whose members kept the logits of every epoch
    python benchmarks/selection.py --pool DIR --task sst --draws 50

A draw is a random pool, a random split and a seed: half of the members or more, one time in three without the best so
many of them; half or two thirds of the dev examples, stratified, to choose on, where each member's epoch is chosen too;
what is left is scored. All methods see the same draws, so that differences are paired. Printed for each:

    in-sample   the mean score on the examples that were chosen on
    honest      dicor's honest estimate from those alone (our methods; ``--repeats`` repeats of its three folds)
    held out    the mean score on the examples that were not
    to best, to Omni    the mean difference of the held-out scores to the single best member and to the mean of all; ±
                its standard error, that of other examples (each example's mean over the draws is one number) and of
                other draws together; how many draws it won, tied and lost

Members, and the data that they were trained on, are the same in all draws: nothing here speaks for other members.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_ensemble.dicor.choose.combine import decide
from lora_ensemble.dicor.choose.criteria import Sums
from lora_ensemble.dicor.choose.methods import Greedy, Method
from lora_ensemble.dicor.compare import dev_of
from lora_ensemble.dicor.estimate.fold_scores import fold_scores
from lora_ensemble.dicor.estimate.honest import estimate
from lora_ensemble.dicor.estimate.interval import influence
from lora_ensemble.dicor.estimate.splits import stratified_folds
from lora_ensemble.dicor.members import Dev, Members
from lora_ensemble.dicor.options import METHODS, Options, method_of
from lora_ensemble.pool import TaskPool, task_names
from lora_ensemble.scores import scored
from lora_ensemble.tasks import Kind
from peers import autogluon, peers


@dataclass
class Draw:
    """What one pool and one split are."""

    dev: Dev
    """The members drawn, on the examples to choose on, each at the epoch that is best there."""
    held: np.ndarray
    """(M, N', C): the same members at the same epochs on the examples that are left."""
    rows: np.ndarray
    """(N',): which of all dev examples these are."""
    labels: np.ndarray
    """(N',)"""


def draw(dev: Dev, number: int) -> Draw:
    """The ``number``-th draw from a pool's members."""
    rng = np.random.default_rng(number)
    folds = int(rng.integers(2, 4))  # half of the examples are held out, or a third
    # Other texts are dealt out otherwise, so each draw has a split of its own.
    fold = stratified_folds([f"{number} {i}" for i in dev.ids], dev.labels, dev.kind, folds=folds, repeats=1)
    found = fold_scores(dev, fold, folds, omni="mean")
    out = fold[0] == 0
    scores, epochs = found.scores[0], found.epochs[0]
    ranked = np.argsort(-scores, kind="stable")
    # The best are those on the choosing part: what is held out has no say in anything.
    dropped = int(rng.integers(1, max(len(dev) // 4, 1) + 1)) if rng.random() < 1 / 3 else 0
    left = ranked[dropped:]
    size = int(rng.integers(min(max(len(dev) // 2, 2), len(left)), len(left) + 1))
    chosen = np.sort(rng.choice(left, size, replace=False))

    def at_epoch(m: int) -> np.ndarray:
        each = dev.epochs_of(m)
        return np.asarray(dev.logits_of(m) if each is None else each[epochs[m]], np.float32)

    logits = np.stack([at_epoch(m) for m in chosen])
    kept = [dev.epochs_of(m) for m in chosen]
    part = Dev.of(
        logits[:, ~out],
        dev.labels[~out],
        kind=dev.kind,
        names=[dev.names[m] for m in chosen],
        ranks=[dev.ranks[m] for m in chosen],
        ids=dev.ids[~out],
        epochs=[None if e is None else np.asarray(e)[:, ~out] for e in kept],
        fingerprints=[dev.names[m] for m in chosen],
    )
    # Dev.of sorts members by name; the pool's are sorted already, so the order is the same.
    assert part.names == [dev.names[m] for m in chosen]
    return Draw(dev=part, held=logits[:, out], rows=np.flatnonzero(out), labels=dev.labels[out])


def ours(kind: Kind, members: int) -> dict[str, Method]:
    """All of dicor's methods, with their defaults."""
    return {name: method_of(name, kind, members, Options())[0] for name in METHODS}


@dataclass
class Seen:
    """What was seen of one contestant in all draws."""

    in_sample: list[float] = field(default_factory=list)
    honest: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    total: np.ndarray | None = None
    """(N,): the sum over draws of what each held-out example adds to the score: right or wrong, or its influence."""


class Contest:
    """All draws of one task."""

    def __init__(self, task_pool: TaskPool, repeats: int) -> None:
        self.dev, self.kind = dev_of(task_pool), task_pool.kind
        self.repeats = repeats
        self.of: dict[str, Seen] = defaultdict(Seen)
        self.counts = np.zeros(len(self.dev.labels))
        self.same: dict[str, list[tuple[bool, float]]] = defaultdict(list)
        self.peers = peers(self.kind, own_metric=False)

    def run(self, number: int) -> None:
        """One draw."""
        one = draw(self.dev, number)
        self.counts[one.rows] += 1
        n = len(one.dev)
        methods = ours(self.kind, n)
        found = estimate(one.dev, methods, repeats=self.repeats)
        place = {name: i for i, name in enumerate(one.dev.names)}
        for name, of in found.of.items():
            members = [place[x] for x in of.names]
            chosen = Members(
                logits=one.held[members],
                kind=self.kind,
                names=of.names,
                ranks=[one.dev.ranks[m] for m in members],
                scores=np.array([found.scores[x] for x in of.names]),
            )
            self._note(name, decide(chosen, of.choice), one, of.in_sample)
            if of.honest is not None:
                self.of[name].honest.append(of.honest.value)
        whole = np.stack([one.dev.logits_of(m) for m in range(n)])
        for name, fit in self.peers.items():
            decides = fit(whole, one.dev.labels, self.kind)
            self._note(name, decides(one.held), one, float(scored(decides(whole), one.dev.labels, self.kind)))
        if "AutoGluon, by loss" in self.peers:
            self._compare_greedy(one, found.scores)

    def _note(self, name: str, decided: np.ndarray, one: Draw, in_sample: float) -> None:
        seen = self.of[name]
        seen.in_sample.append(in_sample)
        seen.held.append(float(scored(decided, one.labels, self.kind)))
        if seen.total is None:
            seen.total = np.zeros(len(self.counts))
        adds = influence(decided, one.labels) if self.kind == "regression" else (decided == one.labels).astype(float)
        seen.total[one.rows] += adds

    def _compare_greedy(self, one: Draw, scores: dict[str, float]) -> None:
        """Whether AutoGluon chooses what ours does, from the same members in the same order."""
        each = np.array([scores[name] for name in one.dev.names])
        members = one.dev.top(each, len(one.dev))
        for by in ("loss", "score"):
            # With its own metrics the first few times: the formulas in numpy must not be what makes them agree.
            own = len(self.same[by]) < 3
            theirs = autogluon(members.logits, members.labels, self.kind, by=by, first=True, own_metric=own)
            method = Greedy(top_k=len(members), criterion="loss" if by == "loss" else "score")
            choice = method.choose(members)
            assert choice.weights is not None
            weights = np.zeros(len(members))
            weights[choice.members] = choice.weights
            sums = Sums(members, "loss" if by == "loss" else "score")

            def worth(w: np.ndarray, sums: Sums = sums) -> float:
                return float(sums.value(np.tensordot(w, sums.each, axes=1), 1))

            self.same[by].append((bool(np.allclose(weights, theirs.weights_)), worth(weights) - worth(theirs.weights_)))

    def difference(self, a: str, b: str) -> tuple[float, float, tuple[int, int, int]]:
        """Mean of a's held-out scores less b's, its standard error, and draws won, tied and lost."""
        gains = np.array(self.of[a].held) - np.array(self.of[b].held)
        one, other = self.of[a].total, self.of[b].total
        assert one is not None
        assert other is not None
        seen = self.counts > 0
        each = (one - other)[seen] / self.counts[seen]
        error = float(np.hypot(each.std() / np.sqrt(seen.sum()), gains.std() / np.sqrt(len(gains))))
        close = np.abs(gains) < 1e-9
        counts = (int((gains[~close] > 0).sum()), int(close.sum()), int((gains[~close] < 0).sum()))
        return float(gains.mean()), error, counts

    def table(self) -> str:
        """Markdown."""
        lines = [
            "| method | in-sample | honest | held out | to best | won-tied-lost | to Omni | won-tied-lost |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, seen in self.of.items():
            honest = f"{np.mean(seen.honest):.4f}" if seen.honest else ""
            cells = []
            for other in ("best", "omni"):
                value, error, (won, tied, lost) = self.difference(name, other)
                cells += ["", ""] if name == other else [f"{value:+.4f} ± {error:.4f}", f"{won}-{tied}-{lost}"]
            lines.append(
                f"| {name} | {np.mean(seen.in_sample):.4f} | {honest} | {np.mean(seen.held):.4f} "
                f"| {' | '.join(cells)} |"
            )
        return "\n".join(lines)

    def matrix(self) -> str:
        """Markdown: each method less each other, in thousandths; a star where it is more than 1.645 errors from 0."""
        names = list(self.of)
        lines = [
            "| row less column, ×1000 | " + " | ".join(str(i + 1) for i in range(len(names))) + " |",
            "| --- |" + " --- |" * len(names),
        ]
        for i, a in enumerate(names):
            cells = []
            for b in names:
                value, error, _ = self.difference(a, b)
                cells.append("" if a == b else f"{1000 * value:+.1f}{'*' if abs(value) > 1.645 * error else ''}")
            lines.append(f"| {i + 1} {a} | {' | '.join(cells)} |")
        return "\n".join(lines)


def main() -> None:
    """Draw, choose, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--task", action="append", help="default: all tasks of the pool; may be repeated")
    parser.add_argument("--draws", type=int, default=200, help="of each task (default: 200)")
    parser.add_argument("--repeats", type=int, default=1, help="of the honest estimate's folds (default: 1)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    record = {}
    for task in options.task or task_names(options.pool):
        start = time.perf_counter()
        task_pool = TaskPool(options.pool, task)
        contest = Contest(task_pool, options.repeats)
        for number in range(options.draws):
            contest.run(number)
        pool = f"{len(contest.dev)} members and {len(contest.dev.labels)} dev examples"
        seconds = time.perf_counter() - start
        print(f"\n{task}: {options.draws} draws from {pool} ({seconds:.0f} s)\n\n{contest.table()}\n")
        for by, same in contest.same.items():
            differ = [gain for equal, gain in same if not equal]
            agree = f"AutoGluon's choice and weights are ours in {len(same) - len(differ)} of {len(same)} draws"
            rest = f"; else ours less AutoGluon's: {min(differ):+.1e} to {max(differ):+.1e}" if differ else ""
            print(f"greedy by {by}: {agree}{rest}")
        print(f"\n{contest.matrix()}", flush=True)
        record[task] = {
            name: {"in_sample": s.in_sample, "honest": s.honest, "held_out": s.held} for name, s in contest.of.items()
        }
    if options.json:
        options.json.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
