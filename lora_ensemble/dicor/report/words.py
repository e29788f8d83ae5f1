"""What the numbers of a report are, in words: each is defined where it stands.

N in the formulas is the number of members, as in the reports.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.tasks import Kind


def decides(strategy: Strategy, kind: Kind) -> str:
    """How an ensemble decides, in words."""
    if strategy == "majority":
        return "the majority of its members' decisions"
    of = "values" if kind == "regression" else "logits" if strategy == "mean" else "probabilities"
    return f"{'a weighted' if strategy == 'weighted' else 'the'} mean of its members' {of}"


def offsets(scale: float, values: Sequence[float], labels: Sequence[str]) -> str:
    """Scale and offsets of an ensemble's mean, in words; ``labels`` are the classes' names, or none."""
    names = labels or [str(c) for c in range(len(values))]
    each = ", ".join(f"{name} {value:+.3f}" for name, value in zip(names, values, strict=True))
    return f"The logarithm of the mean's probabilities is multiplied by {scale:.3f}, then offset by class: {each}."


MEMBERS_TABLE = (
    "The weight is a member's part in the mean, or of the votes; all weights add up to 1. The temperature is what its "
    "logits are divided by first, where that was asked for. A dash is what is not known, or not used."
)
HEAT_MAP = (
    "After Tolkunov's figure 1, clustered by average linkage of 1 - similarity. Beside the squares: rank r and "
    "scaling c as the length of a bar (short and grey where unknown), and who is in the ensemble."
)
DIVERSITY = "An ensemble gains from members that are good (high) and unlike the others (left)."
BY_RANK = (
    "After Tolkunov's figure 3: a line for each scaling c through the means of members of the same rank. Scores are "
    "in-sample."
)
BY_SIZE = (
    "n is what a method's size is: members, steps of a greedy search, or how many of the best are weighted. Each n is "
    "chosen and estimated anew, by the same folds as the table; the larger mark is the size in use. Reading the best "
    "n off this curve is itself a choice on dev, and flatters a little."
)
RELIABILITY = {
    "binary": "On the diagonal, what is said comes true.",
    "multiclass": "On the diagonal, what is said comes true; below it, a method is too sure of itself.",
}
_ECE = (
    "Expected calibration error: ten bins of equal width, from 0 to 1, of {}; the distance between its mean and the "
    "share that came true, averaged over the bins by their share of the predictions. 0 is best."
)
_LOG_LOSS = ("Log-loss", "The mean of -log p(label), in nats; a probability counts as 10⁻¹⁵ at least. 0 is best.")
CALIBRATION = {
    "binary": [
        ("ECE", _ECE.format("the probability of class 1")),
        ("Brier score", "The mean of (p - y)², p the probability of class 1. 0 is best, 1 worst."),
        _LOG_LOSS,
    ],
    "multiclass": [
        ("ECE", _ECE.format("the confidence, the probability of the class that was decided for")),
        (
            "Brier score",
            "The squared distance between the probabilities and the label (1 for its class, 0 for the others), summed "
            "over classes; the mean over examples. 0 is best, 2 worst.",
        ),
        _LOG_LOSS,
    ],
}
VARIANCE = [
    ("σ²", "The variance over examples of value - label, averaged over the ensemble's members."),
    ("ρ", "The correlation of two members' errors, averaged over all pairs of members."),
    (
        "By the report",
        "Tolkunov's equation 2: Var(ens) = σ²/N + (N - 1)/N ρ σ². It is exact where all members have the same "
        "variance of error.",
    ),
    ("If independent", "The same with ρ = 0: σ²/N."),
    (
        "Observed",
        "The variance over examples of the error of the members' plain mean, which is what the equation is about, "
        "whatever the ensemble's own weights.",
    ),
]
MAJORITY = [
    ("p", "The share of wrong decisions, averaged over the ensemble's members."),
    ("ρ", "The correlation (phi) of two members' wrong answers, averaged over all pairs of members."),
    (
        "By the report",
        "Tolkunov's approximation: p_eff = ρ p + (1 - ρ) p², and the sum over k from floor(N/2) to N of C(N, k) "
        "p_eff^k (1 - p_eff)^(N - k). It has faults: at ρ = 0 it takes p² for p; at ρ = 1, where all members say the "
        "same, it still gains from voting; for even N it counts ties as errors; for odd N it starts one vote below a "
        "majority, so that N = 1 gives 1. And with more than two classes, fewer than half of the votes can be enough "
        "to be right.",
    ),
    (
        "If independent",
        "The chance that more than half of N votes are wrong, each with probability p and on its own (Condorcet).",
    ),
    (
        "Observed",
        "The share of dev on which the members' majority is wrong, ties to the member of highest rank, whatever the "
        "ensemble's own way to decide.",
    ),
]
