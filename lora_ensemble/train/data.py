"""The LightningDataModule: read, say what was skipped, tokenise once, and hand out batches.

The loaders are plain iterables over arrays in memory, made for banks: a training batch holds ``batch_size`` examples of
every task for all devices together, and every member of the bank sees the same ones.

Axes: N examples of a split, B examples in a batch, T tokens of all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch

from lora_ensemble.bank.base_model import load_tokenizer, longest_input, tokenizer_fingerprint
from lora_ensemble.bank.lora import derived_seed
from lora_ensemble.errors import UserError
from lora_ensemble.scores import one_label
from lora_ensemble.tasks import PRESETS, Task
from lora_ensemble.text.packing import Tokens
from lora_ensemble.text.readers import Split, fingerprint, read_split, shared_texts, split_file
from lora_ensemble.train.notices import say


class TokenisedSplit:
    """A split's tokens in flat arrays, its ids and its labels, which may be soft (``BankData.teach``).

    ``max_length``: longest example in tokens; longer ones are cut, the longer sentence of a pair first.
    """

    def __init__(self, split: Split, tokenizer: Any, *, max_length: int) -> None:
        self.ids, self.labels = split.ids, split.labels
        self.fingerprint = fingerprint(split)
        self._tokens = Tokens(split.texts, tokenizer, max_length=max_length)
        self.lengths = self._tokens.lengths
        self.notices = list(split.notices)
        if cut := self._tokens.cut:
            first = ", ".join(str(split.ids[i]) for i in cut[:3])
            self.notices.append(f"{len(cut)} of {len(self)} examples cut to {max_length} tokens (first ids: {first})")

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        """The examples ``rows`` (B,) as one packed row of T tokens: ``input_ids`` and ``token_type_ids`` (T,),
        :func:`packing.layout`, ``labels`` (B, ...) where known, and ``rows`` (B,), which stays on the host."""
        batch = {**self._tokens.row(rows), "rows": np.asarray(rows, np.int64)}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return batch


class TrainBatches:
    """Training batches of all tasks, in an order that only the seed, the epoch and the step decide.

    Each step has a batch of every task (Oyeniyi, section 4): ``batch_size`` examples over all devices, of which this
    process gets every ``world``-th. A task that ends is shuffled anew and goes on. ``epoch`` is asked at the start of
    each pass, which begins with the epoch's first batch, wherever the last one was left. ``repeats``: all epochs have
    the first one's batches. Lightning saves ``state_dict`` in its checkpoints, so that a run resumes in mid-epoch.
    """

    def __init__(
        self,
        splits: dict[str, TokenisedSplit],
        *,
        batch_size: int,
        steps: int | Literal["longest", "shortest"],
        seed: int,
        rank: int,
        world: int,
        epoch: Callable[[], int],
        repeats: bool = False,
    ) -> None:
        self.splits, self.batch_size, self.seed = splits, batch_size, seed
        self.rank, self.world, self.epoch, self.repeats = rank, world, epoch, repeats
        self._passes = {name: math.ceil(len(split) / batch_size) for name, split in splits.items()}
        self._flowing = isinstance(steps, int)
        if isinstance(steps, int):
            self._steps = steps
        else:
            self._steps = (max if steps == "longest" else min)(self._passes.values())
        self._at = (-1, 0)
        """Epoch of the last pass, and how many of its batches were handed out."""
        self._orders: dict[str, tuple[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._steps

    def _rows(self, name: str, epoch: int, step: int) -> np.ndarray:
        # With a fixed number of steps an epoch need not be a whole pass: go on where the last one stopped.
        step, epoch = (epoch * self._steps + step, 0) if self._flowing else (step, epoch)
        cycle, place = divmod(step, self._passes[name])
        key = f"{name}/{epoch}/{cycle}"
        if self._orders.get(name, ("",))[0] != key:
            generator = np.random.default_rng(derived_seed(self.seed, key))
            self._orders[name] = (key, generator.permutation(len(self.splits[name])))
        return self._orders[name][1][place * self.batch_size : (place + 1) * self.batch_size]

    def rows(self, epoch: int, step: int) -> dict[str, np.ndarray]:
        """This process's rows of each task at a step."""
        return {name: self._rows(name, epoch, step)[self.rank :: self.world] for name in self.splits}

    def __iter__(self) -> Iterator[dict[str, dict[str, Any]]]:
        epoch = self.epoch()
        start = self._at[1] % self._steps if self._at[0] == epoch else 0
        for step in range(start, self._steps):
            batch = {}
            for name, split in self.splits.items():
                rows = self._rows(name, 0 if self.repeats else epoch, step)
                batch[name] = {**split.batch(rows[self.rank :: self.world]), "size": len(rows)}
            # Counted before the yield: what comes after the last one is never run.
            self._at = (epoch, step + 1)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of which epoch have been handed out."""
        return {"epoch": self._at[0], "served": self._at[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass after the batches that were handed out, if it is of that epoch."""
        # An older version did not say which epoch, and counted from 0 again where one had ended.
        self._at = (state.get("epoch", self.epoch()), state["served"])


class EvalBatches:
    """A split of each task, every example once: this process gets every ``world``-th, sorted by length."""

    def __init__(self, splits: dict[str, TokenisedSplit], *, batch_size: int, rank: int, world: int) -> None:
        self.splits, self.batch_size = splits, batch_size
        # Sorted: what still has to be padded is little; the logits are put back by index.
        self._rows = {name: np.argsort(split.lengths, kind="stable")[rank::world] for name, split in splits.items()}

    def __len__(self) -> int:
        return sum(max(1, math.ceil(len(rows) / self.batch_size)) for rows in self._rows.values())

    def __iter__(self) -> Iterator[dict[str, dict[str, Any]]]:
        for name, rows in self._rows.items():
            # At least one, even if empty: a process without a batch would leave the others waiting.
            for start in range(0, max(1, len(rows)), self.batch_size):
                yield {name: self.splits[name].batch(rows[start : start + self.batch_size])}


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
        steps_per_epoch: int | Literal["longest", "shortest"] = "longest",
        seed: int = 11711,
        predict_split: Literal["train", "dev", "test"] = "test",
        revision: str | None = None,
    ) -> None:
        """
        Args:
            base_model: Whose tokeniser to use (taken from ``model.base_model``).
            root: Folder that the tasks' file names are relative to.
            tasks: Presets (sst, quora, sts) by name, or tasks of your own; several are trained together.
            batch_size: Examples per step, task and member, over all devices together.
            eval_batch_size: Examples at a time in evaluation; it changes speed and memory, not results.
            max_length: Longest example in tokens; longer ones are cut. Null: what the encoder can take.
            steps_per_epoch: longest: until the longest task is through (shorter ones start again); shortest: until
                the shortest is; or a number of steps, each epoch going on where the last one stopped.
            seed: Orders the batches; all members share the order.
            predict_split: Which split ``predict`` adds to the pool.
            revision: Of the base model (taken from ``model.revision``).
        """
        super().__init__()
        self.base_model, self.revision, self.root = base_model, revision, None if root is None else Path(root)
        self.tasks = resolve_tasks(tasks)
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise UserError(f"data.{name}: {value}; expected at least 1")
        if max_length is not None and max_length < 4:
            raise UserError(f"data.max_length: {max_length}; expected at least 4 tokens")
        if isinstance(steps_per_epoch, int) and steps_per_epoch < 1:
            raise UserError(f"data.steps_per_epoch: {steps_per_epoch}; expected at least 1, longest or shortest")
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.steps_per_epoch, self.seed, self.predict_split = steps_per_epoch, seed, predict_split
        self.splits: dict[str, dict[str, TokenisedSplit]] = {}
        """Split name to task name to examples."""
        self.taught: dict[str, Any] = {}
        """What :meth:`teach` was given, in words: it goes into the settings of the members that are trained here."""
        self._tokenizer: Any = None
        self._texts: dict[str, dict[str, Split]] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits that a stage needs, once."""
        wanted = {"fit": "train dev", "validate": "dev", "test": "test", "predict": self.predict_split}[stage]
        for split in wanted.split():
            if split not in self.splits:
                self.splits[split] = {t.name: self._read(t, split, need_labels=stage != "predict") for t in self.tasks}

    def check_files(self) -> None:
        """``UserError`` where a file that training reads is missing."""
        for task in self.tasks:
            for split in ("train", "dev") if task.dataset is None else ():
                split_file(task, split, self.root)

    def _read(self, task: Task, split: str, *, need_labels: bool) -> TokenisedSplit:
        raw = read_split(task, split, self.root, need_labels=need_labels)
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base_model, self.revision)
        limit = self._limit()
        tokenised = TokenisedSplit(raw, self._tokenizer, max_length=limit)
        tokenised.notices += one_label(raw.labels, task.labels)
        if split in ("train", "dev"):
            self._texts.setdefault(split, {})[task.name] = raw
        if split == "dev" and task.name in self._texts.get("train", {}):
            shared = shared_texts(self._texts["train"][task.name], raw)
            if shared:
                tokenised.notices.append(f"{shared} of {len(raw.ids)} examples also stand in train")
        say("\n  ".join([f"{task.name} {split}: {len(tokenised)} examples", *tokenised.notices]))
        return tokenised

    @functools.cached_property
    def tokenizer_fingerprint(self) -> dict[str, str]:
        """What tells the tokeniser from others, once a split was read."""
        return tokenizer_fingerprint(self._tokenizer)

    def texts(self, split: str, task: str) -> Split:
        """The train or dev split of a task as it was read."""
        return self._texts[split][task]

    def teach(self, task: str, labels: np.ndarray, unlabelled: Split, how: dict[str, Any]) -> None:
        """Train a task on other labels than its own, and on ``unlabelled`` texts (U of them) behind its own N.

        ``labels``: (N + U, C) probabilities of the classes, or (N + U,) of class 1 or values. ``how``: ``taught``.
        """
        own, first = self.texts("train", task), self.splits["train"][task]
        texts = [[*a, *b] for a, b in zip(own.texts, unlabelled.texts, strict=True)]
        whole = Split(np.concatenate([own.ids, unlabelled.ids]), texts, labels)
        taught = TokenisedSplit(whole, self._tokenizer, max_length=self._limit())
        # What a record calls its training data; the rest is in ``how``, and soft labels round otherwise elsewhere.
        taught.fingerprint = first.fingerprint
        self.splits["train"][task], self.taught = taught, how

    def _limit(self) -> int:
        most = longest_input(self.base_model, self._tokenizer, self.revision)
        if self.max_length is not None and self.max_length > most:
            raise UserError(f"data.max_length: {self.max_length}; {self.base_model} takes at most {most} tokens")
        return self.max_length or most

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> TrainBatches:
        """Batches of all tasks."""
        rank, world = self._place()
        return TrainBatches(
            self.splits["train"],
            batch_size=self.batch_size,
            steps=self.steps_per_epoch,
            seed=self.seed,
            rank=rank,
            world=world,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
            repeats=bool(getattr(self.trainer, "overfit_batches", 0)),
        )

    def _eval_batches(self, split: str) -> EvalBatches:
        rank, world = self._place()
        return EvalBatches(self.splits[split], batch_size=self.eval_batch_size, rank=rank, world=world)

    def val_dataloader(self) -> EvalBatches:
        """The dev split."""
        return self._eval_batches("dev")

    def test_dataloader(self) -> EvalBatches:
        """The labelled test split."""
        return self._eval_batches("test")

    def predict_dataloader(self) -> EvalBatches:
        """The split to predict."""
        return self._eval_batches(self.predict_split)


def resolve_tasks(tasks: Sequence[str | Task]) -> list[Task]:
    """Presets by name or tasks as they are; ``UserError`` for an unknown name, none at all, or one name twice."""
    if not tasks:
        raise UserError(f"data.tasks: the list is empty; give presets ({', '.join(PRESETS)}) or tasks of your own")
    found = []
    for task in tasks:
        if isinstance(task, str) and task not in PRESETS:
            raise UserError(
                f"data.tasks: {task!r} is no preset; presets: {', '.join(PRESETS)}; a task of your own is written as "
                "{name: ..., kind: ..., text: [...], label: ..., train: ..., dev: ...}"
            )
        found.append(PRESETS[task] if isinstance(task, str) else task)
    names = [t.name for t in found]
    if len(set(names)) < len(names):
        raise UserError(f"data.tasks: a name is used twice: {', '.join(names)}")
    return found
