"""A chosen ensemble at work: text in, decisions out, all its members in one pass over one encoder. No lightning.

Axes: M members, N texts, C outputs of a head.

>>> ensemble = Ensemble.load("dicor.json")
>>> ensemble.labels
['0', '1', '2', '3', '4']
>>> texts = ["A bright and gripping story.", "Slow, and not good."]
>>> ensemble.predict(texts).shape
(2,)
>>> ensemble.predict_proba(texts).shape
(2, 5)
>>> ensemble.logits(texts).shape == (len(ensemble.members), 2, 5)
True
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from lora_ensemble.bank.lora import Member
from lora_ensemble.bank.member_files import load_base, restore_members
from lora_ensemble.bank.model import Bank
from lora_ensemble.dicor import record
from lora_ensemble.ensemble.sources import Source, read_source, text_limit
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import outputs_of
from lora_ensemble.text.packing import Tokens, Truncation

Precision = Literal["32", "bf16"]
Text = str | Sequence[str]
"""What a task reads: a text, or two of them as a pair."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Members that one pass serves: of one encoder, and cutting texts in one way."""

    bank: Bank
    tokenizer: Any
    max_length: int
    truncation: Truncation
    places: list[int]  # where its members stand in the ensemble
    models: list[int]  # of each member, how many of the bank's models it is the mean of


class Ensemble:
    """The members of ``dicor.json`` over one encoder; see :meth:`load`.

    Any number of threads may ask it; they are served one after another, since one pass uses all cores.
    """

    def __init__(self, chosen: record.Ensemble, parts: list[_Part], *, text: list[str], precision: Precision) -> None:
        self.record = chosen
        """What ``dicor select`` wrote."""
        self.text = text
        """Names of the text columns that it reads, two for a pair; empty where the members do not say."""
        self._parts, self._precision = parts, precision
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        pool: str | Path | None = None,
        device: str = "auto",
        precision: Precision = "32",
        any_base: bool = False,
    ) -> Ensemble:
        """Restore the members that ``dicor select`` chose.

        ``path``: the record that it wrote, or a folder that ``lora-ensemble export`` wrote, with members and base
        models. ``pool``: where the members are, if no longer where the record says. ``device``: cpu, cuda, cuda:1, ...;
        auto: a GPU where there is one. ``precision``: 32 or bf16, of the matrix products; but for rounding, both answer
        the same. ``any_base``: take the base model that is here, though it be another than in training.

        ``UserError`` naming what is missing: a member, its weights, its base model, the device; and for another base
        model than in training.
        """
        if precision not in get_args(Precision):
            raise UserError(f"precision is {precision!r}; expected one of {', '.join(get_args(Precision))}")
        where = _device(device)
        source = read_source(Path(path), None if pool is None else Path(pool))
        together: dict[Any, list[int]] = {}
        for i, r in enumerate(source.members):
            # Of the hub's revisions many have the same weights. A fully fine-tuned encoder is one member's own.
            version = str(r.base_fingerprint or r.revision) if r.revision and not any_base else ""
            cut = r.settings.get("max_length"), r.settings.get("truncation")
            key = (r.base_model, version, cut, None if r.finetune != "full" else r.name)
            together.setdefault(key, []).append(i)
        parts = [_part(source, places, where, any_base) for places in together.values()]
        return cls(source.ensemble, parts, text=source.text, precision=precision)

    @property
    def labels(self) -> list[str]:
        """The labels in the order of :meth:`predict_proba`'s columns; empty for a regression."""
        return self.record.labels

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._parts[0].bank.weights.device

    @property
    def members(self) -> list[str]:
        """Names of the members, in the order of :meth:`logits`."""
        return [m.name for m in self.record.members]

    def logits(self, texts: Sequence[Text], *, progress: Callable[[int], object] | None = None) -> np.ndarray:
        """What each member says: (M, N, C) float32. Equal texts are computed once.

        ``texts``: N texts, or N pairs of texts. ``progress``: told how many texts are done after each pass. Raises
        ``UserError`` for what is no text, or a text where pairs are read.
        """
        rows = list(zip(*self._columns(texts), strict=True))
        c = outputs_of(self.record.kind, self.labels)
        distinct = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        out = np.empty((self.record.size, len(distinct), c), np.float32)
        if not rows:
            return out
        place = np.array([distinct[row] for row in rows])  # of each text among the distinct ones
        times = np.bincount(place)
        columns = list(zip(*distinct, strict=True))
        with self._lock, torch.inference_mode():
            for number, part in enumerate(self._parts):
                budget = TOKENS.get(part.bank.weights.device.type, TOKENS["cpu"])
                tokens = Tokens(columns, part.tokenizer, max_length=part.max_length, truncation=part.truncation)
                for some in _passes(tokens.lengths, budget // sum(part.models)):
                    out[np.ix_(np.array(part.places), some)] = self._pass(part, tokens.row(some))
                    if progress is not None and number == len(self._parts) - 1:
                        progress(int(times[some].sum()))
        return out[:, place]

    def _pass(self, part: _Part, row: dict[str, Any]) -> np.ndarray:
        bank, device = part.bank, part.bank.weights.device
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            (logits,) = bank({self.record.task: batch}).values()
        return np.stack([models.mean(0).cpu().numpy() for models in logits.float().split(part.models)])

    def decision(self, texts: Sequence[Text]) -> np.ndarray:
        """What the ensemble decides, by the strategy of its record: (N,) class numbers, or values of a regression.

        Of several labels (N, L) of 0 and 1.
        """
        return self.record.decide(self.logits(texts))

    def predict(self, texts: Sequence[Text]) -> np.ndarray:
        """The same with the class numbers as labels: (N,) unicode, or float64 for a regression; of several lists."""
        return self.named(self.decision(texts))

    def named(self, decided: np.ndarray) -> np.ndarray:
        """Decisions (N,) as :meth:`predict` gives them."""
        if self.record.kind == "multilabel":
            rows = [[name for name, there in zip(self.labels, row, strict=True) if there] for row in decided]
            return np.fromiter(rows, dtype=object, count=len(rows))
        return decided if self.record.kind == "regression" else np.array(self.labels)[decided]

    def predict_proba(self, texts: Sequence[Text]) -> np.ndarray:
        """Probabilities (N, classes), or of each label (N, L): of a majority, the shares of the votes.

        ``UserError`` for a regression.
        """
        return self.probabilities(self.logits(texts))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The same from :meth:`logits`."""
        return self.record.probabilities(logits)

    def _columns(self, texts: Sequence[Text]) -> list[list[str]]:
        """One list of N strings for each text column, stripped as the training texts were."""
        if isinstance(texts, str):
            raise UserError("texts is one text; expected a list of them")
        rows = [(text,) if isinstance(text, str) else text for text in texts]
        width = len(self.text) or (len(rows[0]) if rows and isinstance(rows[0], list | tuple) else 1)
        for i, row in enumerate(rows):
            if not isinstance(row, list | tuple) or not all(isinstance(text, str) for text in row):
                raise UserError(f"texts[{i}] is {texts[i]!r:.80}; expected {_ASKED[width]}")
            if len(row) != width:
                named = f" ({', '.join(self.text)})" if self.text else ""
                raise UserError(f"texts[{i}] has {len(row)} texts; expected {_ASKED[width]}{named}")
        return [[row[column].strip() for row in rows] for column in range(width)]


TOKENS = {"cpu": 1024, "cuda": 65536}
"""Tokens of a pass, those of all members together: on a CPU more are no faster, and take more memory."""

_ASKED = {1: "a text", 2: "a pair of texts"}


def _passes(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Numbers of the texts of each pass: sorted by length, about ``budget`` tokens together, at least one text."""
    order = np.argsort(lengths, kind="stable")[::-1]  # the longest first: what memory it takes shows at once
    number = np.cumsum(lengths[order]) // max(budget, 1)
    return np.split(order, np.flatnonzero(np.diff(number)) + 1)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # torch without CUDA asserts
        reason = str(e).splitlines()[0]
        raise UserError(f"device is {name!r}: it cannot be used ({reason}); expected cpu, cuda, cuda:1 or auto") from e
    return device


def _part(source: Source, places: list[int], device: torch.device, any_base: bool) -> _Part:
    """A bank of the source's members at these places on the device, ready to answer."""
    ensemble, records = source.ensemble, [source.members[i] for i in places]
    base_model, full = str(records[0].base_model), records[0].finetune == "full"
    where = source.bases[base_model].where if base_model in source.bases else base_model
    revision = None if any_base else records[0].revision
    task = ensemble.described(source.text)
    classifier, fresh, tokenizer = load_base(
        records, source.pool, where, revision, outputs=task.num_outputs, any_base=any_base
    )
    models = [len(r.models) for r in records]
    members = [Member.of_record(r) for r, count in zip(records, models, strict=True) for _ in range(count)]
    bank = Bank(classifier, members=members, tasks=[task], fresh=fresh, train_encoder=full)
    restore_members(bank, source.pool, base_model=base_model)
    bank.eval().requires_grad_(False).to(device)
    longest, kept = text_limit(records[0], where, revision)
    return _Part(bank=bank, tokenizer=tokenizer, max_length=longest, truncation=kept, places=places, models=models)
