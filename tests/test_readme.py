"""The README's blocks are run, in its order, with made-up data and a tiny model; what cannot be run must exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, save_tiny

from lora_ensemble import pool
from lora_ensemble.bank.lora import Member, expand_members
from lora_ensemble.dicor.cli import main as dicor
from lora_ensemble.main import main as lora_ensemble
from lora_ensemble.train.runs.ray_sweep import RayOptions

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = [re.sub("(?m)^    ", "", block) for block in re.findall(r"(?m)(?<=\n\n)(?:^    .*\n(?:\n(?=    ))?)+", README)]
PROGRAMS: dict[str, Callable[[list[str]], int]] = {"lora-ensemble": lora_ensemble, "dicor": dicor}

# Verbs that are not run here: where there is their own test, or what they would take.
NOT_RUN = {
    "reproduce": "test_reproduce.py, on the course's data",
    "serve": "test_serve.py: it does not end",
    "sweep": "test_sweep.py: 186 members over BERT",
}
TINY = [
    *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false"),
    "--trainer.enable_progress_bar=false",
]
WORDS = {"billing": "invoice paid twice", "delivery": "parcel is late", "returns": "send it back"}


def commands(block: str) -> list[list[str]]:
    """The calls of our programs in a block, as lists of words; without those that are cut short by three dots."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", "").splitlines() if is_command(line)]
    return [words for words in lines if "..." not in words]


def is_command(line: str) -> bool:
    return bool(re.match(rf"({'|'.join(PROGRAMS)}) +[a-z]", line)) and "──►" not in line and " | " not in line


COMMANDS = [words for block in BLOCKS for words in commands(block)]


def verb_of(words: list[str]) -> tuple[str, ...]:
    """Program and verb; ``fit`` for those that have its options, whose help takes as long again."""
    return (words[0], "fit") if words[1] in ("validate", "predict") else tuple(words[:2])


@pytest.fixture(scope="module")
def helps() -> dict[tuple[str, ...], str]:
    """What ``--help`` says of each command that the README names, and of those that it names elsewhere."""
    asked = {verb_of(words) for words in COMMANDS} | {("lora-ensemble", "sweep"), ("lora-ensemble", "data", "download")}
    said = {}
    for program, *verb in asked:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            PROGRAMS[program]([*verb, "--help"])
        said[(program, *verb)] = text.getvalue()
    return said


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[\w]", text))


def test_every_option_of_every_command_exists(helps: dict[tuple[str, ...], str]) -> None:
    assert len(COMMANDS) > 20
    for words in COMMANDS:
        known = options(helps[verb_of(words)])
        assert known, f"{words[:2]} has no help"
        assert options(" ".join(words)) <= known, words
    everywhere = set.union(*(options(text) for text in helps.values()))
    # Of a setting that is a dataclass, the parts are options.
    known = everywhere | {o.rsplit(".", 1)[0] for o in everywhere} | {f"--ray.{f.name}" for f in fields(RayOptions)}
    assert sorted(options(README) - known) == []


@pytest.fixture
def home(tmp_path: Path, demo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all files that the README's commands name, to be worked in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "DIR").symlink_to(demo_root)
    (block,) = (b for b in BLOCKS if "name: tickets" in b)
    Path("tickets.yaml").write_text(block)
    Path("data").mkdir()
    rng, names = np.random.default_rng(0), list(WORDS)
    for split, n in (("train", 40), ("dev", 40), ("test", 12)):
        labels = [names[i % 3] for i in range(n)]
        rows = [f"{WORDS[label]} {i},{label}" for i, label in enumerate(labels)]  # a row's place is its id
        Path(f"data/{split}.csv").write_text("\n".join(["subject,queue", *rows, ""]))
        Path(f"{split}.csv").write_text("\n".join(["id,queue", *(f"{i},{x}" for i, x in enumerate(labels)), ""]))
        said = rng.dirichlet(np.ones(3), n)
        lines = [f"{i},{','.join(f'{p:.4f}' for p in row)}" for i, row in enumerate(said)]
        Path(f"forest-{split}.csv").write_text("\n".join(["id,p_billing,p_delivery,p_returns", *lines, ""]))
        np.save(f"svm-{split}.npy", said[::-1])
    Path("new.csv").write_text("id,subject,sentence\n1,where is my parcel,a good film\n2,paid twice,a bad film\n")
    Path("more.csv").write_text("subject\nis it late\nback\n")
    texts = [p.read_text() for p in (*demo_root.glob("*.csv"), *Path("data").glob("*.csv"))]
    save_tiny(tmp_path / "model", "bert", re.findall("[a-z]+", " ".join(texts).lower()))
    return tmp_path


def test_the_commands_run_in_the_readmes_order(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that stands there twice, for another way to begin, is run once."""
    (python,) = (block for block in BLOCKS if "Ensemble.load" in block)
    names: dict[str, Any] = {}
    done: list[list[str]] = []
    for words in COMMANDS:
        if words[1] in NOT_RUN or words in done:
            continue
        done.append(words)
        given = words[1:]
        if "NAME" in given:
            given[given.index("NAME")] = pool.TaskPool(Path("checkpoints/pool"), "tickets").members[0].name
            given = [f"{word}-{len(done)}" if word == "one" else word for word in given]
        if words[1] in ("fit", "validate", "predict", "distill", "boost"):
            given += ["--model.base_model=model", *TINY]
        assert PROGRAMS[words[0]](given) == 0, (words, capsys.readouterr().err)
        if "--probabilities" in words:  # the README's "or, from Python"
            exec(python.replace("ensemble.predict([", "decided = ensemble.predict(["), names)
    assert {words[1] for words in done} >= {"fit", "validate", "predict", "distill", "infer", "export"}
    assert {words[1] for words in done} >= {"compare", "select", "report", "apply", "import"}
    assert names["decided"].tolist()[0] in WORDS
    for file in ("report.html", "answers.csv", "predictions.csv", "tickets-ensemble/config.json"):
        assert Path(file).stat().st_size, file


def test_methods_are_used_as_the_readme_uses_them() -> None:
    (block,) = (b for b in BLOCKS if "Greedy(" in b)
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(3, size=30), rng.normal(size=(4, 30, 3)).astype(np.float32)
    given: dict[str, Any] = {"logits": logits, "labels": labels, "names": list("abcd"), "test_logits": logits}
    exec(block, given)
    assert set(given["greedy"].names_) <= set("abcd")


def test_a_grid_in_yaml_makes_the_members_that_are_said() -> None:
    (block,) = (b for b in BLOCKS if "# six members" in b)
    entries = [{**e, "lr": float(e["lr"])} for e in yaml.safe_load(block)["model"]["members"]]
    members = expand_members([Member(**entry) for entry in entries])
    assert [m.targets for m in members] == ["qv"] * 6 + ["none"]
