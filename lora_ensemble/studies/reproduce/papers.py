"""What the two reports trained and what they say they saw. Their numbers are copied, not computed; ours never are.

Oyeniyi: "BERT with LoRA", Stanford CS224N; Tolkunov: "Ensembling LoRA Models", Stanford CS224N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PaperName = Literal["oyeniyi", "tolkunov"]
Scale = Literal["full", "small"]
TASKS = ("sst", "quora", "sts")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One sweep of a reproduction."""

    name: str  # what it trains, in words
    pool: str  # its pool's folder below the output
    config: str  # its file below ``configs``, the report's own settings
    small: str  # what ``--scale small`` puts on top of it
    tasks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A report."""

    title: str
    parts: tuple[Part, ...]
    sizes: dict[str, tuple[int, int, int]]  # task to examples of train, dev and test
    small: str  # how ``--scale small`` differs, in words
    oddities: tuple[str, ...]  # what in the report contradicts itself or cannot be right
    base_model: str  # as it is named there
    dev: dict[str, tuple[float, float, float, float] | None]
    """System to SST, Quora, STS and overall score on dev; None: announced and not reported."""
    test: tuple[str, tuple[float, float, float, float]]  # the system of the test leaderboard, and its scores


OYENIYI = Paper(
    title='Oyeniyi, "BERT with LoRA"',
    parts=(
        Part(
            name="the eleven models of section 5.3 in one bank, three tasks in every step",
            pool="pool",
            config="oyeniyi.yaml",
            small="oyeniyi-small.yaml",
            tasks=TASKS,
        ),
    ),
    sizes={"sst": (8544, 1101, 2210), "quora": (283_010, 40_429, 80_859), "sts": (6040, 863, 1725)},
    small="600 steps instead of about 350 000 with a hundred times the learning rates, gradients clipped to norm 1, "
    "no dropout inside the encoder",
    oddities=(
        "Its rows 4 and 9 are identical in all four figures.",
        "Its Quora accuracies 0.632 and 0.369 add up to 1: all pairs were answered with one class.",
        "Its best STS correlation is 0.157; on the test set it is 0.002.",
        "It names no scaling; here alpha / r is 1.",
        'Its table 2 speaks of "three models" and has one; model 11 is announced and not reported.',
    ),
    base_model="BERT base",
    # Section 5.3, table 2.
    dev={
        "1-baseline": (0.144, 0.369, -0.009, 0.336),
        "2-kqv-r4": (0.272, 0.632, 0.013, 0.470),
        "3-kqv-r32": (0.176, 0.631, -0.047, 0.428),
        "4-kqv-r48": (0.256, 0.632, 0.157, 0.489),
        "5-pooler-r4": (0.256, 0.380, 0.030, 0.384),
        "6-pooler-kqv-r4": (0.279, 0.632, -0.037, 0.464),
        "7-pooler-kqv-r32": (0.261, 0.369, 0.084, 0.391),
        "8-pooler-kqv-r48": (0.241, 0.632, 0.133, 0.480),
        "9-all-1-r4": (0.256, 0.632, 0.157, 0.489),
        "10-all-1-r48": (0.257, 0.632, 0.021, 0.466),
        "11-all-1-r100": None,
    },
    test=("9-all-1-r4", (0.236, 0.632, 0.002, 0.456)),  # table 3
)

TOLKUNOV = Paper(
    title='Tolkunov, "Ensembling LoRA Models"',
    parts=tuple(
        Part(
            name=f"{task}: {what}",
            pool=pool,
            config=f"tolkunov/{config or task}.yaml",
            small=f"tolkunov/small/{config or task}.yaml",
            tasks=(task,),
        )
        for task in TASKS
        for what, pool, config in (
            ("the frozen baseline", "frozen", "frozen"),
            ("the fully fine-tuned baseline", "finetuned", "finetuned"),
            ("the grid over rank and scaling", "grid", ""),
        )
    ),
    sizes={"sst": (8544, 1101, 2210), "quora": (141_506, 20_215, 40_431), "sts": (6040, 863, 1725)},
    small="12 of the 80 SST models and 12 of the 186 STS models, all 4 Quora models; 600 steps, dev scored after 300 "
    "and at the end, with five times the learning rate (frozen: 3 epochs); no dropout inside the encoder; DiCor takes "
    "4 of the 6 best",
    oddities=(
        "Section 4.3 compares STS models by Pearson correlation, section 5.3 speaks of cosine; here it is Pearson.",
        'How many "most accurate" models are kept before the choice is not said; here the 30 best (small: 6).',
        'To what a candidate has the "lowest correlation" is not said; here the mean to those already chosen.',
        "The standard deviation of A at the start is not said; here 0.02.",
        "On Quora DiCor takes all four models, so it is Omni.",
    ),
    base_model="BERT",
    # Table 1.
    dev={
        "Frozen BERT": (0.395, 0.697, 0.526, 0.618),
        "Finetuned BERT": (0.543, 0.883, 0.884, 0.789),
        "LoRA (best)": (0.540, 0.898, 0.872, 0.791),
        "Omni-LoRA": (0.530, 0.905, 0.874, 0.791),
        "DiCor-LoRA": (0.544, 0.905, 0.885, 0.797),
    },
    test=("DiCor-LoRA", (0.550, 0.904, 0.882, 0.798)),  # table 2
)

# Of DiCor in a small pool.
SMALL_SIZE = 4
SMALL_TOP_K = {"sst": 6, "quora": 4, "sts": 6}

PAPERS: dict[PaperName, Paper] = {"oyeniyi": OYENIYI, "tolkunov": TOLKUNOV}
