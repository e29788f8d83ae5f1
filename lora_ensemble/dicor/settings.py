"""The settings of a selection and their defaults. Nothing heavy is imported: ``dicor --help`` needs the choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_ensemble.errors import UserError

if TYPE_CHECKING:
    from lora_ensemble.tasks import Kind

Similarity = Literal["cosine", "pearson", "error", "kappa", "double-fault"]
Strategy = Literal["mean", "mean-probability", "majority", "weighted"]
MethodName = Literal[
    "best", "omni", "dicor", "dicor-auto", "greedy", "greedy-score", "greedy-bagged", "weighted", "exhaustive"
]
Criterion = Literal["score", "loss"]
"""What a search makes best: the task's score, or the softer log-loss (classifiers) or squared error (regression)."""

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


# What `dicor select` takes unless told otherwise (the figures: benchmarks/README.md). The paper's rule is `dicor`.
DEFAULT_METHOD: dict[Kind, MethodName] = {"multiclass": "weighted", "binary": "weighted", "regression": "weighted"}
# How Omni, to which all methods are compared, combines all members. Voting is the paper's for classifiers; the mean is
# the harder one to beat.
OMNI_STRATEGY: dict[Kind, Strategy] = {"multiclass": "mean", "binary": "mean", "regression": "mean"}
# `dicor-auto`: as much for the score as for being different.
DEFAULT_TRADE_OFF = 0.5
# `exhaustive` tries all ensembles of the best so many.
EXHAUSTIVE_TOP_K = 8
GREEDY_TOP_K, GREEDY_STEPS, GREEDY_BAGS = 50, 25, 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an ensemble is chosen and combined; every field is decided."""

    size: int
    """Members in the ensemble."""
    top_k: int
    """Candidates: the members with the best dev scores; size <= top_k <= M."""
    similarity: Similarity
    strategy: Strategy


def settle(
    kind: Kind,
    members: int,
    *,
    size: int | None = None,
    top_k: int | None = None,
    similarity: Similarity | None = None,
    strategy: Strategy | None = None,
) -> tuple[Settings, list[str]]:
    """Fill in the defaults for a task's kind and a pool of ``members``; also returns notices for the user.

    A default gives way to what is there; what was asked for does not: ``UserError`` where the size exceeds the pool
    or the candidates, where it is below one, and for a majority of regression values.
    """
    notices = []
    if size is not None and size < 1:
        raise UserError(f"--size {size}: an ensemble needs at least one member")
    if size is not None and size > members:
        raise UserError(f"--size {size}: the pool has {members} finished members; give at most {members}")
    if top_k is not None and top_k < (size or 1):
        least = f"--size {size}" if size else "1"
        raise UserError(f"--top-k {top_k} is below {least}: there must be at least as many candidates as members")
    if top_k is not None and top_k > members:
        notices.append(f"--top-k {top_k}: the pool has {members} finished members, all of them are candidates")
    if size is None:
        size = min(DEFAULT_SIZE[kind], members, top_k or members)
        if size < DEFAULT_SIZE[kind]:
            limit = f"--top-k is {top_k}" if size == top_k else f"the pool has {members} finished members"
            notices.append(f"size is {size} instead of the default {DEFAULT_SIZE[kind]}: {limit}")
    if top_k is None:
        top_k = max(DEFAULT_TOP_K, size)
    strategy = strategy or DEFAULT_STRATEGY[kind]
    if strategy == "majority" and kind == "regression":
        raise UserError("--strategy majority: a regression has values, not classes to vote for; use --strategy mean")
    return Settings(
        size=size,
        top_k=min(top_k, members),
        similarity=similarity or DEFAULT_SIMILARITY[kind],
        strategy=strategy,
    ), notices
