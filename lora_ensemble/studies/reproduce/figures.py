"""Tolkunov's figure 4: t-SNE of what the heads read of the dev examples. Figures 1 and 3 are ``dicor report``'s."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from lora_ensemble.bank.base_model import hub_id
from lora_ensemble.bank.lora import Member
from lora_ensemble.bank.member_files import restore_members
from lora_ensemble.pool import MemberRecord, TaskPool
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
    data.setup("validate")
    module = BankModule(data.tasks, base_model, members=tuple(Member.of_record(r) for r in records))
    fingerprint = module.base_fingerprint(data)
    restore_members(module.bank, pool, base_model=hub_id(base_model), fingerprint=fingerprint)
    module.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    states = np.zeros((len(records), len(data.splits["dev"][task]), module.bank.config.hidden_size), np.float32)
    for batch in data.val_dataloader():
        part = move_data_to_device(batch[task], module.device)
        states[:, part["rows"]] = module.bank.read(part).float().cpu().numpy()
    return states


def save_embeddings(pool: Path, task: str, root: Path, base_model: str, path: Path) -> Path:
    """Draw figure 4 of a task into ``path``, a PNG: a panel for each of two members, a point for each dev example."""
    import altair as alt
    from sklearn.manifold import TSNE

    task_pool = TaskPool(pool, task)
    records, labels = low_and_high(task_pool.members), task_pool.examples().labels
    assert labels is not None
    regression = task_pool.kind == "regression"
    names = labels.tolist() if regression else [task_pool.labels[int(label)] for label in labels]
    points = []
    for record, states in zip(records, embeddings(pool, task, records, root, base_model), strict=True):
        at = TSNE(init="pca", perplexity=min(30, (len(states) - 1) / 3), random_state=0).fit_transform(states)
        member = f"{record.name}, {task} dev {record.score:.3f}"
        points += [
            {"member": member, "x": x, "y": y, "label": name} for (x, y), name in zip(at.tolist(), names, strict=True)
        ]
    chart = (
        alt.Chart(alt.Data(values=points), title=f"{task}: what the head reads, t-SNE (Tolkunov, figure 4)")
        .mark_circle(size=9, opacity=1)
        .encode(
            x=alt.X("x:Q", axis=None),
            y=alt.Y("y:Q", axis=None),
            color=alt.Color("label:Q" if regression else "label:O").scale(scheme="viridis"),
            column=alt.Column("member:N", sort=None, title=None),
        )
        .resolve_scale(x="independent", y="independent")
    )
    chart.save(path, ppi=144)
    return path
