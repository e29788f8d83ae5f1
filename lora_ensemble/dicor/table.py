"""What is printed about methods: a table, and in words what of a gain is within noise."""

from __future__ import annotations

from collections.abc import Sequence

from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.dicor.compare import Judgement
from lora_ensemble.dicor.estimate.honest import Estimate, Estimates
from lora_ensemble.dicor.estimate.interval import LEVEL, Interval
from lora_ensemble.tasks import SCORES, Kind

IN_SAMPLE = "In-sample: the score on the very {} set that was chosen on, which flatters what was chosen."
_OUT_OF_FOLD = (
    "oof: the training examples, each predicted by a model that was trained without its fold. On other text a member "
    "is the mean of its models, or one of all examples, and mostly a little better."
)


def number(value: float | None, *, sign: bool = False) -> str:
    """Four decimals; "undefined" for NaN, "-" for None."""
    if value is None:
        return "-"
    # Plus 0: what rounding left below 0 is no -0.0000.
    return "undefined" if value != value else f"{round(value, 4) + 0.0:{'+' if sign else ''}.4f}"


def about(estimates: Estimates) -> str:
    """What the columns mean, in sentences."""
    score = SCORES[estimates.candidates.scored_by]
    lower = f"{score.words}: the lower the better; differences and the optimism are what is gained.\n"
    first = ("" if score.sign > 0 else lower) + IN_SAMPLE.format(estimates.split)
    first += "" if estimates.split == "dev" else f"\n{_OUT_OF_FOLD}"
    if not estimates.repeats:
        return f"{first}\nThere are too few examples, or groups of them, for an honest estimate."
    folds, methods = estimates.folds, len(estimates.of)
    part = {2: "half", 3: "third", 4: "quarter", 5: "fifth", 10: "tenth"}.get(folds, f"1/{folds}")
    times = "once" if estimates.repeats == 1 else f"{estimates.repeats} times"
    over = "examples" if estimates.groups is None else f"the {estimates.groups} groups, which no split tears apart"
    lines = [
        first,
        f"Honest: chosen, epochs included, without a {part} of {estimates.split} and scored on it, until every example "
        f"was held out {times}, with its {LEVEL:.0%} interval.",
        f"Chosen on all of {estimates.split}, an ensemble has seen more: 1/{4 * (folds - 1)} of the optimism is added.",
        f"Within noise: the {LEVEL:.0%} interval of the difference (paired bootstrap over {over}) holds 0.",
    ]
    if methods > 3:  # best and omni are there to compare with
        count = {4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}.get(methods, methods)
        lines.append(
            f"The highest of {count} honest estimates is itself flattered a little: it was taken for being the highest."
        )
    return "\n".join(lines)


def table(estimates: Estimates, found: Judgement | None = None) -> str:
    """A row for each method; ``found``: their scores on another split."""
    columns = [f"{SCORES[estimates.candidates.scored_by].words} on {estimates.split}", "members", "in-sample", "honest"]
    columns += [f"{LEVEL:.0%} interval", "optimism", "to single best", "to Omni", found.split if found else ""]
    rows = [columns]
    for name, about in estimates.of.items():
        value = number(about.honest.value if about.honest else None)
        span, optimism = ends(about.honest) if about.honest else "-", number(about.optimism, sign=True)
        row = [name, str(len(about.names)), number(about.in_sample), value, span, optimism]
        last = number(found.scores[name]) if found else ""
        rows.append([*row, gain(about.against_best), gain(about.against_omni), last])
    form = f"{{:<{max(17, len(columns[0]))}}} " + "{:>7} {:>9} {:>9} {:>17} {:>9}  {:<20}  {:<20}  {}"
    return "\n".join(form.format(*row).rstrip() for row in rows)


def gain(difference: Interval | None) -> str:
    """A difference, and whether there is one."""
    return "-" if difference is None else f"{number(difference.value, sign=True)} {noise(difference)}"


def noise(difference: Interval) -> str:
    """Whether a difference is one, in words."""
    return f"{'beyond' if difference.beyond_noise else 'within'} noise"


def ends(interval: Interval, *, sign: bool = False) -> str:
    """From where to where an interval goes."""
    return f"{number(interval.low, sign=sign)} to {number(interval.high, sign=sign)}"


def verdict(name: str, estimate: Estimate) -> str:
    """In a sentence: what of the gain of a method will survive on new examples."""
    if estimate.honest is None:
        return f"{name}: in-sample {number(estimate.in_sample)}; how much of it is chance cannot be said here."
    return f"{name}: honest {number(estimate.honest.value)}; {_gains(estimate)}."


def judgement(name: str, found: Judgement) -> str:
    """In a sentence: how good what a method chose is where nothing was chosen."""
    at = found.of.honest
    value = "undefined" if at is None else f"{number(at.value)} ({LEVEL:.0%} interval {ends(at)})"
    return f"{name} on {found.split}, on which nothing was chosen: {value}; {_gains(found.of)}."


def _gains(estimate: Estimate) -> str:
    parts = []
    for other, difference in (("the single best", estimate.against_best), ("Omni", estimate.against_omni)):
        if difference is not None:
            word = "a gain" if difference.low > 0 else "a loss" if difference.high < 0 else "within noise"
            parts.append(f"{number(difference.value, sign=True)} ({ends(difference, sign=True)}) to {other}: {word}")
    return "; ".join(parts)


def decides(strategy: Strategy, kind: Kind) -> str:
    """How an ensemble decides, in words."""
    if strategy == "majority":
        return "the majority of its members' decisions"
    of = "values" if kind == "regression" else "logits" if strategy == "mean" else "probabilities"
    return f"{'a weighted' if strategy == 'weighted' else 'the'} mean of its members' {of}"


def offsets(scale: float, values: Sequence[float], labels: Sequence[str], kind: Kind) -> str:
    """Scale and offsets of an ensemble's mean, in words; ``labels`` are the classes' names, or none."""
    what = "the log-odds are offset by label" if kind == "multilabel" else "offset by class"
    names = labels or [str(c) for c in range(len(values))]
    moved = ", ".join(f"{name} {value:+.3f}" for name, value in zip(names, values, strict=True))
    return f"The logarithm of the mean's probabilities is multiplied by {scale:.3f}, then {what}: {moved}."
