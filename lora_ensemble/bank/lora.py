"""Members, their settings, and their adapters in PEFT's format.

A member's adapter computes W0 x + c · B A x with c = α/r (Hu et al. 2021, section 4.1; Tolkunov, section 4.1); A starts
normal, B starts at zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from lora_ensemble import pool
from lora_ensemble.errors import UserError

NO_TARGETS = "none"
ALL_LAYERS = "all"
T = TypeVar("T", int, float, str)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One entry of ``model.members``. A setting that is a list is a grid over it.

    What :func:`expand_members` returns has no lists, and names.
    """

    rank: int | list[int] = 8
    """LoRA rank r. Without meaning for targets ``none``."""
    scaling: float | list[float] = 1.0
    """Scaling c = alpha / r: the adapter computes W0 x + c · B A x."""
    lr: float | list[float] = 1e-4
    """AdamW's learning rate of this member."""
    targets: str | list[str] = "qv"
    """qv, qkv, pooler, qkv+pooler, all-linear, all-but-output (all but the feed-forward's second layer), none (head
    only), or module-name suffixes joined by '+'."""
    layers: str | list[int] | list[str | list[int]] = "all"
    """The encoder's layers that are adapted: all, top-half, top-third, top-4 and the like, or numbers from 0 ([4, 5]).
    What lies below the lowest is computed once for all epochs."""
    seed: int | list[int] = 11711
    """Draws this member's A and head."""
    bag: bool | list[bool] = False
    """Whether it is trained on a bag of its own: as many examples as there are, drawn with replacement (its seed)."""
    patience: int | None = None
    """Dev evaluations in a row without a gain after which it is finished, at the end of an epoch; null: none."""
    name: str = None  # type: ignore[assignment]  # to jsonargparse a str or null; an expanded member has one
    """Folder in the pool; made from the settings by default."""

    @property
    def adapted(self) -> bool:
        """Whether it has adapters; False where it trains its head alone, or the whole encoder."""
        return self.targets != NO_TARGETS

    @property
    def own_layers(self) -> str | list[int]:
        """``layers`` of an expanded member, which is no grid."""
        return cast(str | list[int], self.layers)

    def recorded(self) -> dict[str, Any]:
        """Its settings as ``member.json`` has them.

        Rank, scaling and targets are None where nothing is adapted; layers where all are.
        """
        settings = dataclasses.asdict(self) | {"layers": None if self.layers == ALL_LAYERS else self.layers}
        return settings if self.adapted else settings | dict.fromkeys(("rank", "scaling", "targets"))

    @classmethod
    def of_record(cls, record: pool.MemberRecord) -> Member:
        """The member that a record is of."""
        return cls(
            rank=record.rank or 1,
            scaling=1.0 if record.scaling is None else record.scaling,
            lr=record.lr or 0.0,
            targets=record.targets or NO_TARGETS,
            layers=record.layers or ALL_LAYERS,
            bag=record.bag,
            patience=record.patience,
            seed=record.seed or 0,
            name=record.name,
        )


def single(setting: T | list[T]) -> T:
    """A setting of an expanded member, which is no list."""
    assert not isinstance(setting, list)
    return setting


def member_name(member: Member, finetune: str) -> str:
    """``r12-c3-qv-lr1e-4-s11711``; ``head-…`` for targets none, ``full-…`` for full fine-tuning.

    Layers, bag and patience are in it where they are not the defaults: ``r12-c3-qv-top-half-lr1e-4-s11711-bag-p3``.
    """
    # The rate to its last digit in scientific form: 0.0001 is 1e-4.
    end = f"lr{Decimal(repr(member.lr)).normalize():e}-s{member.seed}".replace("e+", "e")
    end += "-bag" * bool(member.bag)
    end += f"-p{member.patience}" if member.patience is not None else ""
    if finetune == "full":
        return f"full-{end}"
    if not member.adapted:
        return f"head-{end}"
    layers = member.layers if isinstance(member.layers, str) else "l" + "+".join(str(n) for n in member.layers)
    where = member.targets if layers == ALL_LAYERS else f"{member.targets}-{layers}"
    return f"r{member.rank}-c{repr(member.scaling).removesuffix('.0')}-{where}-{end}"


def expand_members(entries: Sequence[Member], *, finetune: str = "lora") -> list[Member]:
    """All members that the entries describe, grids expanded, in order; of an expanded one, itself.

    ``UserError`` where there is none, a value is out of range, a name is there twice, or several are finetuned in full.
    """
    if not entries:
        raise UserError("model.members: the list is empty; give at least one member, e.g. [{rank: 8, lr: 1e-4}]")
    members = []
    for number, entry in enumerate(entries):
        where = f"model.members[{number}]"
        values = {k: v if _is_grid(k, v) else [v] for k, v in vars(entry).items() if k != "name"}
        grid = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
        if not grid:
            raise UserError(f"{where}: a setting is an empty list; a grid needs at least one value")
        if entry.name and len(grid) > 1:
            raise UserError(f"{where}: name {entry.name!r} for a grid of {len(grid)} members; leave the name out")
        members += [_checked(where, entry.name, settings, finetune) for settings in grid]
    numbers: dict[str, int] = {}
    for number, member in enumerate(members):
        if numbers.setdefault(member.name, number) != number:
            raise UserError(
                f"model.members: members {numbers[member.name]} and {number} are both named {member.name!r}; "
                "names must differ (change a setting, or give a name)"
            )
    if finetune == "full" and len(members) > 1:
        raise UserError(
            f"model.members: {len(members)} members with finetune: full; full fine-tuning changes the encoder that a "
            "bank shares, so train one member a run (or use finetune: lora)"
        )
    return members


def _is_grid(setting: str, value: Any) -> bool:
    """Whether a setting's value is a list of values to try; a list of layers' numbers is one value."""
    return isinstance(value, list) and not (setting == "layers" and value and all(isinstance(v, int) for v in value))


def layer_numbers(layers: str | list[int], depth: int) -> list[int]:
    """Numbers, from 0, of the layers that a member's ``layers`` names in an encoder of ``depth`` layers.

    A half or a third that is no whole number of layers is rounded up. ``UserError`` for what the encoder lacks.
    """
    if isinstance(layers, str):
        count = {ALL_LAYERS: depth, "top-half": -(-depth // 2), "top-third": -(-depth // 3)}.get(layers)
        if count is None and (top := re.fullmatch(r"top-([0-9]+)", layers)):
            count = int(top[1])
        numbers = range(depth - count, depth) if count else []
    else:
        numbers = sorted(set(layers))
    if not numbers or numbers[0] < 0 or numbers[-1] >= depth:
        raise UserError(
            f"layers {layers!r}: expected all, top-half, top-third, top-1 to top-{depth}, or a list of numbers from 0 "
            f"to {depth - 1}: this encoder has {depth} layers"
        )
    return list(numbers)


def _checked(where: str, name: str | None, settings: dict[str, Any], finetune: str) -> Member:
    rank, scaling, lr, targets, seed = (settings[k] for k in ("rank", "scaling", "lr", "targets", "seed"))
    layers, patience = settings["layers"] or ALL_LAYERS, settings["patience"]
    layers = sorted(set(layers)) if isinstance(layers, list) else layers
    adapted = finetune == "lora" and targets not in (None, NO_TARGETS)
    # YAML may say null. Written so that NaN fails too.
    for key, value, right, expected in (
        ("rank", rank, not adapted or (rank or 0) >= 1, "a rank of at least 1 (targets: none trains the head alone)"),
        ("lr", lr, 0 < (lr or 0) < math.inf, "a learning rate above 0"),
        ("scaling", scaling, not adapted or 0 < (scaling or 0) < math.inf, "c = alpha / r above 0"),
        ("seed", seed, seed is not None and 0 <= seed < 2**63, "0 to 2^63 - 1"),
        ("patience", patience, patience is None or patience >= 1, "a number of dev evaluations of at least 1, or null"),
    ):
        if not right:
            raise UserError(f"{where}.{key}: {value}; expected {expected}")
    if not adapted:
        rank, scaling, targets, layers = 1, 1.0, NO_TARGETS, ALL_LAYERS
    same: dict[str, Any] = {"lr": float(lr), "seed": seed, "bag": bool(settings["bag"]), "patience": patience}
    member = Member(rank=rank, scaling=float(scaling), targets=targets, layers=layers, **same)
    name = name or member_name(member, finetune)
    pool.check_name(name)
    return dataclasses.replace(member, name=name)


def derived_seed(seed: int, purpose: str) -> int:
    """An independent 63-bit seed for each purpose, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


def linear_layers(encoder: nn.Module) -> dict[str, nn.Linear]:
    """Path inside the encoder to each of its linear layers, in order."""
    return {path: layer for path, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}


Adapter = dict[str, tuple[Tensor, Tensor]]
"""Of one member, at its own rank: path of a linear layer in the encoder to A (r, in) and B (out, r)."""


def head_names(model: Any) -> list[str]:
    """Children of a classification model that hold its head: PEFT's ``modules_to_save``."""
    names = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    return [name for name in names if name != model.base_model_prefix]


def peft_config(
    model: Any,
    paths: Iterable[str],
    *,
    rank: int,
    scaling: float,
    base_model: str,
    revision: str | None,
    layers: list[int] | None = None,
) -> dict[str, Any]:
    """``adapter_config.json`` for an ``AutoModelForSequenceClassification`` whose encoder is adapted at ``paths``.

    ``layers``: numbers of the layers that they are in; None where they are in all.
    """
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
        "target_modules": [f"{model.base_model_prefix}.{path}" for path in paths],
        **({} if layers is None else {"layers_to_transform": layers}),  # for people to read: the paths decide
        "modules_to_save": head_names(model),
    }


def peft_tensors(adapter: Adapter, head: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """Tensors of ``adapter_model.safetensors`` under PEFT's keys. ``head``: parameter name to tensor."""
    sides = ((path, side, t) for path, ab in adapter.items() for side, t in zip("AB", ab, strict=True))
    tensors = {f"{prefix}.{path}.lora_{side}.weight": t for path, side, t in sides} | head
    return {f"base_model.model.{name}": t for name, t in tensors.items()}


def from_peft(tensors: dict[str, Tensor], *, prefix: str) -> tuple[Adapter, dict[str, Tensor]]:
    """The inverse of :func:`peft_tensors`; an A without its B, or a B without its A, is left with the head."""
    head = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    ends = ".lora_A.weight", ".lora_B.weight"
    named = (name.removesuffix(ends[0]) for name in [*head] if name.endswith(ends[0]))
    paths = [name for name in named if name + ends[1] in head]
    adapter = {p.removeprefix(f"{prefix}."): (head.pop(p + ends[0]), head.pop(p + ends[1])) for p in paths}
    return adapter, head
