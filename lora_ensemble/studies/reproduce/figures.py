"""Tolkunov's figures: 1 and 3 as dicor draws them, 4 (t-SNE of what the heads read of the dev examples) here."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from lora_ensemble.bank.base_model import hub_id
from lora_ensemble.bank.lora import Member
from lora_ensemble.bank.member_files import restore_members
from lora_ensemble.dicor.report import command as report_command
from lora_ensemble.errors import UserError
from lora_ensemble.files import replacing
from lora_ensemble.pool import MemberRecord, TaskPool
from lora_ensemble.studies.reproduce.papers import TASKS, Scale
from lora_ensemble.studies.reproduce.results import dicor_options
from lora_ensemble.train.data import BankData
from lora_ensemble.train.module import BankModule


def low_and_high(members: Sequence[MemberRecord]) -> tuple[MemberRecord, MemberRecord]:
    """A member of the lowest and one of the highest rank, of one scaling: the most common, the least of equals."""
    scalings = [r.scaling for r in members if r.scaling is not None]
    common = max(sorted(set(scalings)), key=scalings.count)
    ranked = sorted((r for r in members if r.scaling == common and r.rank), key=lambda r: (r.rank or 0, r.name))
    return ranked[0], ranked[-1]


def embeddings(pool: Path, task: str, records: Sequence[MemberRecord], root: Path, base_model: str) -> np.ndarray:
    """The first token's last hidden state of each dev example: (M, N, H), rows in the order of the pool's examples."""
    data = BankData(base_model=base_model, root=str(root), tasks=(task,))
    data.setup("fit")
    module = BankModule(data.tasks, base_model, members=tuple(Member.of_record(r) for r in records))
    here = module.base_fingerprint(data)
    restore_members(module.bank, pool, base_model=hub_id(base_model), fingerprint=here)
    module.eval()
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    found = np.zeros((len(records), len(data.splits["dev"][task]), module.bank.config.hidden_size), np.float32)
    for batch in data.val_dataloader():
        part = move_data_to_device(batch[task], module.device)
        found[:, part["rows"]] = module.bank.read(part).float().cpu().numpy()
    return found


def tolkunov_figures(output: Path, scale: Scale, root: Path, base_model: str) -> list[Path]:
    """Each task's page of ``dicor report`` with its plots (1 and 3 among them), and figure 4, below ``output``.

    ``UserError`` where what draws them is missing.
    """
    folder, files = output / "figures", []
    for task in TASKS:
        page = output / f"{task}.html"
        given = Namespace(
            pool=output / "grid",
            task=task,
            output=page,
            method=["dicor"],
            split="dev",
            plots=folder,
            wandb=False,
        )
        report_command.run(given, dicor_options(task, scale))
        files += [page, figure(output / "grid", task, root, base_model, folder / f"{task}-embeddings.png")]
    return files


def figure(pool: Path, task: str, root: Path, base_model: str, path: Path) -> Path:
    """Draw figure 4 of a task into ``path``."""
    try:
        import altair as alt
        import vl_convert
        from sklearn.manifold import TSNE

        from lora_ensemble.dicor.report.plot import VEGA_LITE
    except ImportError as e:
        raise UserError(
            f"figure 4 needs scikit-learn, altair and vl-convert-python ({e}); "
            "run: pip install 'lora-ensemble[reproduce]'"
        ) from e
    task_pool = TaskPool(pool, task)
    records = low_and_high(task_pool.members)
    labels = task_pool.examples().labels
    assert labels is not None
    named = labels.tolist() if task_pool.kind == "regression" else [task_pool.labels[int(y)] for y in labels]
    ordered = alt.Color("label:Q") if task_pool.kind == "regression" else alt.Color("label:O", sort=task_pool.labels)
    colour = ordered.scale(scheme="viridis")
    plots = []
    for record, points in zip(records, embeddings(pool, task, records, root, base_model), strict=True):
        at = TSNE(init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=0).fit_transform(points)
        rows = [{"x": float(x), "y": float(y), "label": label} for (x, y), label in zip(at, named, strict=True)]
        places = {c: axis(f"{c}:Q", axis=None, scale=alt.Scale(zero=False)) for c, axis in (("x", alt.X), ("y", alt.Y))}
        dots = alt.Chart(alt.InlineData(values=rows)).mark_circle(size=14, opacity=1).encode(**places, color=colour)
        title = alt.Title([record.name, f"{task_pool.name} dev {record.score:.3f}"], fontSize=12)
        plots.append(dots.properties(width=420, height=380, title=title))
    title = alt.Title(f"{task}: what the head reads, t-SNE (Tolkunov, figure 4)", anchor="middle", fontSize=15)
    chart = alt.hconcat(*plots, title=title).to_dict()
    with replacing(path) as beside:
        beside.write_bytes(vl_convert.vegalite_to_png(chart, vl_version=VEGA_LITE, scale=2))
    return path
