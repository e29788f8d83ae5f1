"""One example in fifty is positive: what class weights and thresholds are worth, by F1 and MCC on a held-out test set.

    python benchmarks/imbalance.py --output DIR

Made-up sentences (``demo/sentiment.py``): very positive ones against all others, the merely positive among them. A few
members are trained until dev stops improving, once as they are and once with ``class_weights: balanced``, by average
precision (by F1, a member that says yes to nobody yet has gained nothing, and loses its patience). Then ensembles are
chosen by accuracy, which leaves the threshold where it is, and by F1 and MCC, which choose one. Begun again with the
same DIR, it goes on. scikit-learn says how good the decisions on test are.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import f1_score, matthews_corrcoef

from lora_ensemble.dicor import record
from lora_ensemble.dicor.apply import predict
from lora_ensemble.dicor.compare import compare
from lora_ensemble.dicor.options import Options
from lora_ensemble.main import main as lora_ensemble
from lora_ensemble.pool import TaskPool

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import sentiment

SIZES = {"train": 3000, "dev": 1500, "test": 6000}
RARE = 50  # one in so many
MEMBERS = "[{rank: [4, 8], scaling: [1, 3], lr: 1e-3, targets: all-linear, layers: top-third, patience: 3}]"


def write_data(folder: Path, seed: int) -> None:
    """``train.csv``, ``dev.csv`` and ``test.csv`` with the columns text and label; no text twice."""
    rng, seen = random.Random(seed), set[str]()
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in SIZES.items():
        wanted = {"1": n // RARE, "0": n - n // RARE}
        rows: list[tuple[str, str]] = []
        while len(rows) < n:
            (text,), level = sentiment.example(rng)
            label = "1" if level == "4" else "0"
            if wanted[label] and text not in seen:
                wanted[label] -= 1
                seen.add(text)
                rows.append((text, label))
        rng.shuffle(rows)
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows([("text", "label"), *rows])


def train(folder: Path, pool: Path, weights: str | None) -> None:
    """Fit members and have them predict test; what is finished is not done again."""
    files = {split: f"{split}.csv" for split in SIZES}
    task = {
        "name": "rare",
        "kind": "binary",
        "text": ["text"],
        "score": "average_precision",
        "class_weights": weights,
        **files,
    }
    common = [
        *(f"--data.root={folder}", f"--data.tasks={json.dumps([task])}", f"--model.members={MEMBERS}"),
        *(f"--pool.dir={pool}", f"--trainer.default_root_dir={folder}", "--trainer.max_epochs=30"),
    ]
    for verb in ("sweep", "predict"):
        if code := lora_ensemble([verb, *common]):
            sys.exit(code)


def rows_of(pool: Path, weights: str) -> list[list[str]]:
    """A row for each way to choose: F1 and MCC on test, and what the honest estimate said from dev."""
    rows = []
    for score in ("accuracy", "f1", "mcc"):
        comparison = compare(TaskPool(pool, "rare"), ["best", "omni", "weighted"], Options(), score=score)
        for method in ("best", "omni", "weighted"):
            ensemble = record.make(comparison, method, folder=pool)
            examples, decided, _ = predict(ensemble, pool, "test")
            honest = comparison.estimates.of[method].honest
            told = (
                ""
                if honest is None or score == "accuracy"
                else f"{honest.value:.3f} ({honest.low:.3f} to {honest.high:.3f})"
            )
            scores = [f"{f(examples.labels, decided):.3f}" for f in (f1_score, matthews_corrcoef)]
            rows.append([weights, score, method, str(int(np.sum(decided))), *scores, told])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of data and pools")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    print("| seed | loss | chosen by | method | said yes on test | F1 | MCC | its honest estimate |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | --- |")
    for seed in given.seeds:
        folder = given.output / str(seed)
        write_data(folder, seed)
        for name, weights in (("plain", None), ("balanced", "balanced")):
            train(folder, folder / name, weights)
            for row in rows_of(folder / name, name):
                print(f"| {seed} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
