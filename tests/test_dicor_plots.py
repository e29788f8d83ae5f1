"""The plots: that they are drawn for any pool, and that what they show is what there is."""

import sys

import numpy as np
import pytest
from pool_factory import make_pool

from lora_ensemble.dicor.cli import main

plots = pytest.importorskip("lora_ensemble.dicor.plots")


@pytest.mark.parametrize(
    ("members", "kind"), [(6, "binary"), (186, "regression"), (1, "multiclass"), (2, "multiclass")]
)
def test_compare_saves_both_plots(members, kind, tmp_path, capsys):
    make_pool(tmp_path / "pool", "mine", kind, members=members)
    assert main(["compare", "--pool", str(tmp_path / "pool"), "--plots", str(tmp_path / "a" / "plots")]) == 0
    found = sorted(p.name for p in (tmp_path / "a" / "plots").iterdir())
    assert found == ["mine-score-by-rank.png", "mine-similarity.png"]
    out = capsys.readouterr().out
    for path in (tmp_path / "a" / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"saved {path}\n" in out


def test_similar_members_stand_side_by_side():
    """Two kinds of members, shuffled: the order of the clustering brings each kind together."""
    kind = np.array([0, 1, 0, 1, 1, 0])
    similarities = np.where(kind[:, None] == kind, 0.9, 0.1)
    np.fill_diagonal(similarities, 1)
    order, tree = plots.cluster_order(similarities)
    assert sorted(order) == list(range(6))
    assert np.abs(np.diff(kind[order])).sum() == 1
    assert tree.shape == (5, 4)


def figure_of_ranks():
    ranks, scalings = [None, 4, 4, 8, 8, 0], [None, 1.0, 1.0, 1.0, 2.0, None]
    return plots.rank_figure(
        np.array([0.3, 0.5, 0.7, 0.8, 0.4, 0.2]),
        ranks=ranks,
        scalings=scalings,
        chosen=[3, 1],
        systems={"single best (1)": 0.8, "Omni (6)": 0.6, "DiCor (2)": 0.9},
        title="t",
        label="accuracy",
    )


def test_score_by_rank_draws_a_line_per_scaling_through_the_means_and_a_level_per_system():
    axes = figure_of_ranks().axes[0]
    lines = [np.column_stack(line.get_data()).tolist() for line in axes.lines]
    assert lines[0] == [[4, 0.6], [8, 0.8]]
    assert lines[1] == [[8, 0.4]]
    assert [line[0][1] for line in lines[2:]] == [0.8, 0.6, 0.9]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == [
        "c = 1", "c = 2", "no rank (at 0)", "in DiCor", "single best (1): 0.800", "Omni (6): 0.600", "DiCor (2): 0.900",
    ]  # fmt: skip


def test_members_without_rank_stand_at_zero():
    dots = [c.get_offsets().tolist() for c in figure_of_ranks().axes[0].collections]
    assert [[0, 0.3], [0, 0.2]] in dots
    assert [[8, 0.8], [4, 0.5]] in dots  # the rings of the chosen


@pytest.mark.parametrize(("members", "labelled"), [(6, True), (186, False)])
def test_the_heat_map_names_members_while_they_can_be_read(members, labelled):
    names = [f"member-{i}" for i in range(members)]
    similarities = np.full((members, members), 0.5) + 0.5 * np.eye(members)
    similarities[0, -1] = similarities[-1, 0] = 0.95
    figure = plots.similarity_figure(
        similarities,
        names=names,
        ranks=[None, *range(1, members)],
        scalings=[None] + [float(i % 12) for i in range(1, members)],
        chosen=[0],
        title="t",
        label="cosine similarity",
    )
    heat = figure.axes[4]
    shown = [text.get_text() for text in heat.get_yticklabels()]
    assert (sorted(shown) == sorted(names)) is labelled
    image = np.asarray(heat.images[0].get_array())
    assert image.shape == (members, members)
    order, _ = plots.cluster_order(similarities)
    assert image[order.index(0), order.index(members - 1)] == 0.95
    red = figure.axes[3].images[0].get_array()
    assert np.flatnonzero(np.asarray(red)[:, 0, 1] < 0.5).tolist() == [order.index(0)]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    make_pool(tmp_path / "pool", "sst", "multiclass")
    monkeypatch.delitem(sys.modules, "lora_ensemble.dicor.plots")
    monkeypatch.delattr("lora_ensemble.dicor.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", "--pool", str(tmp_path / "pool"), "--plots", str(tmp_path / "plots")]) == 2
    out, err = capsys.readouterr()
    assert "pip install 'lora-ensemble[plots]'" in err
    assert out == ""  # told before the work
