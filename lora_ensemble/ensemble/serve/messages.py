"""What is asked and what is answered; the OpenAPI description is made of it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

Probability = Annotated[float, Field(ge=0, le=1)]
Probabilities = Annotated[
    dict[str, Probability], Field(description="By label; of a majority, the shares of the votes.")
]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Question(BaseModel):
    """Texts to decide about."""

    model_config = ConfigDict(extra="forbid")
    texts: list[Any]
    members: bool = Field(False, strict=True, description="Whether to say as well what each member says.")


def question(columns: list[str], *, max_texts: int, max_chars: int) -> type[Question]:
    """``Question`` for a task that reads these columns, one or two, with its limits."""
    one: Any = Annotated[str, StringConstraints(max_length=max_chars)]
    if len(columns) == 2:
        one = Annotated[list[one], Field(min_length=2, max_length=2, description=f"A pair: {', '.join(columns)}.")]
    texts = Annotated[list[one], Field(min_length=1, max_length=max_texts)]
    return create_model("Question", __base__=Question, __doc__=Question.__doc__, texts=(texts, ...))


class MemberClass(BaseModel):
    """What one member says of a text."""

    name: str
    decision: str
    probabilities: Probabilities


class Class(BaseModel):
    """What the ensemble decides about a text, as one of the labels."""

    decision: str
    probabilities: Probabilities
    members: list[MemberClass] | None = None


class Classes(BaseModel):
    """An answer for each text, in the order of the question."""

    answers: list[Class]


class MemberValue(BaseModel):
    """What one member says of a text."""

    name: str
    decision: Finite


class Value(BaseModel):
    """What the ensemble decides about a text, as a value."""

    decision: Finite
    members: list[MemberValue] | None = None


class Values(BaseModel):
    """An answer for each text, in the order of the question."""

    answers: list[Value]


class Member(BaseModel):
    """A member of the ensemble."""

    name: str
    rank: int | None
    scaling: float | None
    targets: str | None
    weight: float


class Limits(BaseModel):
    """What a question may be; more is refused."""

    texts: int
    chars: int
    bytes: int


class About(BaseModel):
    """The ensemble that answers."""

    task: str
    kind: str
    labels: list[str]
    text: list[str]
    """Names of the columns that it reads, two for a pair."""
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


class Mistake(BaseModel):
    """One thing that is wrong with a question."""

    loc: list[str | int]
    msg: str
    type: str


class Mistakes(BaseModel):
    """What is wrong with a question, and where; the first few."""

    detail: list[Mistake]
