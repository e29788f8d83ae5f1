"""What may import what. A boundary has a test, and that test has a test."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pool_factory import make_pool
from trained_pool import write_pool

import lora_ensemble
from lora_ensemble.dicor.cli import main as dicor_main
from lora_ensemble.main import _OWN

PACKAGE = Path(lora_ensemble.__file__).parent
HEAVY = ("torch", "transformers", "lightning", "wandb")
TRAINING = ("lightning", "wandb", "jsonargparse", "peft", "torchmetrics", "pytorch_lightning")
ALL = ("torch", "transformers", *TRAINING, "pyarrow", "scipy", "sklearn", "matplotlib", "datasets", "ray", "yaml")


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
    assert loaded(dicor(*args), (*HEAVY, "numpy", "scipy", "matplotlib", "safetensors")) == []


@pytest.mark.parametrize("command", _OWN)
def test_help_needs_no_torch(command):
    help_ = f"from lora_ensemble.main import main\ntry: main([{command!r}, '--help'])\nexcept SystemExit: pass"
    names = [*HEAVY, "fastapi", "uvicorn", "matplotlib", "sklearn"]
    if command not in ("reproduce", "data"):  # their options are made of the tasks, whose scores need numpy
        names.append("numpy")
    assert loaded(help_, tuple(names)) == []


def test_dicor_needs_no_torch(tmp_path):
    make_pool(tmp_path / "pool", "sst", "multiclass")
    names = (*HEAVY, "scipy", "matplotlib", "numpy")
    select = dicor("select", "--pool", tmp_path / "pool", "--task", "sst", "--output", tmp_path / "dicor.json")
    assert loaded(select, names) == ["numpy"]
    assert loaded(dicor("compare", "--pool", tmp_path / "pool"), names) == ["numpy"]
    apply = dicor("apply", "--ensemble", tmp_path / "dicor.json", "--output", tmp_path / "predictions.csv")
    assert loaded(apply, names) == ["numpy"]
    (tmp_path / "boosted.csv").write_text("id,logit\n" + "".join(f"d{i},{i - 2}\n" for i in range(5)))
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"d{i},{i % 2}\n" for i in range(5)))
    where = ("--pool", tmp_path / "pool", "--task", "new", "--task-kind", "binary", "--labels", tmp_path / "labels.csv")
    assert loaded(dicor("import", tmp_path / "boosted.csv", *where), (*names, "pyarrow")) == ["numpy"]


def test_the_plots_need_no_torch(tmp_path):
    pytest.importorskip("matplotlib")
    make_pool(tmp_path / "pool", "sst", "multiclass")
    compare = dicor("compare", "--pool", tmp_path / "pool", "--plots", tmp_path / "plots")
    assert loaded(compare, (*HEAVY, "matplotlib", "matplotlib.pyplot")) == ["matplotlib"]


def test_the_report_needs_neither_torch_nor_matplotlib(tmp_path):
    make_pool(tmp_path / "pool", "sst", "multiclass")
    report = dicor("report", "--pool", tmp_path / "pool", "--task", "sst", "--output", tmp_path / "report.html")
    assert loaded(report, (*HEAVY, "matplotlib", "numpy")) == ["numpy"]


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


def is_below(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def broken_rules(module: str, source: str) -> list[str]:
    """What a module imports and must not."""
    own = "lora_ensemble."
    names = ("errors", "arguments", "tasks", "tables", "delimited", "pool", "online", "dicor", "__version__")
    allowed_in_dicor = tuple(own + name for name in names)
    foundations = tuple(own + name for name in ("errors", "arguments", "tasks", "tables", "delimited", "pool"))
    plain = (
        "model",
        "ensemble",
        "bank_io",
        "lora",
        "families",
        "base_model",
        "optim",
        "readers",
        "tables",
        "delimited",
        "memory",
        "split",
        "plan",
        "tokens",
        "packing",
        "encode",
    )
    without_lightning = tuple(own + name for name in plain)
    above = (f"{own}reproduce", f"{own}distill", f"{own}main", f"{own}__main__", f"{own}dicor.__main__")  # both stages
    starts = (f"{own}main", f"{own}__main__", f"{own}dicor.__main__")  # what starts a command line
    broken = []
    for name in sorted(imports(source, module)):
        inside = is_below(name, "lora_ensemble")
        in_dicor = is_below(module, f"{own}dicor")
        wrong = (
            (in_dicor and inside and not is_below(name, *allowed_in_dicor))
            or (in_dicor and is_below(name, *HEAVY) and (module, name) != (f"{own}dicor.report.to_wandb", "wandb"))
            # A restored ensemble combines with dicor's functions; training knows nothing of them.
            or (not in_dicor and is_below(name, f"{own}dicor") and not is_below(module, f"{own}ensemble", *above))
            or (is_below(module, *foundations) and inside and not is_below(name, *foundations))
            or (is_below(module, *foundations) and is_below(name, *HEAVY, "scipy", "matplotlib"))
            or (is_below(module, *without_lightning) and is_below(name, "lightning", "wandb"))
            or (is_below(name, f"{own}cli", f"{own}dicor.cli") and module not in starts)
        )
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


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dicor.select", "from lora_ensemble.module import Bank"),
        ("dicor.select", "from lora_ensemble import lora"),
        ("dicor.select", "from .. import model"),
        ("dicor.select", "def f():\n    import torch.nn"),
        ("dicor.compare", "from lora_ensemble.dicor.cli import main"),
        ("dicor.report.page", "import wandb"),
        ("dicor.report.to_wandb", "import torch"),
        ("module", "from lora_ensemble.dicor.select import dicor"),
        ("sweep", "from lora_ensemble import dicor"),
        ("data", "import lora_ensemble.dicor"),
        ("pool", "import torch"),
        ("pool.reading", "from lora_ensemble.module import Bank"),
        ("tasks", "from lora_ensemble.pool import TaskPool\nfrom lora_ensemble import lora"),
        ("model", "import lightning.pytorch as pl"),
        ("ensemble", "from wandb import init"),
        ("ensemble.infer", "import lightning.pytorch as pl"),
        ("ensemble.serve.app", "import wandb"),
        ("bank_io", "from lightning.pytorch import Trainer"),
        ("sweep", "from lora_ensemble.cli import main"),
    ],
)
def test_the_rules_see_what_is_imported(module, source):
    assert len(broken_rules(f"lora_ensemble.{module}", source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "dicor.select",
            "from lora_ensemble.pool import TaskPool\nfrom lora_ensemble import __version__\nimport numpy",
        ),
        ("dicor.select", "from .similarity import features"),
        ("dicor.report.to_wandb", "def f():\n    import wandb"),
        ("ensemble", "from lora_ensemble.dicor.combine import combine\nimport torch"),
        ("ensemble.infer", "from lora_ensemble.dicor import record"),
        ("sweep", "from lora_ensemble.client import x\nimport torchmetrics"),
        ("__main__", "from lora_ensemble.cli import main"),
    ],
)
def test_the_rules_let_pass_what_is_right(module, source):
    assert broken_rules(f"lora_ensemble.{module}", source) == []
