"""The settings of a selection and their defaults. Nothing heavy is imported: ``dicor --help`` needs the choices."""

from __future__ import annotations

from typing import Literal

from lora_ensemble.tasks import Kind

Similarity = Literal["cosine", "pearson", "error", "kappa", "double-fault"]
Strategy = Literal["mean", "mean-probability", "majority", "weighted"]
MethodName = Literal[
    "best",
    "omni",
    "dicor",
    "dicor-auto",
    "greedy",
    "greedy-score",
    "greedy-bagged",
    "weighted",
    "weighted-offset",
    "exhaustive",
]
Criterion = Literal["score", "loss"]
"""What a search makes best: the task's score, or the softer log-loss (classifiers) or squared error (regression)."""

# To a method several labels are a binary task; ``multilabel`` stands only where a task is asked for its kind.
# Tolkunov's three tasks: SST (11 members), Quora (4) and STS (10). A user's own task has those of its kind.
DEFAULT_SIZE: dict[Kind, int] = {"multiclass": 11, "binary": 4, "regression": 10}
# His section 4.3; his section 5.3 contradicts it for STS.
DEFAULT_SIMILARITY: dict[Kind, Similarity] = {"multiclass": "cosine", "binary": "cosine", "regression": "pearson"}
DEFAULT_STRATEGY: dict[Kind, Strategy] = {"multiclass": "majority", "binary": "majority", "regression": "mean"}
# He keeps "the most accurate" and does not say how many; this number is ours.
DEFAULT_TOP_K = 30
# As far as `--size auto` looks; beyond it another member changes a mean by little.
MOST_AUTO = 25
# What a search makes best unless told otherwise. Accuracy moves in steps of 1/N and ties everywhere, so that a search
# by it fits the noise of the few examples at the border; r is smooth already.
SMOOTH: dict[Kind, Criterion] = {"multiclass": "loss", "binary": "loss", "regression": "score"}
# What `dicor select` takes unless told otherwise. On 3 real pools it is beyond noise above Omni, and none of our others
# is above it beyond noise. Offsets: on Quora 0.0167 above `weighted`, beyond noise, on SST 0.0069, within
# (benchmarks/README.md); a regression has none. `dicor`, the paper's rule, is below the single best on all three.
DEFAULT_METHOD: dict[Kind, MethodName] = {
    "multiclass": "weighted-offset",
    "binary": "weighted-offset",
    "multilabel": "weighted-offset",
    "regression": "weighted",
}
# `dicor-auto`: as much for the score as for being different.
DEFAULT_TRADE_OFF = 0.5
# `exhaustive` tries all ensembles of the best so many.
EXHAUSTIVE_TOP_K = 8
GREEDY_TOP_K, GREEDY_STEPS, GREEDY_BAGS = 50, 25, 10
