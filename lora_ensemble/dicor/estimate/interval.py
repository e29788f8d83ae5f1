"""How sure an estimate is: intervals over the examples of the dev set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_ensemble.scores import pearson, scored
from lora_ensemble.tasks import SCORES, Kind, ScoreName, check_score

CLOSED = ("accuracy", "pearson")  # scores whose intervals have a formula; of others they are the bootstrap's
LEVEL = 0.90
Z = 1.6448536269514722  # the normal's 95 % point: LEVEL lies between -Z and Z
DRAWS = 2000
LEAST_DRAWS, MOST_DRAWN = 500, 40_000_000  # draws of many examples, of scores that are slow to work out, are fewer


@dataclass(frozen=True)
class Interval:
    """An estimate, and where the true value lies with a chance of ``LEVEL``."""

    value: float
    low: float
    high: float

    def moved(self, by: float, least: float, most: float) -> Interval:
        """The same, so much higher, within what a score can be."""
        return Interval(*(min(max(x + by, least), most) for x in (self.value, self.low, self.high)))

    def turned(self, sign: int) -> Interval:
        """Of the values times 1 or -1."""
        return self if sign > 0 else Interval(-self.value, -self.high, -self.low)

    @property
    def beyond_noise(self) -> bool:
        """Whether 0 lies outside: for a difference, whether there is one."""
        return self.low > 0 or self.high < 0


def of_score(decided: np.ndarray, labels: np.ndarray, kind: Kind) -> Interval | None:
    """The mean accuracy or r of held-out decisions (R, N) on labels (N,), with its interval; None where r is undefined.

    The interval is that of one repeat: repeats bring no new example. For accuracy it is Wilson's; for r Fisher's z with
    the variance that the examples' influence on r gives (the delta method): errors of ratings are not normal.
    """
    n = len(labels)
    if kind != "regression":
        p = float(np.mean(decided == labels))
        middle, spread = (p + Z**2 / (2 * n)) / (1 + Z**2 / n), Z / (1 + Z**2 / n)
        half = spread * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return Interval(p, float(middle - half), float(middle + half))
    r = float(np.mean([pearson(row, labels) for row in decided]))
    if np.isnan(r):
        return None
    if n < 4 or abs(r) >= 1:
        return Interval(r, -1.0, 1.0) if n < 4 else Interval(r, r, r)
    variance = float(np.mean([np.var(influence(row, labels)) for row in decided])) / (n - 3)
    half = Z * np.sqrt(variance) / (1 - r * r)
    return Interval(r, float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half)))


def influence(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each example's influence (N,) on Pearson's r (Devlin, Gnanadesikan and Kettenring 1975)."""
    a, b = (values - values.mean()) / values.std(), (labels - labels.mean()) / labels.std()
    r = float(np.mean(a * b))
    return np.asarray(a * b - r * (a * a + b * b) / 2)


def of_differences(
    held: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[str, str]],
    labels: np.ndarray,
    kind: Kind,
    name: ScoreName | None = None,
    groups: np.ndarray | None = None,
    width: int = 1,
) -> dict[tuple[str, str], Interval | None]:
    """For each pair of names by how much the first's score is better than the second's, and its interval.

    ``held``: what was said of what was held out, (R, N) or (R, N, classes), see ``scores.said_of``; ``name``: of the
    score, None: the kind's default. A pair of a name and "" is the first's score itself, times its sign.

    A paired bootstrap: each draw takes N examples with replacement, the same for all, and their decisions from one of
    the repeats, which share the draws. Where examples belong to ``groups`` (N,), numbers from 0, whole groups are drawn
    (the cluster bootstrap, Davison and Hinkley 1997, section 3.8), as the ``width`` rows of an example are. None where
    it is undefined. The examples must come in an order of ours.
    """
    intervals: dict[tuple[str, str], Interval | None] = {}
    name, names = check_score(name, kind), sorted(held)
    drawn_all = name != "accuracy" or groups is not None
    if drawn_all:
        sign, every = SCORES[name].sign, [held[n] for n in names]
        r = {n: sign * float(np.mean(scored(held[n], labels, kind, name, width=width))) for n in names} | {"": 0.0}
        by_r = name == "pearson"
        found = _drawn_r(every, labels, groups) if by_r else sign * _drawn(every, labels, kind, name, groups, width)
        drawn_r = dict(zip(names, found.T, strict=True)) | {"": np.zeros(len(found))}
    for a, b in pairs:
        if drawn_all:
            value, drawn = r[a] - r[b], drawn_r[a] - drawn_r[b]
            drawn = drawn[np.isfinite(drawn)]
            if np.isnan(value) or not len(drawn):
                intervals[a, b] = None
                continue
        else:
            gain = (held[a] == labels).astype(int) - (held[b] == labels)  # -1, 0 or 1
            counts = np.array([(gain == g).sum() for g in (-1, 0, 1)])
            # A draw of N examples is a multinomial draw over the three values.
            draws = np.random.default_rng(0).multinomial(len(labels), counts / counts.sum(), size=DRAWS)
            value, drawn = float(gain.mean()), (draws[:, 2] - draws[:, 0]) / len(labels)
        ends = np.percentile(drawn, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
        if groups is not None:
            ends = value + _of_few(int(groups.max()) + 1) * (ends - value)
        intervals[a, b] = Interval(value, *ends.tolist())
    return intervals


def _of_few(groups: int) -> float:
    """By what the bootstrap's intervals over few groups are too narrow: Student's t and the variance's n - 1.

    t as Cornish and Fisher expand it (Abramowitz and Stegun, 26.7.5).
    """
    v = groups - 1
    t = Z + (Z**3 + Z) / (4 * v) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * v**2)
    return float(np.sqrt(groups / v) * t / Z)


def _times(rng: np.random.Generator, n: int, draws: int, groups: np.ndarray | None) -> Iterator[np.ndarray]:
    """How often each example was drawn, (B, N) at a time; all of a group together."""
    count = n if groups is None else int(groups.max()) + 1
    while draws > 0:
        size = min(draws, max(2_000_000 // n, 1))  # 16 MB at a time
        draws -= size
        cells = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(cells.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        yield times if groups is None else times[:, groups]


def _drawn(
    held: Sequence[np.ndarray], labels: np.ndarray, kind: Kind, name: ScoreName, groups: np.ndarray | None, width: int
) -> np.ndarray:
    """The score (B, methods) of what each method said, (R, N) or (R, N, classes), in each draw of examples."""
    rng, n, drawn, repeats = np.random.default_rng(0), len(labels), list[np.ndarray](), len(held[0])
    draws = DRAWS if SCORES[name].of == "decisions" else int(np.clip(MOST_DRAWN // n, LEAST_DRAWS, DRAWS))
    draws = -(-draws // repeats)
    for repeat in range(repeats):
        said, truth = [one[repeat] for one in held], labels
        if SCORES[name].of == "decisions" and groups is None:
            # A draw of N examples is a multinomial draw over the few patterns that labels and decisions make.
            (truth, *said), counts = np.unique(np.stack([labels, *said]), axis=1, return_counts=True)
            size = max(2_000_000 // len(counts), 1)
            sizes = [min(size, draws - done) for done in range(0, draws, size)]
            times: Iterable[np.ndarray] = (rng.multinomial(n, counts / n, size=size) for size in sizes)
        else:
            times = _times(rng, n, draws, groups)
        drawn += [np.stack([scored(one, truth, kind, name, t, width=width) for one in said], -1) for t in times]
    return np.concatenate(drawn)


def _drawn_r(held: Sequence[np.ndarray], labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """r (B, methods) of each method's values (R, N) in each draw of examples."""
    rng = np.random.default_rng(0)
    n, y, repeats = len(labels), labels - labels.mean(), len(held[0])
    drawn = []
    for repeat in range(repeats):
        rows = np.stack([values[repeat] - values[repeat].mean() for values in held])
        columns = np.concatenate([rows, rows**2, rows * y, y[None], y[None] ** 2]).T  # (N, 3 methods + 2)
        for times in _times(rng, n, -(-DRAWS // repeats), groups):
            means = times @ columns / times.sum(1, keepdims=True)
            x, xx, xy, sy, yy = np.split(means, np.cumsum([len(held)] * 3 + [1]), axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn.append((xy - x * sy) / np.sqrt((xx - x**2) * (yy - sy**2)))
    return np.concatenate(drawn)
