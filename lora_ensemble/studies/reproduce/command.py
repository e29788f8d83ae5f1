"""``lora-ensemble reproduce``: says what it will train, trains it, and puts the report's tables beside ours."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import get_args

from lora_ensemble.dicor.options import words
from lora_ensemble.errors import Interrupted, Parser, UserError
from lora_ensemble.pool import MemberRecord
from lora_ensemble.studies.reproduce.papers import PAPERS, TASKS, Paper, PaperName, Part, Scale
from lora_ensemble.studies.reproduce.work import MOST, config_files, measure, seconds, settings_of, steps, work_of
from lora_ensemble.tasks import PRESETS, SPLITS
from lora_ensemble.text.readers import read_split

BASE_MODELS: dict[Scale, str] = {"full": "bert-base-uncased", "small": "all-MiniLM-L6-v2"}


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(
        prog="lora-ensemble reproduce",
        description="Train every system of a report's tables, and put its tables and ours side by side. Interrupted, "
        "the same command goes on.",
    )
    p.add_argument("paper", choices=get_args(PaperName))
    p.add_argument("--data.root", dest="root", type=Path, required=True, metavar="DIR", help="the course's files")
    p.add_argument(
        "--scale", choices=get_args(Scale), default="full", help="small: under an hour on two cores (default: full)"
    )
    p.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help=f"train each model until N dev evaluations brought no gain, in up to {MOST} times the epochs",
    )
    p.add_argument("--output", type=Path, metavar="DIR", help="default: checkpoints/PAPER-SCALE[-patience-N]")
    p.add_argument("--base_model", help="default: bert-base-uncased; small: all-MiniLM-L6-v2")
    p.add_argument(
        "--precision", help="of training (default: bf16-mixed where the device multiplies bf16 itself, else 32-true)"
    )
    p.add_argument("--accelerator", default="auto", help="auto, cpu or gpu")
    p.add_argument("--devices", default="1", help="how many of them (default: 1)")
    p.add_argument("--plan", action="store_true", help="say what would be trained and how long it takes, and stop")
    return p


def run(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. ``UserError`` for what the user can put right."""
    given = parser().parse_args(args)
    paper: Paper = PAPERS[given.paper]
    given.base_model = given.base_model or BASE_MODELS[given.scale]
    given.experiment = f"{given.paper}-{given.scale}" + f"-patience-{given.patience}" * bool(given.patience)
    given.output = given.output or Path("checkpoints") / given.experiment
    _check(given)
    import torch  # not for --help, like what is imported below

    from lora_ensemble.bank.encode import computes_bf16
    from lora_ensemble.bank.lora import Member
    from lora_ensemble.studies.reproduce.results import write_results
    from lora_ensemble.train.runs.progress import duration

    device = "cuda" if torch.cuda.is_available() and given.accelerator != "cpu" else "cpu"
    given.precision = given.precision or ("bf16-mixed" if computes_bf16(device) else "32-true")
    given.tokenised = {}  # the splits, once for all parts
    _say_plan(paper, given, device)
    if given.plan:
        return 0
    started = time.monotonic()
    for number, part in enumerate(paper.parts, 1):
        print(f"\n== part {number} of {len(paper.parts)}: {part.name}", flush=True)
        try:
            _train("sweep", part, given, *_with_patience(part, given))
        except BaseException:
            print(f"lora-ensemble: stopped in part {number} ({part.name}); the same command goes on", file=sys.stderr)
            raise

    def predict(pool: str, task: str, members: list[MemberRecord]) -> None:
        part = next(p for p in paper.parts if p.pool == pool and task in p.tasks)
        entries = json.dumps([asdict(Member.of_record(r)) for r in members])
        _train("predict", part, given, f"--model.members={entries}")

    files = write_results(
        given.paper, given.scale, given.output, base_model=given.base_model, patience=given.patience, predict=predict
    )
    if given.paper == "tolkunov":
        files += _figures(given)
    print("\n".join(f"saved {file}" for file in files))
    print(f"done in {duration(time.monotonic() - started)} (this start)")
    return 0


def _check(given: argparse.Namespace) -> None:
    """``UserError`` for what would be missed only after hours of training."""
    if given.patience is not None and given.patience < 1:
        raise UserError(f"--patience {given.patience}: expected a number of dev evaluations of at least 1")
    for task in PRESETS.values():
        for split in SPLITS:
            file = given.root / getattr(task, split)
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; --data.root is the folder of the CS224N default project's data files, or "
                    f"of what lora-ensemble data download --root {given.root} fetches"
                )
    if given.paper == "tolkunov" and not given.plan:
        needed = {"altair": "altair", "vl_convert": "vl-convert-python", "jinja2": "jinja2", "sklearn": "scikit-learn"}
        missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise UserError(f"the figures need {' and '.join(missing)}; run: pip install 'lora-ensemble[reproduce]'")


def _say_plan(paper: Paper, given: argparse.Namespace, device: str) -> None:
    """Say what is trained; how long that takes, where the base model is here or is about to be needed anyway."""
    from lora_ensemble.bank.base_model import is_here
    from lora_ensemble.studies.reproduce.results import markdown_table
    from lora_ensemble.train.data import BankData
    from lora_ensemble.train.runs.progress import duration

    speed = None
    if given.plan and not is_here(given.base_model):
        splits = [[read_split(PRESETS[t], s, given.root, need_labels=True) for s in ("train", "dev")] for t in TASKS]
    else:
        data = BankData(base_model=given.base_model, root=str(given.root), tasks=TASKS)
        data.tokenised = given.tokenised
        data.setup("fit")
        splits = [[data.splits[s][t].source for s in ("train", "dev")] for t in TASKS]
        speed = measure(data, precision=given.precision, device=device)
    examples = {t: (len(train), len(dev)) for t, (train, dev) in zip(TASKS, splits, strict=True)}
    rows, total = [], 0.0
    for part in paper.parts:
        work = work_of(part, given.scale, given.patience)
        took = seconds(work, part.tasks, examples, speed) if speed else 0.0
        total += took
        rates = ", ".join(f"{rate:g}" for rate in work.learning_rates)
        number = steps(work, part.tasks, examples)
        about = duration(took) if speed else "?"
        rows.append([part.name, str(work.members), str(work.epochs), str(number), rates, about])
    where = f" on {speed.device}" if speed else ""
    print(f"\n{paper.title}, --scale {given.scale}, {given.base_model}, {given.precision}{where}\n")
    most = "at most" if given.patience else "about"
    print(markdown_table(["trains", "members", "epochs", "steps", "learning rates", most], rows))
    if speed:
        print(f"\n{most} {duration(total)} in all, if nothing else runs here; output: {given.output}", flush=True)
    else:
        print(f"\n{given.base_model} is not on this machine yet, so how long it takes is not known")


def _figures(given: argparse.Namespace) -> list[Path]:
    """Each task's page of ``dicor report`` with its plots, figures 1 and 3 among them, and figure 4; the files."""
    from lora_ensemble.studies.reproduce.figures import save_embeddings
    from lora_ensemble.studies.reproduce.results import dicor_options

    pool, folder, files = given.output / "grid", given.output / "figures", []
    for task in TASKS:
        page, chosen = given.output / f"{task}.html", words(dicor_options(task, given.scale))
        files += [page, folder / f"{task}-embeddings.png"]
        paths = [f"--pool={pool}", f"--output={page}", f"--plots={folder}"]
        if _program("lora_ensemble.dicor", "report", f"--task={task}", "--method=dicor", *paths, *chosen):
            raise UserError(f"the figures of {task} failed; the same command goes on")
        save_embeddings(pool, task, given.root, given.base_model, files[-1])
    return files


def _with_patience(part: Part, given: argparse.Namespace) -> list[str]:
    if not given.patience:
        return []
    merged = settings_of(part, given.scale, given.patience)
    return [
        f"--model.members={json.dumps(merged['model']['members'])}",
        f"--trainer.max_epochs={merged['trainer']['max_epochs']}",
    ]


def _train(verb: str, part: Part, given: argparse.Namespace, *more: str) -> None:
    """Run ``lora-ensemble`` for a part; ``UserError`` for what the user can put right.

    In this process, which has the data, unless several devices have one each: they are started with its own command.
    """
    from lora_ensemble.train.cli import CLI
    from lora_ensemble.train.cli import run as lora_ensemble

    arguments = [
        verb,
        *(f"--config={file}" for file in config_files(part, given.scale)),
        f"--data.root={given.root}",
        f"--data.tasks=[{', '.join(part.tasks)}]",
        f"--model.base_model={given.base_model}",
        f"--pool.dir={given.output / part.pool}",
        f"--trainer.default_root_dir={given.output}",
        f"--trainer.precision={given.precision}",
        f"--trainer.accelerator={given.accelerator}",
        f"--trainer.devices={given.devices}",
        f"--experiment={given.experiment}",
        *more,
    ]
    code = (
        lora_ensemble(arguments, partial(CLI, tokenised=given.tokenised))
        if given.devices == "1"
        else _program("lora_ensemble", *arguments)
    )
    if code > 128:
        raise Interrupted(code - 128)
    if code:
        raise UserError(f"{verb} failed for {part.name}")
    gc.collect()
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.finish()


def _program(module: str, *arguments: str) -> int:
    """Run one of our programs in a process of its own."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments])
    # A scheduler tells this process alone to end; the one that trains has the checkpoint to write.
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal told both
        process.wait()
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
