"""How sure an estimate is: intervals over the examples of the dev set.

Axes: R repeats, N examples, B bootstrap draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_ensemble.tasks import Kind, pearson

LEVEL = 0.90
Z = 1.6448536269514722
"""The normal's 95 % point: LEVEL lies between -Z and Z."""
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate, and where the true value lies with a chance of ``LEVEL``."""

    value: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Whether 0 lies outside: for a difference, whether there is one."""
        return self.low > 0 or self.high < 0


def of_score(decided: np.ndarray, labels: np.ndarray, kind: Kind) -> Interval | None:
    """The score of held-out decisions (R, N) against labels (N,), and its interval; None where r is undefined.

    Each repeat's decisions are scored, and the mean taken. The interval is that of one repeat's decisions on other
    examples: repeats of the same examples make the estimate steadier, but bring no new example. For accuracy it is
    Wilson's; for r it is Fisher's z with the variance that the examples' influence on r gives (the delta method), since
    the errors of ratings are not normal.
    """
    n = len(labels)
    if kind != "regression":
        p = float(np.mean(decided == labels))
        middle, spread = (p + Z**2 / (2 * n)) / (1 + Z**2 / n), Z / (1 + Z**2 / n)
        half = spread * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return Interval(value=p, low=float(middle - half), high=float(middle + half))
    each = np.array([pearson(row, labels) for row in decided])
    if np.isnan(each).any():
        return None
    r = float(each.mean())
    if n < 4 or abs(r) >= 1:
        return Interval(value=r, low=-1.0, high=1.0) if n < 4 else Interval(value=r, low=r, high=r)
    variance = float(np.mean([np.var(influence(row, labels)) for row in decided])) / (n - 3)
    half = Z * np.sqrt(variance) / (1 - r * r)
    return Interval(value=r, low=float(np.tanh(np.arctanh(r) - half)), high=float(np.tanh(np.arctanh(r) + half)))


def influence(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each example's influence (N,) on Pearson's r (Devlin, Gnanadesikan and Kettenring 1975)."""
    a, b = (values - values.mean()) / values.std(), (labels - labels.mean()) / labels.std()
    r = float(np.mean(a * b))
    return np.asarray(a * b - r * (a * a + b * b) / 2)


def of_difference(
    decided: np.ndarray, other: np.ndarray, labels: np.ndarray, kind: Kind, *, draws: int = DRAWS
) -> Interval | None:
    """Score of ``decided`` less that of ``other``, both held-out decisions (R, N), and its interval.

    A paired bootstrap over examples: each draw takes N of the examples with replacement, the same for both, and their
    decisions from one repeat, drawn too, as in ``of_score``. None where r is undefined. The examples must come in an
    order that does not depend on the file's.
    """
    rng = np.random.default_rng(0)
    n = len(labels)
    tail = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
    if kind != "regression":
        gain = (decided == labels).astype(int) - (other == labels)  # -1, 0 or 1
        counts = np.array([(gain == g).sum() for g in (-1, 0, 1)])
        # A draw of N of them is a multinomial draw over the three values.
        drawn = rng.multinomial(n, counts / counts.sum(), size=draws)
        means, value = (drawn[:, 2] - drawn[:, 0]) / n, float(gain.mean())
    else:
        first, second = (np.mean([pearson(row, labels) for row in rows]) for rows in (decided, other))
        value = float(first - second)
        if np.isnan(value):
            return None
        means = _drawn_r(decided, other, labels, rng, draws)
        means = means[np.isfinite(means)]
    low, high = np.percentile(means, tail)
    return Interval(value=value, low=float(low), high=float(high))


def _drawn_r(a: np.ndarray, b: np.ndarray, labels: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """r of a row of ``a`` less r of that row of ``b`` (R, N) in each draw of examples (B,)."""
    n, y = len(labels), labels - labels.mean()
    rows = np.concatenate([a, b])
    rows = rows - rows.mean(axis=1, keepdims=True)
    columns = np.concatenate([rows, rows**2, rows * y, y[None], y[None] ** 2]).T  # (N, 6 R + 2)
    found = []
    for start in range(0, draws, 250):
        size = min(250, draws - start)
        times = rng.multinomial(n, np.full(n, 1 / n), size=size)  # how often each example was drawn
        x, xx, xy, sy, yy = np.split(times @ columns / n, np.cumsum([len(rows), len(rows), len(rows), 1]), axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = (xy - x * sy) / np.sqrt((xx - x**2) * (yy - sy**2))
        repeat, draw = rng.integers(len(a), size=size), np.arange(size)
        found.append(r[draw, repeat] - r[draw, len(a) + repeat])
    return np.concatenate(found)
