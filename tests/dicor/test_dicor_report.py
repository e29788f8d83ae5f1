"""The report: that the page is sound and says what was found, and that its numbers are those of others' formulas."""

import base64
import hashlib
import itertools
import json
import math
import re
import shlex
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from pool_factory import add_member, make_pool, random_labels, random_logits
from scipy.stats import binom
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from lora_ensemble.dicor.cli import main
from lora_ensemble.dicor.compare import compare
from lora_ensemble.dicor.options import METHODS, Options
from lora_ensemble.dicor.report import facts, page, theory
from lora_ensemble.dicor.report.theory import BINS, calibration
from lora_ensemble.dicor.table import decides
from lora_ensemble.pool import MemberRecord, TaskPool

VOID = {"meta", "br", "img", "link", "input", "hr", "base"}


class Page(HTMLParser):
    """A page's elements with their attributes, and the text of each; wrong where tags do not close what is open."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.styles = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(e[2] for e in self.elements if e[0] != "script")

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        assert len(dict(attributes)) == len(attributes), f"{tag}: an attribute twice"
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, i in self.open if self.open[-1:] and self.open[-1][0] != "script" else self.open[-1:]:
            self.elements[i][2] += data

    def all(self, *tags):
        return [e for e in self.elements if e[0] in tags]

    def rows(self, caption):
        """The rows of a table as lists of cells' texts."""
        tables = [e for e in self.all("table") if caption in e[2]]
        assert len(tables) == 1
        start = next(i for i, e in enumerate(self.elements) if e is tables[0])
        found = []
        for tag, _, text in self.elements[start + 1 :]:
            if tag == "table":
                break
            if tag == "tr":
                found.append([])
            elif tag in ("th", "td"):
                found[-1].append(text)
        return found


def datasets(page):
    """All data of the plots of a page."""
    plots = json.loads(next(text for tag, a, text in page.elements if a.get("id") == "specifications"))
    return [data for plot in plots.values() for data in plot["datasets"].values()]


def report(folder, task, *args, name="report.html", pool=None):
    path = folder / name
    assert main(["report", "--pool", str(pool or folder / "pool"), "--task", task, "--output", str(path), *args]) == 0
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """A folder with a pool of all kinds."""
    folder = tmp_path_factory.mktemp("report")
    for kind in ("multiclass", "binary", "regression"):
        make_pool(folder / "pool", kind, kind, members=9, n=90, noise=2.5)
    return folder


@pytest.fixture(scope="module")
def pages(pools):
    """The text of the page of each task."""
    return {kind: report(pools, kind) for kind in ("multiclass", "binary", "regression")}


@pytest.mark.parametrize("kind", ["multiclass", "binary", "regression"])
def test_the_page_is_well_formed_and_fetches_nothing(kind, pages):
    source = pages[kind]
    found = Page(source)
    ids = [a["id"] for _, a, _ in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes, _ in found.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids)
        assert not {"src", "srcset", "style", "onclick", "onload", "action"} & set(attributes), tag
        if "href" in attributes:
            assert attributes["href"].removeprefix("#") in ids
    assert not found.all("link", "img", "iframe", "object", "image", "use", "form", "base")
    ((_, _, style),) = found.all("style")
    assert "url(" not in style
    assert "@import" not in style
    data, program = found.all("script")
    assert data[1] == {"id": "specifications", "type": "application/json"}
    (policy,) = [a["content"] for _, a, _ in found.all("meta") if "http-equiv" in a]
    of_style, of_script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, program[2])
    )
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{of_style}'; script-src 'sha256-{of_script}'; "
        "base-uri 'none'; form-action 'none'"
    )
    levels = [int(tag[1]) for tag, _, _ in found.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert max(np.diff(levels)) == 1
    drawn = re.findall(r"<svg.*?</svg>", source.partition("<script")[0], re.DOTALL)
    assert len(drawn) == len(json.loads(data[2])) == (5 if kind == "regression" else 6)
    for text in drawn:
        assert ET.fromstring(text).get("aria-hidden") == "true"
    stills = [a for _, a, _ in found.elements if a.get("role") == "img"]
    assert len(stills) == len(drawn)
    assert all(len(a["aria-label"]) > 40 for a in stills)


def test_the_same_pool_gives_the_same_bytes(pools, pages):
    assert report(pools, "binary", name="again.html") == pages["binary"]


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
def test_the_numbers_are_those_of_compare(kind, pools, pages, capsys):
    assert main(["compare", "--pool", str(pools / "pool"), "--task", kind]) == 0
    printed = capsys.readouterr().out
    found = Page(pages[kind])
    rows = found.rows("Pearson r on dev" if kind == "regression" else "accuracy on dev")[1:]
    assert len(rows) == len(METHODS)
    for name, row in zip(METHODS, rows, strict=True):
        (line,) = [line for line in printed.splitlines() if re.match(rf"{name} +\d", line)]
        cells = re.split(r" {1,}", line)
        # members, in-sample, honest, low "to" high, optimism
        assert row[1:3] == cells[1:3]
        assert row[3] == f"{cells[3]}{cells[4]} to {cells[6]}"
        assert row[4] == cells[7]
        gains = re.findall(r"[+-][\d.]+ (?:within|beyond) noise", line)
        assert [re.match(r"[+-][\d.]+ \w+ noise", cell).group() for cell in row[5:7] if cell != "-"] == gains
    default = "weighted" if kind == "regression" else "weighted-offset"
    (words,) = [line for line in printed.splitlines() if line.startswith(f"{default}: honest")]
    assert words in found.text
    assert "The highest of ten honest estimates is itself flattered a little" in printed
    assert "The highest of ten honest estimates is itself flattered a little" in found.text
    assert f"{default} chosen" in rows[METHODS.index(default)][0]
    (heading,) = [text for _, _, text in found.all("h1")]
    assert heading.startswith(f"{kind}: {default}, ")
    assert ("is multiplied by" in found.text) is (kind != "regression")  # scale and offsets


def test_of_one_method_alone_none_is_the_highest(pools, capsys):
    assert main(["compare", "--pool", str(pools / "pool"), "--task", "binary", "--method", "dicor"]) == 0
    assert "highest of" not in capsys.readouterr().out
    found = Page(report(pools, "binary", "--method", "dicor"))
    assert "highest of" not in found.text
    assert found.all("h1")[0][2] == "binary: dicor, 4 of 9 members"


def test_what_users_wrote_is_text(tmp_path):
    nasty = tmp_path / "<img src=x onerror=alert(1)>&\"'"
    labels = random_labels("binary", 60)
    logits = random_logits("binary", labels, 3, noise=3)
    for m in range(3):
        add_member(
            nasty, "mine", "binary", f"m{m}", {"dev": logits[m]}, {"dev": [f"{i}" for i in range(60)]}, {"dev": labels},
            labels=["<b>no</b>", "</style><script>alert(1)</script>"], targets="<i>&amp;", rank=m + 1, scaling=1.0,
        )  # fmt: skip
    source = report(tmp_path, "mine", pool=nasty)
    found = Page(source)
    assert not found.all("img", "b", "i")
    assert len(found.all("style")) == 1
    assert len(found.all("script")) == 2
    assert "<i>&amp;" in {row.get("targets") for data in datasets(found) for row in data}
    assert "<b>no</b>, </style><script>alert(1)</script>" in found.text
    assert str(nasty) in found.text
    assert any(text == "<i>&amp;" for _, _, text in found.all("td"))
    assert "<script>" not in source


def test_the_commands_it_shows_make_the_ensemble_it_shows(pools, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = Page(report(pools, "regression", "--method", "dicor", "--size", "3", "--top-k", "5", name="other.html"))
    select, apply = next(text for tag, _, text in found.elements if tag == "code").splitlines()
    program, *args = shlex.split(select)
    assert program == "dicor"
    assert "--size 3" in select
    assert main(args) == 0
    shown = [row[0] for row in found.rows("Members of dicor, in the order of choice")[1:]]
    assert len(shown) == 3
    listed = capsys.readouterr().out
    positions = [listed.index(f"\n{name} ") for name in shown]
    assert positions == sorted(positions)
    assert main(shlex.split(apply)[1:]) == 0
    assert (tmp_path / "predictions.csv").is_file()


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_calibration_is_scikit_learns(kind):
    rng = np.random.default_rng(3)
    n, classes, repeats = 300, 2 if kind == "binary" else 4, 2
    p = rng.dirichlet(np.full(classes, 0.7), size=(repeats, n))
    y = np.array([rng.choice(classes, p=row) for row in p[0]])
    found = calibration(p, y, kind)
    flat, labels = p.reshape(-1, classes), np.tile(y, repeats)
    said = flat[:, 1] if kind == "binary" else flat.max(axis=1)
    true = labels == 1 if kind == "binary" else flat.argmax(axis=1) == labels
    filled = found.counts > 0
    came_true, mean = calibration_curve(true, said, n_bins=BINS)
    np.testing.assert_allclose(found.came_true[filled], came_true)
    np.testing.assert_allclose(found.said[filled], mean)
    edges = np.linspace(0, 1, BINS + 1)
    counts = [np.sum((said > low) & (said <= high)) for low, high in itertools.pairwise(edges)]
    np.testing.assert_array_equal(found.counts, counts)
    share = np.array(counts)[filled] / len(labels)
    assert found.ece == pytest.approx(float(np.sum(share * np.abs(came_true - mean))))
    assert found.ece > 0.01
    one = flat[:, 1] if kind == "binary" else flat
    assert found.brier == pytest.approx(brier_score_loss(labels, one))
    assert found.log_loss == pytest.approx(log_loss(labels, flat))


def test_a_probability_of_a_bins_border_is_in_the_lower_one():
    p = np.array([[[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]])
    found = calibration(p, np.array([0, 1, 1, 1, 1]), "binary")
    assert found.counts.tolist() == [2, 1, 0, 0, 1, 0, 0, 0, 0, 1]
    # said 0.05, 0.2, 0.5, 1; came true 1/2, 1, 1, 1; by hand
    assert found.ece == pytest.approx((2 * 0.45 + 0.8 + 0.5 + 0) / 5)
    assert found.brier == pytest.approx((0.01 + 0.64 + 0.25 + 0 + 1) / 5)
    assert found.log_loss == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.5) + math.log(1e-15)) / 5)


def test_the_pages_calibration_is_of_what_was_held_out(pools, pages):
    comparison = compare(TaskPool(pools / "pool", "binary"), METHODS, Options(), probabilities=True)
    one, labels = comparison.estimates.of["omni"], comparison.estimates.candidates.labels
    np.testing.assert_array_equal((one.probabilities[..., 1] > 0.5).astype(int), one.held_out)
    expected = brier_score_loss(np.tile(labels, len(one.held_out)), one.probabilities[..., 1].ravel())
    found = Page(pages["binary"])
    rows = found.rows("Calibration on dev, held out")
    assert rows[0] == ["method", "ECE", "Brier score", "log-loss"]
    assert rows[2][0] == "Omni"
    assert rows[2][2] == f"{expected:.4f}"
    assert [row[0] for row in rows[1:]] == ["single best", "Omni", "weighted-offset chosen"]


def test_equation_2_by_hand():
    # sigma^2 = 4, rho = 0.5, N = 4: 4 / 4 + 3 / 4 * 0.5 * 4 = 2.5
    assert theory.ensemble_variance(4.0, 0.5, 4) == 2.5
    assert theory.ensemble_variance(4.0, math.nan, 1) == 4.0


def test_the_reports_majority_by_hand_faults_included():
    # rho = 0: p_eff = p^2 = 0.16. N = 3, from k = 1: 1 - 0.84^3
    assert theory.majority_error(0.4, 0.0, 3) == pytest.approx(1 - 0.84**3)
    # rho = 1: p_eff = p. N = 4, from k = 2, ties are errors: 1 - 0.6^4 - 4 * 0.4 * 0.6^3
    assert theory.majority_error(0.4, 1.0, 4) == pytest.approx(1 - 0.6**4 - 4 * 0.4 * 0.6**3)
    assert theory.majority_error(0.4, math.nan, 1) == 1.0
    assert math.isnan(theory.majority_error(0.2, -0.9, 3))  # p_eff below 0
    effective = 0.3 * 0.4 + 0.7 * 0.16
    expected = sum(math.comb(11, k) * effective**k * (1 - effective) ** (11 - k) for k in range(5, 12))
    assert theory.majority_error(0.4, 0.3, 11) == pytest.approx(expected)
    assert theory.independent_majority_error(0.4, 3) == pytest.approx(0.4**3 + 3 * 0.4**2 * 0.6)
    assert theory.independent_majority_error(0.4, 4) == pytest.approx(binom.sf(2, 4, 0.4))


def measured(kind, *, members=5, n=70):
    labels = random_labels(kind, n)
    logits = random_logits(kind, labels, members, noise=2)
    outputs = {"multiclass": 5, "binary": 2, "regression": 0}[kind]
    found = theory.theory(logits, labels, kind, outputs=outputs, order=range(members))
    return found, logits, labels


def test_theory_beside_observation_for_values():
    found, logits, labels = measured("regression")
    errors = logits[..., 0].astype(float) - labels
    corr = np.corrcoef(errors)
    assert found.level == pytest.approx(errors.var(axis=1).mean())
    assert found.rho == pytest.approx(corr[~np.eye(5, dtype=bool)].mean())
    assert found.observed == pytest.approx(errors.mean(axis=0).var())
    assert found.expected == pytest.approx(found.level / 5 + 4 / 5 * found.rho * found.level)
    # With one covariance for all pairs it would be exact; here it is near, and independence alone is not the same.
    assert found.expected == pytest.approx(found.observed, rel=0.1)
    assert found.independent == pytest.approx(found.level / 5)
    assert found.independent != pytest.approx(found.expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_theory_beside_observation_for_votes(kind):
    found, logits, labels = measured(kind)
    decided = logits.argmax(axis=-1) if kind == "multiclass" else (logits[..., 0] > 0).astype(int)
    wrong = decided != labels
    assert found.level == pytest.approx(1 - np.mean([accuracy_score(labels, one) for one in decided]))
    assert found.rho == pytest.approx(np.corrcoef(wrong)[~np.eye(5, dtype=bool)].mean())
    voted = []
    for i in range(len(labels)):  # equal ranks: of tied classes the one whose voter has the best score, the first
        votes = np.bincount(decided[:, i], minlength=5)
        tied = np.flatnonzero(votes == votes.max())
        voted.append(next(c for c in decided[:, i] if c in tied))
    assert found.observed == pytest.approx(np.mean(np.array(voted) != labels))


def test_of_tied_members_the_one_of_highest_rank_counts(tmp_path):
    """Two that are wrong on other examples, 8 and 12 of 40, tie on 20: the second's 12 are what is observed."""
    labels = np.tile([0, 1], 20)
    ids, truth = {"dev": [f"d{i}" for i in range(40)]}, {"dev": labels}
    for name, rank, wrong in (("a", 1, slice(0, 8)), ("b", 4, slice(8, 20))):
        logits = (labels * 2.0 - 1)[:, None]
        logits[wrong] *= -1
        add_member(tmp_path, "two", "binary", name, {"dev": logits}, ids, truth, rank=rank)
    comparison = compare(TaskPool(tmp_path, "two"), ["best", "omni"], Options(), probabilities=True)
    assert facts.gather(comparison, "omni").theories["omni"].observed == pytest.approx(12 / 40)


def test_how_an_ensemble_decides_in_words():
    words = {
        ("majority", "multiclass"): "the majority of its members' decisions",
        ("mean", "binary"): "the mean of its members' logits",
        ("mean", "regression"): "the mean of its members' values",
        ("mean-probability", "multiclass"): "the mean of its members' probabilities",
        ("weighted", "binary"): "a weighted mean of its members' probabilities",
        ("weighted", "regression"): "a weighted mean of its members' values",
    }
    assert {key: decides(*key) for key in words} == words


def test_a_member_that_is_always_right_has_no_correlation():
    labels = random_labels("binary", 40)
    good = (labels * 2.0 - 1)[None, :, None]
    logits = np.concatenate([good, random_logits("binary", labels, 2, noise=3)])
    found = theory.theory(logits, labels, "binary", outputs=2, order=range(3))
    wrong = (logits[1:, :, 0] > 0) != labels
    assert found.rho == pytest.approx(np.corrcoef(wrong)[0, 1])


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
def test_a_curve_holds_the_comparisons_own_estimate(kind, pools):
    comparison = compare(TaskPool(pools / "pool", kind), METHODS, Options(size=4))
    found = facts.curves(comparison, ["dicor", "weighted", "greedy", "exhaustive", "omni"])
    assert [c.used for c in found] == [4, 9, 4, 4, 9]
    for curve in found:
        own = curve.estimates[curve.sizes.index(curve.used)]
        expected = comparison.estimates.of[curve.method]
        assert own.honest == expected.honest
        assert own.in_sample == pytest.approx(expected.in_sample, abs=1e-12)
        assert sorted(own.names) == sorted(expected.names)
        smaller = curve.estimates[0]
        assert len(smaller.names) == 1
        assert smaller.honest != own.honest
    dicor = found[0]
    assert [len(e.names) for e in dicor.estimates] == dicor.sizes == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert facts.curves(comparison, ["best"]) == []


def test_a_pool_of_one_member_says_what_is_missing(tmp_path):
    make_pool(tmp_path / "pool", "sst", "multiclass", members=1)
    found = Page(report(tmp_path, "sst"))
    assert "The pool has one member, so there is nothing to compare it with." in found.text
    assert "No member has a rank" in found.text  # m00 has none
    assert len(found.all("svg")) == 2  # methods and calibration


def test_members_without_a_rank(tmp_path):
    labels = random_labels("regression", 40)
    for m, one in enumerate(random_logits("regression", labels, 3)):
        add_member(
            tmp_path / "pool",
            "mine",
            "regression",
            f"m{m}",
            {"dev": one},
            {"dev": [*map(str, range(40))]},
            {"dev": labels},
        )
    found = Page(report(tmp_path, "mine"))
    assert "No member has a rank: they were imported, or only their heads were trained" in found.text
    assert "A regression gives values, not probabilities, so there is no calibration." in found.text
    assert [e[1]["id"] for e in found.all("figure")] == [
        f"figure-{n}" for n in ("methods", "similarity", "diversity", "size")
    ]


def test_too_few_examples_for_an_estimate(tmp_path):
    make_pool(tmp_path / "pool", "sst", "multiclass", members=4, n=8)
    found = Page(report(tmp_path, "sst"))
    assert "There is no honest estimate, so how much of that is chance cannot be said." in found.text
    assert "In-sample: there are too few examples to hold any out" in found.text
    assert "Calibration on dev, in-sample" in found.text


def test_of_many_members_the_best_are_shown(tmp_path, monkeypatch):
    make_pool(tmp_path / "pool", "sst", "binary", members=12)
    monkeypatch.setattr(facts, "MOST_SHOWN", 5)
    found = Page(report(tmp_path, "sst"))
    assert "Of 12 members the 5 best by score are shown" in found.text
    pool = TaskPool(tmp_path / "pool", "sst")
    labels = pool.examples().labels
    scores = {r.name: accuracy_score(labels, pool.logits(r.name)[:, 0] > 0) for r in pool.members}
    best = sorted(scores, key=lambda name: (-scores[name], name))[:5]
    assert [row[0] for row in found.rows("All members")[1:]] == best
    assert next(a["data-member"] for _, a, text in found.all("tr") if text.startswith(best[3])) == "3"


def test_the_test_splits_scores_are_a_column_where_they_are_asked_for(tmp_path, capsys):
    make_pool(tmp_path / "pool", "sst", "binary", members=4)
    assert "no labels" not in report(tmp_path, "sst")
    where = ["--pool", str(tmp_path / "pool"), "--task", "sst", "--output", str(tmp_path / "r.html")]
    assert main(["report", *where, "--split", "test"]) == 2
    assert "the test examples have no labels" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
    labels = {split: random_labels("binary", 40, seed=i) for i, split in enumerate(("dev", "test"))}
    logits = {split: random_logits("binary", y, 3, noise=3) for split, y in labels.items()}
    ids = {split: [f"{split}{i}" for i in range(40)] for split in labels}
    for m in range(3):
        add_member(tmp_path / "pool", "mine", "binary", f"m{m}", {s: x[m] for s, x in logits.items()}, ids, labels)
    rows = Page(report(tmp_path, "mine", "--split", "test")).rows("accuracy on dev")
    assert rows[0][-1] == "test"
    assert rows[2][0] == "Omni"
    assert rows[2][-1] == f"{accuracy_score(labels['test'], logits['test'].mean(axis=0)[:, 0] > 0):.4f}"


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    make_pool(tmp_path / "pool", "sst", "binary", members=3)
    (tmp_path / "report.html").write_text("before")

    def fails(*_):
        raise RuntimeError("on the way")

    monkeypatch.setattr(page, "page", fails)
    with pytest.raises(RuntimeError, match="on the way"):
        report(tmp_path, "sst")
    assert (tmp_path / "report.html").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool", "report.html"]


def test_without_wandb_it_says_what_to_install_before_the_work(tmp_path, monkeypatch, capsys):
    make_pool(tmp_path / "pool", "sst", "binary", members=3)
    monkeypatch.setitem(sys.modules, "wandb", None)
    where = ["--pool", str(tmp_path / "pool"), "--task", "sst", "--output", str(tmp_path / "r.html")]
    assert main(["report", *where, "--wandb"]) == 2
    out, err = capsys.readouterr()
    assert "pip install wandb" in err
    assert out == ""
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("given", "targets", "rate"),
    [
        ({"targets": "qv", "lr": 1e-4}, "qv", "0.0001"),
        ({"targets": "qv", "layers": [1], "lr": 1e-4, "lr_b": 1.6e-3}, "qv, [1]", "0.0001, B 0.0016"),
        (
            {
                "targets": "qkv",
                "layers": "top-half",
                "dropout": 0.1,
                "init": "kaiming",
                "lr": 1e-3,
                "weight_decay": 0.0,
            },
            "qkv, top-half, dropout 0.1, kaiming",
            "0.001, decay 0",
        ),
        ({}, "-", "-"),
    ],
)
def test_a_members_settings_in_words(given, targets, rate):
    record = MemberRecord(name="m", task="t", kind="binary", rank=4, scaling=2.0, seed=3, **given)
    assert facts.settings(record) == ["m", "4", "2", targets, rate, "3"]
