"""The clustered heat map of similarities with side bars for rank and scaling (Tolkunov, figure 1)."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
from scipy.cluster.hierarchy import cut_tree, dendrogram, leaves_list, linkage
from scipy.spatial.distance import squareform

from lora_ensemble.dicor.report.facts import Facts, members_table
from lora_ensemble.dicor.report.plot import ACCENT, INK, SERIES, SOFT, Plot, chart, tooltip
from lora_ensemble.dicor.table import number

LEVELS = 12  # steps of the scale: h0, the least, to h11
MOST_LABELS = 48  # more members than this cannot be labelled by name and still be read
MOST_IN_TABLE = 40  # more columns than this are no table to read
MOST_STILL = 30  # with more groups than this a PNG is smaller than an SVG
MOST_GROUPS = 60  # with more, those that are joined first share a row: forty thousand squares are slow


def cluster_order(similarities: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Members in an order with similar ones side by side, and the tree: average linkage of 1 - similarity (S, S)."""
    # Symmetric and zero on the diagonal but for rounding; squareform wants it exactly so.
    distance = np.clip(1 - (similarities + similarities.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance), method="average", optimal_ordering=True)
    return leaves_list(tree).tolist(), tree


def gathered(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean similarities (G, G) of groups, of two different members each, from those of members (S, S).

    ``groups`` (G,): the first member of each.
    """
    counts = np.diff(groups, append=len(values)).astype(float)
    sums = np.add.reduceat(np.add.reduceat(values, groups, axis=0), groups, axis=1)
    pairs = np.outer(counts, counts)
    several = np.diag(counts > 1)
    sums[several] -= counts[counts > 1]
    pairs[several] -= counts[counts > 1]
    return np.asarray(sums / pairs)


def heat_map(facts: Facts) -> Plot:
    """The similarities of the members that are shown, in the order of the clustering."""
    order, tree = cluster_order(facts.similarities)
    s = len(order)
    side = s * max(round(float(np.clip(28 * s, 220, 500)) / s), 2)  # whole pixels a row: a picture compresses well
    values = facts.similarities[np.ix_(order, order)]
    starts = np.flatnonzero(np.diff(cut_tree(tree, min(s, MOST_GROUPS))[order, 0], prepend=-1))
    others = values[~np.eye(s, dtype=bool)]
    low, high = float(others.min()), float(others.max())
    low, high = (low, high) if high - low > 1e-6 else (min(low, 0.0), max(high, 1.0))
    header, table = members_table(facts)
    members = [
        dict(zip(header, table[i], strict=True))
        | {"y": y, "y2": y + 1, "rank": facts.shown[i].rank, "scaling": facts.shown[i].scaling, "holds": i}
        for y, i in enumerate(order)
    ]
    data = chart(members)
    rows = data.encode(y=_place(alt.Y, "y", s), y2="y2:Q")
    told = rows.mark_rect(opacity=0).encode(tooltip=tooltip(header))
    inside = rows.transform_filter(f"datum['in {facts.method}'] == 'yes'").mark_rect(color=ACCENT)
    inside = inside.encode(x=alt.value(14), x2=alt.value(26))
    band: dict[str, Any] = {"filled": False, "stroke": INK, "strokeWidth": 2}
    ticked = "indexof(ticked, datum.holds) >= 0"
    down = data.encode(x=_place(alt.X, "y", s), x2="y2:Q").transform_filter(ticked).mark_rect(**band)
    across = rows.transform_filter(ticked).mark_rect(**band)
    columns = [
        _branches(tree),
        _bars(rows, "rank", "rank r", SERIES[0]) + told,
        _bars(rows, "scaling", "scaling c", SERIES[1]) + told,
        (inside + told).properties(width=40, title=alt.Title("chosen", color=ACCENT, fontSize=11, offset=6)),
        alt.layer(_cells(facts, gathered(values, starts), [low, high]), across, down, width=side),
    ]
    if s <= MOST_LABELS:
        size = min(11.0, 0.86 * side / s)
        text = data.transform_calculate(y="datum.y + 0.5").mark_text(align="left", limit=220, fontSize=size)
        columns.append(text.encode(y=_place(alt.Y, "y", s), text="member:N").properties(width=1))
    plot = alt.hconcat(*(column.properties(height=side) for column in columns), spacing=5)
    whole = s <= MOST_IN_TABLE
    return Plot(
        name="similarity",
        title=f"Similarity of {s} members on {facts.split} ({facts.similarity})",
        description=f"A square for each pair of {s} members, the darker (in a dark dress the lighter) the more alike, "
        f"from {number(low)} to {number(high)}. Members are ordered by clustering; bars beside them show rank, scaling "
        f"and who is in {facts.method}.",
        chart=plot.add_params(*_groups(members, starts)),
        header=["member", *map(str, range(1, s + 1))] if whole else [],
        rows=[[f"{i + 1}. {m['member']}", *(f"{v:.3f}" for v in values[i])] for i, m in enumerate(members) if whole],
        picture=len(starts) > MOST_STILL,
    )


def _groups(members: list[dict[str, Any]], starts: np.ndarray) -> tuple[alt.Parameter, alt.Parameter]:
    """Names (G,) and places (G + 1,) of the groups that begin at ``starts`` (G,), for the marks to look up."""
    names, ends = [], [*starts.tolist(), len(members)]
    for start, count in zip(starts, np.diff(ends), strict=True):
        first = members[start]
        name = f"{first['member']} (rank {first['rank r']}, scaling {first['scaling c']})"
        names.append(name if count == 1 else f"{name} and {count - 1} like it")
    return alt.param(name="names", value=names), alt.param(name="ends", value=ends)


def _place(axis: Any, field: str, s: int) -> Any:
    """The places of S members along an axis, the first on the left or above."""
    domain = [0, s] if axis is alt.X else [s, 0]
    return axis(f"{field}:Q", scale=alt.Scale(domain=domain, nice=False, zero=False), axis=None)


def _branches(tree: np.ndarray) -> alt.Chart:
    """The tree of the clustering, from a little below the first merger: what is far from all leaves no empty width."""
    drawn, heights = dendrogram(tree, no_plot=True), tree[:, 2]
    near = max(float(heights.min()) - 0.1 * float(np.ptp(heights)), 0.0)
    points = [
        {"branch": branch, "order": i, "x": max(x, near), "y": y / 10}  # scipy's leaves are at 5, 15, 25, ...
        for branch, (xs, ys) in enumerate(zip(drawn["dcoord"], drawn["icoord"], strict=True))
        for i, (x, y) in enumerate(zip(xs, ys, strict=True))
    ]
    far = max(float(heights.max()), near + 1e-9)
    x = alt.X("x:Q", scale=alt.Scale(domain=[far, near], nice=False, zero=False), axis=None)
    line = chart(points).mark_line(stroke=SOFT, strokeWidth=0.8)
    y = _place(alt.Y, "y", len(tree) + 1)
    return line.encode(x=x, y=y, detail="branch:N", order="order:Q").properties(width=66)


def _bars(rows: alt.Chart, field: str, title: str, colour: str) -> alt.LayerChart:
    """A setting of each member as the length of a bar from 0; a short grey one where it is not known."""
    largest = max((row[field] for row in rows.data.values if row[field] is not None), default=0) or 1
    axis = alt.Axis(title=title, orient="top", values=[0, largest])
    x = alt.X(f"{field}:Q", scale=alt.Scale(domain=[0, largest], nice=False), axis=axis)
    known = rows.transform_filter(f"isValid(datum.{field})").mark_rect(color=colour).encode(x=x, x2=alt.datum(0))
    unknown = rows.transform_filter(f"!isValid(datum.{field})").mark_rect(color="var(--unknown)")
    return (known + unknown.encode(x=alt.value(0), x2=alt.value(4))).properties(width=36)


def _cells(facts: Facts, values: np.ndarray, domain: list[float]) -> alt.Chart:
    """A rectangle for each pair of groups, of similarities (G, G)."""
    pairs = [{"a": a, "b": b, "v": round(float(v), 4)} for (a, b), v in np.ndenumerate(values)]
    scale = alt.Scale(type="quantize", domain=domain, range=[f"var(--h{i})" for i in range(LEVELS)])
    legend = alt.Legend(title=f"{facts.similarity} similarity", format=".2f", direction="horizontal")
    s = len(facts.shown)
    placed = chart(pairs).transform_calculate(
        x="ends[datum.b]", x2="ends[datum.b + 1]", y="ends[datum.a]", y2="ends[datum.a + 1]",
        member="names[datum.a]", other="names[datum.b]", similarity="format(datum.v, '.4f')",
    ).mark_rect()  # fmt: skip
    at: dict[str, Any] = {"x": _place(alt.X, "x", s), "x2": "x2:Q", "y": _place(alt.Y, "y", s), "y2": "y2:Q"}
    told = [alt.Tooltip("member:N"), alt.Tooltip("other:N", title="and"), alt.Tooltip("similarity:N")]
    return placed.encode(**at, tooltip=told, fill=alt.Fill("v:Q", scale=scale, legend=legend))
