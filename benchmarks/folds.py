"""What folds are worth: members chosen on out-of-fold predictions against as many plain models chosen on dev.

    python benchmarks/folds.py --task sst --root DIR --output DIR
    python benchmarks/folds.py --task quora --rows 3000 --root DIR --output DIR
    python benchmarks/folds.py --task sst --boosting --root DIR --output DIR

Twelve members (three ranks, four seeds) of five folds, sixty plain ones (three ranks, twenty seeds), which take as
long, and the first twelve of these; each trained until it stops improving. Whoever is chosen on dev is chosen on a half
of it, epochs included, and judged on the other half, many times; what is chosen out of fold is judged on the same
halves. With ``--boosting``: four rounds of boosting, four bags and four seeds of one setting, with five folds each.
Test predictions are in the pools. Begun again with the same DIR, it goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from lora_ensemble.dicor.choose.combine import Choice, decide, probabilities
from lora_ensemble.dicor.choose.methods import Method
from lora_ensemble.dicor.choose.settings import DEFAULT_METHOD, MethodName
from lora_ensemble.dicor.estimate.honest import estimate
from lora_ensemble.dicor.members import Dev, Members
from lora_ensemble.dicor.options import Options, method_of
from lora_ensemble.main import main as lora_ensemble
from lora_ensemble.pool import TaskPool
from lora_ensemble.scores import score
from lora_ensemble.tasks import PRESETS

SETTING = "lr: 1e-3, layers: top-2, patience: 2"
FOLDS, SEEDS = 5, 4
DRAWS = 100


def members(ranks: Sequence[int], seeds: int, more: str = "") -> str:
    return f"[{{rank: {list(ranks)}, seed: {list(range(1, seeds + 1))}, {SETTING}{more}}}]"


def prepare(task: str, rows: int | None, root: Path, output: Path) -> Path:
    """The folder of data: the task's, or its first ``rows`` training rows in an order that looks at nothing."""
    if rows is None:
        return root
    data, preset = output / "data", PRESETS[task]
    data.mkdir(parents=True, exist_ok=True)
    for name in (preset.dev, preset.test):
        shutil.copyfile(root / str(name), data / str(name))
    header, *lines = (root / str(preset.train)).read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    (data / str(preset.train)).write_text("".join([header, *lines[:rows]]), encoding="utf-8")
    return data


def train(verb: str, pool: Path, common: list[str], *more: str) -> None:
    """Train what is not finished, and have it predict test."""
    for command in (verb, "predict") if verb == "sweep" else (verb,):
        given = [word for word in more if command == verb or not word.startswith("--rounds")]
        if code := lora_ensemble([command, *common, f"--pool.dir={pool}", *given]):
            sys.exit(code)


class Pool:
    """A pool's members on dev, and on what they are chosen on."""

    def __init__(self, folder: Path, task: str, names: Callable[[str], bool] = lambda name: True) -> None:
        dev = TaskPool(folder, task, split="dev")
        self.records = [r for r in dev.members if names(r.name)]
        self.names, self.kind = [r.name for r in self.records], dev.kind
        self.dev, self.ids = [dev.logits(n) for n in self.names], dev.examples().ids
        self.labels: Any = dev.examples().labels
        folded = all(r.folds for r in self.records)
        on = TaskPool(folder, task, split="oof") if folded else dev
        examples, logits = on.examples(), [on.logits(n) for n in self.names]
        self.epochs: list[Any] = [np.asarray(on.epochs(n), np.float32) for n in self.names]
        self.chosen = self._choose(logits, self.epochs, examples.labels, examples.ids) if folded else None

    def _choose(self, logits: Any, epochs: Any, labels: Any, ids: Any) -> dict[str, tuple[Choice, list[str], Any]]:
        ranks = [r.rank for r in self.records]
        dev = Dev.of(logits, labels, kind=self.kind, names=self.names, ranks=ranks, ids=ids, epochs=epochs)
        names: list[MethodName] = ["best", "omni", "weighted", DEFAULT_METHOD[self.kind]]
        methods: dict[str, Method] = {n: method_of(n, self.kind, len(dev), Options())[0] for n in names}
        found = estimate(dev, methods).of
        return {n: (e.choice, e.names, e.honest and e.honest.value) for n, e in found.items()}

    def half(self, a: np.ndarray, b: np.ndarray) -> dict[str, tuple[float, float]]:
        """Method to its score on the rows ``b`` of dev, and to what was estimated without them."""
        chosen, said = self.chosen, [x[b] for x in self.dev]
        if chosen is None:
            at = [int(np.argmax([score(e[a], self.labels[a], self.kind) for e in x])) for x in self.epochs]
            logits = [x[e] for x, e in zip(self.epochs, at, strict=True)]
            chosen = self._choose([x[a] for x in logits], [x[:, a] for x in self.epochs], self.labels[a], self.ids[a])
            said = [x[b] for x in logits]
        found: dict[str, tuple[float, float]] = {}
        for name, (choice, names, honest) in chosen.items():
            decided = decide(self.members(said, names), choice)
            found[name] = float(np.mean(decided == self.labels[b])), float(honest or np.nan)
        return found

    def members(self, said: Sequence[np.ndarray], names: Sequence[str]) -> Members:
        which = [self.names.index(n) for n in names]
        ranks, scores = [self.records[i].rank for i in which], np.array([self.records[i].score for i in which])
        return Members(np.stack([said[i] for i in which]), self.kind, list(names), ranks, scores)


def table(pools: dict[str, Pool]) -> None:
    """Scores on halves of dev that no choice saw, and what was expected of them."""
    n = len(next(iter(pools.values())).labels)
    draws: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(n)
        for name, pool in pools.items():
            for method, found in pool.half(order[: n // 2], order[n // 2 :]).items():
                draws.setdefault((name, method), []).append(found)
    first = next(iter(pools))
    print("| members | method | score where no choice looked | expected of it | the first row's, less |")
    print("| --- | --- | ---: | ---: | --- |")
    for (name, method), of_draws in draws.items():
        said, expected = np.array(of_draws).T
        gap = np.array(draws[first, method])[:, 0] - said
        more = "" if name == first else f"{gap.mean():+.4f} (ahead in {np.mean(gap > 0):.0%} of {DRAWS} halves)"
        print(f"| {name} | {method} | {said.mean():.4f} | {np.nanmean(expected):.4f} | {more} |", flush=True)


def calibration(pool: Pool) -> None:
    """Whether scale and offsets that were fitted out of fold, to single models, suit the means of five on dev."""
    assert pool.chosen is not None
    print("| chosen out of fold | log-loss on dev | scaled by | log-loss then |\n| --- | ---: | ---: | ---: |")
    rows = np.arange(len(pool.labels))
    for method in dict.fromkeys(["omni", "weighted", DEFAULT_METHOD[pool.kind]]):
        choice, names, _ = pool.chosen[method]
        p = probabilities(pool.members(pool.dev, names).logits, choice, kind=pool.kind)
        logs = np.log(np.maximum(p, 1e-12))

        def loss(scale: float, logs: np.ndarray = logs) -> float:
            z = scale * logs
            z = z - np.log(np.exp(z).sum(1, keepdims=True))
            return float(-z[rows, pool.labels].mean())

        best = minimize_scalar(loss, bounds=(0.2, 5), method="bounded")
        print(f"| {method} | {loss(1.0):.4f} | {best.x:.3f} | {best.fun:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=("sst", "quora"), default="sst")
    parser.add_argument("--rows", type=int, help="training rows (default: all)")
    parser.add_argument("--root", type=Path, required=True, help="folder of the course's data")
    parser.add_argument("--output", type=Path, required=True, help="folder of pools and runs")
    parser.add_argument("--boosting", action="store_true", help="compare boosting, bags and seeds instead")
    parser.add_argument("--precision", default="32-true", help="the Trainer's (default: 32-true)")
    parser.add_argument("--train", nargs="+", help="only train these pools: folded, plain, bags, boosted")
    given = parser.parse_args()
    root = prepare(given.task, given.rows, given.root, given.output)
    common = [
        *(f"--data.root={root}", f"--data.tasks={json.dumps([given.task])}", "--data.batch_size=16"),
        *(f"--trainer.default_root_dir={given.output}", "--trainer.max_epochs=20", "--trainer.val_check_interval=0.5"),
        *("--trainer.logger=false", "--trainer.enable_progress_bar=false", f"--trainer.precision={given.precision}"),
    ]
    folds = f"--data.folds={FOLDS}"
    trained = {
        "folded": ("sweep", folds, f"--model.members={members([4, 8, 16], SEEDS)}"),
        "plain": ("sweep", f"--model.members={members([4, 8, 16], FOLDS * SEEDS)}"),
        "bags": ("sweep", folds, f"--model.members={members([8], SEEDS, ', bag: true')}"),
        "boosted": ("boost", folds, f"--model.members={members([8], 1)}", f"--rounds={SEEDS}"),
    }
    wanted = ["folded", *(["bags", "boosted"] if given.boosting else ["plain"])]
    for name in given.train or wanted:
        verb, *more = trained[name]
        train(verb, given.output / name, common, *more)
    pools = {name: Pool(given.output / name, given.task) for name in ([] if given.train else wanted)}
    if given.boosting and pools:
        folded = Pool(given.output / "folded", given.task, lambda name: name.startswith("r8-"))
        table({f"{SEEDS} seeds": folded, f"{SEEDS} bags": pools["bags"], f"{SEEDS} rounds": pools["boosted"]})
    elif pools:
        first = [f"-s{seed}-" for seed in range(1, SEEDS + 1)]
        few = Pool(given.output / "plain", given.task, lambda name: any(seed in f"{name}-" for seed in first))
        m = len(few.names)
        table({f"{m} of {FOLDS} folds": pools["folded"], f"{m * FOLDS} plain": pools["plain"], f"{m} plain": few})
        print()
        calibration(pools["folded"])


if __name__ == "__main__":
    main()
