"""Members and what they say of labelled examples: all on the dev set (``Dev``), or some in memory (``Members``).

Of several labels both are made of (N, L) and are of a binary task from there on, with a row for each example and label,
example by example (``scores.as_binary``): every similarity, strategy, method and weight is that of the N L rows, and
what is chosen is shared by the labels. ``width`` is L, else 1; N below counts rows. Examples are never torn apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from lora_ensemble.dicor.choose.probabilities import losses, soft_votes, true_probabilities
from lora_ensemble.errors import UserError
from lora_ensemble.scores import as_binary, by_example, decisions, said_of, scored
from lora_ensemble.tasks import SCORES, Kind, ScoreName, check_score
from lora_ensemble.text.splits import canonical

DECIMALS = 12
"""To which scores, losses and similarities are compared: members that tie must tie whatever the examples' order."""


def ranked(scores: np.ndarray, names: Sequence[str], loss: np.ndarray | None = None) -> list[int]:
    """Indices of members (M,), best first: by score (higher is better), ties by the softer ``loss``, then by name."""
    softer = np.zeros(len(names)) if loss is None else np.round(loss, DECIMALS)
    return [int(m) for m in np.lexsort((np.asarray(names, np.str_), softer, -np.round(scores, DECIMALS)))]


def top_members(scores: np.ndarray, limit: int, names: Sequence[str], loss_of: Callable[[int], float]) -> list[int]:
    """Indices of the ``limit`` best members (M,), best first as ``ranked``; a member whose score is NaN never is.

    ``loss_of`` is asked only where it may matter: of those as good as the last one that is let in, or better.
    """
    rounded = np.round(np.nan_to_num(scores, nan=-np.inf), DECIMALS)
    place = max(len(rounded) - limit, 0)
    within = np.flatnonzero((rounded >= np.partition(rounded, place)[place]) & np.isfinite(rounded)).tolist()
    order = ranked(scores[within], [names[m] for m in within], np.array([loss_of(m) for m in within]))
    return [within[i] for i in order[:limit]]


@dataclass(frozen=True, eq=False)
class Members:
    """k members on N examples: what a method chooses from, best first, and what an ensemble decides by."""

    logits: np.ndarray  # (k, N, C)
    kind: Kind
    names: list[str]
    ranks: list[int | None]
    scores: np.ndarray  # (k,) on the examples that are chosen by, times the score's sign: the higher the better
    labels: np.ndarray = field(default_factory=lambda: np.empty(0))  # (N,); empty where nothing is chosen
    score: ScoreName | None = None  # what is to be good; None: the default of the kind
    width: int = 1  # rows of an example

    @classmethod
    def of(
        cls,
        logits: np.ndarray,
        kind: Kind,
        names: list[str],
        ranks: list[int | None],
        scores: np.ndarray,
        by: ScoreName,
    ) -> Members:
        """Who decides: of logits (k, N, C) of any kind."""
        logits, flat, width = as_binary(logits, kind)
        return cls(logits, flat, names, ranks, scores, score=by, width=width)

    @property
    def scored_by(self) -> ScoreName:
        """What is to be good."""
        return check_score(self.score, self.kind)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, which: Sequence[int] | np.ndarray, rows: np.ndarray | None = None) -> Members:
        """These members alone, in this order, and, where ``rows`` are given, these examples alone."""
        if rows is None and np.array_equal(which, np.arange(len(self))):
            return self  # with what it has worked out
        logits, labels = self.logits[which], self.labels
        if rows is not None:
            logits, labels = logits[:, rows], labels[rows]
        names, ranks = [self.names[m] for m in which], [self.ranks[m] for m in which]
        return Members(logits, self.kind, names, ranks, self.scores[which], labels, self.score, self.width)

    @cached_property
    def soft_votes(self) -> np.ndarray:
        """(k, N, C), see ``probabilities``."""
        return soft_votes(self.logits, self.kind)

    @cached_property
    def true_probabilities(self) -> np.ndarray:
        """(k, N) of the labels; classifiers only."""
        return true_probabilities(self.logits, self.labels, self.kind)


def numbered(m: int) -> list[str]:
    """Names (M,) for members that have none, which sort as they stand."""
    return [f"m{i:0{len(str(m))}d}" for i in range(m)]


@dataclass(frozen=True, eq=False)
class Dev:
    """All members' logits on labelled examples; members by name, none twice."""

    logits: Sequence[ArrayLike]  # M of (N, C), as they are kept: an array, or opened whenever numpy asks for it
    labels: np.ndarray  # (N,)
    ids: np.ndarray  # (examples,) unicode
    kind: Kind
    scored_by: ScoreName  # what is to be good
    names: list[str]
    ranks: list[int | None]
    epochs: Sequence[np.ndarray | None]  # M of (E, N, C), as kept: logits of every epoch, or None where there are none
    notices: list[str] = field(default_factory=list)  # what was left out, or is to be known, in words
    groups: np.ndarray | None = None
    """(examples,) unicode: those of one group are no independent evidence; None: all are."""
    width: int = 1  # rows of an example
    split: str = "dev"  # what the examples are: dev, or oof

    @classmethod
    def of(
        cls,
        logits: Sequence[ArrayLike] | np.ndarray,
        labels: np.ndarray,
        *,
        kind: Kind,
        names: Sequence[str] | None = None,
        ranks: Sequence[int | None] | None = None,
        ids: Sequence[str] | np.ndarray | None = None,
        epochs: Sequence[np.ndarray | None] | None = None,
        fingerprints: Sequence[str] | None = None,
        score: str | None = None,
        groups: np.ndarray | None = None,
    ) -> Dev:
        """Check, sort by name, and collapse members whose logits are the same to the last bit (a notice says so).

        ``labels``: (N,), or (N, L) of multilabel.
        ``fingerprints`` (M,): texts that are equal where the logits are, which are not looked at then. ``UserError``
        where lengths differ, an id or a name is there twice, a label is no class, a value is not finite, or the kind
        has no such score.
        """
        name = check_score(score, kind)
        m, n, labels = len(logits), len(labels), np.asarray(labels)
        names = numbered(m) if names is None else list(names)
        ranks, epochs = [None] * m if ranks is None else ranks, [None] * m if epochs is None else epochs
        ids = np.arange(n).astype(np.str_) if ids is None else np.asarray(ids, np.str_)
        if not m or not n:
            raise UserError(f"{m} members on {n} examples: there must be at least one of each")
        lengths = {"names": (len(names), m), "ranks": (len(ranks), m), "epochs": (len(epochs), m), "ids": (len(ids), n)}
        for what, (length, expected) in lengths.items():
            if length != expected:
                raise UserError(f"{length} {what} for {m} members on {n} examples; expected {expected}")
        if len(set(names)) < m or len(np.unique(ids)) < n:
            raise UserError("a name of a member or an id of an example is there twice; each must be unique")
        if fingerprints is None:
            fingerprints = [_fingerprint(logits[i], names[i], n, kind) for i in range(m)]
            _check_labels(labels, kind, np.shape(logits[0])[-1])
        same: dict[str, list[int]] = {}
        for i in sorted(range(m), key=names.__getitem__):
            same.setdefault(fingerprints[i], []).append(i)
        copied = sorted(([names[i] for i in places] for places in same.values() if len(places) > 1), key=lambda c: c[1])
        notices = [
            f"{len(others)} member{'s' * (len(others) > 1)} with the very logits of {name} left out: "
            + ", ".join(others[:3])
            + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            for name, *others in copied
        ]
        kept, outputs = [logits[i] for i in range(m)], labels.shape[1] if kind == "multilabel" else 1
        flat: Kind = "binary" if kind == "multilabel" else kind
        of = kept, labels.reshape(-1), ids, flat, name, names, list(ranks), epochs
        return cls(*of, groups=groups, width=outputs).only([places[0] for places in same.values()], notices)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def evidence(self) -> int:
        """How many independent pieces of evidence there are: groups, or examples."""
        return len(self.ids) if self.groups is None else len(np.unique(self.groups))

    @property
    def truth(self) -> np.ndarray:
        """(examples,) the labels, or (examples, L), of each example."""
        return by_example(self.labels, self.width)

    @property
    def together(self) -> np.ndarray | None:
        """(N,) numbers from 0 of what the rows belong to, in ``order``: groups, or examples; None: each is its own."""
        which = np.arange(len(self.ids))
        if self.groups is None and self.width == 1:
            return None
        if self.groups is not None:
            which = np.unique(self.groups[canonical(self.ids)], return_inverse=True)[1]
        return np.repeat(which, self.width)

    def worth(self, m: int) -> float:
        """The m-th member's score on all examples, times the score's sign: the higher the better."""
        said = said_of(self.logits_of(m), self.kind, self.scored_by)
        value = scored(said, self.labels, self.kind, self.scored_by, width=self.width)
        return SCORES[self.scored_by].sign * float(value)

    @cached_property
    def order(self) -> np.ndarray:
        """(N,): the order of rows in which everything that depends on one is done, see ``splits.canonical``."""
        return (canonical(self.ids)[:, None] * self.width + np.arange(self.width)).ravel()

    def logits_of(self, m: int) -> np.ndarray:
        """(N, C) of the m-th."""
        return self._flat(np.asarray(self.logits[m]))

    def epochs_of(self, m: int) -> np.ndarray | None:
        """(E, N, C) of the m-th, or None."""
        epochs = self.epochs[m]
        return None if epochs is None else self._flat(epochs)

    def _flat(self, logits: np.ndarray) -> np.ndarray:
        return logits if self.width == 1 else as_binary(logits, "multilabel")[0]

    def only(self, which: Sequence[int], notices: Sequence[str]) -> Dev:
        """These members alone, in this order, with further notices."""
        logits, epochs = [self.logits[m] for m in which], [self.epochs[m] for m in which]
        names, ranks = [self.names[m] for m in which], [self.ranks[m] for m in which]
        notices = [*self.notices, *notices]
        return replace(self, logits=logits, epochs=epochs, names=names, ranks=ranks, notices=notices)

    def members(self, which: Sequence[int], logits: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Members:
        """Some members in memory, on some examples: their logits (k, N', C), scores (k,) and labels (N',) there."""
        names, ranks = [self.names[m] for m in which], [self.ranks[m] for m in which]
        return Members(logits, self.kind, names, ranks, scores, labels, self.scored_by, self.width)

    def scored(self, scores: np.ndarray) -> tuple[Dev, list[int]]:
        """The members whose score (M,) is defined (``UserError``: none), the others in a notice, and which they are."""
        undefined, good = np.flatnonzero(np.isnan(scores)).tolist(), np.flatnonzero(~np.isnan(scores)).tolist()
        if not undefined:
            return self, good
        words = SCORES[self.scored_by].words
        by_label = self.labels.reshape(-1, self.width)
        if np.all(by_label == by_label[0]):
            raise UserError(
                f"the {self.split} labels are all the same, so {words} is undefined; give examples that differ"
            )
        name, value = self.names[undefined[0]], decisions(self.logits_of(undefined[0]), self.kind)[0]
        what = f"member {name}: its {self.split} predictions are constant (all {value:.6g}), so its {words}"
        if not good:
            raise UserError(f"{what} is undefined, and so are all others'; train them again")
        others = f" (and {len(undefined) - 1} more like it)" if len(undefined) > 1 else ""
        return self.only(good, [f"{what} is undefined; left out{others}"]), good

    def top(self, scores: np.ndarray, limit: int) -> Members:
        """The ``limit`` best by ``scores`` (M,), none undefined, on all examples in ``order``."""
        if limit < 1:
            raise UserError(f"top_k {limit}: there must be at least one candidate")

        def loss_of(m: int) -> float:
            return float(losses(self.logits_of(m), self.labels, self.kind).mean())

        which = top_members(scores, limit, self.names, loss_of)
        logits = np.stack([self.logits_of(m)[self.order] for m in which])
        # As the task scores it: sums over folds round otherwise.
        scores = np.array([self.worth(m) for m in which])
        return self.members(which, logits, scores, self.labels[self.order])


def _fingerprint(logits: ArrayLike, name: str, n: int, kind: Kind) -> str:
    """A text that is equal where logits are; ``UserError`` where they are not (N, C) or not finite."""
    logits = np.asarray(logits)
    several = kind in ("multiclass", "multilabel")
    right = logits.ndim == 2 and len(logits) == n and (logits.shape[1] == 1) == (not several)
    if not right or logits.shape[1] == 0:
        wanted = "C of at least 2" if several else "C = 1"
        raise UserError(f"member {name}: logits of shape {logits.shape}; expected (N, C): {n} examples, {wanted}")
    if logits.dtype.kind not in "fiu" or not np.isfinite(logits).all():
        raise UserError(f"member {name}: logits are not all finite numbers; leave this member out")
    return hashlib.blake2b(np.ascontiguousarray(logits + 0.0).tobytes(), digest_size=16).hexdigest()


def _check_labels(labels: np.ndarray, kind: Kind, outputs: int) -> None:
    if labels.dtype.kind not in "biuf" or not np.isfinite(labels).all():
        raise UserError("labels are not all finite numbers")
    if labels.shape[1:] != ((outputs,) if kind == "multilabel" else ()):
        raise UserError(f"labels of shape {labels.shape}; expected (N,), or (N, {outputs}) for multilabel")
    classes = {"multiclass": outputs, "binary": 2, "multilabel": 2, "regression": 0}[kind]
    if classes and len(wrong := labels[~np.isin(labels, np.arange(classes))]):
        raise UserError(f"labels hold {wrong[0]}; expected classes 0 to {classes - 1}")
