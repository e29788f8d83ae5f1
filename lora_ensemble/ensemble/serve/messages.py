"""What is asked and what is answered, of which the OpenAPI description is made. Axes: M members, N texts, C outputs."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

from lora_ensemble.dicor.choose.probabilities import class_probabilities, soft_votes
from lora_ensemble.ensemble.options import Limits
from lora_ensemble.ensemble.restored import Ensemble
from lora_ensemble.scores import as_binary, by_example, decisions

Probability = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Question(BaseModel):
    """Texts to decide about."""

    model_config = ConfigDict(extra="forbid")
    texts: list[Any]
    members: bool = Field(False, strict=True, description="Whether to say as well what each member says.")


def question(columns: list[str], limits: Limits) -> type[Question]:
    """``Question`` for a task that reads these columns, one or two, with its limits."""
    text: Any = Annotated[str, StringConstraints(max_length=limits.chars)]
    if len(columns) == 2:
        text = Annotated[list[text], Field(min_length=2, max_length=2, description=f"A pair: {', '.join(columns)}.")]
    texts = Annotated[list[text], Field(min_length=1, max_length=limits.texts)]
    return create_model("Question", __base__=Question, __doc__=Question.__doc__, texts=(texts, ...))


class Said(BaseModel):
    """What is said of a text."""

    decision: Annotated[
        str | Finite | list[str],
        Field(description="One of the labels, or a list of several; of a regression, a value."),
    ]
    probabilities: Annotated[
        dict[str, Probability] | None, Field(description="By label; of a majority, the shares of the votes.")
    ] = None


class MemberSaid(Said):
    """What one member says of a text."""

    name: str


class Answer(Said):
    """What the ensemble decides about a text."""

    members: list[MemberSaid] | None = None


class Answers(BaseModel):
    """An answer for each text, in the order of the question."""

    answers: list[Answer]


def answers(ensemble: Ensemble, logits: np.ndarray, *, members: bool) -> dict[str, Any]:
    """What the ensemble, and with ``members`` each of its members, says by these logits (M, N, C); as ``Answers``."""
    record = ensemble.record
    valued = record.kind == "regression"
    rows = _rows(ensemble, record.decide(logits), None if valued else ensemble.probabilities(logits))
    if members:
        # As they enter the ensemble's: at the member's temperature, where it has one.
        rows_of, kind, width = as_binary(logits, record.kind)
        votes = soft_votes(rows_of, kind, record.choice.temperatures)
        for name, own, decided in zip(ensemble.members, votes, decisions(logits, record.kind), strict=True):
            probabilities = None if valued else class_probabilities(own, kind)
            if width > 1 and probabilities is not None:
                probabilities = by_example(probabilities[:, 1], width)
            for row, said in zip(rows, _rows(ensemble, decided, probabilities), strict=True):
                row.setdefault("members", []).append({"name": name, **said})
    return {"answers": rows}


def _rows(ensemble: Ensemble, decided: np.ndarray, probabilities: np.ndarray | None) -> list[dict[str, Any]]:
    """Decisions (N,) and, of a classifier, probabilities (N, classes), for each text; of several labels (N, L)."""
    rows: list[dict[str, Any]] = [{"decision": decision} for decision in ensemble.named(decided).tolist()]
    if probabilities is not None:
        # Clipped, for rounding may leave one beyond what is promised.
        for row, p in zip(rows, probabilities.clip(0, 1).tolist(), strict=True):
            row["probabilities"] = dict(zip(ensemble.labels, p, strict=True))
    return rows


class Member(BaseModel):
    """A member of the ensemble."""

    name: str
    rank: int | None
    scaling: float | None
    targets: str | None
    weight: float


class About(BaseModel):
    """The ensemble that answers."""

    task: str
    kind: str
    labels: list[str]
    text: Annotated[list[str], Field(description="Names of the columns that it reads, two for a pair.")]
    method: str
    decides: str
    members: list[Member]
    limits: Limits


class Health(BaseModel):
    """Whether it works."""

    status: str


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str
