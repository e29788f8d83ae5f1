"""What may import what. A boundary has a test, and that test has a test."""

import ast
import graphlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pool_factory import make_pool
from trained_pool import write_pool

import lora_ensemble
from lora_ensemble.dicor.cli import main as dicor_main
from lora_ensemble.main import OWN

PACKAGE = Path(lora_ensemble.__file__).parent
HEAVY = ("torch", "transformers", "lightning", "wandb")
TRAINING = ("lightning", "wandb", "jsonargparse", "peft", "torchmetrics", "pytorch_lightning")
ALL = ("torch", "transformers", *TRAINING, "pyarrow", "scipy", "sklearn", "altair", "datasets", "ray", "yaml")


def loaded(statement: str, names: tuple[str, ...], *, path: Path | None = None) -> list[str]:
    """Which of ``names`` a fresh interpreter has loaded after ``statement``; ``path`` comes first on its path."""
    code = f"import sys\n{statement}\nprint('loaded:', *sorted({set(names)!r} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(path)} if path else None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return done.stdout.splitlines()[-1].split()[1:]


def dicor(*args: object) -> str:
    return f"from lora_ensemble.dicor.cli import main\nassert main({[str(a) for a in args]!r}) == 0"


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["select", "--help"], ["import", "--help"], ["report", "--help"]]
)
def test_dicors_help_needs_nothing_at_all(args):
    assert loaded(dicor(*args), (*HEAVY, "numpy", "scipy", "altair", "jinja2", "safetensors")) == []


@pytest.mark.parametrize("command", OWN)
def test_help_needs_no_torch(command):
    help_ = f"from lora_ensemble.main import main\ntry: main([{command!r}, '--help'])\nexcept SystemExit: pass"
    names = [*HEAVY, "fastapi", "uvicorn", "altair", "sklearn"]
    if command not in ("reproduce", "data"):  # their options are made of the tasks, whose scores need numpy
        names.append("numpy")
    assert loaded(help_, tuple(names)) == []


def test_dicor_needs_no_torch(tmp_path):
    make_pool(tmp_path / "pool", "sst", "multiclass")
    names = (*HEAVY, "scipy", "altair", "vl_convert", "jinja2", "numpy")
    select = dicor("select", "--pool", tmp_path / "pool", "--task", "sst", "--output", tmp_path / "dicor.json")
    assert loaded(select, names) == ["numpy"]
    assert loaded(dicor("compare", "--pool", tmp_path / "pool"), names) == ["numpy"]
    apply = dicor("apply", "--ensemble", tmp_path / "dicor.json", "--output", tmp_path / "predictions.csv")
    assert loaded(apply, names) == ["numpy"]
    (tmp_path / "boosted.csv").write_text("id,logit\n" + "".join(f"d{i},{i - 2}\n" for i in range(5)))
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"d{i},{i % 2}\n" for i in range(5)))
    where = ("--pool", tmp_path / "pool", "--task", "new", "--task-kind", "binary", "--labels", tmp_path / "labels.csv")
    assert loaded(dicor("import", tmp_path / "boosted.csv", *where), (*names, "pyarrow")) == ["numpy"]


def test_the_report_and_its_plots_need_no_torch(tmp_path):
    make_pool(tmp_path / "pool", "sst", "multiclass")
    where = ("--pool", tmp_path / "pool", "--plots", tmp_path / "plots")
    report = dicor("report", *where, "--task", "sst", "--output", tmp_path / "report.html")
    assert loaded(report, (*HEAVY, "altair", "numpy", "pandas")) == ["altair", "numpy"]


def test_an_ensemble_answers_without_what_training_needs(tiny, tmp_path):
    """Of third parties torch, transformers, numpy and safetensors do, and what these bring themselves."""
    pool, record, out = tmp_path / "pool", tmp_path / "dicor.json", tmp_path / "out"
    write_pool(pool, tiny("bert"), "multiclass")
    select = ["select", "--pool", str(pool), "--task", "mine", "--method", "omni", "--output", str(record)]
    assert dicor_main(select) == 0
    bring = loaded("import torch\nfrom transformers import AutoModelForSequenceClassification as A, BertModel", ALL)
    predict = "from lora_ensemble import Ensemble\nassert len(Ensemble.load({!r}).predict(['good', 'bad'])) == 2"
    export = (
        f"from lora_ensemble.main import main\nassert main({['export', '--ensemble', str(record)]!r} + {{!r}}) == 0"
    )
    assert set(loaded(predict.format(str(record)), ALL)) == set(bring)
    assert set(loaded(export.format(["--output", str(out)]), ALL)) == set(bring)
    assert set(loaded(predict.format(str(out)), ALL)) == set(bring)
    assert not {*TRAINING, "pyarrow"} & set(bring)


@pytest.mark.parametrize("name", HEAVY)
def test_the_test_sees_what_is_loaded(name, tmp_path):
    """A stand-in of that name, imported by a bad module, deep inside a function: the check must report it."""
    (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "bad.py").write_text(f"def main():\n    import {name}\n")
    assert loaded("import bad", HEAVY, path=tmp_path) == []
    assert loaded("import bad\nbad.main()", HEAVY, path=tmp_path) == [name]


def imports(source: str, module: str) -> set[str]:
    """Full names of all that a module's source imports, anywhere in it: ``a.b`` for import a.b and from a import b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


ROOMS = {
    "text": (),
    "pool": (),
    "bank": ("text", "pool"),
    "dicor": ("text", "pool"),
    "train": ("text", "pool", "bank"),
    "ensemble": ("text", "pool", "bank", "dicor"),
    "studies": ("text", "pool", "bank", "dicor", "train", "ensemble"),
}
"""Each room, and the rooms that it may import from. All may import from the root."""
ROOT = ("errors", "files", "online", "scores", "tasks", "__version__")
DOORS = ("lora_ensemble.__init__", "lora_ensemble.__main__", "lora_ensemble.main", "lora_ensemble.dicor.__main__")
TORCH_IN_TEXT = ("lora_ensemble.text.packing", "lora_ensemble.text.tokens")
WANDB_IN_DICOR = "lora_ensemble.dicor.report.to_wandb"


def room_of(name: str) -> str:
    """The room that a full name of ours lies in; empty for the root."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def is_below(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def is_a_door(name: str) -> bool:
    """Whether a room shows this to the others: it is in the ``__all__`` of the room."""
    room = room_of(name)
    shown = importlib.import_module(f"lora_ensemble.{room}").__all__
    return name == f"lora_ensemble.{room}" or name.split(".")[2] in shown


def is_forbidden_library(module: str, name: str) -> bool:
    room = room_of(module)
    if room in ("", "pool"):
        return is_below(name, *HEAVY, "scipy", "altair")
    if room == "text":
        return is_below(name, *HEAVY, "scipy") and not (module in TORCH_IN_TEXT and is_below(name, "torch"))
    if room == "dicor":
        return is_below(name, *HEAVY) and (module, name) != (WANDB_IN_DICOR, "wandb")
    return room in ("bank", "ensemble") and is_below(name, "lightning", "wandb")


def broken_rules(module: str, source: str) -> list[str]:
    """What a module imports and must not."""
    broken = []
    here = room_of(module)
    for name in sorted(imports(source, module)):
        there = room_of(name)
        if is_forbidden_library(module, name):
            broken.append(f"{module} imports {name}")
        if not is_below(name, "lora_ensemble") or module in DOORS:
            continue
        if not there:
            wrong = not is_below(name, *(f"lora_ensemble.{part}" for part in ROOT))
        elif there == here:
            wrong = name.split(".")[-2] in ("cli", "command")  # nothing imports a command line
        else:
            wrong = not here or there not in ROOMS[here] or not is_a_door(name)
        if wrong:
            broken.append(f"{module} imports {name}")
    return broken


SOURCES = {
    ".".join(["lora_ensemble", *path.relative_to(PACKAGE).with_suffix("").parts]): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", SOURCES)
def test_dependencies_point_one_way(module):
    assert broken_rules(module, SOURCES[module].read_text(encoding="utf-8")) == []


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Each module of ours and those that it imports, anywhere in it; the doors are left out."""
    nodes = {module.removesuffix(".__init__") for module in sources} - {"lora_ensemble"}
    edges: dict[str, set[str]] = {}
    for module, source in sources.items():
        node = module.removesuffix(".__init__")
        if node in nodes:
            names = {part for name in imports(source, module) for part in (name, name.rpartition(".")[0])}
            edges[node] = (names & nodes) - {node}
    return edges


def test_there_is_no_circle():
    sources = {module: path.read_text(encoding="utf-8") for module, path in SOURCES.items()}
    assert len(list(graphlib.TopologicalSorter(graph(sources)).static_order())) == len(SOURCES) - 1


def test_a_circle_is_seen():
    lazy, plain = "def f():\n    from lora_ensemble.b import x", "import lora_ensemble.a"
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph({"lora_ensemble.a": lazy, "lora_ensemble.b": plain})).prepare()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dicor.choose.select", "from lora_ensemble.train.module import Bank"),
        ("dicor.choose.select", "from lora_ensemble.bank import lora"),
        ("dicor.choose.select", "from ... import train"),
        ("dicor.choose.select", "def f():\n    import torch"),
        ("dicor.choose.select", "import lora_ensemble.bank.model"),
        ("dicor.choose.select", "import wandb"),
        ("dicor.record", "from lora_ensemble.text.delimited import read"),
        ("dicor.record", "from lora_ensemble.dicor.cli import main"),
        ("train.module", "from lora_ensemble.dicor import record"),
        ("train.module", "def f():\n    from lora_ensemble.studies.distill import x"),
        ("train.runs.sweep", "from lora_ensemble.main import main"),
        ("bank.lora", "from lora_ensemble.dicor.choose.combine import combine"),
        ("bank.model", "import lightning.pytorch as pl"),
        ("pool.reading", "from lora_ensemble.text.tables import read"),
        ("pool", "import torch"),
        ("pool.swap", "def f():\n    import scipy.stats"),
        ("text.tables", "from lora_ensemble.pool import TaskPool"),
        ("text.readers", "import torch"),
        ("tasks", "from lora_ensemble.pool import TaskPool"),
        ("scores", "import scipy"),
        ("ensemble", "from wandb import init"),
        ("ensemble.infer", "import lightning.pytorch as pl"),
        ("ensemble.infer", "from lora_ensemble.bank.attention import x"),
        ("ensemble.serve.app", "import wandb"),
        ("studies.distill", "from lora_ensemble.dicor.cli import main"),
    ],
)
def test_the_rules_see_what_is_imported(module, source):
    assert len(broken_rules(f"lora_ensemble.{module}", source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "dicor.choose.select",
            "from lora_ensemble.pool import TaskPool\nfrom lora_ensemble import __version__\nimport numpy",
        ),
        ("dicor.choose.select", "from .similarity import features"),
        ("dicor.report.to_wandb", "def f():\n    import wandb"),
        ("ensemble", "from lora_ensemble.dicor.choose.combine import combine\nimport torch"),
        ("ensemble.infer", "from lora_ensemble.dicor import record"),
        ("train.runs.sweep", "from lora_ensemble.errors import UserError\nimport torchmetrics"),
        ("text.tokens", "import torch"),
        ("__main__", "from lora_ensemble.main import main"),
    ],
)
def test_the_rules_let_pass_what_is_right(module, source):
    assert broken_rules(f"lora_ensemble.{module}", source) == []
