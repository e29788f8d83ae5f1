"""The two plots of ``dicor compare --plots``, after Tolkunov's figures 1 and 3. The only module that needs matplotlib.

Axes: M members, F numbers that a member is compared by.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_ensemble.dicor.compare import Comparison
from lora_ensemble.dicor.settings import DEFAULT_SIMILARITY
from lora_ensemble.dicor.similarity import features, pairwise
from lora_ensemble.errors import UserError

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgba
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ImportError as e:
    raise UserError(f"--plots needs matplotlib ({e}); run: pip install 'lora-ensemble[plots]'") from e

UNKNOWN = "#d9d9d9"
DICOR = "#c1121f"
MOST_LABELS = 60  # more members than this cannot be labelled by name and still be read


def check_folder(folder: Path) -> None:
    """Make the folder of the plots; ``UserError`` where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"{folder}: plots cannot be written: {e.strerror}; give another folder with --plots") from e


def save(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw both plots of a task into ``folder`` and return their paths.

    The method shown is ``dicor`` if it was compared, otherwise the last one. Raises ``UserError`` as
    ``similarity.features`` does.
    """
    task_pool, found = comparison.task_pool, comparison.estimates
    method = "dicor" if "dicor" in comparison.methods else list(comparison.methods)[-1]
    similarity = comparison.methods[method].get_params().get("similarity") or DEFAULT_SIMILARITY[task_pool.kind]
    records = [r for r in task_pool.members if r.name in found.scores]
    names = [r.name for r in records]
    ranks, scalings = [r.rank for r in records], [r.scaling for r in records]
    compared_by = features(
        np.stack([task_pool.logits(name) for name in names]),
        kind=task_pool.kind,
        similarity=similarity,
        labels=task_pool.examples().labels,
    )
    chosen = [names.index(name) for name in found.of[method].names]
    heat = similarity_figure(
        pairwise(compared_by, similarity=similarity),
        names=names,
        ranks=ranks,
        scalings=scalings,
        chosen=chosen,
        title=f"{task_pool.name}: similarity of {len(names)} members on dev",
        label=f"{similarity} similarity",
    )
    score_name = "Pearson r" if task_pool.kind == "regression" else "accuracy"
    shown = {"best": "single best", "omni": "Omni", "dicor": "DiCor"}
    lines = rank_figure(
        np.array([found.scores[name] for name in names]),
        ranks=ranks,
        scalings=scalings,
        chosen=chosen,
        systems={
            f"{shown.get(m, m)} ({len(found.of[m].names)})": found.of[m].in_sample
            for m in dict.fromkeys(["best", "omni", method])
        },
        title=f"{task_pool.name}: dev score by rank",
        label=f"{score_name} on dev",
    )
    saved = []
    for figure, what in ((heat, "similarity"), (lines, "score-by-rank")):
        path = folder / f"{task_pool.name}-{what}.png"
        beside = folder / f".{path.stem}.{os.getpid()}.png"
        FigureCanvasAgg(figure).print_png(beside)
        os.replace(beside, path)
        saved.append(path)
    return saved


def cluster_order(similarities: np.ndarray) -> tuple[list[int], Any]:
    """Order of the members that puts similar ones side by side, and the tree behind it, from similarities (M, M).

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


def scaling_colours(scalings: Sequence[float | None]) -> dict[float, Any]:
    """Scaling to colour, the same in both plots."""
    known = sorted({s for s in scalings if s is not None})
    if len(known) <= 10:
        return {s: matplotlib.colormaps["tab10"](i) for i, s in enumerate(known)}
    return {s: matplotlib.colormaps["turbo"](i / (len(known) - 1)) for i, s in enumerate(known)}


def similarity_figure(
    similarities: np.ndarray,
    *,
    names: Sequence[str],
    ranks: Sequence[int | None],
    scalings: Sequence[float | None],
    chosen: Sequence[int],
    title: str,
    label: str,
) -> Figure:
    """Clustered heat map of similarities (M, M), with side bars for rank, scaling and the chosen members."""
    m = len(names)
    order, tree = cluster_order(similarities)
    side = float(np.clip(0.26 * m, 4.0, 9.0))  # inches
    widths = [0.16 * side, 0.22, 0.22, 0.22, side, 1.4]
    room = 0.075 * max(map(len, names)) if m <= MOST_LABELS else 0.0  # inches, for the names
    figure = Figure(
        figsize=(sum(widths) + 0.6 + room, side + 1.2),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.05, wspace=0, hspace=0),
    )
    figure.suptitle(title, fontsize=13, fontweight="bold")
    branches, rank_bar, scaling_bar, chosen_bar, heat, keys = figure.subplots(1, 6, width_ratios=widths)

    branches.axis("off")
    if tree is not None:
        from scipy.cluster.hierarchy import dendrogram

        drawn = dendrogram(tree, no_plot=True)
        for x, y in zip(drawn["dcoord"], drawn["icoord"], strict=True):
            branches.plot(x, (np.array(y) - 5) / 10, color="#555555", linewidth=0.8)  # scipy's leaves: 5, 15, 25, ...
        branches.set(ylim=(m - 0.5, -0.5), xlim=(max(float(tree[:, 2].max()) * 1.03, 1e-9), 0))

    low = float(similarities.min())
    norm = Normalize(low if low < 1 else 0.0, 1.0)
    heat.imshow(similarities[np.ix_(order, order)], cmap="magma", norm=norm, aspect="auto", interpolation="nearest")
    heat.yaxis.tick_right()
    heat.set_xticks([])
    if m <= MOST_LABELS:
        heat.set_yticks(range(m), [names[i] for i in order], fontsize=8 if m <= 35 else 6.5)
    else:
        heat.set_yticks([])
        heat.set_xlabel(f"{m} members, in the order of the clustering")

    known_ranks = [r for r in ranks if r is not None] or [0]
    rank_norm = Normalize(min(known_ranks), max(max(known_ranks), min(known_ranks) + 1))
    rank_map = matplotlib.colormaps["YlGnBu"]
    colours = scaling_colours(scalings)
    for axes, name, cells in (
        (rank_bar, "rank r", [UNKNOWN if (r := ranks[i]) is None else rank_map(rank_norm(r)) for i in order]),
        (scaling_bar, "scaling c", [UNKNOWN if (c := scalings[i]) is None else colours[c] for i in order]),
        (chosen_bar, "DiCor", [DICOR if i in chosen else "white" for i in order]),
    ):
        axes.imshow([[to_rgba(c)] for c in cells], aspect="auto", interpolation="nearest")
        axes.set_xticks([0], [name], rotation=90, fontsize=9)
        axes.set_yticks([])
        axes.tick_params(length=0)

    keys.axis("off")
    # Inset axes stand where they are put; colour bars "stolen" from an axes would change the columns' widths.
    figure.colorbar(ScalarMappable(norm, "magma"), cax=keys.inset_axes([0.25, 0.70, 0.14, 0.28]), label=label)
    if len(set(known_ranks)) > 1:
        bar = keys.inset_axes([0.25, 0.37, 0.14, 0.28])
        figure.colorbar(ScalarMappable(rank_norm, rank_map), cax=bar, label="rank r").locator = MaxNLocator(
            6, integer=True
        )
    patches = [Patch(facecolor=colour, label=f"c = {c:g}") for c, colour in colours.items()]
    if None in ranks or None in scalings:
        patches.append(Patch(facecolor=UNKNOWN, label="no rank or scaling"))
    patches.append(Patch(facecolor=DICOR, label="in DiCor"))
    keys.legend(handles=patches, loc="upper left", bbox_to_anchor=(0.1, 0.34), fontsize=8, frameon=False)
    return figure


def rank_figure(
    scores: np.ndarray,
    *,
    ranks: Sequence[int | None],
    scalings: Sequence[float | None],
    chosen: Sequence[int],
    systems: dict[str, float],
    title: str,
    label: str,
) -> Figure:
    """Dev scores (M,) against rank: a dot per member, a line per scaling through the means, a level per system.

    Members without a rank, or of rank 0 (only the head was trained), stand at 0 and on no line.
    """
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    axes = figure.subplots()
    colours = scaling_colours(scalings)
    rank = np.array([r or 0 for r in ranks])
    entries: list[Any] = []
    for c, colour in [*colours.items(), (None, "#777777")]:
        own = np.array([bool(r) and s == c for r, s in zip(ranks, scalings, strict=True)])
        if not own.any():
            continue
        xs = np.unique(rank[own])
        means = [scores[own & (rank == x)].mean() for x in xs]
        axes.plot(xs, means, color=colour, linewidth=1.4, alpha=0.85, zorder=2)
        axes.scatter(rank[own], scores[own], color=colour, s=22, zorder=3)
        name = "no scaling" if c is None else f"c = {c:g}"
        entries.append(Line2D([], [], color=colour, marker="o", markersize=4.5, linewidth=1.4, label=name))
    without = rank == 0
    if without.any():
        axes.scatter(rank[without], scores[without], color="black", marker="D", s=26, zorder=3)
        entries.append(Line2D([], [], color="black", marker="D", markersize=5, linestyle="", label="no rank (at 0)"))
    ringed = list(chosen)
    axes.scatter(rank[ringed], scores[ringed], facecolors="none", edgecolors=DICOR, s=85, linewidths=1.5, zorder=4)
    entries.append(
        Line2D([], [], marker="o", markersize=9, linestyle="", markerfacecolor="none", color=DICOR, label="in DiCor")
    )
    looks = (("#333333", ":"), ("#1d4e89", "--"), (DICOR, "-"))
    for (name, score), (colour, dashes) in zip(systems.items(), looks, strict=False):
        if np.isnan(score):
            continue
        axes.axhline(score, color=colour, linestyle=dashes, linewidth=1.5, zorder=1)
        entries.append(Line2D([], [], color=colour, linestyle=dashes, label=f"{name}: {score:.3f}"))
    axes.set_title(title, fontsize=13, fontweight="bold")
    axes.set_xlabel("rank r")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=entries, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False)
    return figure
