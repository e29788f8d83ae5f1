"""Members and their settings, from entries of our own or from PEFT's ``LoraConfig``.

A member's adapter computes W0 x + c · B A x with c = α/r (Hu et al. 2021, section 4.1; Tolkunov, section 4.1); A starts
at random, B starts at zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from torch import Tensor, nn

from lora_ensemble import pool
from lora_ensemble.errors import UserError

NO_TARGETS = "none"
ALL_LAYERS = "all"
T = TypeVar("T", int, float, str, float | None)
Init = Literal["normal", "kaiming"]


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
    lr_b: float | list[float | None] | None = None
    """Of its B matrices, where it is another (LoRA+, Hayou et al. 2024); null: lr."""
    weight_decay: float | list[float | None] | None = None
    """AdamW's decoupled weight decay of this member; null: model.weight_decay."""
    targets: str | list[str] = "qv"
    """qv, qkv, pooler, qkv+pooler, all-linear, all-but-output (all but the feed-forward's second layer), none (head
    only), or module-name suffixes joined by '+'."""
    layers: str | list[int] | list[str | list[int]] = "all"
    """The encoder's layers that are adapted: all, top-half, top-third, top-4 and the like, or numbers from 0 ([4, 5]).
    What lies below the lowest is computed once for all epochs."""
    dropout: float | list[float] = 0.0
    """Probability of LoRA's dropout, of what enters an adapter, in training; the seed and the step draw its masks."""
    init: Init | list[Init] = "normal"
    """How A starts: normal, with deviation model.init_std, or kaiming, as PEFT's init_lora_weights: true."""
    seed: int | list[int] = 11711
    """Draws this member's A, its head and the masks of its LoRA dropout."""
    bag: bool | list[bool] = False
    """Whether it is trained on a bag of its own: as many examples as there are, drawn with replacement (its seed)."""
    patience: int | None = None
    """Dev evaluations in a row without a gain after which it is finished, at the end of an epoch; null: none."""
    peft: str | None = None
    """A LoraConfig that PEFT saved, a folder or its adapter_config.json, in place of rank, scaling, targets, layers,
    dropout and init."""
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

        Rank, scaling and targets are None where nothing is adapted; what came later, where it is the default.
        """
        settings = {k: v for k, v in vars(self).items() if k != "peft"}
        settings |= {key: None for key, default in LATER.items() if settings[key] == default}
        return settings if self.adapted else settings | dict.fromkeys(("rank", "scaling", "targets"))

    @classmethod
    def of_record(cls, record: pool.MemberRecord) -> Member:
        """The member that a record is of."""
        return cls(
            rank=record.rank or 1,
            scaling=1.0 if record.scaling is None else record.scaling,
            lr=record.lr or 0.0,
            lr_b=record.lr_b,
            weight_decay=record.weight_decay,
            targets=record.targets or NO_TARGETS,
            layers=record.layers or ALL_LAYERS,
            dropout=record.dropout or 0.0,
            init=cast(Init, record.init or "normal"),
            bag=bool(record.bag),
            patience=record.patience,
            seed=record.seed or 0,
            name=record.name,
        )


LATER: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(Member)
    if field.name in ("layers", "patience", "dropout", "init", "lr_b", "weight_decay", "bag")
}
"""Settings that earlier versions did not have, and the defaults with which a member is what it was."""


def single(setting: T | list[T]) -> T:
    """A setting of an expanded member, which is no list."""
    assert not isinstance(setting, list)
    return setting


def member_name(member: Member, finetune: str) -> str:
    """``r12-c3-qv-lr1e-4-s11711``; ``head-…`` for targets none, ``full-…`` for full fine-tuning.

    All else is in it where it is not the default:
    ``r12-c3-qv-top-half-d0.1-kaiming-lr1e-4-b2e-3-wd0.01-s11711-bag-p3``.
    """

    def rate(lr: Any) -> str:  # to its last digit in scientific form: 0.0001 is 1e-4
        return f"{Decimal(repr(lr)).normalize():e}".replace("e+", "e")

    end = f"lr{rate(member.lr)}" + (f"-b{rate(member.lr_b)}" if member.lr_b is not None else "")
    end += f"-wd{_short(member.weight_decay)}" if member.weight_decay is not None else ""
    end += f"-s{member.seed}" + ("-bag" if member.bag else "")
    end += f"-p{member.patience}" if member.patience is not None else ""
    if finetune == "full":
        return f"full-{end}"
    if not member.adapted:
        return f"head-{end}"
    layers = member.layers if isinstance(member.layers, str) else "l" + "+".join(str(n) for n in member.layers)
    where = f"{member.targets}" if layers == ALL_LAYERS else f"{member.targets}-{layers}"
    where += f"-d{_short(member.dropout)}" if member.dropout else ""
    where += f"-{member.init}" if member.init != LATER["init"] else ""
    return f"r{member.rank}-c{_short(member.scaling)}-{where}-{end}"


def _short(number: Any) -> str:
    return repr(number).removesuffix(".0")


def expand_members(entries: Sequence[Member], *, finetune: str = "lora", ending: str = "") -> list[Member]:
    """All members that the entries describe, grids expanded, in order; of an expanded one, itself.

    ``ending``: of the names that are made from the settings. ``UserError`` where there is no member, a value is out of
    range, a name is there twice, or several are finetuned in full.
    """
    if not entries:
        raise UserError("model.members: the list is empty; give at least one member, e.g. [{rank: 8, lr: 1e-4}]")
    members = []
    for number, entry in enumerate(entries):
        where = f"model.members[{number}]"
        settings = vars(entry if entry.peft is None else _with_peft(where, entry))
        values = {k: v if _is_grid(k, v) else [v] for k, v in settings.items() if k not in ("name", "peft")}
        grid = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
        if not grid:
            raise UserError(f"{where}: a setting is an empty list; a grid needs at least one value")
        if entry.name and len(grid) > 1:
            raise UserError(f"{where}: name {entry.name!r} for a grid of {len(grid)} members; leave the name out")
        members += [_checked(where, entry.name, settings, finetune, ending) for settings in grid]
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


def _checked(where: str, name: str | None, settings: dict[str, Any], finetune: str, ending: str) -> Member:
    rank, scaling, lr, targets, seed = (settings[k] for k in ("rank", "scaling", "lr", "targets", "seed"))
    layers, patience = settings["layers"] or ALL_LAYERS, settings["patience"]
    layers = sorted(set(layers)) if isinstance(layers, list) else layers
    dropout, init, lr_b, decay = (settings[k] for k in ("dropout", "init", "lr_b", "weight_decay"))
    adapted = finetune == "lora" and targets not in (None, NO_TARGETS)
    # YAML may say null. Written so that NaN fails too.
    for key, value, right, expected in (
        ("rank", rank, not adapted or (rank or 0) >= 1, "a rank of at least 1 (targets: none trains the head alone)"),
        ("lr", lr, 0 < (lr or 0) < math.inf, "a learning rate above 0"),
        ("scaling", scaling, not adapted or 0 < (scaling or 0) < math.inf, "c = alpha / r above 0"),
        ("lr_b", lr_b, lr_b is None or 0 < lr_b < math.inf, "a learning rate above 0, or null for lr"),
        ("weight_decay", decay, decay is None or 0 <= decay < math.inf, "0 or more, or null for model.weight_decay"),
        ("dropout", dropout, 0 <= (dropout or 0) < 1, "a probability from 0 to below 1"),
        ("init", init, init in get_args(Init), "normal or kaiming"),
        ("seed", seed, seed is not None and 0 <= seed < 2**63, "0 to 2^63 - 1"),
        ("patience", patience, patience is None or patience >= 1, "a number of dev evaluations of at least 1, or null"),
    ):
        if not right:
            raise UserError(f"{where}.{key}: {value}; expected {expected}")
    same: dict[str, Any] = {"lr": float(lr), "weight_decay": decay, "seed": seed, "patience": patience}
    same["bag"] = bool(settings["bag"])
    member = Member(rank=1, targets=NO_TARGETS, **same)
    if adapted:
        own: dict[str, Any] = {"layers": layers, "dropout": dropout or 0.0, "init": init, "lr_b": lr_b}
        member = Member(rank=rank, scaling=float(scaling), targets=targets, **own, **same)
    name = name or member_name(member, finetune) + ending
    pool.check_name(name)
    return dataclasses.replace(member, name=name)


_PEFT: dict[str, Any] = {
    **{"r": 8, "lora_alpha": 8, "use_rslora": False, "lora_dropout": 0.0, "init_lora_weights": True, "bias": "none"},
    **dict.fromkeys(("target_modules", "layers_to_transform", "modules_to_save", "task_type")),
    # These change nothing here.
    **dict.fromkeys(("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision")),
    **dict.fromkeys(("inference_mode", "megatron_core", "qalora_group_size")),
}
"""Keys of a ``LoraConfig`` that may be set, with PEFT's defaults where they are read; any other must be off."""


def _with_peft(where: str, entry: Member) -> Member:
    """An entry with the settings of the ``LoraConfig`` that it names; ``UserError`` for what we cannot do, by name."""
    path = Path(str(entry.peft)).expanduser()
    file = path / pool.ADAPTER_CONFIG if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {config.get('peft_type')!r}")
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{where}.peft: {file}: not a LoraConfig that PEFT saved ({e})") from e
    given = _PEFT | config
    modules, layers, rank, alpha = (given[k] for k in ("target_modules", "layers_to_transform", "r", "lora_alpha"))
    listed = isinstance(modules, list) and modules and all(isinstance(m, str) for m in modules)
    fits = {
        "r": type(rank) is int and rank >= 1,
        "lora_alpha": type(alpha) in (int, float),
        "lora_dropout": type(given["lora_dropout"]) in (int, float),
        "init_lora_weights": given["init_lora_weights"] is True,
        "bias": given["bias"] == "none",
        "task_type": given["task_type"] in (None, "SEQ_CLS"),
        "target_modules": modules in (None, "all-linear") or listed,  # another word is a regular expression to PEFT
        "modules_to_save": {*(given["modules_to_save"] or ())} <= {"classifier", "score", "pre_classifier", "head"},
    }
    for key, value in given.items():
        if not fits.get(key, key in _PEFT or not value):
            raise UserError(f"{where}.peft: {file}: {key} is {value!r}, which no member here can have; leave it out")
    settings: dict[str, Any] = {
        "rank": rank,
        "scaling": alpha / (math.sqrt(rank) if given["use_rslora"] else rank),
        "targets": "+".join(sorted(modules)) if listed else modules or "qv",  # null is query and value to PEFT, too
        "layers": ALL_LAYERS if layers in (None, []) else layers if isinstance(layers, list) else [layers],
        "dropout": given["lora_dropout"],
        "init": "kaiming",
    }
    ours = {f.name: f.default for f in dataclasses.fields(Member)}
    for key, value in settings.items():
        if (own := getattr(entry, key)) != ours[key]:
            raise UserError(f"{where}.{key}: {own!r}, and in {file} it is {value!r}; leave one of them out")
    return dataclasses.replace(entry, **settings, peft=None)


def derived_seed(seed: int, purpose: str) -> int:
    """An independent 63-bit seed for each purpose, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


def linear_layers(encoder: nn.Module) -> dict[str, nn.Linear]:
    """Path inside the encoder to each of its linear layers, in order."""
    return {path: layer for path, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}


Adapter = dict[str, tuple[Tensor, Tensor]]
"""Of one member, at its own rank: path of a linear layer in the encoder to A (r, in) and B (out, r)."""
