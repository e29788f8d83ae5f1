"""The drawings of a report, but for the heat map: each from the facts, with the numbers that it shows as a table.

Axes: S members that are shown.
"""

from __future__ import annotations

import numpy as np

from lora_ensemble.dicor.estimate.interval import LEVEL
from lora_ensemble.dicor.report.drawing import (
    DASHES,
    SHAPES,
    Axes,
    Box,
    Drawing,
    Key,
    Line,
    Mark,
    Text,
    legend,
    span,
    text_width,
)
from lora_ensemble.dicor.report.facts import NAMES, Facts
from lora_ensemble.dicor.report.heat_map import heat_map
from lora_ensemble.dicor.report.palette import SERIES
from lora_ensemble.dicor.table import number

WIDTH, WIDE, HEIGHT = 560.0, 760.0, 400.0


def drawings(facts: Facts) -> dict[str, Drawing]:
    """All drawings that these facts are enough for, by name; ``missing`` says why one is not there."""
    found = [methods(facts)]
    if not (absent := missing(facts)).get("similarity"):
        found += [heat_map(facts), diversity(facts)]
    if "score-by-rank" not in absent:
        found.append(score_by_rank(facts))
    if "size" not in absent:
        found.append(by_size(facts))
    if "calibration" not in absent:
        found.append(reliability(facts))
    return {one.name: one for one in found}


def missing(facts: Facts) -> dict[str, str]:
    """Name of a drawing to why it is not there, in a sentence."""
    found = {}
    if len(facts.shown) < 2:
        found["similarity"] = found["diversity"] = found["size"] = (
            "The pool has one member, so there is nothing to compare it with."
        )
    elif not facts.curves:
        found["size"] = "The single best member has no size to vary."
    if all(not r.rank for r in facts.comparison.task_pool.members):
        found["score-by-rank"] = (
            "No member has a rank: they were imported, or only their heads were trained, so there is no score by rank."
        )
    if facts.comparison.kind == "regression":
        found["calibration"] = "A regression gives values, not probabilities, so there is no calibration."
    return found


def methods(facts: Facts) -> Drawing:
    """Every method's honest estimate with its interval, and its in-sample score."""
    of = facts.comparison.estimates.of
    names = [NAMES.get(m, m) for m in of]
    left = 24 + max(text_width(n, 13) for n in names)
    row, top = 30.0, 40.0
    d = Drawing(
        "methods",
        "Scores of all methods",
        f"A row for each of {len(of)} methods: the in-sample score and, where it is known, the honest estimate with "
        f"its {LEVEL:.0%} interval. {facts.method}, the method of this report, is marked.",
        WIDE,
        top + row * len(of) + 58,
        ["method", "members", "in-sample", "honest", "from", "to"],
    )
    ends = [v for one in of.values() if one.honest for v in (one.honest.low, one.honest.high)]
    shown = span([*ends, *(one.in_sample for one in of.values())])
    axes = Axes(d, (left, top, d.width - 84, top + row * len(of)), shown, (0, 1))
    y = axes.top
    for m in of:
        if m == facts.method:
            d.add(Box(0, y, d.width, row, "wash"))
        y += row
    axes.frame(f"{facts.score_name} on dev", "", x_only=True)
    y = axes.top + row / 2
    for (m, one), name in zip(of.items(), names, strict=True):
        own = m == facts.method
        colour = "accent" if own else "s0"
        d.add(Text((left - 12, y + 4.5), name, "ink", "end", 13, bold=own))
        told = f"{name}: in-sample {number(one.in_sample)}"
        if one.honest:
            told += f", honest {number(one.honest.value)} ({number(one.honest.low)} to {number(one.honest.high)})"
            d.add(Line([(axes.x(one.honest.low), y), (axes.x(one.honest.high), y)], colour, 3 if own else 2))
        if not np.isnan(one.in_sample):
            d.add(Mark((axes.x(one.in_sample), y), colour, "diamond", 4.2, True, told))
        if one.honest:
            d.add(Mark((axes.x(one.honest.value), y), colour, "circle", 5.2, title=told))
        d.add(Text((d.width - 4, y + 4.5), number(one.honest.value if one.honest else None), "ink", "end", 13, own))
        d.rows.append([
            name, str(len(one.names)), number(one.in_sample),
            *([number(v) for v in (one.honest.value, one.honest.low, one.honest.high)] if one.honest else ["-"] * 3),
        ])  # fmt: skip
        y += row
    keys = [Key(f"honest, {LEVEL:.0%} interval", "s0", "circle", dash=()), Key("in-sample", "s0", "diamond", True)]
    legend(d, left, 8, d.width, keys)
    d.add(Text((d.width - 4, 21), "honest", "soft", "end"))
    return d


def by_size(facts: Facts) -> Drawing:
    """Score against the number of members, in-sample and honest."""
    d = Drawing(
        "size",
        "Score by size of the ensemble",
        "For "
        + " and ".join(c.method for c in facts.curves)
        + ": the in-sample score, dotted, and the honest estimate, "
        f"solid with its {LEVEL:.0%} interval, for growing n.",
        WIDE,
        HEIGHT + 20,
        ["method", "n", "members", "in-sample", "honest", "from", "to"],
    )
    values = [v for c in facts.curves for e in c.estimates for v in ([e.honest.low, e.honest.high] if e.honest else [])]
    values += [e.in_sample for c in facts.curves for e in c.estimates]
    keys = []
    looks = [(c, "accent" if c.method == facts.method else "s0", SHAPES[i]) for i, c in enumerate(facts.curves)]
    for curve, colour, shape in looks:
        if curve.estimates[0].honest:
            keys.append(Key(f"{curve.method} ({curve.of_n}), honest", colour, shape, dash=(), band=True))
        keys.append(Key(f"{curve.method}, in-sample", colour, shape, hollow=True, dash=DASHES[2]))
    top = legend(d, 56, 6, WIDE - 8, keys) + 8
    most = max(c.sizes[-1] for c in facts.curves)
    axes = Axes(d, (56, top, WIDE - 12, d.height - 48), (0, most * 1.03), span(values))
    axes.frame("n", f"{facts.score_name} on dev", whole=True)
    for curve, colour, _ in looks:
        known = [(n, e.honest) for n, e in zip(curve.sizes, curve.estimates, strict=True) if e.honest]
        edge = [axes.at(n, h.high) for n, h in known] + [axes.at(n, h.low) for n, h in reversed(known)]
        if edge:
            d.add(Line(edge, colour, area=True))
    for curve, colour, shape in looks:
        points = list(zip(curve.sizes, curve.estimates, strict=True))
        d.add(Line([axes.at(n, e.in_sample) for n, e in points if e.in_sample == e.in_sample], colour, 1.4, DASHES[2]))
        d.add(Line([axes.at(n, e.honest.value) for n, e in points if e.honest], colour, 2))
        for n, e in points:
            told = f"{curve.method}, n = {n}, {len(e.names)} members"
            if e.in_sample == e.in_sample:
                d.add(Mark(axes.at(n, e.in_sample), colour, shape, 3, True, f"{told}: in-sample {number(e.in_sample)}"))
            if e.honest:
                large = 6.5 if n == curve.used else 3.6
                told = f"{told}: honest {number(e.honest.value)}" + (" (the size in use)" if n == curve.used else "")
                d.add(Mark(axes.at(n, e.honest.value), colour, shape, large, title=told))
            d.rows.append([
                curve.method, str(n), str(len(e.names)), number(e.in_sample),
                *([number(v) for v in (e.honest.value, e.honest.low, e.honest.high)] if e.honest else ["-"] * 3),
            ])  # fmt: skip
    return d


def diversity(facts: Facts) -> Drawing:
    """Each member's score against its mean similarity to the others."""
    d = Drawing(
        "diversity",
        "Score and diversity of members",
        f"A mark for each of {len(facts.shown)} members: its {facts.score_name} on dev, upwards, and its mean "
        f"{facts.similarity} similarity to the others, to the right. Members of the ensemble are ringed.",
        WIDTH,
        HEIGHT,
        ["member", facts.score_name, f"mean {facts.similarity} similarity", "in the ensemble"],
    )
    mean = facts.mean_similarity
    keys = [Key(f"in {facts.method}", "accent", "circle"), Key("not in it", "s5", "diamond", True)]
    top = legend(d, 56, 6, WIDTH - 8, keys) + 8
    axes = Axes(d, (56, top, WIDTH - 12, HEIGHT - 48), span(mean), span(facts.scores))
    axes.frame(
        f"mean {facts.similarity} similarity to the others (to the left: more diverse)", f"{facts.score_name} on dev"
    )
    inside = [r.name in facts.chosen for r in facts.shown]
    for i in sorted(range(len(facts.shown)), key=lambda i: inside[i]):  # the ensemble on top
        name = facts.shown[i].name
        told = f"{name}: {facts.score_name} {number(facts.scores[i])}, mean similarity {number(mean[i])}"
        at = axes.at(mean[i], facts.scores[i])
        d.add(
            Mark(at, "accent", "circle", 4.4, title=told) if inside[i] else Mark(at, "s5", "diamond", 3.2, True, told)
        )
    for i, record in enumerate(facts.shown):
        d.rows.append([record.name, number(facts.scores[i]), number(mean[i]), "yes" if inside[i] else "no"])
    return d


def score_by_rank(facts: Facts) -> Drawing:
    """Score against rank (Tolkunov, figure 3): a line per scaling through the means, a level per system.

    Members without a rank, or of rank 0 (only the head was trained), stand at 0 and on no line.
    """
    scores, of = facts.comparison.estimates.scores, facts.comparison.estimates.of
    records = [r for r in facts.comparison.task_pool.members if r.name in scores]
    shown = {r.name for r in facts.shown}
    d = Drawing(
        "score-by-rank",
        "Score by rank",
        f"{facts.score_name} on dev of members against their rank r, a line for each scaling c through the means; "
        "levels of the single best, of Omni and of the ensemble.",
        WIDTH,
        HEIGHT + 20,
        ["scaling c", "rank r", "members", f"mean {facts.score_name}", "best"],
    )
    groups: dict[tuple[float | None, int], list[float]] = {}
    for r in records:
        groups.setdefault((r.scaling if r.rank else None, r.rank or 0), []).append(scores[r.name])
    scalings = sorted({c for c, rank in groups if rank and c is not None})
    series: list[float | None] = [*scalings, *([None] if any(rank and c is None for c, rank in groups) else [])]
    looks = {
        c: ("s5" if c is None else f"s{i % (SERIES - 1)}", SHAPES[i % len(SHAPES)], DASHES[i % len(DASHES)])
        for i, c in enumerate(series)
    }
    systems = {
        m: of[m].in_sample for m in dict.fromkeys(("best", "omni", facts.method)) if not np.isnan(of[m].in_sample)
    }
    levels = {"best": ("soft", (1, 3)), "omni": ("ink", (6, 3))} | {facts.method: ("accent", ())}
    keys = [Key("no scaling" if c is None else f"c = {c:g}", *looks[c][:2], dash=looks[c][2]) for c in series]
    keys += [Key("no rank (at 0)", "ink", "plus")] if any(not rank for _, rank in groups) else []
    keys += [Key("in the ensemble", "accent", "circle", True)]
    keys += [Key(f"{NAMES.get(m, m)}: {s:.3f}", levels[m][0], dash=levels[m][1]) for m, s in systems.items()]
    top = legend(d, 56, 6, WIDTH - 8, keys) + 8
    ranks = [rank for _, rank in groups]
    axes = Axes(
        d, (56, top, WIDTH - 12, d.height - 48), span(ranks, least=2), span([*scores.values(), *systems.values()])
    )
    axes.frame("rank r", f"{facts.score_name} on dev, in-sample", whole=True)
    for m, s in systems.items():
        d.add(Line([(axes.left, axes.y(s)), (axes.right, axes.y(s))], levels[m][0], 1.5, levels[m][1]))
    for c in series:
        colour, _, dash = looks[c]
        line = sorted((rank, float(np.mean(v))) for (own, rank), v in groups.items() if own == c and rank)
        d.add(Line([axes.at(*point) for point in line], colour, 1.7, dash))
    for r in records:
        if r.name not in shown:
            continue
        at = axes.at(r.rank or 0, scores[r.name])
        colour, shape, _ = looks[r.scaling] if r.rank else ("ink", SHAPES[5], ())
        if r.name in facts.chosen:
            d.add(Mark(at, "accent", "circle", 7.5, True))
        d.add(Mark(at, colour, shape, 3.4, title=f"{r.name}: {facts.score_name} {number(scores[r.name])}"))
    for (c, rank), v in sorted(groups.items(), key=lambda item: (item[0][0] is None, item[0][0] or 0, item[0][1])):
        d.rows.append(
            ["-" if c is None else f"{c:g}", str(rank or "-"), str(len(v)), number(float(np.mean(v))), number(max(v))]
        )
    return d


def reliability(facts: Facts) -> Drawing:
    """Reliability diagram: what was said, and how often it came true."""
    binary = facts.comparison.kind == "binary"
    what = "probability of class 1" if binary else "confidence (probability of the decision)"
    true = "share that is class 1" if binary else "share that is right"
    held = "held-out" if facts.comparison.estimates.repeats else "in-sample"
    d = Drawing(
        "calibration",
        f"Reliability of the {held} probabilities",
        f"For each tenth of the {what}: its mean, to the right, and the {true}, upwards. Well calibrated is the "
        "diagonal. Larger marks have more predictions.",
        WIDTH,
        HEIGHT + 20,
        ["method", "bin", "predictions", f"mean {what}", true],
    )
    colours = ("s0", "s2", "accent")
    looks = [
        (m, c, "accent" if m == facts.method else colours[i], SHAPES[i], DASHES[(i + 1) % 3])
        for i, (m, c) in enumerate(facts.calibrations.items())
    ]
    keys = [Key(f"{NAMES.get(m, m)}: ECE {c.ece:.3f}", colour, shape, dash=dash) for m, c, colour, shape, dash in looks]
    top = legend(d, 56, 6, WIDTH - 8, keys) + 8
    axes = Axes(d, (56, top, WIDTH - 12, d.height - 48), (0, 1), (0, 1))
    axes.frame(f"{what}, {held}", true)
    d.add(Line([axes.at(0, 0), axes.at(1, 1)], "soft", 1.2, (4, 4)))
    for m, c, colour, shape, dash in looks:
        filled = np.flatnonzero(c.counts)
        d.add(Line([axes.at(c.said[i], c.came_true[i]) for i in filled], colour, 1.7, dash))
        for i in filled:
            share = c.counts[i] / c.counts.sum()
            told = f"{NAMES.get(m, m)}: said {c.said[i]:.3f}, came true {c.came_true[i]:.3f}, {c.counts[i]} predictions"
            d.add(Mark(axes.at(c.said[i], c.came_true[i]), colour, shape, 3 + 7 * float(np.sqrt(share)), title=told))
            d.rows.append([
                NAMES.get(m, m), f"{i / 10:.1f} to {(i + 1) / 10:.1f}", str(c.counts[i]), number(c.said[i]),
                number(c.came_true[i]),
            ])  # fmt: skip
    return d
