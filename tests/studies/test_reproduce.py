"""The two reports: what is trained is what they say, and their tables stand beside ours."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from pool_factory import add_member, random_labels, random_logits
from scipy.stats import spearmanr
from test_cli import Program

from lora_ensemble.bank.lora import Member, expand_members
from lora_ensemble.dicor.choose.settings import DEFAULT_SIZE
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.main import main
from lora_ensemble.pool import MemberRecord, TaskPool
from lora_ensemble.scores import overall_score
from lora_ensemble.studies.reproduce import command, papers, results, work
from lora_ensemble.studies.reproduce.figures import low_and_high, save_embeddings
from lora_ensemble.studies.reproduce.results import markdown_table
from lora_ensemble.studies.reproduce.work import Speed, Work, config_files, config_folder, work_of
from lora_ensemble.tasks import PRESETS

CONFIGS = REPOSITORY / "configs"


def settings(*names: str) -> dict[str, Any]:
    merged: dict[str, Any] = {"data": {}, "model": {}, "trainer": {}}
    for name in names:
        for section, values in yaml.safe_load((CONFIGS / name).read_text()).items():
            merged[section].update(values)
    return merged


def members(config: dict[str, Any]) -> list[Any]:
    entries = [Member(**entry) for entry in config["model"]["members"]]
    return expand_members(entries, finetune=config["model"].get("finetune", "lora"))


# Oyeniyi, section 5.3: model, where LoRA sits, rank, learning rate. PyYAML reads 1e-5 as a text, LightningCLI does not.
ELEVEN = [
    (None, None, 1e-5),
    ("qkv", 4, 1e-5),
    ("qkv", 32, 1e-9),
    ("qkv", 48, 1e-5),
    ("pooler", 4, 1e-5),
    ("qkv+pooler", 4, 1e-5),
    ("qkv+pooler", 32, 1e-9),
    ("qkv+pooler", 48, 1e-5),
    ("all-but-output", 4, 1e-5),
    ("all-but-output", 48, 1e-5),
    ("all-but-output", 100, 1e-5),
]


@pytest.fixture
def read(program: Program, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Any], Any]]:
    """The members and all settings of configuration files, as the program reads them."""
    from lora_ensemble.train.cli import CLI

    monkeypatch.chdir(program.folder)

    def seen(*configs: str, tasks: str = "") -> tuple[list[Any], Any]:
        found: list[tuple[list[Any], Any]] = []
        monkeypatch.setattr(CLI, "fit", lambda self, model, **_: found.append((model.members, self.config.fit)))
        arguments = ["fit", *(f"--config={CONFIGS / c}" for c in configs), f"--data.root={program.root}"]
        arguments += [f"--model.base_model={program.base}", "--trainer.accelerator=cpu"]
        arguments += [f"--data.tasks={tasks}"] if tasks else []
        assert main(arguments) == 0
        return found[0]

    return seen


@pytest.fixture
def program(tmp_path: Path, tiny: Any, demo_root: Path) -> Program:
    return Program(tmp_path, tiny("bert"), demo_root)


def test_oyeniyis_models_and_defaults(read: Any) -> None:
    found, config = read("oyeniyi.yaml")
    assert [(m.recorded()["targets"], m.recorded()["rank"], m.lr) for m in found] == ELEVEN
    assert {m.scaling for m in found if m.adapted} == {1.0}
    assert {m.seed for m in found} == {11711}
    assert [m.name for m in found] == list(papers.OYENIYI.dev)
    assert config.seed_everything == 11711
    assert config.trainer.max_epochs == 10
    assert config.data.batch_size == 8
    assert config.model.head_dropout == 0.3
    assert list(config.data.tasks) == ["sst", "quora", "sts"]
    assert config.model.weight_decay == 0
    assert config.model.schedule == "constant"


def test_tolkunovs_baselines(read: Any) -> None:
    (frozen,), config = read("tolkunov/frozen.yaml", tasks="[sts]")
    assert (frozen.targets, frozen.lr, config.trainer.max_epochs) == ("none", 1e-3, 10)
    (full,), config = read("tolkunov/finetuned.yaml", tasks="[sts]")
    assert (config.model.finetune, full.lr, config.trainer.max_epochs) == ("full", 1e-5, 10)


# Tolkunov: number of models, epochs, the best (r, c), and the (r, c) that DiCor chose.
GRIDS = {
    "sst": (80, 20, (12, 3), "12,3 14,5 4,1 7,4 12,4 5,1 13,5 8,3 15,3 3,5 9,1"),
    "quora": (4, 20, (16, 1), "8,1 8,2 16,1 16,2"),
    "sts": (186, 10, (29, 3), "29,3 28,5 16,4 17,5 23,10 31,10 18,5 21,10 24,5 21,5"),
}


@pytest.mark.parametrize("task", GRIDS)
def test_tolkunovs_grids(task: str) -> None:
    number, epochs, best, chosen = GRIDS[task]
    config = settings(f"tolkunov/{task}.yaml")
    for entry in config["model"]["members"]:
        entry["lr"] = float(entry["lr"])
    found = members(config)
    points = {(m.rank, m.scaling) for m in found}
    assert len(found) == len(points) == number
    assert {(m.targets, m.lr) for m in found} == {("qv", 1e-4)}
    assert config["trainer"]["max_epochs"] == epochs
    assert best in points
    named = [tuple(map(float, p.split(","))) for p in chosen.split()]
    assert set(named) <= points
    assert DEFAULT_SIZE[PRESETS[task].kind] == len(named)  # dicor select takes as many


@pytest.mark.parametrize(
    "figures",
    [*papers.OYENIYI.dev.values(), papers.OYENIYI.test[1], *papers.TOLKUNOV.dev.values(), papers.TOLKUNOV.test[1]],
)
def test_the_reports_overall_scores_are_the_means_of_theirs(figures: Any) -> None:
    """A slip in copying a figure would show: overall = (sst + quora + (sts + 1) / 2) / 3, to their rounding."""
    if figures is None:
        return
    sst, quora, sts, overall = figures
    found = overall_score({"sst": (sst, "multiclass"), "quora": (quora, "binary"), "sts": (sts, "regression")})
    assert found == pytest.approx(overall, abs=1.01e-3)


@pytest.mark.parametrize("scale", ["full", "small"])
@pytest.mark.parametrize("paper", papers.PAPERS)
def test_what_a_part_trains(paper: Any, scale: Any) -> None:
    """Counted from the files without starting anything, against the members that the program makes of them."""
    for part in papers.PAPERS[paper].parts:
        counted = work_of(part, scale)
        config = settings(*(str(f.relative_to(config_folder())) for f in config_files(part, scale)))
        for entry in config["model"]["members"]:
            entry["lr"] = float(entry["lr"])
        found = members(config)
        assert counted.members == len(found)
        assert counted.heads_only == sum(m.targets in ("none", "pooler") for m in found) * (not counted.full)
        assert counted.epochs == config["trainer"]["max_epochs"]


def test_a_table() -> None:
    assert markdown_table(["model", "sst"], [["a", "0.1"], ["bc", "-"]]) == (
        "| model | sst |\n|-------|----:|\n| a     | 0.1 |\n| bc    |   - |"
    )


def test_a_column_is_of_numbers_where_nothing_else_stands_in_it() -> None:
    assert markdown_table(["a", "b"], [["0.5 (p 0.1)", "x"], ["-", "1"]]).splitlines()[1] == "|------------:|---|"
    assert markdown_table(["a"], []).splitlines()[1] == "|---|"


def test_how_long_a_part_takes_by_hand() -> None:
    speed, examples = Speed(device="", seconds=0.01, tokens={"a": 5.0, "b": 2.0}), {"a": (100, 10), "b": (40, 20)}
    some = Work(members=5, heads_only=2, full=False, epochs=3, steps_per_epoch=None, learning_rates=[])
    assert work.steps(some, ("a", "b"), examples) == 3 * 13  # 100 examples in batches of 8
    assert work.steps(replace(some, steps_per_epoch=4), ("a", "b"), examples) == 3 * 4
    # Three members: 39 steps of 8 × (5 + 2) tokens, three times 10 × 5 + 20 × 2 of dev at a third. Two heads: the
    # encoder once over 110 × 5 + 60 × 2 tokens, at a third.
    assert work.seconds(some, ("a", "b"), examples, speed) == pytest.approx(0.01 * (3 * (2184 + 90) + 670 / 3))
    full = replace(some, members=1, heads_only=0, full=True)
    assert work.seconds(full, ("a",), examples, speed) == pytest.approx(0.01 * (2.5 * 39 * 8 * 5 + 50))


def test_the_members_of_figure_4() -> None:
    """Most have scaling 3; of those the least and the largest rank, of equals by name. A head alone has no rank."""
    given = [
        ("a", 2, 3.0),
        ("b", 1, 1.0),
        ("c", 9, 3.0),
        ("d", 9, 3.0),
        ("e", 20, 1.0),
        ("f", 2, 3.0),
        ("g", None, None),
    ]
    records = [MemberRecord(name=n, task="sst", kind="multiclass", rank=r, scaling=c) for n, r, c in given]
    assert [r.name for r in low_and_high(records)] == ["a", "d"]
    even = [records[i] for i in (4, 1, 2, 0)]  # two of each scaling: the lesser one
    assert [r.name for r in low_and_high(even)] == ["b", "e"]


def test_oyeniyis_claims_by_hand() -> None:
    """Who diverged has no overall score."""
    of = dict.fromkeys(papers.OYENIYI.dev, 0.5) | {"4-kqv-r48": 0.7, "9-all-1-r4": 0.6}
    of |= {"2-kqv-r4": math.nan, "11-all-1-r100": math.nan}
    beats, ranks, layers, _, best = results.oyeniyi_claims(of).splitlines()
    assert ": 2 of 10 do here (not 2-kqv-r4, 3-kqv-r32, 5-pooler-r4, " in beats  # as good as the baseline is not better
    assert "11-all-1-r100)." in beats
    assert "4 to 48 on key, query, value - → 0.700;" in ranks
    assert ranks.endswith("and to 100 -.")
    assert layers.endswith("all but the output layer 0.600.")
    assert best == "* *Model 9 is best*: here it is 4-kqv-r48 (0.700); model 9 has 0.600."


@pytest.fixture
def tolkunovs_pools(tmp_path: Path) -> Path:
    """His nine pools, made of numbers; m00 of each grid has no rank, and SST's frozen baseline has diverged."""
    for task in papers.TASKS:
        for folder, count in (("frozen", task != "sst"), ("finetuned", 1), ("grid", 10)):
            kind = PRESETS[task].kind
            dev, test = random_labels(kind, 60), random_labels(kind, 20, seed=1)
            logits = {"dev": random_logits(kind, dev, 10, seed=2), "test": random_logits(kind, test, 10, seed=3)}
            ids = {"dev": [f"d{i}" for i in range(60)], "test": [f"t{i}" for i in range(20)]}
            for m in range(int(count)):
                add_member(
                    *(tmp_path / folder, task, kind, f"m{m:02d}", {split: a[m] for split, a in logits.items()}, ids),
                    {"dev": dev, "test": None},
                    **{"rank": 1 + m, "scaling": float(1 + m % 3)},
                    **{"settings": {"precision": "32-true"}, "score": float(m), "targets": "qv"},
                )
    return tmp_path


def test_tolkunovs_tables(tolkunovs_pools: Path) -> None:
    asked: list[Any] = []
    files = results.write_results(
        "tolkunov", "small", tolkunovs_pools, base_model="tiny", predict=lambda *of: asked.append(of)
    )
    text = (tolkunovs_pools / "report.md").read_text()
    assert asked == []  # all members had said something of the test split
    assert [f.name for f in files] == ["report.md", *(f"{t}-dicor-test.csv" for t in papers.TASKS)]
    rows = {cells[1]: cells[2:-1] for line in text.splitlines() if len(cells := re.split(r" *\| *", line)) > 3}
    assert rows["report, DiCor-LoRA"] == ["0.550", "0.904", "0.882", "0.798"]
    assert rows["ours, DiCor-LoRA"] == ["not known"] * 4
    assert rows["sst: dev examples"] == ["1101", "60"]
    systems = next(line for line in text.splitlines() if line.startswith("| Frozen BERT") and "0.395" in line)
    said = {task: TaskPool(tolkunovs_pools / "frozen", task).logits("m00")[:, 0] for task in ("quora", "sts")}
    quora = np.mean((said["quora"] > 0) == random_labels("binary", 60))
    sts = np.corrcoef(said["sts"], random_labels("regression", 60))[0, 1]
    theirs, ours = ["0.395", "0.697", "0.526", "0.618"], ["-", f"{quora:.3f}", f"{sts:.3f}", "-"]
    assert [c.strip() for c in systems.split("|")[2:10]] == [c for pair in zip(theirs, ours, strict=True) for c in pair]
    for task in papers.TASKS:
        ensemble = json.loads((tolkunovs_pools / f"{task}-dicor.json").read_text())
        assert (ensemble["size"], ensemble["settings"]["top_k"]) == (4, papers.SMALL_TOP_K[task])
    # What STS members say is compared by Pearson's r, each with the nine others.
    members = TaskPool(tolkunovs_pools / "grid", "sts")
    said = np.stack([members.logits(r.name)[:, 0] for r in members.members])
    alike = (np.corrcoef(said).sum(1) - 1) / 9
    expected = spearmanr(alike, range(10))
    assert rows["sts, 10 members"][2] == f"{expected.statistic:+.2f} (p {expected.pvalue:.2g})"


def test_tolkunovs_pages(tolkunovs_pools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page and its plots for each task, by the command that anybody can give."""
    (tolkunovs_pools / "out").mkdir()
    shutil.move(tolkunovs_pools / "grid", tolkunovs_pools / "out/grid")
    asked: list[tuple[str, ...]] = []

    def program(module: str, *arguments: str) -> int:
        asked.append(arguments)
        return dicor(arguments)

    monkeypatch.setattr(command, "_program", program)
    monkeypatch.setattr("lora_ensemble.studies.reproduce.figures.save_embeddings", lambda *_: None)
    given = argparse.Namespace(output=tolkunovs_pools / "out", scale="small", root=Path(), base_model="tiny")
    files = command._figures(given)
    assert [f.name for f in files if f.suffix == ".html"] == [f"{t}.html" for t in papers.TASKS]
    assert all(f.is_file() for f in files if f.suffix == ".html")
    assert {"--size", "4"} < set(asked[0])
    assert all(list((tolkunovs_pools / "out/figures").glob(f"{t}*.svg")) for t in papers.TASKS)


def test_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "tolkunov", "--data.root", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}/ids-sst-train.csv: no such file" in err
    assert "lora-ensemble data download" in err
    assert main(["reproduce", "somebody", "--data.root", str(tmp_path)]) == 2
    assert "invalid choice: 'somebody'" in capsys.readouterr().err


def test_what_the_figures_need_is_asked_for_before_hours_of_training(
    program: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "sklearn" else object())
    arguments = ["reproduce", "tolkunov", f"--data.root={program.root}", f"--base_model={program.base}"]
    assert main([*arguments, "--accelerator=cpu"]) == 2
    said = capsys.readouterr()
    assert "figures need scikit-learn; run: pip install 'lora-ensemble[reproduce]'" in said.err
    assert said.out == ""
    assert main([*arguments, "--accelerator=cpu", "--plan"]) == 0


def test_a_plan_needs_no_base_model(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """Members and steps are counted from configurations and files; how long it takes is left open, and said to be."""
    plan = ["reproduce", "tolkunov", f"--data.root={program.root}", "--accelerator=cpu", "--plan"]
    assert main([*plan, "--base_model=nobody/has-this"]) == 0
    unknown = capsys.readouterr().out
    assert "nobody/has-this is not on this machine yet" in unknown
    assert main([*plan, f"--base_model={program.base}"]) == 0
    known = capsys.readouterr().out
    tables = [[line.split("|")[1:-2] for line in out.splitlines() if line.startswith("| ")] for out in (unknown, known)]
    assert [[c.strip() for c in row] for row in tables[0]] == [[c.strip() for c in row] for row in tables[1]]
    assert len(tables[0]) > 8


def test_told_to_end(program: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that a signal ended ends the whole, which says how it goes on."""
    monkeypatch.setattr("lora_ensemble.train.cli.run", lambda *_: 143)
    arguments = ["reproduce", "oyeniyi", f"--data.root={program.root}", f"--output={program.folder / 'out'}"]
    assert main([*arguments, f"--base_model={program.base}", "--accelerator=cpu", "--precision=32-true"]) == 143
    assert "stopped in part 1 " in capsys.readouterr().err


def small_oyeniyi(program: Program) -> tuple[Path, list[str]]:
    """Where it goes, and the command."""
    output = program.folder / "out"
    arguments = ["reproduce", "oyeniyi", f"--data.root={program.root}", "--scale=small", f"--output={output}"]
    return output, [*arguments, f"--base_model={program.base}", "--accelerator=cpu", "--precision=32-true"]


def test_small_reproduction_of_oyeniyi(
    program: Program, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From nothing to the tables, with a tiny model and few steps; begun again, it trains nothing."""
    fewer = program.folder / "fewer.yaml"
    fewer.write_text("data: {steps_per_epoch: 4}\ntrainer: {max_epochs: 2, precision: 32-true}\n")
    monkeypatch.setattr(command, "config_files", lambda part, scale: [*config_files(part, scale), fewer])
    output, arguments = small_oyeniyi(program)
    assert main([*arguments, "--plan"]) == 0
    assert not output.exists()
    capfd.readouterr()
    assert main(arguments) == 0
    out = capfd.readouterr().out
    assert out.count("quora train: 60 examples") == 1  # read once, for the plan and for all parts
    text = (output / "report.md").read_text()
    assert text in out
    assert "| 9-all-1-r4       |        0.256 | " in text  # the report's figure
    assert "| 11-all-1-r100    | not reported | " in text
    assert len((output / "sst-9-all-1-r4-test.csv").read_text().splitlines()) == 21  # a header and 20 examples
    tested = [r.name for r in TaskPool(output / "pool", "sst").members if "test" in r.examples]
    assert tested == ["9-all-1-r4"]  # no model that the table of test scores has not
    assert main(arguments) == 0
    out = capfd.readouterr().out
    assert "11 of 11 members are finished" in out
    assert "bank 1" not in out
    assert (output / "report.md").read_text() == text
    picture = save_embeddings(output / "pool", "sts", program.root, str(program.base), output / "figure-4.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_patience_trains_until_nothing_is_gained(
    program: Program, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every member of the report has it, and more epochs than the small run's to use it in; the tables say so."""
    fewer = program.folder / "fewer.yaml"
    fewer.write_text("data: {steps_per_epoch: 2}\ntrainer: {max_epochs: 1}\n")
    monkeypatch.setattr(command, "config_files", lambda part, scale: [*config_files(part, scale), fewer])
    monkeypatch.setattr(work, "config_files", lambda part, scale: [*config_files(part, scale), fewer])
    monkeypatch.setattr(work, "MOST", 4)
    output, arguments = small_oyeniyi(program)
    assert main([*arguments, "--patience=0"]) == 2
    assert "--patience 0: expected a number of dev evaluations of at least 1" in capfd.readouterr().err
    assert main([*arguments, "--patience=1"]) == 0
    assert "at most" in capfd.readouterr().out
    records = TaskPool(output / "pool", "sst").members
    assert [r.name for r in records] == sorted(papers.OYENIYI.dev)
    assert {r.patience for r in records} == {1}
    ended = [(r.epochs_done, r.best_epoch) for r in records]
    assert any(done < 4 for done, _ in ended)
    assert all(done in (best + 1, 4) for done, best in ended)
    assert "`--patience 1`: not so many epochs, but each model until" in (output / "report.md").read_text()
