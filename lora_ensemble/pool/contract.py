"""What lies in the pool: the names of its files, a member's record, a split's examples, and what is right in them."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lora_ensemble.errors import UserError
from lora_ensemble.files import replacing
from lora_ensemble.tasks import Kind, ScoreName, check_score, check_task_name

SCHEMA = 1
RECORD = "member.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
FULL_CONFIG = "config.json"
FULL = "model.safetensors"
EXAMPLES = "examples"
DISTILLED = "distilled"  # the key of a record's settings that says which ensemble a member was taught by
NEW, OLD, LOCK = ".new.", ".old.", ".lock"


def logits_file(split: str) -> str:
    """File name of a split's logits (N, C) float32 inside a member's folder."""
    return f"{split}.logits.npy"


def epochs_file(split: str) -> str:
    """That of its logits at every epoch, (E, N, C) float16, where the split decided about epochs."""
    return f"{split}.epochs.npy"


def in_fold(fold: int, name: str) -> str:
    """The name, in its member's folder, of a file of the model that was trained without a fold."""
    return f"fold-{fold}/{name}"


def member_folder(pool: Path, task: str, name: str) -> Path:
    """Where a member lives."""
    return Path(pool) / task / name


def check_name(name: str, *, what: str = "member name") -> None:
    """``UserError`` unless ``name`` can be the name of a member's folder, or of another."""
    # File systems end at 255 bytes.
    if not re.fullmatch(r"[\w+-][\w.+-]*", name) or name[0] == "_" or name == EXAMPLES or len(name.encode()) > 150:
        raise UserError(
            f"{what} {name!r}: expected up to 150 bytes of letters, digits, '-', '_', '.' or '+', not starting "
            f"with '.' or '_', and not {EXAMPLES!r}"
        )


@dataclass(kw_only=True)
class MemberRecord:
    """What ``member.json`` says. Unknown things are None: a member made elsewhere may have no rank."""

    name: str
    task: str
    kind: Kind
    labels: list[str] = field(default_factory=list)  # in the order of the outputs; empty for regression
    finished: bool = False  # a member is written whole at every improvement, and selected only once finished
    diverged: bool = False  # training gave NaN or infinity; then it is never finished
    score: float | None = None  # the task's score on dev, or out of fold, at the best epoch
    best_epoch: int | None = None  # counted from 1
    epochs_done: int | None = None
    epoch_scores: list[float | None] = field(default_factory=list)  # on the same; None where undefined
    examples: dict[str, str] = field(default_factory=dict)  # split to fingerprint of what its logits belong to
    text: list[str] = field(default_factory=list)  # columns that it reads, two for a pair; empty: unknown
    train_fingerprint: str | None = None  # fingerprint of the training examples (ids, texts and labels)
    base_model: str | None = None  # hub id, or the path as the user gave it; none of site-packages
    revision: str | None = None
    base_fingerprint: dict[str, Any] = field(default_factory=dict)
    """What tells the encoder and its tokeniser from others; empty where an earlier version trained."""
    finetune: str | None = None
    rank: int | None = None
    scaling: float | None = None
    targets: str | None = None
    layers: str | list[int] | None = None  # None: all
    bag: bool | None = None
    patience: int | None = None
    folds: int | None = None  # parts of the training set, without each of which a model was trained; None: none
    refit: bool | None = None  # whether it answers by a model of all examples; else by the mean of those models
    lr: float | None = None
    seed: int | None = None
    lr_b: float | None = None  # None: lr
    weight_decay: float | None = None  # None: that of the settings
    dropout: float | None = None  # of LoRA; None: 0
    init: str | None = None  # None: normal
    settings: dict[str, Any] = field(default_factory=dict)  # what else decides the result: epochs, batch size, ...
    run: str | None = None  # the run that made it; it ties the folders of one member in several tasks
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """File name to "sha256:<hex>" of every other file in the folder; a file not listed does not count."""

    @property
    def models(self) -> list[str]:
        """What the names of the weight files begin with, of each of the models that it is the mean of; none: of none.

        Empty for the one model that most members are.
        """
        if {ADAPTER, FULL} & self.files.keys():
            return [""]
        return [start for k in range(self.folds or 0) if (start := in_fold(k, "")) + ADAPTER in self.files]

    @property
    def scored_by(self) -> ScoreName:
        """The score by which its best epoch was chosen: its settings name one that is not its kind's default."""
        return check_score(self.settings.get("score"), self.kind)

    def to_json(self) -> str:
        """JSON text, keys in the order of the fields."""
        return json.dumps({"schema": SCHEMA, **vars(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> MemberRecord:
        """Read ``member.json``; ``UserError`` where it is missing, not JSON, of another schema or lacks a key."""
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
            raise UserError(
                f"{path.parent}: half-written member: {RECORD} is missing; delete the folder, or copy it again whole"
            ) from e
        try:
            raw = json.loads(content.decode("utf-8"))
            schema = raw.pop("schema")
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{path}: not a member record ({type(e).__name__}: {e}); expected JSON and a schema") from e
        if schema != SCHEMA:
            raise UserError(f"{path}: schema {schema!r}; this version reads schema {SCHEMA}")
        try:
            record = cls(**raw)
        except TypeError as e:
            raise UserError(f"{path}: {str(e).removeprefix('MemberRecord.__init__() ')}") from e
        for key, (hint, fits) in _record_types().items():
            if not fits(value := getattr(record, key)):
                expected = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
                raise UserError(f"{path}: {key} is {value!r}; expected {expected}")
        try:
            check_score(record.settings.get("score"), record.kind)
        except UserError as e:
            raise UserError(f"{path}: settings: {e}") from e
        for key, names in (("files", record.files), ("examples", record.examples.values())):
            if any("/" in name or "\\" in name for name in (re.sub(r"^fold-\d+/", "", n) for n in names)):
                raise UserError(f"{path}: {key} holds a path; expected names of files in the same folder")
        task, folder = path.parts[-3:-1]
        for key, name in (("name", folder.removeprefix(NEW).removeprefix(OLD)), ("task", task)):
            if (value := getattr(record, key)) != name:
                raise UserError(f"{path}: {key} is {value!r}, but the folder is {name!r}")
        return record


@cache  # not for each of thousands of members
def _record_types() -> dict[str, tuple[Any, Callable[[Any], bool]]]:
    """Each key of a record, its type, and whether a value is of it."""
    return {key: (hint, _test_of(hint)) for key, hint in typing.get_type_hints(MemberRecord).items()}


def _test_of(hint: Any) -> Callable[[Any], bool]:
    """A test of whether a value out of a JSON file is of a field's type; a whole number is a float too."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return lambda value: True
    if hint is float:
        return lambda value: type(value) is int or (type(value) is float and math.isfinite(value))
    if origin is typing.Literal:
        return args.__contains__
    if origin is list:
        item = _test_of(args[0])
        return lambda value: type(value) is list and all(map(item, value))
    if origin is dict:
        item = _test_of(args[1])
        return lambda value: type(value) is dict and all(map(item, value.values()))
    if args:  # a union, of what is or of None
        tests = [_test_of(a) for a in args]
        return lambda value: any(test(value) for test in tests)
    return lambda value: type(value) is hint


@dataclass(frozen=True)
class Examples:
    """The examples of a split: ids (N,) unicode, labels (N,) int64 or float64, or None where unknown.

    Of several labels (N, L) int64, 1 for a label that is there and 0 for one that is not.

    ``groups`` (N,) unicode: which of them belong together; None where nobody said so.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    groups: np.ndarray | None = None


def examples_fingerprint(ids: np.ndarray, labels: np.ndarray | None, groups: np.ndarray | None = None) -> str:
    """16 hex digits over ids, labels and groups in their order."""
    digest = hashlib.sha256("\0".join(ids.tolist()).encode())
    if labels is not None:
        digest.update(b"\1")
        digest.update(np.ascontiguousarray(labels, _label_type(labels)).tobytes())
    if groups is not None:
        digest.update(b"\2" + "\0".join(groups.tolist()).encode())
    return digest.hexdigest()[:16]


def _label_type(labels: np.ndarray) -> str:
    return "<f8" if np.issubdtype(labels.dtype, np.floating) and labels.ndim == 1 else "<i8"


def examples_file(pool: Path, task: str, split: str, fingerprint: str) -> Path:
    """Where the examples of a split lie that have this fingerprint."""
    check_task_name(task)
    return Path(pool) / task / EXAMPLES / f"{split}-{fingerprint}.npz"


def write_examples(
    pool: Path, task: str, split: str, ids: ArrayLike, labels: ArrayLike | None, groups: np.ndarray | None = None
) -> str:
    """Write a split's examples once; returns their fingerprint.

    ``ids`` (N,), ``labels`` (N,) numbers (classes count from 0), (N, L) of 0 and 1 for several, or None, ``groups``
    (N,) unicode or None. ``UserError`` where ids are not unique, a label is no finite number, or the lengths differ.
    """
    ids, labels = np.asarray(ids, dtype=np.str_), None if labels is None else np.asarray(labels)
    _check_examples(ids, labels, f"{task} {split} examples")
    arrays = {"ids": ids} if labels is None else {"ids": ids, "labels": labels.astype(_label_type(labels))}
    arrays |= {} if groups is None else {"groups": groups}
    fingerprint = examples_fingerprint(ids, arrays.get("labels"), groups)
    path = examples_file(pool, task, split, fingerprint)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside, open(beside, "wb") as f:
            np.savez_compressed(f, allow_pickle=False, **arrays)
    return fingerprint


def _check_examples(ids: np.ndarray, labels: np.ndarray | None, where: str) -> None:
    if ids.ndim != 1:
        raise UserError(f"{where}: ids of shape {ids.shape}; expected (N,)")
    rows: dict[str, int] = {}
    for row, example in enumerate(ids.tolist()):
        if (first := rows.setdefault(example, row)) != row:
            raise UserError(f"{where}: id {example!r} is there twice, in rows {first} and {row}")
    if labels is None:
        return
    if labels.shape[:1] != ids.shape or labels.ndim > 2 or labels.shape[1:] == (1,):
        raise UserError(f"{where}: {len(ids)} ids, but labels of shape {labels.shape}; expected one for each")
    if labels.dtype.kind not in "biuf":
        raise UserError(f"{where}: labels are {labels.dtype}; expected numbers (classes count from 0)")
    if labels.ndim == 2 and not np.isin(labels, (0, 1)).all():
        row = int(np.argwhere(~np.isin(labels, (0, 1)))[0][0])
        raise UserError(f"{where}: the labels are {labels[row].tolist()} in row {row}; expected 0 or 1 for each")
    if not np.isfinite(labels).all():
        row = int(np.flatnonzero(~np.isfinite(labels))[0])
        raise UserError(f"{where}: the label is {labels[row]} in row {row}; expected a finite number")


def read_examples(pool: Path, task: str, split: str, fingerprint: str) -> Examples:
    """Read a split's examples; ``UserError`` where they are missing or are not those of the fingerprint."""
    path = examples_file(pool, task, split, fingerprint)
    if not path.is_file():
        raise UserError(f"{path}: missing, though members of this pool refer to it; copy it back, or train again")
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as data:
            examples = Examples(data["ids"], data.get("labels"), data.get("groups"))
        there = examples_fingerprint(examples.ids, examples.labels, examples.groups)
    except Exception as e:  # a damaged zip raises many kinds of exception
        raise UserError(f"{path}: cannot be read ({type(e).__name__}: {e}); copy it again") from e
    if there != fingerprint:
        raise UserError(f"{path}: its content is not what its name says (tampered with, or damaged); copy it again")
    return examples


def checksum(content: Path | bytes | mmap.mmap) -> str:
    """ "sha256:<hex>" of a file, or of what is in memory or mapped into it."""
    if isinstance(content, Path):
        with open(content, "rb") as f:
            return "sha256:" + hashlib.file_digest(f, "sha256").hexdigest()
    return "sha256:" + hashlib.sha256(content).hexdigest()
