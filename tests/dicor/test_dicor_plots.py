"""The plots: that they are drawn for any pool, and that what they show is what there is."""

import struct
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from pool_factory import add_member, make_pool

from lora_ensemble.dicor.cli import main
from lora_ensemble.dicor.compare import compare
from lora_ensemble.dicor.options import Options
from lora_ensemble.dicor.report.charts import plots
from lora_ensemble.dicor.report.facts import gather
from lora_ensemble.dicor.report.heat_map import LEVELS, MOST_GROUPS, cluster_order, gathered, heat_map
from lora_ensemble.dicor.report.plot import painted, palette
from lora_ensemble.pool import TaskPool


@pytest.mark.parametrize(
    ("members", "kind", "names"),
    [
        (6, "binary", ["calibration", "diversity", "methods", "score-by-rank", "similarity", "size"]),
        (3, "regression", ["diversity", "methods", "score-by-rank", "similarity", "size"]),
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
            wide, high = struct.unpack(">II", path.read_bytes()[16:24])
            assert 400 < wide < 3000
            assert 400 < high < 3000
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


def drawn(plot, *, like):
    """The rows of a plot's data that have the field ``like``."""
    return [row for data in plot.specification["datasets"].values() for row in data if like in row]


def test_score_by_rank_draws_a_line_per_scaling_through_the_means_and_a_level_per_system(tmp_path):
    facts = pool_of_ranks(tmp_path)
    plot = plots(facts)["score-by-rank"]
    table = {(c, r): (count, mean, best) for c, r, count, mean, best in plot.rows}
    assert table == {
        ("1", "4"): ("2", "0.6000", "0.7000"),
        ("1", "8"): ("1", "0.8000", "0.8000"),
        ("2", "8"): ("1", "0.4000", "0.4000"),
        ("-", "-"): ("2", "0.2500", "0.3000"),
    }
    of = facts.comparison.estimates.of
    levels = {n: of[m].in_sample for n, m in (("single best", "best"), ("Omni", "omni"), ("dicor", "dicor"))}
    rows = drawn(plot, like="series")
    lines = [(row["series"], row["x"], pytest.approx(row["y"])) for row in rows if "x" in row and "member" not in row]
    assert lines == [("c = 1", 4, 0.6), ("c = 1", 8, 0.8), ("c = 2", 8, 0.4)]
    assert {row["series"]: row["y"] for row in rows if "x" not in row} == {
        f"{n}: {s:.3f}": s for n, s in levels.items()
    }
    marks = {row["member"]: (row["series"], row["x"]) for row in rows if "member" in row}
    none = ("no rank (at 0)", 0)
    assert marks == {
        "m0": none,
        "m5": none,
        "m1": ("c = 1", 4),
        "m2": ("c = 1", 4),
        "m3": ("c = 1", 8),
        "m4": ("c = 2", 8),
    }
    legend = ["c = 1", "c = 2", "no rank (at 0)", *(f"{n}: {s:.3f}" for n, s in levels.items())]
    texts = [text.text for text in ET.fromstring(plot.svg()).iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in legend] == legend


def test_every_plot_shows_the_numbers_of_its_table_and_knows_its_members(tmp_path):
    facts = pool_of_ranks(tmp_path)
    every = plots(facts)
    assert list(every) == ["methods", "similarity", "diversity", "score-by-rank", "size", "calibration"]
    for name in ("methods", "size", "calibration"):
        plot = every[name]
        marks = [{row[column] for column in plot.header} for row in drawn(plot, like="holds")]
        assert len(plot.rows) > 1
        for row in plot.rows:
            assert set(row) in marks
        assert "nan" not in plot.svg().lower()
    places = {r.name: i for i, r in enumerate(facts.shown)}
    of = facts.comparison.estimates.of
    for row in drawn(every["methods"], like="holds"):
        e = of[{"single best": "best", "Omni": "omni"}.get(row["method"], row["method"])]
        assert row["holds"] == sorted(places[name] for name in e.names)
    marks = drawn(every["diversity"], like="holds")
    assert {row["member"] for row in marks if row["series"] == "in dicor"} == set(facts.estimate.names)
    assert {(row["member"], *row["holds"]) for row in marks} == set(places.items())


def test_a_member_that_is_ticked_is_marked_in_every_plot(tmp_path):
    """With the parameter set, as the page's script does, each plot has more marks in the colour of the ink."""
    facts = pool_of_ranks(tmp_path)
    for plot in plots(facts).values():
        before = plot.svg()
        (ticked,) = (p for p in plot.specification["params"] if p["name"] == "ticked")
        assert ticked["value"] == []
        ticked["value"] = [next(i for i, r in enumerate(facts.shown) if r.name == facts.estimate.names[0])]
        ring = 'stroke="var(--ink)"'
        assert plot.svg().count(ring) > before.count(ring), plot.name


def test_similar_members_stand_side_by_side():
    """Two kinds of members, shuffled: the order of the clustering brings each kind together."""
    kind = np.array([0, 1, 0, 1, 1, 0])
    similarities = np.where(kind[:, None] == kind, 0.9, 0.1)
    np.fill_diagonal(similarities, 1)
    order, tree = cluster_order(similarities)
    assert sorted(order) == list(range(6))
    assert np.abs(np.diff(kind[order])).sum() == 1
    assert tree.shape == (5, 4)


@pytest.mark.parametrize("members", [6, 60, 70])
def test_the_heat_map_shows_each_pair_while_it_can_be_read(members, tmp_path):
    make_pool(tmp_path, "mine", "binary", members=members, noise=3)
    facts = gather(compare(TaskPool(tmp_path, "mine"), ["dicor"], Options(), probabilities=True), "dicor")
    plot = heat_map(facts)
    names = [r.name for r in facts.shown]
    picture = ET.fromstring(plot.svg())
    shown = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}text") if t.text in names]
    assert sorted(shown) == (sorted(names) if members == 6 else [])
    assert plot.picture is (members > 6)
    order, _ = cluster_order(facts.similarities)
    rows = drawn(plot, like="member")
    assert [row["member"] for row in rows] == [names[i] for i in order]
    assert {row["member"] for row in rows if row["in dicor"] == "yes"} == set(facts.estimate.names)
    assert [row["rank"] for row in rows] == [facts.shown[i].rank for i in order]
    cells = drawn(plot, like="v")
    groups = min(members, MOST_GROUPS)
    assert len(cells) == groups**2
    fills = [p.get("fill") for p in picture.iter() if (p.get("fill") or "").startswith("var(--h")]
    levels = [int(fill[7:-1]) for fill in fills[: groups**2]]
    values = np.array([cell["v"] for cell in cells])
    off = np.array([cell["a"] != cell["b"] for cell in cells])
    assert np.corrcoef(values[off], np.array(levels)[off])[0, 1] > 0.98
    if members > MOST_GROUPS:
        return
    expected = facts.similarities[np.ix_(order, order)]
    np.testing.assert_allclose(values.reshape(members, members), expected, atol=1e-4)
    assert {level for level, o in zip(levels, off, strict=True) if not o} == {LEVELS - 1}
    assert {min(levels), max(np.array(levels)[off])} == {0, LEVELS - 1}


def test_gathered_similarities_are_means_of_different_members():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(6, 6))
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1)
    found = gathered(values, np.array([0, 1, 4]))
    assert found[0, 0] == 1
    assert found[0, 1] == pytest.approx(values[0, 1:4].mean())
    assert found[2, 1] == pytest.approx(values[4:, 1:4].mean())
    assert found[1, 1] == pytest.approx(np.mean([values[1, 2], values[1, 3], values[2, 3]]))
    assert found[2, 2] == pytest.approx(values[4, 5])


def test_what_looks_like_a_colour_in_a_name_is_text():
    svg = '<svg><text fill="var(--ink)">var(--ink) &lt;b&gt;</text></svg>'
    ink = palette()["dark"]["ink"]
    assert painted(svg, "dark") == f'<svg><text fill="{ink}">var(--ink) &lt;b&gt;</text></svg>'


def contrast(one, other):
    """Of two colours, by WCAG 2.2."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("dress", ["light", "dark"])
def test_colours_can_be_told_from_the_paper(dress):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = palette()[dress]
    for role in ("ink", "soft", "accent"):
        for ground in ("paper", "card", "wash"):
            assert contrast(colours[role], colours[ground]) >= 4.5, (role, ground)
    for role in ("s0", "s1", "s2", "s3", "s4", "s5"):
        assert contrast(colours[role], colours["paper"]) >= 3, role
    scale = [contrast(colours[f"h{i}"], colours["paper"]) for i in range(LEVELS)]
    assert scale == sorted(scale)  # ever further from the paper: it can be read without colours


@pytest.mark.parametrize(
    "command", [["compare", "--plots", "plots"], ["report", "--task", "sst", "--output", "r.html"]]
)
def test_without_the_extra_it_says_what_to_install(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_pool(tmp_path / "pool", "sst", "multiclass")
    monkeypatch.setitem(sys.modules, "altair", None)
    assert main([*command, "--pool", "pool"]) == 2
    out, err = capsys.readouterr()
    assert "needs altair; run: pip install 'lora-ensemble[report]'" in err
    assert out == ""  # told before the work
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]
