"""The LightningDataModule: read, say what was skipped, tokenise once, and hand out batches.

Axes: N labelled training examples, U unlabelled ones, C outputs of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np

from lora_ensemble.bank.base_model import load_tokenizer, longest_input, tokenizer_fingerprint
from lora_ensemble.errors import UserError
from lora_ensemble.scores import one_label
from lora_ensemble.tasks import DEFAULT_SCORE, OOF, PRESETS, Task
from lora_ensemble.text.packing import Truncation
from lora_ensemble.text.readers import Split, read_split, shared_texts, split_file
from lora_ensemble.text.splits import Deal
from lora_ensemble.train.batches import EvalBatches, ExampleWeights, Folds, TokenisedSplit, TrainBatches
from lora_ensemble.train.notices import say


class BankData(pl.LightningDataModule):
    """Examples of one or several tasks, tokenised once per run."""

    def __init__(
        self,
        base_model: str = "all-MiniLM-L6-v2",
        root: str | None = None,
        # A tuple: of two lists of one length, jsonargparse would merge the entries.
        tasks: tuple[str | Task, ...] = ("sst",),
        batch_size: int = 8,
        eval_batch_size: int = 32,
        max_length: int | None = None,
        truncation: Truncation = "head",
        steps_per_epoch: int | Literal["longest", "shortest"] = "longest",
        seed: int = 11711,
        predict_split: Literal["train", "dev", "test"] = "test",
        revision: str | None = None,
        overall: dict[str, float] | Literal["mean"] | None = None,
        folds: int = 0,
        refit: bool = False,
    ) -> None:
        """
        Args:
            base_model: Whose tokeniser to use (taken from ``model.base_model``).
            root: Folder that the tasks' file names are relative to.
            tasks: Presets (sst, quora, sts) by name, or tasks of your own; several are trained together.
            batch_size: Examples per step, task and member, over all devices together.
            eval_batch_size: Examples at a time in evaluation; of no influence on results.
            max_length: Longest example in tokens; longer ones are cut. Null: what the encoder can take.
            truncation: What is kept of those: head, tail, or head-tail (half of each). Of a pair the longer text is cut
                first, each in that way.
            steps_per_epoch: longest: until the longest task is through (shorter ones start again); shortest: until
                the shortest is; or a number of steps, each epoch going on where the last one stopped.
            seed: Orders the batches, for all members.
            predict_split: What ``predict`` adds to the pool.
            revision: Of the base model (taken from ``model.revision``).
            overall: What the best epochs of several tasks are chosen by: a weight above 0 for each task (a score of
                which lower is better is taken off), or mean. Null: the mean of accuracies and of (r + 1) / 2.
            folds: Each member is so many models, each trained without one of so many parts of the training set. What
                they say of the part that they have not seen decides about epochs in place of dev, which need not be
                there. Of other texts a member says their mean. 0: one model.
            refit: With folds: one model more, on all examples, for as many epochs as the folds say; it alone answers.
        """
        super().__init__()
        self.base_model, self.revision, self.root = base_model, revision, None if root is None else Path(root)
        self.tasks = weighed(resolve_tasks(tasks), overall)
        least = {"batch_size": (batch_size, 1), "eval_batch_size": (eval_batch_size, 1), "max_length": (max_length, 4)}
        for name, (value, at_least) in least.items():
            if value is not None and value < at_least:
                raise UserError(f"data.{name}: {value}; expected at least {at_least}")
        if isinstance(steps_per_epoch, int) and steps_per_epoch < 1:
            raise UserError(f"data.steps_per_epoch: {steps_per_epoch}; expected at least 1, longest or shortest")
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.steps_per_epoch, self.seed, self.predict_split = steps_per_epoch, seed, predict_split
        self.truncation: Truncation = truncation
        self.folds = Folds(folds, refit)
        self.fold: dict[str, np.ndarray] = {}  # task to the fold (N,) of each training example
        self.splits: dict[str, dict[str, TokenisedSplit]] = {}  # split name to task name to examples
        self.boosted: dict[str, dict[str, np.ndarray]] = {}  # task to member to what each example's weight is times
        self.taught: dict[str, Any] = {}  # what of this is not in the files, for the settings of who is trained here
        self._tokenizer: Any = None
        self.tokenised: dict[tuple[Any, ...], TokenisedSplit] = {}
        """Splits that were read and tokenised, by what decides them: for data modules of one program to share."""

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits that a stage needs, once."""
        wanted = {"fit": "train dev", "validate": "dev", "test": "test", "predict": self.predict_split}[stage]
        for split in wanted.split():
            if split not in self.splits:
                tasks = self._with_dev if (stage, split) == ("fit", "dev") else self.tasks
                self.splits[split] = {t.name: self._read(t, split, need_labels=stage != "predict") for t in tasks}
        if stage == "fit" and self.folds.count:
            self.splits[OOF] = self.splits["train"]
            self.fold = {name: self._dealt(name, split.source) for name, split in self.splits[OOF].items()}

    @property
    def _with_dev(self) -> list[Task]:
        """The tasks whose dev examples training reads: with folds, those that name some."""
        return [t for t in self.tasks if t.dev is not None or not self.folds.count]

    @property
    def evaluated(self) -> list[str]:
        """The splits that are evaluated now, or will be in training; the one that decides first."""
        stage = self.trainer.state.fn if self.trainer else None
        if stage is None or stage == "fit":
            return [split for split in (OOF, "dev") if self.splits.get(split)]
        return [{"test": "test", "predict": self.predict_split}.get(stage.value, "dev")]

    def _dealt(self, task: str, examples: Split) -> np.ndarray:
        """The fold (N,) of each training example: stratified, groups kept together, by ids alone, in every run."""
        (kind,) = (t.kind for t in self.tasks if t.name == task)
        parts = len(examples) if examples.groups is None else len(np.unique(examples.groups))
        if parts < self.folds.count or examples.labels is None:
            what = "examples" if examples.groups is None else "groups"
            raise UserError(f"data.folds: {self.folds.count}; task {task!r} has {parts} training {what}")
        return Deal(examples.ids, examples.labels, kind, [1 / self.folds.count] * self.folds.count, examples.groups)(0)

    def check_files(self) -> None:
        """``UserError`` where a file that training reads is missing."""
        for task in self.tasks:
            for split in ("train", "dev" if task in self._with_dev else "train") if task.dataset is None else ():
                split_file(task, split, self.root)

    def _read(self, task: Task, split: str, *, need_labels: bool) -> TokenisedSplit:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base_model, self.revision)
        cut: Any = {"max_length": self._limit(), "truncation": self.truncation}
        key = (repr(task), split, need_labels, self.root, self.base_model, self.revision, *cut.values())
        if key in self.tokenised:
            return self.tokenised[key]
        raw = read_split(task, split, self.root, need_labels=need_labels)
        tokenised = self.tokenised[key] = TokenisedSplit(raw, self._tokenizer, **cut)
        tokenised.notices += one_label(raw.labels, task.labels)
        train = self.splits.get("train", {}).get(task.name)
        if split == "dev" and train is not None and (shared := shared_texts(train.source, raw)):
            tokenised.notices.append(f"{shared} of {len(raw.ids)} examples also stand in train")
        known = None if train is None else train.source.groups
        if (
            split == "dev"
            and raw.groups is not None
            and known is not None
            and (torn := np.isin(raw.groups, known).sum())
        ):
            tokenised.notices.append(f"{torn} of {len(raw.ids)} examples are of groups that are also in train")
        say("\n  ".join([f"{task.name} {split}: {len(tokenised)} examples", *tokenised.notices]))
        return tokenised

    @functools.cached_property
    def tokenizer_fingerprint(self) -> dict[str, str]:
        """What tells the tokeniser from others, once a split was read."""
        return tokenizer_fingerprint(self._tokenizer)

    def teach(self, task: str, labels: np.ndarray, unlabelled: Split, how: dict[str, Any]) -> None:
        """Train a task on other labels than its own, and on ``unlabelled`` texts (U of them) behind its own N.

        ``labels``: (N + U, C) probabilities of the classes, or (N + U,) of class 1 or values. ``how``: ``taught``.
        """
        first = self.splits["train"][task]
        own = first.source
        if self.folds.count:
            raise UserError("data.folds: a student learns from soft labels on all examples; leave data.folds out")
        if own.weights is not None or any(t.class_weights is not None for t in self.tasks if t.name == task):
            raise UserError(f"task {task!r}: a student learns from soft labels; leave out class_weights and weight")
        texts = [[*a, *b] for a, b in zip(own.texts, unlabelled.texts, strict=True)]
        whole = Split(np.concatenate([own.ids, unlabelled.ids]), texts, labels)
        taught = TokenisedSplit(whole, self._tokenizer, max_length=self._limit(), truncation=self.truncation)
        # What a record calls its training data; the rest is in ``how``, and soft labels round otherwise elsewhere.
        taught.fingerprint = first.fingerprint
        self.splits["train"][task], self.taught = taught, how

    def _limit(self) -> int:
        most = longest_input(self.base_model, self._tokenizer, self.revision)
        if self.max_length is not None and self.max_length > most:
            raise UserError(f"data.max_length: {self.max_length}; {self.base_model} takes at most {most} tokens")
        return self.max_length or most

    def _place(self) -> dict[str, int]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return {"rank": rank, "world": world}

    def train_dataloader(self) -> TrainBatches:
        """Batches of all tasks."""
        trainer: Any = self.trainer
        members = getattr(getattr(trainer, "lightning_module", None), "members", ())
        of = {name: (self.splits["train"][name].source, members, self.folds) for name in self.splits["train"]}
        each = {t.name: (self.fold.get(t.name), self.boosted.get(t.name)) for t in self.tasks}
        weights = {t.name: ExampleWeights(t, *of[t.name], *each[t.name]) for t in self.tasks}
        return TrainBatches(
            splits=self.splits["train"],
            batch_size=self.batch_size,
            steps=self.steps_per_epoch,
            seed=self.seed,
            epoch=lambda: trainer.current_epoch if trainer else 0,
            repeats=bool(getattr(trainer, "overfit_batches", 0)),
            weights={name: w for name, w in weights.items() if w.anything and members},
            accumulated=lambda: trainer.accumulate_grad_batches if trainer else 1,
            ends=lambda: trainer.num_training_batches if trainer else math.inf,
            **self._place(),
        )

    def val_dataloader(self) -> EvalBatches:
        """The splits that are evaluated now."""
        splits = {name: self.splits[name] for name in self.evaluated}
        return EvalBatches(splits, batch_size=self.eval_batch_size, fold=self.fold, **self._place())

    test_dataloader = predict_dataloader = val_dataloader


def weighed(tasks: list[Task], overall: Mapping[str, float] | Literal["mean"] | None) -> list[Task]:
    """The tasks with their weights in the overall score; ``UserError`` where these are needed, or do not fit."""
    names = [t.name for t in tasks]
    own = [t for t in tasks if t.scored_by != DEFAULT_SCORE[t.kind]]
    if overall is None and (not own or len(tasks) == 1 or None not in [t.overall for t in tasks]):
        return tasks
    weights = dict.fromkeys(names, 1.0) if overall == "mean" else dict(overall or {})
    if set(weights) != set(names) or not all(0 < w < math.inf for w in weights.values()):
        found = f"task {own[0].name} is scored by {own[0].score_name}" if overall is None else f"{weights}"
        example = ", ".join(f"{name}: 1" for name in names)
        raise UserError(f"data.overall: {found}; give each of the tasks a weight above 0: {{{example}}}, or mean")
    return [replace(t, overall=float(weights[t.name])) for t in tasks]


def resolve_tasks(tasks: Sequence[str | Task]) -> list[Task]:
    """Presets by name or tasks as they are; ``UserError`` for an unknown name, none at all, or one name twice."""
    if not tasks:
        raise UserError(f"data.tasks: the list is empty; give presets ({', '.join(PRESETS)}) or tasks of your own")
    resolved: list[Task] = []
    for task in tasks:
        if isinstance(task, str) and task not in PRESETS:
            raise UserError(
                f"data.tasks: {task!r} is no preset; presets: {', '.join(PRESETS)}; a task of your own is written as "
                "{name: ..., kind: ..., text: [...], label: ..., train: ..., dev: ...}"
            )
        resolved.append(PRESETS[task] if isinstance(task, str) else task)
    names = [t.name for t in resolved]
    if len(set(names)) < len(names):
        raise UserError(f"data.tasks: a name is used twice: {', '.join(names)}")
    return resolved
