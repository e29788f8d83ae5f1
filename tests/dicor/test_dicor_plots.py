"""The plots: that they are drawn for any pool, and that what they show is what there is."""

import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from pool_factory import add_member, make_pool

from lora_ensemble.dicor.cli import main
from lora_ensemble.dicor.compare import compare
from lora_ensemble.dicor.options import Options
from lora_ensemble.dicor.report.charts import by_size, diversity, methods, reliability, score_by_rank
from lora_ensemble.dicor.report.drawing import Axes, Box, Cells, Drawing, Line, Mark, Text, ticks
from lora_ensemble.dicor.report.facts import gather
from lora_ensemble.dicor.report.heat_map import cluster_order, heat_map
from lora_ensemble.dicor.report.palette import LEVELS, roles
from lora_ensemble.dicor.report.svg import svg
from lora_ensemble.pool import TaskPool

plots = pytest.importorskip("lora_ensemble.dicor.report.plots")


@pytest.mark.parametrize(
    ("members", "kind", "names"),
    [
        (6, "binary", ["calibration", "diversity", "methods", "score-by-rank", "similarity", "size"]),
        (60, "regression", ["diversity", "methods", "score-by-rank", "similarity", "size"]),
        (1, "multiclass", ["calibration", "methods"]),
        (2, "multiclass", ["calibration", "diversity", "methods", "score-by-rank", "similarity", "size"]),
    ],
)
def test_compare_saves_each_plot_as_png_and_svg(members, kind, names, tmp_path, capsys):
    make_pool(tmp_path / "pool", "mine", kind, members=members)
    folder = tmp_path / "a" / "plots"
    options = ["--method", "dicor", "--method", "weighted", "--plots", str(folder)]
    assert main(["compare", "--pool", str(tmp_path / "pool"), *options]) == 0
    found = sorted(p.name for p in folder.iterdir())
    assert found == sorted(f"mine-{name}.{ending}" for name in names for ending in ("png", "svg"))
    out = capsys.readouterr().out
    for path in folder.iterdir():
        assert f"saved {path}\n" in out
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            root = ET.parse(path).getroot()
            assert root[0].text.startswith("mine: ")


def pool_of_ranks(folder):
    """Six members of which one has no rank, and one rank 0: 20 examples of class 1, of which each gets some right."""
    right, ranks, scalings = (6, 10, 14, 16, 8, 4), [None, 4, 4, 8, 8, 0], [None, 1.0, 1.0, 1.0, 2.0, None]
    labels = np.array([1] * 19 + [0])
    for m, (count, rank, scaling) in enumerate(zip(right, ranks, scalings, strict=True)):
        logits = np.where(np.arange(20) < count, 1.0 + m, -1.0 - m) * np.where(labels == 1, 1, -1)
        add_member(
            folder, "mine", "binary", f"m{m}", {"dev": logits[:, None]}, {"dev": [f"e{i}" for i in range(20)]},
            {"dev": labels}, rank=rank, scaling=scaling,
        )  # fmt: skip
    return gather(compare(TaskPool(folder, "mine"), ["dicor"], Options(size=2), probabilities=True), "dicor")


def parts(drawing, kind):
    return [p for p in drawing.parts if isinstance(p, kind)]


def test_score_by_rank_draws_a_line_per_scaling_through_the_means_and_a_level_per_system(tmp_path):
    facts = pool_of_ranks(tmp_path)
    drawing = score_by_rank(facts)
    table = {(c, r): (count, mean, best) for c, r, count, mean, best in drawing.rows}
    assert table == {
        ("1", "4"): ("2", "0.6000", "0.7000"),
        ("1", "8"): ("1", "0.8000", "0.8000"),
        ("2", "8"): ("1", "0.4000", "0.4000"),
        ("-", "-"): ("2", "0.2500", "0.3000"),
    }
    legend = [t.text for t in parts(drawing, Text) if t.colour == "ink"]
    of = facts.comparison.estimates.of
    levels = [f"{n}: {of[m].in_sample:.3f}" for n, m in (("single best", "best"), ("Omni", "omni"), ("dicor", "dicor"))]
    assert legend == ["c = 1", "c = 2", "no rank (at 0)", "in the ensemble", *levels]
    # The marks by their titles; the line of c = 1 goes through the mean of the two of rank 4.
    at = {m.title.split(":")[0]: m.at for m in parts(drawing, Mark) if m.title}
    assert len(at) == 6
    (line,) = [p.points for p in parts(drawing, Line) if p.colour == "s0" and p.points[1][0] > 100]
    assert line[0] == pytest.approx((at["m1"][0], (at["m1"][1] + at["m2"][1]) / 2))
    assert line[1] == pytest.approx(at["m3"])
    assert at["m0"][0] == at["m5"][0] < at["m1"][0] == at["m2"][0] < at["m3"][0] == at["m4"][0]
    rings = {m.at for m in parts(drawing, Mark) if m.radius == 7.5}
    assert rings == {at[name] for name in of["dicor"].names}


def test_every_plot_shows_the_numbers_of_its_table(tmp_path):
    facts = pool_of_ranks(tmp_path)
    for drawing in (methods(facts), by_size(facts), diversity(facts), score_by_rank(facts), reliability(facts)):
        assert drawing.rows
        assert {len(row) for row in drawing.rows} == {len(drawing.header)}
        assert len([m for m in parts(drawing, Mark) if m.title]) >= len(drawing.rows)
        for mark in parts(drawing, Mark):
            assert 0 <= mark.at[0] <= drawing.width
            assert 0 <= mark.at[1] <= drawing.height
    named = {m.title.split(":")[0]: m for m in parts(diversity(facts), Mark) if m.title}
    assert {name for name, mark in named.items() if mark.colour == "accent"} == set(facts.one.names)


def test_similar_members_stand_side_by_side():
    """Two kinds of members, shuffled: the order of the clustering brings each kind together."""
    kind = np.array([0, 1, 0, 1, 1, 0])
    similarities = np.where(kind[:, None] == kind, 0.9, 0.1)
    np.fill_diagonal(similarities, 1)
    order, tree = cluster_order(similarities)
    assert sorted(order) == list(range(6))
    assert np.abs(np.diff(kind[order])).sum() == 1
    assert tree.shape == (5, 4)


@pytest.mark.parametrize(("members", "labelled"), [(6, True), (60, False)])
def test_the_heat_map_names_members_while_they_can_be_read(members, labelled, tmp_path):
    make_pool(tmp_path, "mine", "binary", members=members, noise=3)
    facts = gather(compare(TaskPool(tmp_path, "mine"), ["dicor"], Options(), probabilities=True), "dicor")
    drawing = heat_map(facts)
    names = [r.name for r in facts.shown]
    shown = [t.text for t in parts(drawing, Text) if t.text in names]
    assert sorted(shown) == (sorted(names) if labelled else [])
    order, _ = cluster_order(facts.similarities)
    (cells,) = parts(drawing, Cells)
    assert cells.levels.shape == (members, members)
    assert (np.diagonal(cells.levels) == LEVELS - 1).all()
    others = ~np.eye(members, dtype=bool)
    values = facts.similarities[np.ix_(order, order)][others]
    levels = cells.levels[others]
    assert (levels[values == values.min()] == 0).all()
    assert (levels[values == values.max()] == LEVELS - 1).all()
    assert np.corrcoef(values, levels)[0, 1] > 0.98
    assert [row[0].split(". ")[-1] for row in drawing.rows] == [names[i] for i in order]
    # The red squares stand in the rows of the chosen.
    high = cells.height / members
    red = [p for p in parts(drawing, Box) if p.colour == "accent"]
    assert {names[order[int((p.y - cells.y) / high)]] for p in red} == facts.chosen
    bars = sorted(p.width for p in parts(drawing, Box) if p.colour == "s0")
    assert len(bars) == members - 1  # m00 has no rank
    ranks = sorted(r.rank for r in facts.shown if r.rank)
    np.testing.assert_allclose(np.array(bars) / bars[-1], np.array(ranks) / ranks[-1])


def test_a_drawing_as_svg_and_as_png_are_the_same_picture():
    """Boxes in two corners, cells, a line and a text: each is where it was put, in its colour, in both files."""
    drawing = Drawing("one", "A & B", "<what>", 200, 100)
    levels = np.array([[0, LEVELS - 1], [LEVELS - 1, LEVELS - 1]])
    drawing.add(Box(0, 0, 50, 50, "s0"), Box(150, 50, 50, 50, "accent", "<b>"), Cells(100, 0, 40, 40, levels))
    drawing.add(Text((10, 90), "cost $5 & $6"))
    root = ET.fromstring(svg(drawing))
    assert [root[0].text, root[1].text] == ["A & B", "<what>"]
    assert root.get("viewBox") == "0 0 200 100"
    name = "{http://www.w3.org/2000/svg}"
    boxes = [(r.get("class"), r.get("x"), r.get("y")) for r in root.iter(f"{name}rect")]
    assert boxes == [("f-s0", "0", "0"), ("f-accent", "150", "50")]
    paths = {p.get("class"): p.get("d") for p in root.iter(f"{name}path")}
    assert paths == {"f-h0": "M0 0h1v1h-1z", f"f-h{LEVELS - 1}": "M1 0h1v1h-1zM0 1h2v1h-2z"}
    figure = plots.figure(drawing, "t")
    canvas = plots.FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())
    for (x, y), role in (((25, 25), "s0"), ((175, 75), "accent"), ((110, 10), "h0"), ((130, 30), f"h{LEVELS - 1}")):
        pixel = image[int((y + plots.TITLE) * 2), int((x + plots.EDGE) * 2), :3]
        assert "#" + "".join(f"{v:02x}" for v in pixel) == roles()[role][0]
    assert [t.get_text() for t in figure.axes[0].texts] == [r"cost \$5 & \$6", "t"]


@pytest.mark.parametrize(("low", "high"), [(0.41, 0.55), (0.0, 1.0), (-0.3, 0.9), (0.8712, 0.8719), (0, 31)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    steps = np.diff(found)
    assert 3 <= len(found) <= 9
    assert low - 1e-9 <= found[0]
    assert found[-1] <= high + 1e-9
    np.testing.assert_allclose(steps, steps[0])
    assert float(f"{steps[0]:.0e}"[0]) in (1, 2, 5)


def test_axes_put_numbers_in_their_place():
    axes = Axes(Drawing("a", "", "", 100, 100), (10, 20, 90, 80), (0, 4), (0, 1))
    assert axes.at(0, 0) == (10, 80)
    assert axes.at(4, 1) == (90, 20)
    assert axes.at(1, 0.5) == (30, 50)


def contrast(one, other):
    """Of two colours, by WCAG 2.2."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("dress", [0, 1])
def test_colours_can_be_told_from_the_paper(dress):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = {role: pair[dress] for role, pair in roles().items()}
    for role in ("ink", "soft", "accent"):
        for ground in ("paper", "card", "wash"):
            assert contrast(colours[role], colours[ground]) >= 4.5, (role, ground)
    for role in ("s0", "s1", "s2", "s3", "s4", "s5"):
        assert contrast(colours[role], colours["paper"]) >= 3, role
    scale = [contrast(colours[f"h{i}"], colours["paper"]) for i in range(LEVELS)]
    assert scale == sorted(scale)  # ever further from the paper: it can be read without colours


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    make_pool(tmp_path / "pool", "sst", "multiclass")
    monkeypatch.delitem(sys.modules, "lora_ensemble.dicor.report.plots")
    monkeypatch.delattr("lora_ensemble.dicor.report.plots", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for command in (["compare"], ["report", "--task", "sst", "--output", str(tmp_path / "r.html")]):
        assert main([*command, "--pool", str(tmp_path / "pool"), "--plots", str(tmp_path / "plots")]) == 2
        out, err = capsys.readouterr()
        assert "pip install 'lora-ensemble[plots]'" in err
        assert out == ""  # told before the work
    assert not (tmp_path / "r.html").exists()
