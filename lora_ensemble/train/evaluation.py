"""How good a bank's members are: losses, scores and further metrics, and the history of scores, which decides.

Axes: M members, B examples in a batch, N examples of a split, C outputs of a head, E evaluations (epochs, mostly).
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, classification, regression

from lora_ensemble.bank.lora import Member
from lora_ensemble.errors import UserError
from lora_ensemble.scores import as_binary, overall, score
from lora_ensemble.tasks import Kind, Task
from lora_ensemble.train.batches import TokenisedSplit


def member_losses(
    logits: Tensor, labels: Tensor, kind: Kind, smoothing: float = 0.0, positives: Sequence[float] | None = None
) -> Tensor:
    """Loss of every member on every example: logits (M, B, C), labels (B,) or soft labels. Returns (M, B).

    Cross-entropy, binary cross-entropy with logits (of several labels, (B, L), the mean), or squared error (both
    reports). Never below float32. Soft labels are probabilities: of the classes (B, C) for multiclass, of class 1 (B,)
    for binary. ``smoothing``: the part of a classifier's label that is spread evenly over all classes (Szegedy et al.
    2016, section 7). ``positives``: of several labels, by what each one's loss counts where it is there.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "multiclass":
        m, b, c = logits.shape
        target = labels if labels.dim() == 1 else labels.to(logits.dtype)
        target = target.expand(m, *target.shape).flatten(0, 1)
        losses = F.cross_entropy(logits.reshape(m * b, c), target, reduction="none", label_smoothing=smoothing)
        return losses.view(m, b)
    target = (labels if labels.dim() == 2 else labels[:, None]).to(logits.dtype).expand(logits.shape)
    if kind != "regression":
        target = target * (1 - smoothing) + smoothing / 2 if smoothing else target
        weight = None if positives is None else target.new_tensor(positives)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weight).mean(-1)
    return (logits - target).square().mean(-1)


def step_losses(logits: Tensor, part: Mapping[str, Any], task: Task, parts: int) -> Tensor:
    """This batch's share of every member's mean loss over the examples that one step sees, times ``parts``: (M,).

    The mean is weighted where examples do not count alike. ``logits``: (M, B, C); ``part``: as ``TrainBatches`` has it.
    """
    weights = task.class_weights if task.kind == "multilabel" else None  # others' weigh whole examples
    positives = weights if isinstance(weights, list) else None
    losses = member_losses(logits, part["labels"], task.kind, task.label_smoothing, positives)
    if "weights" not in part:
        return losses.sum(1) * (parts / part["size"])
    return (losses * part["weights"].to(losses)).sum(1) * (parts / part["size"].to(losses))


def idle_members(parts: Iterable[Mapping[str, Any]]) -> list[int]:
    """The members to whom no example of any task counts in this step."""
    idle = [part.get("idle", np.zeros(1, bool)) for part in parts]
    return np.flatnonzero(np.all(np.broadcast_arrays(*idle), axis=0)).tolist()


@dataclass(frozen=True)
class Evaluation:
    """What the members said about a split of a task."""

    logits: np.ndarray  # (M, N, C) float32, rows in the order of the split
    scores: list[float] | None  # the task's score of each member; NaN where undefined; None without labels
    metrics: dict[str, list[float]]  # the same by further metrics, by name; empty without labels
    complete: bool  # False when a limit on batches left rows out; their logits are NaN

    def curves(self, split: str, task: Task, members: Sequence[Member]) -> dict[str, float]:
        """A point of each member's curves, by name."""
        return {
            f"{split}_{curve}/{task.name}/{member.name}": value
            for curve, values in (("score", self.scores or []), *self.metrics.items())
            for member, value in zip(members, values, strict=False)
        }

    def best(self, task: Task) -> float:
        """The best member's score; NaN where none has one."""
        return task.sign * max((task.sign * s for s in self.scores or [] if not math.isnan(s)), default=math.nan)


def evaluate(
    parts: Iterable[tuple[np.ndarray, Tensor]],
    examples: TokenisedSplit,
    task: Task,
    *,
    members: int,
    metrics: Sequence[str],
    strategy: Any,
) -> Evaluation:
    """Gather every row once, on all devices, and score it. A collective.

    ``parts``: rows (B,) and logits (M, B, C) of this process's batches. ``members``: M. ``strategy``: the Trainer's.
    """
    full = torch.zeros(members, len(examples), task.num_outputs, device=strategy.root_device)
    seen = torch.zeros(len(examples), device=strategy.root_device)
    for rows, logits in parts:
        index = torch.from_numpy(rows).to(seen.device)
        full[:, index] = logits
        seen[index] = 1
    # Every row lies on one device and is zero on the others, so the sum is exact.
    array = strategy.reduce(full, reduce_op="sum").cpu().numpy()
    there = strategy.reduce(seen, reduce_op="sum").bool().cpu().numpy()

    def measured(measure: Callable[[np.ndarray, np.ndarray], float], labels: np.ndarray) -> list[float]:
        usable = [there.any() and np.isfinite(member).all() for member in array]
        return [measure(m[there], labels[there]) if use else math.nan for m, use in zip(array, usable, strict=True)]

    scores, values = None, {}
    if examples.labels is not None:
        scores = measured(partial(score, kind=task.kind, name=task.scored_by), examples.labels)
        values = {name: measured(partial(metric, name, task), examples.labels) for name in metrics}
    array[:, ~there] = math.nan
    return Evaluation(array, scores, values, bool(there.all()))


# What decides


class History:
    """The evaluations of a bank's M members so far, on the split that decides: dev, or out of fold."""

    def __init__(self, members: Sequence[str], tasks: Sequence[Task]) -> None:
        self.members, self.tasks = list(members), list(tasks)
        self.diverged = [False] * len(members)
        self.best_epoch = [0] * len(members)  # each member's best evaluation, counted from 1; 0: none yet
        self._best = [-math.inf] * len(members)
        self._anew = [0] * len(members)  # evaluations that each had when it was offered anew
        self._logits: dict[str, list[np.ndarray]] = {t.name: [] for t in tasks}  # E arrays (M, N, C) float16
        self._scores: dict[str, list[list[float]]] = {t.name: [] for t in tasks}  # E lists of M scores

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, so that ``weights_only=True`` can load them. Who diverged is seen again."""
        return {
            "best": list(self._best),
            "best_epoch": list(self.best_epoch),
            "epochs": {t: [torch.from_numpy(a) for a in arrays] for t, arrays in self._logits.items() if arrays},
            "scores": {t: scores for t, scores in self._scores.items() if scores},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self._best, self.best_epoch = list(state["best"]), list(state["best_epoch"])
        self._logits |= {t: [a.numpy() for a in arrays] for t, arrays in state["epochs"].items()}
        self._scores |= {t: [list(s) for s in scores] for t, scores in state["scores"].items()}

    def __len__(self) -> int:
        return len(self._scores[self.tasks[0].name])

    def add(self, evaluations: Mapping[str, Evaluation], alive: Sequence[bool]) -> tuple[list[int], list[int]]:
        """Take what all tasks' evaluations say; returns the members that improved, and those that were seen to diverge.

        ``alive``: of each member, whether its training has stayed finite.
        """
        for name, e in evaluations.items():
            # Half precision holds a logit to three digits; beyond its range it would turn into infinity.
            self._logits[name].append(np.clip(e.logits, -65504, 65504).astype(np.float16))
            self._scores[name].append(list(e.scores or []))
        finite = np.all([np.isfinite(e.logits).all((1, 2)) for e in evaluations.values()], axis=0) & alive
        improved, diverged = [], []
        for index, value in enumerate(self.overall_at(len(self))):
            if not finite[index]:
                diverged += [] if self.diverged[index] else [index]
                self.diverged[index] = True
            elif value > self._best[index]:  # never for NaN: an undefined score is no improvement
                self._best[index], self.best_epoch[index] = value, len(self)
                improved.append(index)
        return improved, diverged

    @property
    def all_diverged(self) -> bool:
        """Whether no member of the bank is left to train."""
        return bool(self.diverged) and all(self.diverged)

    def forget_best(self, index: int) -> None:
        """Offer a member anew: its next evaluation is its best so far."""
        self._best[index], self.best_epoch[index], self._anew[index] = -math.inf, 0, len(self)

    def without_gain(self, index: int) -> int:
        """A member's evaluations since its best one."""
        return len(self) - max(self.best_epoch[index], self._anew[index])

    def overall_at(self, evaluation: int) -> list[float]:
        """Each member's overall score at an evaluation, counted from 1, the higher the better: (M,)."""
        at = [self._scores[t.name][evaluation - 1] for t in self.tasks]
        return [overall([s[i] for s in at], self.tasks) for i in range(len(self.members))]

    def logits_at(self, evaluation: int) -> dict[str, np.ndarray]:
        """Task to dev logits (M, N, C) float16 at an evaluation, counted from 1; of several labels (M, N L, 1)."""
        at = {name: arrays[evaluation - 1] for name, arrays in self._logits.items()}
        return {t.name: as_binary(at[t.name], t.kind)[0] for t in self.tasks}  # labels are no classes to be centred

    def logits_of(self, task: str, index: int) -> np.ndarray:
        """One member's dev logits at every evaluation: (E, N, C) float16."""
        return np.stack([a[index] for a in self._logits[task]])

    def results(self, task: str, index: int) -> dict[str, Any]:
        """What ``member.json`` says of a member that has a best epoch."""
        scores, best = [s[index] for s in self._scores[task]], self.best_epoch[index]
        return {
            "score": scores[best - 1],
            "best_epoch": best,
            "epochs_done": len(scores),
            "epoch_scores": [None if math.isnan(s) else s for s in scores],
            "diverged": self.diverged[index],
        }

    def summary(self) -> list[list[Any]]:
        """A row per member, below ``summary_header``: name, best epoch, and score of each task at that epoch."""
        rows = []
        for index, name in enumerate(self.members):
            best = self.best_epoch[index]
            scores = [self._scores[t.name][best - 1][index] if best else math.nan for t in self.tasks]
            rows.append([name, "diverged" if self.diverged[index] else best or "-", *scores])
        return rows


def summary_header(tasks: Sequence[Task], split: str) -> list[str]:
    """Of the table of a run's members; ``split``: the one that decided."""
    return ["member", "best epoch", *(f"{t.name} {split} ({t.score_name})" for t in tasks)]


# Further metrics: torchmetrics' classes by name


def metric(name: str, task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """What the torchmetrics class ``name`` makes of logits (N, C) and labels (N,), or (N, L), of a task of its kind.

    It is given probabilities, or a regression's values. Averages over classes are those of its multiclass form (macro).
    """
    z = torch.from_numpy(np.asarray(logits, np.float64))
    z = z if task.num_outputs > 1 else z[:, 0]
    said = z.softmax(1) if task.kind == "multiclass" else z if task.kind == "regression" else z.sigmoid()
    return float(_computed(_metric_classes(task.kind)[name], said, torch.from_numpy(labels), task))


def check_metrics(names: Iterable[str], task: Task) -> list[str]:
    """The names, each once. ``UserError`` for one that is no metric of this kind of task with one number for all."""
    names, classes = list(dict.fromkeys(names)), _metric_classes(task.kind)
    for name in names:
        if name not in classes or not _fits(classes[name], task):
            fitting = [n for n, metric_class in classes.items() if _fits(metric_class, task)]
            close = difflib.get_close_matches(name, fitting, n=4, cutoff=0.4) or fitting
            raise UserError(
                f"metrics: {name!r} is no class of torchmetrics that gives one number for task {task.name!r} "
                f"({task.kind}); expected one like {', '.join(close)}"
            )
    return names


def _metric_classes(kind: Kind) -> dict[str, type[Metric]]:
    """torchmetrics' classes for a kind of task; those of classifiers by their names without the kind."""
    module, prefix = (regression, "") if kind == "regression" else (classification, kind.capitalize())
    return {n.removeprefix(prefix): getattr(module, n) for n in module.__all__ if n.startswith(prefix)}


def _computed(metric_class: type[Metric], said: Tensor, truth: Tensor, task: Task) -> Tensor:
    option = {"multiclass": "num_classes", "multilabel": "num_labels"}
    options: dict[str, Any] = {option[task.kind]: task.num_outputs} if task.kind in option else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of buffers that are kept, and of classes that are missing
        # The value of these examples alone: every process has all of them, and nothing is to be summed up over them.
        return metric_class(**options)(said, truth)


def _fits(metric_class: type[Metric], task: Task) -> bool:
    """Whether a metric needs no other options than ours and gives one number: tried on a few examples."""
    truth = torch.arange(6) % max(task.num_outputs, 2)
    said = torch.linspace(0.1, 0.9, 6)
    if task.num_outputs > 1:
        said = F.one_hot(truth.flip(0), task.num_outputs).double()
    if task.kind == "multilabel":
        truth = F.one_hot(truth, task.num_outputs)
    try:
        value = _computed(metric_class, said, truth if task.kind != "regression" else truth.float(), task)
    except Exception:  # whatever it lacks, torchmetrics says it in many ways
        return False
    return isinstance(value, Tensor) and value.ndim == 0
