"""The plots of a report, but for the heat map: each from the facts, with the numbers that it shows as a table.

Axes: S members that are shown.
"""

from __future__ import annotations

from collections.abc import Iterable

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
    if facts.comparison.kind == "regression":
        absent["calibration"] = "A regression gives values, not probabilities, so there is no calibration."
    return absent


def _cells(e: Estimate) -> list[str]:
    """Members, in-sample score, honest estimate and the ends of its interval, as texts."""
    honest = [number(v) for v in (e.honest.value, e.honest.low, e.honest.high)] if e.honest else ["-"] * 3
    return [str(len(e.names)), number(e.in_sample), *honest]


def _ends(estimates: Iterable[Estimate]) -> list[float]:
    """All scores of these estimates."""
    return [v for e in estimates for v in (e.in_sample, *((e.honest.low, e.honest.high) if e.honest else ()))]


def _held(facts: Facts, e: Estimate) -> list[int]:
    """The places among the members that are shown of an ensemble's members."""
    inside = set(e.names)
    return [i for i, r in enumerate(facts.shown) if r.name in inside]


def methods(facts: Facts) -> Plot:
    """Every method's honest estimate with its interval, and its in-sample score."""
    of = facts.comparison.estimates.of
    header, rows = ["method", "members", "in-sample", *HONEST], [[display_name(m), *_cells(e)] for m, e in of.items()]
    looks = [
        Look("honest", SERIES[0]),
        Look("in-sample", SERIES[0], "diamond", hollow=True),
        Look(f"honest, {facts.method}", ACCENT),
        Look(f"in-sample, {facts.method}", ACCENT, "diamond", hollow=True),
    ]
    drawn = []
    for (m, e), row in zip(of.items(), rows, strict=True):
        who = f", {facts.method}" if m == facts.method else ""
        common = dict(zip(header, row, strict=True)) | {"y": row[0], "holds": _held(facts, e), "own": m == facts.method}
        drawn.append(common | {"series": f"in-sample{who}", "x": e.in_sample})
        if e.honest:
            drawn.append(common | {"series": f"honest{who}", "x": e.honest.value, "x2": e.honest.low, "x3": e.honest.high})
    points, lines, _ = channels(looks, WIDE)
    own = {"condition": {"test": f"datum.value == '{display_name(facts.method)}'", "value": "bold"}, "value": "normal"}
    names = alt.Axis(title=None, grid=False, labelFontSize=13, labelColor=INK, labelFontWeight=own, domain=False)
    y = alt.Y("y:N", sort=[row[0] for row in rows], axis=names)
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=span(_ends(of.values())), nice=False, zero=False),
        axis=alt.Axis(title=f"{facts.score_name} on dev", tickCount=8),
    )
    values = chart(drawn)
    honest = values.transform_filter("isValid(datum.x2)")
    said = honest.mark_text(align="left", fontSize=13).encode(x=alt.value(WIDE + 12), y=y, text="honest:N")
    layers = (
        values.transform_filter("datum.own").mark_rect(color="var(--wash)").encode(y=y),
        honest.mark_rule(strokeWidth=2.4).encode(lines[0], x=x.copy(), x2="x3:Q", y=y).transform_calculate(x="datum.x2"),
        values.mark_point(size=90).encode(*points, x=x, y=y, tooltip=tooltip(header)),
        said,
        rings(drawn, x=x, y=y),
    )
    return Plot(
        name="methods",
        title="Scores of all methods",
        description=f"A row for each of {len(of)} methods: the in-sample score and, where it is known, the honest "
        f"estimate with its {LEVEL:.0%} interval. {facts.method}, the method of this report, is marked.",
        chart=alt.layer(*layers).properties(width=WIDE, height=alt.Step(30)),
        header=header,
        rows=rows,
    )


def by_size(facts: Facts) -> Plot:
    """Score against the number of members, in-sample and honest."""
    header, rows = ["method", "n", "members", "in-sample", *HONEST], []
    looks, drawn, bands = [], [], []
    for i, curve in enumerate(facts.curves):
        colour = ACCENT if curve.method == facts.method else SERIES[0]
        honest, in_sample = f"{curve.method} ({curve.of_n}), honest", f"{curve.method}, in-sample"
        looks += [Look(honest, colour, SHAPES[i])] if curve.estimates[0].honest else []
        looks += [Look(in_sample, colour, SHAPES[i], DASHES[2], hollow=True)]
        for n, e in zip(curve.sizes, curve.estimates, strict=True):
            rows.append([curve.method, str(n), *_cells(e)])
            common = dict(zip(header, rows[-1], strict=True)) | {"x": n, "holds": _held(facts, e), "size": 45}
            drawn.append(common | {"series": in_sample, "y": e.in_sample})
            if e.honest:
                drawn.append(common | {"series": honest, "y": e.honest.value, "size": 180 if n == curve.used else 60})
                bands.append({"series": honest, "x": n, "y": e.honest.low, "y2": e.honest.high})
    points, lines, areas = channels(looks, WIDE)
    most = max(c.sizes[-1] for c in facts.curves)
    shown = span(_ends(e for c in facts.curves for e in c.estimates))
    at = axes("n", [0, most * 1.03], f"{facts.score_name} on dev", shown, whole=True)
    size = alt.Size("size:Q", scale=None, legend=None)
    layers = (
        chart(bands).mark_area(fillOpacity=0.16).encode(*areas, **at, y2="y2:Q"),
        chart(drawn).mark_line().encode(*lines, **at),
        chart(drawn).mark_point().encode(*points, **at, size=size, tooltip=tooltip(header)),
        rings(drawn, **at),
    )
    return Plot(
        name="size",
        title="Score by size of the ensemble",
        description=f"For {' and '.join(c.method for c in facts.curves)}: the in-sample score, dotted, and the honest "
        f"estimate, solid with its {LEVEL:.0%} interval, for growing n.",
        chart=alt.layer(*layers).properties(width=WIDE, height=HEIGHT),
        header=header,
        rows=rows,
    )


def diversity(facts: Facts) -> Plot:
    """Each member's score against its mean similarity to the others."""
    header, rows = members_table(facts)
    chosen = set(facts.estimate.names)
    looks = [Look("not in it", SERIES[5], "diamond", hollow=True), Look(f"in {facts.method}", ACCENT)]
    values = zip(facts.shown, facts.mean_similarity.tolist(), facts.scores.tolist(), rows, strict=True)
    drawn = [
        dict(zip(header, row, strict=True))
        | {"x": x, "y": y, "holds": [i], "series": looks[r.name in chosen].series}
        for i, (r, x, y, row) in enumerate(values)
    ]
    drawn.sort(key=lambda row: row["series"] == looks[1].series)  # the ensemble on top
    at = axes(
        f"mean {facts.similarity} similarity to the others (to the left: more diverse)",
        span(facts.mean_similarity),
        f"{facts.score_name} on dev",
        span(facts.scores),
    )
    points, _, _ = channels(looks, WIDTH)
    layers = chart(drawn).mark_point(size=60).encode(*points, **at, tooltip=tooltip(header)), rings(drawn, **at)
    return Plot(
        name="diversity",
        title="Score and diversity of members",
        description=f"A mark for each of {len(facts.shown)} members: its {facts.score_name} on dev, upwards, and its "
        f"mean {facts.similarity} similarity to the others, to the right. Members of the ensemble are round.",
        chart=alt.layer(*layers).properties(width=WIDTH, height=HEIGHT),
    )


def score_by_rank(facts: Facts) -> Plot:
    """Score against rank (Tolkunov, figure 3): a line per scaling through the means, a level per system.

    Members without a rank, or of rank 0 (only the head was trained), stand at 0 and on no line.
    """
    scores, of = facts.comparison.estimates.scores, facts.comparison.estimates.of
    groups: dict[tuple[float | None, int], list[float]] = {}
    for r in facts.comparison.task_pool.members:
        if r.name in scores:
            groups.setdefault((r.scaling if r.rank else None, r.rank or 0), []).append(scores[r.name])
    names = {key: _series(*key) for key in sorted(groups, key=lambda key: (not key[1], key[0] is None, key[0] or 0, key[1]))}
    looks = [
        Look("no rank (at 0)", INK, SHAPES[5])
        if name == "no rank (at 0)"
        else Look(name, SERIES[i % 6], SHAPES[i % 5], DASHES[i % 4])
        for i, name in enumerate(dict.fromkeys(names.values()))
    ]
    level_looks = {"best": (SOFT, (1, 3)), "omni": (INK, (6, 3))} | {facts.method: (ACCENT, DASHES[0])}
    levels = [(m, s) for m in dict.fromkeys(("best", "omni", facts.method)) if (s := of[m].in_sample) == s]
    looks += [Look(f"{display_name(m)}: {s:.3f}", level_looks[m][0], "stroke", level_looks[m][1]) for m, s in levels]
    points, lines, _ = channels(looks, WIDTH)
    header, told = members_table(facts)
    drawn = [
        dict(zip(header, row, strict=True))
        | {"x": r.rank or 0, "y": float(y), "holds": [i], "series": names[r.scaling if r.rank else None, r.rank or 0]}
        for i, (r, y, row) in enumerate(zip(facts.shown, facts.scores, told, strict=True))
    ]
    means = [{"x": key[1], "y": float(np.mean(v)), "series": names[key]} for key, v in groups.items() if key[1]]
    at = axes(
        "rank r",
        span([rank for _, rank in groups], least=2),
        f"{facts.score_name} on dev, in-sample",
        span([*scores.values(), *(s for _, s in levels)]),
        whole=True,
    )
    rules = [{"y": s, "series": f"{display_name(m)}: {s:.3f}"} for m, s in levels]
    inside = [row for row in drawn if row[f"in {facts.method}"] == "yes"]
    layers = (
        chart(rules).mark_rule(strokeWidth=1.6).encode(*lines, y=at["y"]),
        chart(means).mark_line(strokeWidth=1.7).encode(*lines, **at),
        chart(inside).mark_point(size=190, filled=False, stroke=ACCENT).encode(**at),
        chart(drawn).mark_point(size=50).encode(*points, **at, tooltip=tooltip(header)),
        rings(drawn, **at),
    )
    return Plot(
        name="score-by-rank",
        title="Score by rank",
        description=f"{facts.score_name} on dev of members against their rank r, a line for each scaling c through the "
        "means; levels of the single best, of Omni and of the ensemble, whose members are ringed.",
        chart=alt.layer(*layers).properties(width=WIDTH, height=HEIGHT),
        header=["scaling c", "rank r", "members", f"mean {facts.score_name}", "best"],
        rows=[
            ["-" if c is None else f"{c:g}", str(rank or "-"), str(len(v)), number(float(np.mean(v))), number(max(v))]
            for (c, rank), v in sorted(groups.items(), key=lambda g: (g[0][0] is None, g[0][0] or 0, g[0][1]))
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
    header, rows, looks, drawn = ["method", "bin", "predictions", f"mean {what}", true], [], [], []
    for i, (m, c) in enumerate(facts.calibrations.items()):
        colour = ACCENT if m == facts.method else SERIES[2 * i]
        looks.append(Look(f"{display_name(m)}: ECE {c.ece:.3f}", colour, SHAPES[i], DASHES[(i + 1) % 3]))
        places = _held(facts, facts.comparison.estimates.of[m])
        for b in np.flatnonzero(c.counts):
            x, y, count = float(c.said[b]), float(c.came_true[b]), int(c.counts[b])
            rows.append([display_name(m), f"{b / 10:.1f} to {(b + 1) / 10:.1f}", str(count), number(x), number(y)])
            size = 30 + 600 * count / int(c.counts.sum())
            row = {"x": x, "y": y, "size": size, "series": looks[-1].series, "holds": places}
            drawn.append(dict(zip(header, rows[-1], strict=True)) | row)
    points, lines, _ = channels(looks, WIDTH)
    at = axes(f"{what}, {held}", [0, 1], true, [0, 1])
    size = alt.Size("size:Q", scale=None, legend=None)
    layers = (
        chart([{"x": v, "y": v} for v in (0, 1)]).mark_line(stroke=SOFT, strokeWidth=1.2, strokeDash=[4, 4]).encode(**at),
        chart(drawn).mark_line(strokeWidth=1.7).encode(*lines, **at),
        chart(drawn).mark_point().encode(*points, **at, size=size, tooltip=tooltip(header)),
        rings(drawn, **at),
    )
    return Plot(
        name="calibration",
        title=f"Reliability of the {held} probabilities",
        description=f"For each tenth of the {what}: its mean, to the right, and the {true}, upwards. Well calibrated "
        "is the diagonal. Larger marks have more predictions.",
        chart=alt.layer(*layers).properties(width=WIDTH, height=HEIGHT + 60),
        header=header,
        rows=rows,
    )
