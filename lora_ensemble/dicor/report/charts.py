"""The plots of a report, but for the heat map: each from the facts, with the numbers that it shows as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import altair as alt
import numpy as np

from lora_ensemble.dicor.estimate.honest import Estimate
from lora_ensemble.dicor.estimate.interval import LEVEL
from lora_ensemble.dicor.report.facts import Facts, display_name, members_table
from lora_ensemble.dicor.report.heat_map import heat_map
from lora_ensemble.dicor.report.plot import (
    ACCENT,
    DASHES,
    INK,
    SERIES,
    SHAPES,
    SOFT,
    Look,
    Plot,
    axes,
    channels,
    chart,
    rings,
    span,
    tooltip,
)
from lora_ensemble.dicor.table import number

WIDTH, WIDE, HEIGHT = 480, 640, 320
HONEST = ["honest", "from", "to"]
SIZE = alt.Size("size:Q", scale=None, legend=None)


def plots(facts: Facts) -> dict[str, Plot]:
    """All plots that these facts are enough for, by name; ``missing`` says why one is not there."""
    absent = missing(facts)
    makers = {
        "methods": methods,
        "similarity": heat_map,
        "diversity": diversity,
        "score-by-rank": score_by_rank,
        "size": by_size,
        "calibration": reliability,
    }
    return {name: make(facts) for name, make in makers.items() if name not in absent}


def missing(facts: Facts) -> dict[str, str]:
    """Name of a plot to why it is not there, in a sentence."""
    absent = {}
    if len(facts.shown) < 2:
        alone = "The pool has one member, so there is nothing to compare it with."
        absent = dict.fromkeys(("similarity", "diversity", "size"), alone)
    elif not facts.curves:
        absent["size"] = "The single best member has no size to vary."
    if all(not r.rank for r in facts.comparison.task_pool.members):
        absent["score-by-rank"] = (
            "No member has a rank: they were imported, or only their heads were trained, so there is no score by rank."
        )
    if facts.regression:
        absent["calibration"] = "A regression gives values, not probabilities, so there is no calibration."
    return absent


def _cells(e: Estimate) -> list[str]:
    """Members, in-sample score, honest estimate and the ends of its interval, as texts."""
    honest = [number(v) for v in (e.honest.value, e.honest.low, e.honest.high)] if e.honest else ["-"] * 3
    return [str(len(e.names)), number(e.in_sample), *honest]


def _scores(estimates: Iterable[Estimate]) -> list[float]:
    return [v for e in estimates for v in (e.in_sample, *((e.honest.low, e.honest.high) if e.honest else ()))]


def _held(facts: Facts, e: Estimate) -> list[int]:
    """The places among the members that are shown of an ensemble's members."""
    return [i for i, r in enumerate(facts.shown) if r.name in set(e.names)]


def _members(facts: Facts) -> list[dict[str, Any]]:
    """What is told of each member that is shown, and its place."""
    header, rows = members_table(facts)
    return [dict(zip(header, row, strict=True)) | {"holds": [i]} for i, row in enumerate(rows)]


def methods(facts: Facts) -> Plot:
    """Every method's honest estimate with its interval, and its in-sample score."""
    of, own = facts.comparison.estimates.of, display_name(facts.method)
    header, rows = ["method", "members", "in-sample", *HONEST], [[display_name(m), *_cells(e)] for m, e in of.items()]
    looks, values = [], []
    for colour, who in ((SERIES[0], ""), (ACCENT, f", {facts.method}")):
        looks += [Look(f"honest{who}", colour), Look(f"in-sample{who}", colour, "diamond", hollow=True)]
    for row, e in zip(rows, of.values(), strict=True):
        who = f", {facts.method}" if row[0] == own else ""
        told = dict(zip(header, row, strict=True)) | {"y": row[0], "holds": _held(facts, e)}
        values.append(told | {"series": f"in-sample{who}", "x": e.in_sample})
        if e.honest:
            values.append(told | {"series": f"honest{who}", "x": e.honest.value, "a": e.honest.low, "b": e.honest.high})
    points, lines, _ = channels(looks, WIDE)
    x = axes(f"{facts.score_name} on {facts.split}", span(_scores(of.values())), "", [0, 1])["x"]
    names = alt.Axis(
        title=None, grid=False, domain=False, labelFontSize=13, labelColor=INK,
        labelFontWeight={"condition": {"test": f"datum.value == '{own}'", "value": "bold"}, "value": "normal"},
        minExtent=8.6 * max(len(row[0]) for row in rows),  # a reader's font may be wider than the one that measures
    )  # fmt: skip
    y = alt.Y("y:N", sort=[row[0] for row in rows], axis=names)
    drawn = chart(values)
    honest = drawn.transform_filter("isValid(datum.a)")
    layers = [
        drawn.transform_filter(f"datum.y == '{own}'").mark_rect(color="var(--wash)").encode(y=y),
        honest.transform_calculate(x="datum.a").mark_rule(strokeWidth=2.4).encode(lines[0], x=x, x2="b:Q", y=y),
        drawn.mark_point(size=90).encode(*points, x=x, y=y, tooltip=tooltip(header)),
        honest.mark_text(align="left", fontSize=13).encode(x=alt.value(WIDE + 12), y=y, text="honest:N"),
        rings(values, x=x, y=y),
    ]
    return Plot(
        name="methods",
        title="Scores of all methods",
        description=f"A row for each of {len(of)} methods: the in-sample score and, where it is known, the honest "
        f"estimate with its {LEVEL:.0%} interval. {facts.method}, the method of this report, is marked.",
        chart=alt.layer(*layers, width=WIDE, height=alt.Step(30)),
        header=header,
        rows=rows,
    )


def by_size(facts: Facts) -> Plot:
    """Score against the number of members, in-sample and honest."""
    header, rows = ["method", "n", "members", "in-sample", *HONEST], list[list[str]]()
    looks, values, bands = [], [], []
    for curve, shape in zip(facts.curves, SHAPES, strict=False):
        colour = ACCENT if curve.method == facts.method else SERIES[0]
        honest, in_sample = f"{curve.method} ({curve.of_n}), honest", f"{curve.method}, in-sample"
        looks += [Look(honest, colour, shape)] if curve.estimates[0].honest else []
        looks += [Look(in_sample, colour, shape, DASHES[2], hollow=True)]
        for n, e in zip(curve.sizes, curve.estimates, strict=True):
            rows.append([curve.method, str(n), *_cells(e)])
            told = dict(zip(header, rows[-1], strict=True)) | {"x": n, "holds": _held(facts, e)}
            values.append(told | {"series": in_sample, "y": e.in_sample, "size": 45})
            if e.honest:
                values.append(told | {"series": honest, "y": e.honest.value, "size": 180 if n == curve.used else 60})
                bands.append({"series": honest, "x": n, "y": e.honest.low, "y2": e.honest.high})
    points, lines, areas = channels(looks, WIDE)
    most = max(c.sizes[-1] for c in facts.curves)
    scores = span(_scores(e for c in facts.curves for e in c.estimates))
    at = axes("n", [0, most * 1.03], f"{facts.score_name} on {facts.split}", scores, whole=True)
    layers = [
        chart(bands).mark_area(fillOpacity=0.16).encode(*areas, **at, y2="y2:Q"),
        chart(values).mark_line().encode(*lines, **at),
        chart(values).mark_point().encode(*points, **at, size=SIZE, tooltip=tooltip(header)),
        rings(values, **at),
    ]
    return Plot(
        name="size",
        title="Score by size of the ensemble",
        description=f"For {' and '.join(c.method for c in facts.curves)}: the in-sample score, dotted, and the honest "
        f"estimate, solid with its {LEVEL:.0%} interval, for growing n.",
        chart=alt.layer(*layers, width=WIDE, height=HEIGHT),
        header=header,
        rows=rows,
    )


def diversity(facts: Facts) -> Plot:
    """Each member's score against its mean similarity to the others."""
    inside = f"in {facts.method}"
    looks = [Look("not in it", SERIES[5], "diamond", hollow=True), Look(inside, ACCENT)]
    values = [
        row | {"x": float(x), "y": float(y), "series": looks[row[inside] == "yes"].series}
        for row, x, y in zip(_members(facts), facts.mean_similarity, facts.scores, strict=True)
    ]
    values.sort(key=lambda row: row["series"] == inside)  # the ensemble on top
    x = f"mean {facts.similarity} similarity to the others (to the left: more diverse)"
    at = axes(x, span(facts.mean_similarity), f"{facts.score_name} on {facts.split}", span(facts.scores))
    points, _, _ = channels(looks, WIDTH)
    told = tooltip(members_table(facts)[0])
    layers = [chart(values).mark_point(size=60).encode(*points, **at, tooltip=told), rings(values, **at)]
    return Plot(
        name="diversity",
        title="Score and diversity of members",
        description=f"A mark for each of {len(facts.shown)} members: its {facts.score_name} on {facts.split}, upwards, "
        f"and its mean {facts.similarity} similarity to the others, to the right. Members of the ensemble are round.",
        chart=alt.layer(*layers, width=WIDTH, height=HEIGHT),
    )


def score_by_rank(facts: Facts) -> Plot:
    """Score against rank (Tolkunov, figure 3): a line per scaling; members without a rank stand at 0, on no line."""
    scores, of = facts.comparison.estimates.scores, facts.comparison.estimates.of
    found: dict[tuple[float | None, int], list[float]] = {}
    for r in facts.comparison.task_pool.members:
        if r.name in scores:
            found.setdefault((r.scaling if r.rank else None, r.rank or 0), []).append(scores[r.name])
    groups = {key: found[key] for key in sorted(found, key=lambda key: (key[0] is None, key[0] or 0, key[1]))}
    series = dict.fromkeys(_series(*key) for key in groups)
    looks = [Look(name, SERIES[i % 6], SHAPES[i % 6], DASHES[i % 4]) for i, name in enumerate(series)]
    level_looks = {"best": (SOFT, (1, 3)), "omni": (INK, (6, 3))} | {facts.method: (ACCENT, DASHES[0])}
    levels = {m: score for m in level_looks if (score := of[m].in_sample) == score}
    level_names = {m: f"{display_name(m)}: {score:.3f}" for m, score in levels.items()}
    looks += [Look(level_names[m], level_looks[m][0], "stroke", level_looks[m][1]) for m in levels]
    points, lines, _ = channels(looks, WIDTH)
    values = [
        row | {"x": r.rank or 0, "y": float(y), "series": _series(r.scaling, r.rank or 0)}
        for row, r, y in zip(_members(facts), facts.shown, facts.scores, strict=True)
    ]
    best = max if facts.comparison.score.sign > 0 else min
    means = [{"x": k[1], "y": float(np.mean(v)), "series": _series(*k)} for k, v in groups.items() if k[1]]
    y_range = span([*scores.values(), *levels.values()])
    x_range = span([rank for _, rank in groups], least=2)
    at = axes("rank r", x_range, f"{facts.score_name} on {facts.split}, in-sample", y_range, whole=True)
    inside = chart(values).transform_filter(f"datum['in {facts.method}'] == 'yes'")
    told = tooltip(members_table(facts)[0])
    layers = [
        chart({"y": levels[m], "series": level_names[m]} for m in levels)
        .mark_rule(strokeWidth=1.6)
        .encode(*lines, y=at["y"]),
        chart(means).mark_line(strokeWidth=1.7).encode(*lines, **at),
        inside.mark_point(size=190, filled=False, stroke=ACCENT).encode(**at),
        chart(values).mark_point(size=50).encode(*points, **at, tooltip=told),
        rings(values, **at),
    ]
    return Plot(
        name="score-by-rank",
        title="Score by rank",
        description=f"{facts.score_name} on {facts.split} of members against their rank r, a line for each scaling c "
        "through the means; levels of the single best, of Omni and of the ensemble, whose members are ringed.",
        chart=alt.layer(*layers, width=WIDTH, height=HEIGHT),
        header=["scaling c", "rank r", "members", f"mean {facts.score_name}", "best"],
        rows=[
            ["-" if c is None else f"{c:g}", str(rank or "-"), str(len(v)), number(float(np.mean(v))), number(best(v))]
            for (c, rank), v in groups.items()
        ],
    )


def _series(scaling: float | None, rank: int) -> str:
    return "no rank (at 0)" if not rank else "no scaling" if scaling is None else f"c = {scaling:g}"


def reliability(facts: Facts) -> Plot:
    """Reliability diagram: what was said, and how often it came true."""
    binary = facts.comparison.kind == "binary"
    what = "probability of class 1" if binary else "confidence (probability of the decision)"
    true = "share that is class 1" if binary else "share that is right"
    held = "held-out" if facts.comparison.estimates.repeats else "in-sample"
    header, rows = ["method", "bin", "predictions", f"mean {what}", true], list[list[str]]()
    looks, values = [], []
    for i, (m, c) in enumerate(facts.calibrations.items()):
        colour = ACCENT if m == facts.method else SERIES[2 * i]
        looks.append(Look(f"{display_name(m)}: ECE {c.ece:.3f}", colour, SHAPES[i], DASHES[(i + 1) % 3]))
        row = {"series": looks[-1].series, "holds": _held(facts, facts.comparison.estimates.of[m])}
        for b in np.flatnonzero(c.counts):
            x, y, count = float(c.said[b]), float(c.came_true[b]), int(c.counts[b])
            rows.append([display_name(m), f"{b / 10:.1f} to {(b + 1) / 10:.1f}", str(count), number(x), number(y)])
            size = 30 + 600 * count / int(c.counts.sum())
            values.append(dict(zip(header, rows[-1], strict=True)) | row | {"x": x, "y": y, "size": size})
    points, lines, _ = channels(looks, WIDTH)
    at = axes(f"{what}, {held}", [0, 1], true, [0, 1])
    diagonal = chart([{"x": 0, "y": 0}, {"x": 1, "y": 1}])
    layers = [
        diagonal.mark_line(stroke=SOFT, strokeWidth=1.2, strokeDash=[4, 4]).encode(**at),
        chart(values).mark_line(strokeWidth=1.7).encode(*lines, **at),
        chart(values).mark_point().encode(*points, **at, size=SIZE, tooltip=tooltip(header)),
        rings(values, **at),
    ]
    return Plot(
        name="calibration",
        title=f"Reliability of the {held} probabilities",
        description=f"For each tenth of the {what}: its mean, to the right, and the {true}, upwards. Well calibrated "
        "is the diagonal. Larger marks have more predictions.",
        chart=alt.layer(*layers, width=WIDTH, height=HEIGHT + 60),
        header=header,
        rows=rows,
    )
