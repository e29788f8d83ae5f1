"""``lora-ensemble distill``: a student of a whole ensemble, which learns what the ensemble's members say on average.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2. A student's loss is
λ · (loss against the ensemble's prediction) + (1 - λ) · (loss against the label), and the former alone where there is
no label. Cross-entropy is linear in its target, and two squared errors make one, of the mean target, and a constant: so
a student is trained as any member is, on soft labels λ · prediction + (1 - λ) · label. The temperature is 1: with
another one the two losses would stay apart, and a mean of members is softer than they are.

Axes: M members, N labelled training texts, U unlabelled ones, C classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from tqdm import tqdm

from lora_ensemble import pool
from lora_ensemble.bank.base_model import on_hub
from lora_ensemble.bank.lora import NO_TARGETS, Member, expand_members, member_name
from lora_ensemble.dicor import record
from lora_ensemble.dicor.located import chosen_records, locate
from lora_ensemble.ensemble.restored import Ensemble, Text
from lora_ensemble.errors import UserError
from lora_ensemble.files import replacing, sole_process
from lora_ensemble.pool import MemberRecord
from lora_ensemble.tasks import SCORES, Kind, Task
from lora_ensemble.text.readers import Split, read_texts, shared_texts
from lora_ensemble.train.data import BankData
from lora_ensemble.train.notices import say

_BLOCK = 8192  # texts that the ensemble is asked about at once: what all its members say of them is kept in memory
_SEEN = "\nnote: the ensemble was chosen on dev, so a student has seen something of dev: its dev score flatters"
_SETTINGS = {
    "model": "init_std head_dropout encoder_dropout frozen_dropout weight_decay schedule warmup",
    "data": "batch_size max_length truncation steps_per_epoch",
    "trainer": "max_epochs max_steps precision accumulate_grad_batches limit_train_batches gradient_clip_val "
    "gradient_clip_algorithm",
}
"""Those of a member's record that are options of a run, by the options' group."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Distillation:
    """What the students of a run learn from. ``UserError`` where a file cannot be read or λ is not from 0 to 1."""

    path: Path  # what ``dicor select`` wrote
    elsewhere: Path | None  # where its members are, if no longer where it says
    unlabelled: list[Path]  # files with the task's text columns
    soft_weight: float  # λ
    any_base: bool  # as ``Ensemble.load``

    def __post_init__(self) -> None:
        if not 0 <= self.soft_weight <= 1:
            wrong = f"--soft_weight: {self.soft_weight}"
            raise UserError(f"{wrong}; expected 0 (the labels alone) to 1 (the ensemble alone)")
        located = locate(self.path, self.elsewhere)
        self.record, self.pool = located.ensemble, located.pool
        try:
            texts = [pool.checksum(path) for path in self.unlabelled]
        except OSError as e:
            raise UserError(f"--unlabelled: {e.filename}: {e.strerror}; expected a file of texts") from e
        how = {"ensemble": _identity(self.record), "soft_weight": float(self.soft_weight), "unlabelled": texts}
        how |= {} if self.record.chosen_on == "dev" else {"chosen_on": self.record.chosen_on}
        self.how: dict[str, Any] = {pool.DISTILLED: how}  # what a student's record says of it

    # Before anything is loaded: the settings of the run

    def defaults(self) -> dict[str, Any]:
        """Settings of the run, by option: those of the ensemble's best LoRA member, whose base model, task and pool."""
        records = chosen_records(self.record, self.pool)
        sign = SCORES[self.record.score].sign
        trained = [
            (sign * (m.score or 0.0), r) for m, r in zip(self.record.members, records, strict=True) if r.base_model
        ]
        adapted = [(score, r) for score, r in trained if r.finetune == "lora"]
        options: dict[str, Any] = {"data.tasks": (self.record.task,), "pool.dir": str(self.pool)}
        if trained:
            best = max(adapted or trained, key=lambda pair: pair[0])[1]
            options["model.base_model"] = best.base_model
            if best.revision is not None and best.base_model is not None and on_hub(best.base_model):
                options["model.revision"] = best.revision
            if adapted:
                options |= _settings(best)
        return options

    def named(self, entries: Sequence[Member] | None, *, finetune: str) -> list[Member]:
        """The students that ``model.members`` describes, grids expanded, with names that say what they are."""
        members = expand_members([Member()] if entries is None else entries, finetune=finetune)
        digest = hashlib.sha256(json.dumps(self.how, sort_keys=True).encode()).hexdigest()[:8]
        made = [m.name == member_name(m, finetune) for m in members]  # a name that the user gave is the name
        names = [f"{m.name}-distilled-{digest}" if own else m.name for m, own in zip(members, made, strict=True)]
        return [dataclasses.replace(m, name=name) for m, name in zip(members, names, strict=True)]

    # Then

    def teach(self, data: BankData, trainer: pl.Trainer, *, keep: Path | None) -> None:
        """Have ``data`` train on soft labels.

        ``keep``: a folder where what the ensemble says is kept, to be found by a run that goes on or that has another
        λ. ``UserError`` where the task is another than the ensemble's, or as ``Ensemble.load``.
        """
        task = self.task_of(data)
        data.setup("fit")
        train, dev = (data.splits[split][task.name].source for split in ("train", "dev"))
        unlabelled = self._read(task, train, dev)
        texts = [*zip(*train.texts, strict=True), *zip(*unlabelled.texts, strict=True)]
        soft = self._asked(texts, task, trainer, keep)
        labels = mixed(soft, train.labels, task.kind, self.soft_weight)
        data.teach(task.name, labels, unlabelled, self.how)
        say(
            f"{task.name}: students of {self.record.size} members ({self.path.name}) on {len(train)} labelled texts, "
            f"to whose labels the ensemble's predictions come with weight {self.soft_weight:g}"
            + (f", and on {len(unlabelled)} unlabelled ones" if self.unlabelled else "")
            + (_SEEN if self.record.chosen_on == "dev" else "")
        )

    def task_of(self, data: BankData) -> Task:
        """The task of ``data``. ``UserError`` where it is another than the ensemble's."""
        chosen, names = self.record, ", ".join(t.name for t in data.tasks)
        if names != chosen.task:
            raise UserError(
                f"--ensemble: {self.path} decides about {chosen.task!r}, data.tasks is {names}; give that task alone"
            )
        (task,) = data.tasks
        for what, now, then in (("kind", task.kind, chosen.kind), ("labels", task.labels, chosen.labels)):
            if now != then:
                raise UserError(f"--ensemble: {self.path}: its {what} {then!r} are not those of data.tasks, {now!r}")
        return task

    def _read(self, task: Task, train: Split, dev: Split) -> Split:
        """The unlabelled texts of all files, each once, and none that stands in train."""
        known, every = set(zip(*train.texts, strict=True)), dict[tuple[str, ...], str]()
        for path in self.unlabelled:
            read = read_texts(task, path)
            new: dict[tuple[str, ...], str] = {}
            for name, text in zip(read.ids.tolist(), zip(*read.texts, strict=True), strict=True):
                if text not in known and text not in every:
                    new.setdefault(text, name)
            every |= new
            notices = list(read.notices)
            if again := len(read) - len(new):
                notices.append(f"{again} of {len(read)} texts left out: they stand in train, or came before")
            if shared := shared_texts(dev, read):
                notices.append(f"{shared} of {len(read)} texts also stand in dev")
            say("\n  ".join([f"{task.name} unlabelled: {len(new)} texts of {path.name}", *notices]))
        columns = [[text[i] for text in every] for i in range(len(task.text))]
        return Split(np.array(list(every.values()), np.str_), columns, None)

    def _asked(self, texts: list[tuple[str, ...]], task: Task, trainer: pl.Trainer, keep: Path | None) -> np.ndarray:
        """What the ensemble says of the texts, (N + U, C) or (N + U,), from ``keep`` if it was asked before."""
        precision = "bf16" if str(trainer.precision).startswith("bf16") else "32"
        if keep is None or self.any_base:  # what another base model says is kept for nobody
            return self._ask(texts, task, trainer, precision)
        what = [_identity(self.record), precision, texts]
        file = keep / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.npy"
        # Of several processes on one machine, or several runs, one asks.
        with sole_process(keep, "asks an ensemble", wait=math.inf):
            soft: np.ndarray | None = None
            with contextlib.suppress(OSError, ValueError, EOFError):  # nothing whole was kept
                soft = np.load(file, allow_pickle=False)
            if soft is None:
                soft = self._ask(texts, task, trainer, precision)
                with replacing(file) as beside, open(beside, "wb") as f:
                    np.save(f, soft, allow_pickle=False)
        return soft

    def _ask(self, texts: list[tuple[str, ...]], task: Task, trainer: pl.Trainer, precision: Any) -> np.ndarray:
        device = trainer.strategy.root_device
        ensemble = Ensemble.load(
            self.path, pool=self.elsewhere, device=str(device), precision=precision, any_base=self.any_base
        )
        if ensemble.text and ensemble.text != task.text:
            raise UserError(
                f"--ensemble: its members read {', '.join(ensemble.text)}, task {task.name!r} {', '.join(task.text)}"
            )
        asked: list[Text] = [t[0] for t in texts] if len(task.text) == 1 else list(texts)
        shown = None if trainer.progress_bar_callback is not None else True  # None: on a terminal
        with tqdm(total=len(asked), desc="asking the ensemble", unit="text", disable=shown) as bar:
            blocks = [asked[i : i + _BLOCK] for i in range(0, len(asked), _BLOCK)]
            soft = np.concatenate([averaged(ensemble.logits(b, progress=bar.update), self.record) for b in blocks])
        if not np.isfinite(soft).all():
            raise UserError(f"--ensemble: {self.path}: NaN or infinity for {int((~np.isfinite(soft)).sum())} texts")
        return soft


def averaged(logits: np.ndarray, ensemble: record.Ensemble) -> np.ndarray:
    """The averaged prediction of an ensemble, from its members' logits (M, N, C); float32.

    multiclass, multilabel: probabilities (N, C); binary: those of class 1 (N,); by the ensemble's strategy, weights and
    offsets. Of a majority, whose shares of votes are coarse, the mean of its members' probabilities. regression: its
    values (N,).
    """
    if ensemble.kind == "regression":
        return ensemble.decide(logits).astype(np.float32)
    choice = ensemble.choice
    if choice.strategy == "majority":
        choice = dataclasses.replace(choice, strategy="mean-probability")
    soft = ensemble.probabilities(logits, choice)
    return (soft[:, 1] if ensemble.kind == "binary" else soft).astype(np.float32)


def mixed(soft: np.ndarray, labels: np.ndarray | None, kind: Kind, weight: float) -> np.ndarray:
    """Soft labels, as ``soft``: weight · soft + (1 - weight) · label for the first N, which have ``labels`` (N,)."""
    assert labels is not None
    hard = np.eye(soft.shape[1])[labels] if kind == "multiclass" else labels
    out = soft.copy()
    out[: len(labels)] = weight * soft[: len(labels)].astype(np.float64) + (1 - weight) * hard
    return out


def _identity(ensemble: record.Ensemble) -> str:
    """16 hex digits over what decides an ensemble's predictions; estimates and where its pool is do not."""
    keys = ("name", "weight", "temperature", f"{ensemble.chosen_on}_logits")
    members = [[row[key] for key in keys] for row in ensemble.rows()]
    what = [ensemble.task, ensemble.kind, ensemble.labels, ensemble.strategy, ensemble.scale, ensemble.offsets, members]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _settings(best: MemberRecord) -> dict[str, Any]:
    """How a member was trained, by option."""
    own = {
        key: getattr(best, key) for key in ("rank", "scaling", "lr", "lr_b", "weight_decay", "dropout", "init", "seed")
    }
    own = {k: v for k, v in own.items() if v is not None}
    options: dict[str, Any] = {"model.members": (Member(**own, targets=best.targets or NO_TARGETS),)}
    for group, keys in _SETTINGS.items():
        options |= {f"{group}.{key}": best.settings[key] for key in keys.split() if key in best.settings}
    if "data_seed" in best.settings:
        options["data.seed"] = best.settings["data_seed"]
    return options
