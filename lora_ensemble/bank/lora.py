"""Members, their settings, and their adapters in PEFT's format.

A member's adapter computes W0 x + c · B A x with c = α/r (Hu et al. 2021, section 4.1; Tolkunov, section 4.1); A starts
normal, B starts at zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from torch import Tensor, nn

from lora_ensemble import pool
from lora_ensemble.errors import UserError

NO_TARGETS = "none"


@dataclass(frozen=True, kw_only=True)
class MemberConfig:
    """One entry of ``model.members``. A setting that is a list is a grid over it."""

    rank: int | list[int] = 8
    """LoRA rank r. Without meaning for targets ``none``."""
    scaling: float | list[float] = 1.0
    """Scaling c = alpha / r: the adapter computes W0 x + c · B A x."""
    lr: float | list[float] = 1e-4
    """AdamW's learning rate of this member."""
    targets: str | list[str] = "qv"
    """qv, qkv, pooler, qkv+pooler, all-linear, all-but-output (all but the feed-forward's second layer), none (head
    only), or module-name suffixes joined by '+'."""
    seed: int | list[int] = 11711
    """Draws this member's A and head."""
    name: str | None = None
    """Folder in the pool; made from the settings by default."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One member: a :class:`MemberConfig` with one value for each setting.

    ``rank``, ``scaling`` and ``targets`` are None where nothing is adapted.
    """

    name: str
    rank: int | None
    scaling: float | None
    lr: float
    targets: str | None
    seed: int


def _scientific(x: float) -> str:
    """A number to its last digit in scientific form: 0.0001 is 1e-4."""
    sign, digits, exponent = Decimal(repr(float(x))).normalize().as_tuple()
    assert isinstance(exponent, int)
    first, rest = str(digits[0]), "".join(map(str, digits[1:]))
    return f"{'-' * sign}{first}{'.' * bool(rest)}{rest}e{exponent + len(digits) - 1}"


def member_name(member: Member, finetune: str) -> str:
    """``r12-c3-qv-lr1e-4-s11711``; ``head-…`` for targets none, ``full-…`` for full fine-tuning."""
    end = f"lr{_scientific(member.lr)}-s{member.seed}"
    if finetune == "full":
        return f"full-{end}"
    if member.rank is None or member.scaling is None:
        return f"head-{end}"
    return f"r{member.rank}-c{repr(member.scaling).removesuffix('.0')}-{member.targets}-{end}"


def expand_members(entries: Sequence[MemberConfig], *, finetune: str = "lora") -> list[Member]:
    """All members that the entries describe, grids expanded, in order.

    ``UserError`` where the list is empty, a value is out of range, a name is used twice, or ``finetune`` is full and
    there is more than one member.
    """
    if not entries:
        raise UserError("model.members: the list is empty; give at least one member, e.g. [{rank: 8, lr: 1e-4}]")
    members = []
    for number, entry in enumerate(entries):
        settings = [entry.rank, entry.scaling, entry.lr, entry.targets, entry.seed]
        grid: Iterable[Any] = itertools.product(*(v if isinstance(v, list) else [v] for v in settings))
        found = [_member(f"model.members[{number}]", entry.name, *point, finetune=finetune) for point in grid]
        if not found:
            raise UserError(f"model.members[{number}]: a setting is an empty list; a grid needs at least one value")
        if entry.name and len(found) > 1:
            raise UserError(
                f"model.members[{number}]: name {entry.name!r} for a grid of {len(found)} members; leave the name out"
            )
        members += found
    seen: dict[str, int] = {}
    for number, member in enumerate(members):
        if member.name in seen:
            raise UserError(
                f"model.members: members {seen[member.name]} and {number} are both named {member.name!r}; "
                "names must differ (change a setting, or give a name)"
            )
        seen[member.name] = number
    if finetune == "full" and len(members) > 1:
        raise UserError(
            f"model.members: {len(members)} members with finetune: full; full fine-tuning changes the encoder that a "
            "bank shares, so train one member a run (or use finetune: lora)"
        )
    return members


def _member(
    where: str, name: str | None, rank: int, scaling: float, lr: float, targets: str, seed: int, *, finetune: str
) -> Member:
    adapted = finetune == "lora" and targets != NO_TARGETS
    if adapted and rank < 1:
        raise UserError(f"{where}.rank: {rank}; expected a rank of at least 1 (targets: none trains the head alone)")
    # Written so that NaN fails too.
    if not 0 < lr < float("inf"):
        raise UserError(f"{where}.lr: {lr}; expected a learning rate above 0")
    if adapted and not 0 < scaling < float("inf"):
        raise UserError(f"{where}.scaling: {scaling}; expected c = alpha / r above 0")
    if not 0 <= seed < 2**63:
        raise UserError(f"{where}.seed: {seed}; expected 0 to 2^63 - 1")
    member = Member(
        name="",
        rank=rank if adapted else None,
        scaling=float(scaling) if adapted else None,
        lr=float(lr),
        targets=targets if adapted else None,
        seed=seed,
    )
    member = dataclasses.replace(member, name=name or member_name(member, finetune))
    pool.check_name(member.name)
    return member


def entry_of(member: Member) -> MemberConfig:
    """The entry of ``model.members`` that describes this member alone."""
    return MemberConfig(
        rank=member.rank or 1,  # a member without one adapts nothing; its entry says so by its targets
        scaling=member.scaling or 1.0,
        lr=member.lr,
        targets=member.targets or NO_TARGETS,
        seed=member.seed,
        name=member.name,
    )


def derived_seed(seed: int, purpose: str) -> int:
    """An independent 63-bit seed for each purpose, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


def linear_layers(encoder: nn.Module) -> dict[str, nn.Linear]:
    """Path inside the encoder to each of its linear layers, in order."""
    return {path: layer for path, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Where one member's adapters sit and what they hold, at the member's own rank."""

    A: dict[str, Tensor]
    """Path of the linear layer in the encoder to (r, in)."""
    B: dict[str, Tensor]
    """Path to (out, r)."""


def peft_config(
    member: Member, paths: Sequence[str], *, prefix: str, heads: Sequence[str], base_model: str, revision: str | None
) -> dict:
    """``adapter_config.json`` for ``AutoModelForSequenceClassification``.

    ``paths``: adapted linear layers, as in the encoder; ``prefix``: the encoder's name in the classification model.
    """
    rank, scaling = member.rank or 1, 1.0 if member.scaling is None else member.scaling
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        # Whole paths: a suffix may match a layer of the head, or of another block.
        "target_modules": [f"{prefix}.{path}" for path in paths],
        "modules_to_save": list(heads),
    }


def peft_tensors(adapter: Adapter, head: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """Tensors of ``adapter_model.safetensors`` under PEFT's keys. ``head``: parameter name to tensor."""
    tensors = {}
    for path in adapter.A:
        tensors[f"base_model.model.{prefix}.{path}.lora_A.weight"] = adapter.A[path]
        tensors[f"base_model.model.{prefix}.{path}.lora_B.weight"] = adapter.B[path]
    tensors.update({f"base_model.model.{name}": value for name, value in head.items()})
    return tensors


def from_peft(tensors: dict[str, Tensor], *, prefix: str) -> tuple[Adapter, dict[str, Tensor]]:
    """The inverse of :func:`peft_tensors`."""
    a, b, head = {}, {}, {}
    start = f"base_model.model.{prefix}."
    for key, value in tensors.items():
        if key.endswith(".lora_A.weight"):
            a[key.removeprefix(start).removesuffix(".lora_A.weight")] = value
        elif key.endswith(".lora_B.weight"):
            b[key.removeprefix(start).removesuffix(".lora_B.weight")] = value
        else:
            head[key.removeprefix("base_model.model.")] = value
    return Adapter(A=a, B=b), head
