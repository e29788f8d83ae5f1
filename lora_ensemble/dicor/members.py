"""The members that a method may choose from, as arrays, whether they come from a pool or from elsewhere.

Axes: M members, N examples of the dev split, C outputs of a head, E epochs, k candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_ensemble.dicor.choose.combine import DECIMALS
from lora_ensemble.dicor.choose.view import View, losses
from lora_ensemble.dicor.estimate.splits import canonical
from lora_ensemble.errors import UserError
from lora_ensemble.scores import decisions, score
from lora_ensemble.tasks import Kind


@dataclass(frozen=True, kw_only=True)
class Dev:
    """Members' logits on labelled examples; members by name, none twice."""

    logits: Sequence[np.ndarray] | np.ndarray
    """M of (N, C). An array (M, N, C) will do, and so will anything that opens a member's file when it is asked."""
    labels: np.ndarray
    """(N,)"""
    ids: np.ndarray
    """(N,) unicode"""
    kind: Kind
    names: list[str]
    ranks: list[int | None]
    epochs: Sequence[np.ndarray | None]
    """M of (E, N, C) logits of every epoch, or None where they were not kept."""
    columns: list[int]
    """For each member its place in what ``of`` was given."""
    notices: list[str] = field(default_factory=list)
    """What was left out, and what else is to be known, in words."""

    @classmethod
    def of(
        cls,
        logits: Sequence[np.ndarray] | np.ndarray,
        labels: np.ndarray,
        *,
        kind: Kind,
        names: Sequence[str] | None = None,
        ranks: Sequence[int | None] | None = None,
        ids: Sequence[str] | np.ndarray | None = None,
        epochs: Sequence[np.ndarray | None] | None = None,
        fingerprints: Sequence[str] | None = None,
    ) -> Dev:
        """Check, sort by name, and collapse members whose logits are the same to the last bit (a notice says so).

        ``fingerprints`` (M,): texts that are equal where the logits are, if they are known (a file's checksum); the
        logits are not looked at then. Raises ``UserError`` where lengths differ, an id or a name is there twice, a
        label is no class, or a value is not finite.
        """
        m, n = len(logits), len(labels)
        names = [f"m{i:0{len(str(m))}d}" for i in range(m)] if names is None else list(names)
        ranks = [None] * m if ranks is None else list(ranks)
        ids = np.arange(n).astype(np.str_) if ids is None else np.asarray(ids, np.str_)
        epochs = [None] * m if epochs is None else epochs
        if not m or not n:
            raise UserError(f"{m} members on {n} examples: there must be at least one of each")
        for what, length, expected in (
            ("names", len(names), m),
            ("ranks", len(ranks), m),
            ("epochs", len(epochs), m),
            ("ids", len(ids), n),
        ):
            if length != expected:
                raise UserError(f"{length} {what} for {m} members on {n} examples; expected {expected}")
        if len(set(names)) < m or len(np.unique(ids)) < n:
            raise UserError("a name of a member or an id of an example is there twice; each must be unique")
        labels = np.asarray(labels)
        if fingerprints is None:
            fingerprints = [_checked(logits[i], names[i], n, kind) for i in range(m)]
            _check_labels(labels, kind, logits[0].shape[-1])
        order = sorted(range(m), key=lambda i: names[i])
        first: dict[str, int] = {}
        same: dict[str, list[str]] = {}
        for i in order:
            if fingerprints[i] in first:
                same.setdefault(names[first[fingerprints[i]]], []).append(names[i])
            else:
                first[fingerprints[i]] = i
        kept = list(first.values())
        return cls(
            logits=logits,
            labels=labels,
            ids=ids,
            kind=kind,
            names=[names[i] for i in kept],
            ranks=[ranks[i] for i in kept],
            epochs=epochs,
            columns=kept,
            notices=[
                f"{len(others)} member{'s' * (len(others) > 1)} with the very logits of {name} left out: "
                + ", ".join(others[:3])
                + (f" and {len(others) - 3} more" if len(others) > 3 else "")
                for name, others in same.items()
            ],
        )

    def __len__(self) -> int:
        return len(self.names)

    def of_member(self, m: int) -> np.ndarray:
        """(N, C) of the m-th."""
        return self.logits[self.columns[m]]

    def epochs_of(self, m: int) -> np.ndarray | None:
        """(E, N, C) of the m-th, or None."""
        return self.epochs[self.columns[m]]

    def without_epochs(self) -> Dev:
        """The same, as if only the best epoch had been kept."""
        return replace(self, epochs=[None] * len(self.epochs))

    def only(self, kept: Sequence[int], notices: Sequence[str] = ()) -> Dev:
        """These members alone, with further notices."""
        return replace(
            self,
            names=[self.names[m] for m in kept],
            ranks=[self.ranks[m] for m in kept],
            columns=[self.columns[m] for m in kept],
            notices=[*self.notices, *notices],
        )


def _checked(logits: np.ndarray, name: str, n: int, kind: Kind) -> str:
    """A text that is equal where logits are; ``UserError`` where they are not (N, C) or not finite."""
    logits = np.asarray(logits)
    right = logits.ndim == 2 and len(logits) == n and (logits.shape[1] == 1) == (kind != "multiclass")
    if not right or logits.shape[1] == 0:
        wanted = "C of at least 2" if kind == "multiclass" else "C = 1"
        raise UserError(f"member {name}: logits of shape {logits.shape}; expected (N, C): {n} examples, {wanted}")
    if logits.dtype.kind not in "fiu" or not np.isfinite(logits).all():
        raise UserError(f"member {name}: logits are not all finite numbers; leave this member out")
    return hashlib.blake2b(np.ascontiguousarray(logits + 0.0).tobytes(), digest_size=16).hexdigest()


def _check_labels(labels: np.ndarray, kind: Kind, outputs: int) -> None:
    if labels.dtype.kind not in "biuf" or not np.isfinite(labels).all():
        raise UserError("labels are not all finite numbers")
    classes = {"multiclass": outputs, "binary": 2, "regression": 0}[kind]
    if classes and not np.isin(labels, np.arange(classes)).all():
        raise UserError(
            f"labels hold {labels[~np.isin(labels, np.arange(classes))][0]}; expected classes 0 to {classes - 1}"
        )


def ranked(scores: np.ndarray, loss: np.ndarray, names: Sequence[str]) -> list[int]:
    """Indices (M,), best first: by score, ties by the softer loss, then by name."""
    a, b = np.round(scores, DECIMALS).tolist(), np.round(loss, DECIMALS).tolist()
    return sorted(range(len(names)), key=lambda m: (-a[m], b[m], names[m]))


def leaders(scores: np.ndarray, limit: int) -> list[int]:
    """Members (M,) that are among the ``limit`` best by score, or tie with the last of them; NaN never is."""
    rounded = np.round(np.nan_to_num(scores, nan=-np.inf), DECIMALS)
    place = max(len(rounded) - limit, 0)
    least = np.partition(rounded, place)[place]
    return np.flatnonzero((rounded >= least) & np.isfinite(rounded)).tolist()


def defined(dev: Dev, scores: np.ndarray) -> tuple[Dev, list[int]]:
    """The members whose score (M,) is defined, a notice naming those that have none, and their indices.

    ``UserError`` where none has a score.
    """
    bad = np.flatnonzero(np.isnan(scores))
    if not len(bad):
        return dev, list(range(len(dev)))
    if np.all(dev.labels == dev.labels[0]):
        raise UserError("the dev labels are all the same, so Pearson r is undefined; give dev examples that differ")
    name, value = dev.names[bad[0]], decisions(dev.of_member(int(bad[0])), dev.kind)[0]
    what = f"member {name}: its dev predictions are constant (all {value:.6g}), so its Pearson r is undefined"
    if len(bad) == len(dev):
        raise UserError(f"{what}, and so are all others'; train them again")
    others = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
    good = np.flatnonzero(~np.isnan(scores)).tolist()
    return dev.only(good, [f"{what}; left out{others}"]), good


def view_of(dev: Dev, scores: np.ndarray, *, limit: int, order: np.ndarray | None = None) -> tuple[View, list[int]]:
    """The best ``limit`` members on all examples, as a method sees them, and their indices into ``dev``.

    ``scores`` (M,): of the members of ``dev``, none undefined. Examples are put in ``order`` (None: that of
    ``splits.canonical``). ``UserError`` for a ``limit`` below 1.
    """
    if limit < 1:
        raise UserError(f"top_k {limit}: there must be at least one candidate")
    # The softer loss matters only where scores tie with the last one that is let in, or above it.
    within = leaders(scores, limit)
    limit = min(limit, len(dev))
    order = canonical(dev.ids) if order is None else order
    labels = dev.labels[order]
    loss = np.array([losses(np.asarray(dev.of_member(m)), dev.labels, dev.kind).mean() for m in within])
    top = [within[i] for i in ranked(scores[within], loss, [dev.names[m] for m in within])][:limit]
    view = View(
        np.stack([np.asarray(dev.of_member(m))[order] for m in top]),
        labels,
        kind=dev.kind,
        names=[dev.names[m] for m in top],
        ranks=[dev.ranks[m] for m in top],
        # As the task scores it: sums over folds round otherwise.
        scores=np.array([score(np.asarray(dev.of_member(m)), dev.labels, dev.kind) for m in top]),
    )
    return view, top
