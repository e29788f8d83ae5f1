"""What is printed about methods: a table, and in words what of a gain is within noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_ensemble.dicor.choose.settings import Strategy
from lora_ensemble.dicor.estimate.honest import Estimate, Estimates
from lora_ensemble.dicor.estimate.interval import LEVEL, Interval
from lora_ensemble.tasks import Kind

IN_SAMPLE = "In-sample: the score on the very dev set that was chosen on, which flatters what was chosen."


YARDSTICKS = ("best", "omni")
"""Methods that are always compared, and not chosen among."""


def number(value: float | None, *, sign: bool = False) -> str:
    """Four decimals; "undefined" for NaN, "-" for None."""
    if value is None:
        return "-"
    return "undefined" if value != value else f"{value:{'+' if sign else ''}.4f}"


def about(estimates: Estimates) -> str:
    """What the columns mean, in sentences."""
    if not estimates.repeats:
        return f"{IN_SAMPLE}\nThere are too few dev examples for an honest estimate."
    times = "once" if estimates.repeats == 1 else f"{estimates.repeats} times"
    return (
        f"{IN_SAMPLE}\n"
        f"Honest: chosen, epochs included, without a {_ordinal(estimates.folds)} of dev and scored on it, until every "
        f"example was held out {times}, with its {LEVEL:.0%} interval.\n"
        f"Chosen on all of dev, an ensemble has seen more: 1/{4 * (estimates.folds - 1)} of the optimism is added.\n"
        f"Within noise: the {LEVEL:.0%} interval of the difference (paired bootstrap over examples) holds 0."
        + (f"\n{_highest(len(estimates.of))}" if len(estimates.of) > len(YARDSTICKS) + 1 else "")
    )


def _highest(methods: int) -> str:
    """What taking the best of several honest estimates does to it."""
    count = {4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}.get(methods, str(methods))
    return f"The highest of {count} honest estimates is itself flattered a little: it was taken for being the highest."


def _ordinal(folds: int) -> str:
    return {2: "half", 3: "third", 4: "quarter", 5: "fifth", 10: "tenth"}.get(folds, f"1/{folds}")


def table(estimates: Estimates, score_name: str, test: Mapping[str, float] | None = None) -> str:
    """A row for each method."""
    rows = [
        f"{score_name + ' on dev':<17} {'members':>7} {'in-sample':>9} {'honest':>9} {f'{LEVEL:.0%} interval':>17} "
        f"{'optimism':>9}  {'to single best':<20}  {'to Omni':<20}" + ("  test" if test else "")
    ]
    for name, one in estimates.of.items():
        interval = f"{number(one.honest.low)} to {number(one.honest.high)}" if one.honest else "-"
        row = (
            f"{name:<17} {len(one.names):>7} {number(one.in_sample):>9} "
            f"{number(one.honest.value if one.honest else None):>9} {interval:>17} "
            f"{number(one.optimism, sign=True):>9}  {gain(one.against_best):<20}  {gain(one.against_omni):<20}"
        )
        rows.append((row + (f"  {number(test[name])}" if test else "")).rstrip())
    return "\n".join(rows)


def gain(difference: Interval | None) -> str:
    """A difference, and whether there is one."""
    if difference is None:
        return "-"
    return f"{number(difference.value, sign=True)} {'beyond' if difference.beyond_noise else 'within'} noise"


def verdict(name: str, one: Estimate) -> str:
    """In a sentence: what of the gain of a method will survive on new examples."""
    if one.honest is None:
        return f"{name}: in-sample {number(one.in_sample)}; how much of it is chance cannot be said here."
    parts = []
    for other, difference in (("the single best", one.against_best), ("Omni", one.against_omni)):
        if difference is not None:
            word = "a gain" if difference.low > 0 else "a loss" if difference.high < 0 else "within noise"
            span = f"{number(difference.low, sign=True)} to {number(difference.high, sign=True)}"
            parts.append(f"{number(difference.value, sign=True)} ({span}) to {other}: {word}")
    return f"{name}: honest {number(one.honest.value)}; " + "; ".join(parts) + "."


def decides(strategy: Strategy, kind: Kind) -> str:
    """How an ensemble decides, in words."""
    if strategy == "majority":
        return "the majority of its members' decisions"
    of = "values" if kind == "regression" else "logits" if strategy == "mean" else "probabilities"
    return f"{'a weighted' if strategy == 'weighted' else 'the'} mean of its members' {of}"


def offsets(scale: float, values: Sequence[float], labels: Sequence[str]) -> str:
    """Scale and offsets of an ensemble's mean, in words; ``labels`` are the classes' names, or none."""
    names = labels or [str(c) for c in range(len(values))]
    moved = ", ".join(f"{name} {value:+.3f}" for name, value in zip(names, values, strict=True))
    return f"The logarithm of the mean's probabilities is multiplied by {scale:.3f}, then offset by class: {moved}."
