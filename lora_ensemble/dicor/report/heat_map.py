"""The clustered heat map of similarities with side bars for rank and scaling (Tolkunov, figure 1).

Axes: S members that are shown.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_ensemble.dicor.report.drawing import Box, Cells, Drawing, Line, Text, shortened, text_width
from lora_ensemble.dicor.report.facts import Facts
from lora_ensemble.dicor.report.palette import LEVELS
from lora_ensemble.dicor.table import number
from lora_ensemble.pool import MemberRecord

MOST_LABELS = 48  # more members than this cannot be labelled by name and still be read
MOST_IN_TABLE = 40  # more columns than this are no table to read
TREE, BAR, TOP = 74.0, 38.0, 74.0


def cluster_order(similarities: np.ndarray) -> tuple[list[int], Any]:
    """Order of the members that puts similar ones side by side, and the tree behind it, from similarities (S, S).

    The tree (scipy's linkage: average of 1 - similarity) is None for a single member.
    """
    if len(similarities) < 2:
        return [0], None
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    # Symmetric and zero on the diagonal but for rounding; squareform wants it exactly so.
    distance = np.clip(1 - (similarities + similarities.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance), method="average", optimal_ordering=True)
    return leaves_list(tree).tolist(), tree


def heat_map(facts: Facts) -> Drawing:
    """The similarities of the members that are shown, in the order of the clustering."""
    order, tree = cluster_order(facts.similarities)
    members = [facts.shown[i] for i in order]
    values = facts.similarities[np.ix_(order, order)]
    s, side = len(members), _side(len(members))
    row = side / s
    labelled = s <= MOST_LABELS
    names = [shortened(r.name, 34) for r in members] if labelled else []
    size = min(11.0, 0.86 * row) if labelled else 0.0
    left = TREE + 3 * BAR + 14
    room = 10 + max(text_width(n, size) for n in names) if names else 8.0
    low, high = _range(values)
    d = Drawing(
        "similarity",
        f"Similarity of {s} members on dev ({facts.similarity})",
        f"A square for each pair of {s} members, the darker (in a dark dress the lighter) the more alike, from "
        f"{number(low)} to {number(high)}. Members are ordered by clustering; bars beside them show rank, scaling and "
        f"who is in {facts.method}.",
        left + side + room,
        TOP + side + 26,
    )
    _branches(d, tree, s)
    _bars(d, facts, members, row)
    d.add(Cells(left, TOP, side, side, _levels(values, low, high)))
    _scale(d, facts, left + side, low, high)
    for i, name in enumerate(names):
        d.add(Text((left + side + 6, TOP + (i + 0.5) * row + size * 0.36), name, "ink", size=size))
    near = values - 2 * np.eye(s)
    most = np.argmax(near, axis=1)
    mean = facts.mean_similarity[order]
    for i, r in enumerate(members):  # a row's numbers where the pointer is
        told = f"{r.name}: rank {_known(r.rank)}, scaling {_known(r.scaling)}, mean similarity {number(mean[i])}, "
        told += f"most like {members[most[i]].name} ({number(near[i, most[i]])})"
        d.add(Box(TREE, TOP + i * row, left + side - TREE, row, "", told))
    if not labelled:
        d.add(Text((left + side / 2, TOP + side + 19), f"{s} members, in the order of the clustering", anchor="middle"))
    d.header = ["member", "rank r", "scaling c", f"in {facts.method}", "mean similarity", "most like", "its similarity"]
    whole = s <= MOST_IN_TABLE
    d.header += [str(i + 1) for i in range(s)] if whole else []
    for i, r in enumerate(members):
        inside = "yes" if r.name in facts.chosen else "no"
        own = [f"{i + 1}. {r.name}" if whole else r.name, _known(r.rank), _known(r.scaling), inside, number(mean[i])]
        own += [members[most[i]].name, number(near[i, most[i]])]
        d.rows.append(own + ([f"{v:.3f}" for v in values[i]] if whole else []))
    return d


def _side(s: int) -> float:
    """Of the square of S members: a few need less room."""
    return float(np.clip(28 * s, 220, 500))


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _range(values: np.ndarray) -> tuple[float, float]:
    """The least and the largest similarity (S, S) of two members; of a member to itself it is 1, and says nothing."""
    others = values[~np.eye(len(values), dtype=bool)]
    low, high = float(others.min()), float(others.max())
    return (low, high) if high - low > 1e-6 else (min(low, 0.0), max(high, 1.0))


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Similarities (S, S) from ``low`` to ``high`` as steps of the scale; what is above has the last."""
    return np.clip(((values - low) / (high - low) * LEVELS).astype(int), 0, LEVELS - 1)


def _branches(d: Drawing, tree: Any, s: int) -> None:
    from scipy.cluster.hierarchy import dendrogram

    drawn, heights = dendrogram(tree, no_plot=True), tree[:, 2]
    # From a little below the first merger: members that are far from each other would leave most of the width empty.
    near = max(float(heights.min()) - 0.1 * float(np.ptp(heights)), 0.0)
    far = max(float(heights.max()) - near, 1e-9)
    for across, down in zip(drawn["dcoord"], drawn["icoord"], strict=True):
        # scipy's leaves are at 5, 15, 25, ...
        points = [
            (TREE - 4 - max(x - near, 0) / far * (TREE - 8), TOP + y / 10 * _side(s) / s)
            for x, y in zip(across, down, strict=True)
        ]
        d.add(Line(points, "soft", 0.8))


def _bars(d: Drawing, facts: Facts, members: list[MemberRecord], row: float) -> None:
    """Rank and scaling as the length of a bar, and a square for who is in the ensemble."""
    gap = min(1.0, row * 0.15)
    columns: list[tuple[str, str, list[float | None]]] = [
        ("rank r", "s0", [r.rank for r in members]),
        ("scaling c", "s1", [r.scaling for r in members]),
    ]
    for j, (name, colour, values) in enumerate(columns):
        x = TREE + 6 + j * (BAR + 2)
        largest = max((abs(v) for v in values if v is not None), default=0) or 1
        for i, v in enumerate(values):
            long, look = (4.0, "unknown") if v is None else (max(abs(v) / largest * (BAR - 4), 1.0), colour)
            d.add(Box(x, TOP + i * row + gap / 2, long, row - gap, look))
        d.add(Text((x, TOP - 22), name, "ink", size=11))
        d.add(Text((x, TOP - 9), f"0 to {largest:g}", size=10))
    x = TREE + 6 + 2 * (BAR + 2)
    for i, r in enumerate(members):
        if r.name in facts.chosen:
            d.add(Box(x + 10, TOP + i * row + gap / 2, 12, row - gap, "accent"))
    d.add(Text((x + 2, TOP - 9), "chosen", "accent", size=11, bold=True))


def _scale(d: Drawing, facts: Facts, right: float, low: float, high: float) -> None:
    """The colours and what they stand for, above the squares."""
    wide, x = 16.0, right - 16.0 * LEVELS
    d.add(Text((x, 20), f"{facts.similarity} similarity", "ink"))
    for i in range(LEVELS):
        d.add(Box(x + i * wide, 28, wide, 12, f"h{i}"))
    d.add(Text((x, 54), f"{low:.2f}", size=11))
    d.add(Text((x + wide * LEVELS, 54), f"{high:.2f}", anchor="end", size=11))
