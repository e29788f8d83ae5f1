"""An ensemble's LoRA members as one: adapters side by side, cut to fewer ranks if asked for, and heads averaged.

The change of a layer is the weighted mean of the members' changes, sum_i w_i c_i B_i A_i. That is not their ensemble:
layers between are not linear, so what is lost has to be measured (``measure.py``).

Axes: r rank, summed over members.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_ensemble.dicor import record
from lora_ensemble.ensemble.folder import Base
from lora_ensemble.ensemble.single import Single, base_of, last_layer, read_weights
from lora_ensemble.errors import UserError
from lora_ensemble.lora import Adapter
from lora_ensemble.pool import MemberRecord, member_folder
from lora_ensemble.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One model made of several members."""

    single: Single
    rank: int
    """Of its adapter."""
    full_rank: int
    """What it would be without a cut: the largest sum of the members' ranks at a layer."""
    kept: float
    """Share of the squared norm of all layers' changes that the cut to ``rank`` left; 1.0 without one."""


def merge_members(
    chosen: record.Ensemble,
    folder: Path,
    records: list[MemberRecord],
    task: Task,
    base: Base,
    *,
    rank: int | None,
    any_base: bool = False,
) -> Merged:
    """The ensemble ``chosen`` from the pool at ``folder`` as one model of its task.

    ``rank``: at most so many ranks at a layer, the best in the sense of least squares; None: all of them. Members must
    pass :func:`check_mergeable`.
    """
    shared = base_of(records, folder, task, base, any_base=any_base)
    classifier = shared["classifier"]
    weights = torch.tensor([m.weight for m in chosen.members], dtype=torch.float64)
    weights = weights / weights.sum()
    a: dict[str, list[Tensor]] = {}
    b: dict[str, list[Tensor]] = {}
    head: dict[str, Tensor] = {}
    last = last_layer(classifier)[0]
    for r, member, weight in zip(records, chosen.members, weights, strict=True):
        adapter, own, _ = read_weights(folder, r, prefix=classifier.base_model_prefix)
        for path in adapter.A:
            a.setdefault(path, []).append(adapter.A[path].double())
            b.setdefault(path, []).append(weight * (r.scaling or 0.0) * adapter.B[path].double())
        for name, tensor in own.items():
            # Logits are divided by a temperature; a head's inner layers are not.
            degree = member.temperature or 1.0 if name.startswith(last + ".") else 1.0
            head[name] = head.get(name, 0.0) + weight / degree * tensor.double()
    if chosen.offsets is not None:
        _offset(head, last, chosen)
    side_by_side = {path: (torch.cat(a[path]), torch.cat(b[path], dim=1)) for path in a}
    full_rank = max(len(one) for one, _ in side_by_side.values())
    kept = 1.0
    if rank is not None and rank < full_rank:
        side_by_side, kept = _cut(side_by_side, rank)
    widest = max(len(one) for one, _ in side_by_side.values())
    single = Single(
        name="merged",
        scaling=1.0,
        # PEFT's rank is one for all layers; rows of zeros change nothing.
        adapter=Adapter(
            A={p: pad(one, (0, 0, 0, widest - len(one))).float() for p, (one, _) in side_by_side.items()},
            B={p: pad(two, (0, widest - two.shape[1])).float() for p, (_, two) in side_by_side.items()},
        ),
        head={name: tensor.float() for name, tensor in head.items()},
        encoder={},
        **shared,
    )
    return Merged(single=single, rank=widest, full_rank=full_rank, kept=kept)


def check_mergeable(records: list[MemberRecord], folder: Path) -> None:
    """``UserError`` for members that are fully fine-tuned, have different base models, or cut texts at different
    lengths; it names them."""
    for r in records:
        if r.finetune == "full":
            raise UserError(
                f"{member_folder(folder, r.task, r.name)}: fully fine-tuned, so it has no adapter to merge; select an "
                "ensemble without it, or export the whole ensemble (without --merge)"
            )
    for key, what in (("base_model", "base model"), ("max_length", "longest text")):
        first, *others = [(r.settings.get(key) if key == "max_length" else r.base_model, r.name) for r in records]
        for value, name in others:
            if value != first[0]:
                raise UserError(
                    f"{folder / records[0].task}: --merge needs members of one {what}: that of {first[1]} is "
                    f"{first[0]}, that of {name} is {value}; export the whole ensemble (without --merge)"
                )


def _offset(head: dict[str, Tensor], last: str, chosen: record.Ensemble) -> None:
    """The ensemble's scale and offsets, which act on logits as the last layer does."""
    offsets = torch.tensor(chosen.offsets, dtype=torch.float64)
    if chosen.kind == "binary":
        offsets = offsets[1:] - offsets[:1]
    head[f"{last}.weight"] = head[f"{last}.weight"] * chosen.scale
    head[f"{last}.bias"] = head[f"{last}.bias"] * chosen.scale + offsets


def _cut(layers: dict[str, tuple[Tensor, Tensor]], rank: int) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """The nearest change of each layer of at most ``rank`` (Eckart and Young 1936), and the share that is kept."""
    cut, left, whole = {}, 0.0, 0.0
    for path, (a, b) in layers.items():
        # B A = Qb (Rb Ra^T) Qa^T: the decomposition of a matrix of the ranks' size, not of the layer's.
        qa, ra = torch.linalg.qr(a.T)
        qb, rb = torch.linalg.qr(b)
        u, s, v = torch.linalg.svd(rb @ ra.T)
        root = s[:rank].sqrt()
        cut[path] = (root[:, None] * v[:rank] @ qa.T, qb @ u[:, :rank] * root)
        left, whole = left + float((s[:rank] ** 2).sum()), whole + float((s**2).sum())
    return cut, left / whole if whole else 1.0
