"""Examples on their way into a bank: a split's tokens, and the loaders.

The loaders are plain iterables over arrays in memory: a training batch holds ``batch_size`` examples of every task for
all devices together, and every member of the bank sees the same ones.

Axes: N examples of a split, B examples in a batch, T tokens of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from lora_ensemble.bank.lora import Member, derived_seed, single
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import OOF, Task
from lora_ensemble.text.packing import KEPT, Tokens, Truncation
from lora_ensemble.text.readers import Split, fingerprint


class TokenisedSplit:
    """A split's tokens in flat arrays, its ids and its labels, which may be soft (``BankData.teach``).

    ``max_length``, ``truncation``: as :class:`Tokens`.
    """

    def __init__(self, split: Split, tokenizer: Any, *, max_length: int, truncation: Truncation = "head") -> None:
        self.source, self.ids, self.labels, self.groups = split, split.ids, split.labels, split.groups
        self.fingerprint = fingerprint(split)
        self.tokens = Tokens(split.texts, tokenizer, max_length=max_length, truncation=truncation)
        self.lengths = self.tokens.lengths
        self.notices = list(split.notices)
        if cut := self.tokens.cut:
            first = ", ".join(str(split.ids[i]) for i in cut[:3])
            kept = f"cut to {max_length} tokens, their {KEPT[truncation]} kept"
            self.notices.append(f"{len(cut)} of {len(self)} examples {kept} (first ids: {first})")

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        """The examples ``rows`` (B,) as one packed row of T tokens: ``input_ids`` and ``token_type_ids`` (T,),
        :func:`packing.layout`, ``labels`` (B, ...) where known, and ``rows`` (B,), which stays on the host."""
        batch = {**self.tokens.row(rows), "rows": np.asarray(rows, np.int64)}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return batch


@dataclass(frozen=True)
class Folds:
    """The models that a member is: one, or as many as there are folds, each trained without one of them.

    ``refit``: one model more, on all examples. A bank has a row for each model, a member's side by side. ``UserError``
    for a single fold, or a refit without any.
    """

    count: int = 0
    refit: bool = False

    def __post_init__(self) -> None:
        if self.count < 0 or self.count == 1:
            raise UserError(f"data.folds: {self.count}; expected at least 2, or 0 for none")
        if self.refit and not self.count:
            raise UserError("data.refit: there are no folds after which to train once more; set data.folds, e.g. 5")

    @property
    def models(self) -> int:
        """How many a member is."""
        return self.count + self.refit if self.count else 1

    @property
    def decides(self) -> str:
        """The split by which epochs are chosen."""
        return OOF if self.count else "dev"

    @property
    def ending(self) -> str:
        """Of the names of members that are trained so."""
        return (f"-f{self.count}" if self.count else "") + ("-refit" if self.refit else "")

    def rows(self, members: int, fold: int | None) -> list[int]:
        """The rows, the same number for each of M members, whose mean is what they say of an example of this fold.

        None: of any other text.
        """
        models = range(self.models)
        answering = models[self.count :] or models if fold is None else [fold]
        return [member * self.models + model for member in range(members) for model in answering]


class ExampleWeights:
    """How much each of N training examples counts in the loss of each model of M members.

    Its own weight, times its class's, times how often a member's bag holds it: a bootstrap of the N examples that is
    drawn from the member's seed; times what it is ``boosted`` by, member's name to (N,); and nothing for a model that
    is trained without its ``fold`` (N,). ``anything``: whether any of it is asked for; otherwise all count alike.
    """

    def __init__(
        self,
        task: Task,
        split: Split,
        members: Sequence[Member],
        folds: Folds | None = None,
        fold: np.ndarray | None = None,
        boosted: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        n = len(split)
        self.members, self._own, self._fold = len(members), split.weights, fold
        self._models = np.arange((folds or Folds()).models)[:, None]
        if task.class_weights is not None and split.labels is not None and task.kind != "multilabel":
            of_class = np.asarray(task.class_weights, np.float64) if isinstance(task.class_weights, list) else None
            if of_class is None:  # n / (K n_c), as scikit-learn has it
                counts = np.bincount(split.labels, minlength=len(task.labels))
                of_class = n / (len(counts) * np.maximum(counts, 1))
            self._own = of_class[split.labels] * (1.0 if self._own is None else self._own)
        self._bags: np.ndarray | None = None  # (M, N)
        if boosted or any(m.bag for m in members):
            self._bags = np.ones((len(members), n))
            for bag, member in zip(self._bags, members, strict=True):
                if member.bag:
                    generator = np.random.default_rng(derived_seed(single(member.seed), f"bag/{task.name}"))
                    bag[:] = np.bincount(generator.integers(n, size=n), minlength=n)
                bag *= (boosted or {}).get(str(member.name), 1.0)

    @property
    def anything(self) -> bool:
        return self._own is not None or self._bags is not None or self._fold is not None

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The weights of examples ``rows`` (B,), (M, B), a row for each model."""
        own = np.ones(len(rows)) if self._own is None else self._own[rows]
        weights = np.broadcast_to(own, (self.members, len(rows))) * (1 if self._bags is None else self._bags[:, rows])
        if self._fold is None:
            return weights
        return (weights[:, None] * (self._models != self._fold[rows])).reshape(-1, len(rows))


@dataclass(kw_only=True, eq=False)
class TrainBatches:
    """Training batches of all tasks, in an order that only the seed, the epoch and the step decide.

    Each step has a batch of every task (Oyeniyi, section 4): ``batch_size`` examples over all devices, of which this
    process gets every ``world``-th. A task that ends is shuffled anew and goes on. Lightning saves ``state_dict`` in
    its checkpoints, so that a run resumes in mid-epoch.

    A batch's ``size`` is what its losses are divided by: the number of examples in all batches that make one step, or,
    where they do not count alike, each member's sum of weights in them (M,). Then there are also ``weights`` (M, B),
    and, on the host, ``idle`` (M,): to whom nothing counts in that step.
    """

    splits: dict[str, TokenisedSplit]
    batch_size: int
    steps: int | Literal["longest", "shortest"]
    seed: int
    rank: int
    world: int
    epoch: Callable[[], int]  # asked at each pass, which begins with the epoch's first batch, wherever the last ended
    repeats: bool = False  # whether all epochs have the first one's batches
    weights: Mapping[str, ExampleWeights] = field(default_factory=dict)  # of tasks whose examples do not count alike
    accumulated: Callable[[], int] = lambda: 1  # asked at each batch: how many of them make one step of training
    ends: Callable[[], float] = lambda: math.inf  # how many batches of an epoch are trained on

    def __post_init__(self) -> None:
        self._passes = {name: math.ceil(len(split) / self.batch_size) for name, split in self.splits.items()}
        ends = {"longest": max, "shortest": min}
        self._steps = self.steps if isinstance(self.steps, int) else ends[self.steps](self._passes.values())
        self._at = (-1, 0)  # epoch of the last pass, and how many of its batches were handed out
        self._orders: dict[str, tuple[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._steps

    def _rows(self, name: str, epoch: int, step: int) -> np.ndarray:
        # With a fixed number of steps an epoch need not be a whole pass: go on where the last one stopped.
        step, epoch = (epoch * self._steps + step, 0) if isinstance(self.steps, int) else (step, epoch)
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
                rows = self._rows(name, 0 if self.repeats else epoch, step)[self.rank :: self.world]
                batch[name] = split.batch(rows) | self._counted(name, 0 if self.repeats else epoch, step, rows)
            # Counted before the yield: what comes after the last one is never run.
            self._at = (epoch, step + 1)
            yield batch

    def _counted(self, name: str, epoch: int, step: int, rows: np.ndarray) -> dict[str, Any]:
        """What :class:`TrainBatches` says of a batch besides its examples ``rows`` (B,)."""
        first = step - step % self.accumulated()
        steps = range(first, max(int(min(first + self.accumulated(), self._steps, self.ends())), step + 1))
        together = np.concatenate([self._rows(name, epoch, s) for s in steps])
        if name not in self.weights:
            return {"size": len(together)}
        total = self.weights[name].of(together).sum(1)
        size = torch.from_numpy(np.where(total > 0, total, 1.0))
        return {"size": size, "weights": torch.from_numpy(self.weights[name].of(rows)), "idle": total == 0}

    def state_dict(self) -> dict[str, int]:
        """How many batches of which epoch have been handed out."""
        return {"epoch": self._at[0], "served": self._at[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass after the batches that were handed out, if it is of that epoch."""
        # An older version did not say which epoch, and counted from 0 again where one had ended.
        self._at = (state.get("epoch", self.epoch()), state["served"])


class EvalBatches:
    """Splits of each task, every example once: this process gets every ``world``-th, sorted by length.

    ``fold``: of the split ``oof``, task to the fold (N,) of each example; a batch is of one. Batches say of which
    ``split`` and ``fold`` they are, the latter None where there is none.
    """

    def __init__(
        self,
        splits: Mapping[str, Mapping[str, TokenisedSplit]],
        *,
        batch_size: int,
        rank: int,
        world: int,
        fold: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.splits, self.batch_size = splits, batch_size
        self._parts: list[tuple[str, str, int | None, np.ndarray]] = []  # split, task, fold, rows
        for split, tasks in splits.items():
            for task, examples in tasks.items():
                # Sorted: what still has to be padded is little; the logits are put back by index.
                rows = np.argsort(examples.lengths, kind="stable")
                of = fold[task][rows] if split == OOF and fold else None
                parts = [(None, rows)] if of is None else [(k, rows[of == k]) for k in range(of.max() + 1)]
                self._parts += [(split, task, k, some[rank::world]) for k, some in parts]

    def __len__(self) -> int:
        return sum(max(1, math.ceil(len(rows) / self.batch_size)) for *_, rows in self._parts)

    def __iter__(self) -> Iterator[dict[str, dict[str, Any]]]:
        for split, task, fold, rows in self._parts:
            # At least one, even if empty: a process without a batch would leave the others waiting.
            for start in range(0, max(1, len(rows)), self.batch_size):
                batch = self.splits[split][task].batch(rows[start : start + self.batch_size])
                yield {task: {**batch, "split": split, "fold": fold}}
