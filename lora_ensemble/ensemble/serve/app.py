"""The service: its routes, and what they answer.

Axes: M members, N texts of a question, C outputs of a head.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lora_ensemble import __version__
from lora_ensemble.dicor.table import decides
from lora_ensemble.ensemble.restored import Ensemble
from lora_ensemble.ensemble.serve import messages
from lora_ensemble.ensemble.serve.answers import answers
from lora_ensemble.ensemble.serve.batching import Batcher, BusyError
from lora_ensemble.ensemble.serve.guard import Guard
from lora_ensemble.ensemble.serve.limits import Limits
from lora_ensemble.ensemble.serve.messages import Question
from lora_ensemble.ensemble.serve.metrics import CONTENT_TYPE, Metrics

_GONE = 499  # nginx's number for a client that did not wait; nobody reads it but the metrics
_MOST_MISTAKES, _LONGEST_KEY = 10, 80  # an answer is never much longer than what was asked
_PROBLEMS = {
    400: "The body cannot be read",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    500: "The ensemble failed",
    503: "Too much waits already; come again",
}


def make_app(ensemble: Ensemble, columns: list[str], limits: Limits, *, hosts: Sequence[str] = ("*",)) -> Guard:
    """The ASGI application.

    ``columns``: names of what is read, two for a pair. ``hosts``: Host headers that are answered to.
    """
    record = ensemble.record
    metrics = Metrics()
    batcher = Batcher(ensemble.logits, batch=limits.batch, waiting=limits.waiting, taken=metrics.batches.add)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    app = FastAPI(
        title=f"lora-ensemble: {record.task}",
        description=f"{record.size} members; it decides by {decides(record.strategy, record.kind)}.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page is fetched from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={RequestValidationError: _mistakes, Exception: _failed},
    )

    async def predict(question: Question, request: Request) -> Any:
        """Decide about texts."""
        try:
            logits = await _while_there(request, batcher.ask(question.texts))
        except BusyError as e:
            raise HTTPException(503, "too many texts wait; try again soon", {"Retry-After": "1"}) from e
        if logits is None:
            return Response(status_code=_GONE)
        if not np.isfinite(logits).all():
            wrong = [name for name, said in zip(ensemble.members, logits, strict=True) if not np.isfinite(said).all()]
            raise HTTPException(500, f"members that say what is no number: {', '.join(wrong)}")
        return answers(ensemble, logits, members=question.members)

    # Its limits, which are known only now, are part of the type.
    predict.__annotations__["question"] = messages.question(columns, max_texts=limits.texts, max_chars=limits.chars)
    app.post(
        "/predict",
        response_model=messages.Values if record.kind == "regression" else messages.Classes,
        response_model_exclude_none=True,
        dependencies=[Depends(_json)],
        responses={
            **{status: {"model": messages.Problem, "description": why} for status, why in _PROBLEMS.items()},
            422: {"model": messages.Mistakes, "description": "Not what this task reads, or beyond a limit"},
        },
    )(predict)

    @app.get("/ensemble")
    async def about() -> messages.About:
        """Which ensemble it is."""
        members = [
            messages.Member(name=m.name, rank=m.rank, scaling=m.scaling, targets=m.targets, weight=m.weight)
            for m in record.members
        ]
        return messages.About(
            task=record.task,
            kind=record.kind,
            labels=record.labels,
            text=columns,
            method=record.method,
            decides=decides(record.strategy, record.kind),
            members=members,
            limits=messages.Limits(texts=limits.texts, chars=limits.chars, bytes=limits.bytes),
        )

    @app.get("/health", responses={503: {"model": messages.Health, "description": "It takes no question now"}})
    async def ready(response: Response) -> messages.Health:
        """Whether a question would be taken now."""
        response.status_code = 200 if batcher.ready else 503
        return messages.Health(status="ready" if batcher.ready else "busy")

    @app.get("/health/live")
    async def live() -> messages.Health:
        """Whether it runs."""
        return messages.Health(status="live")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counts() -> Response:
        """What was asked so far, for Prometheus."""
        return Response(metrics.text(waiting=batcher.waiting), media_type=CONTENT_TYPE)

    for path, (content, kind) in _page().items():
        app.get(path, include_in_schema=False)(_file(content, kind))
    return Guard(app, metrics, max_bytes=limits.bytes)


async def _while_there(request: Request, asked: Coroutine[Any, Any, np.ndarray]) -> np.ndarray | None:
    """What was asked, or None as soon as the client has gone: nothing is computed for nobody."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(asked), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        left.cancel()


async def _json(request: Request) -> None:
    """Other content is refused: a form of another site could be sent without the browser asking first."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected Content-Type: application/json")


async def _mistakes(_: Request, e: Exception) -> Response:
    """422 without what was sent: FastAPI would repeat it, and fail where it is no text (lone surrogates, NaN)."""
    assert isinstance(e, RequestValidationError)
    found = [
        messages.Mistake(
            loc=[part if isinstance(part, int) else part[:_LONGEST_KEY] for part in mistake["loc"]],
            msg=": ".join(filter(None, [mistake["msg"], str(mistake.get("ctx", {}).get("error", ""))])),
            type=mistake["type"],
        )
        for mistake in e.errors()[:_MOST_MISTAKES]
    ]
    # As ASCII, since a key may hold lone surrogates too.
    content = json.dumps({"detail": [one.__dict__ for one in found]})
    return Response(content, status_code=422, media_type="application/json")


async def _failed(_: Request, e: Exception) -> Response:
    """500 as promised; what it was is logged, and is no business of the client's."""
    return JSONResponse({"detail": "the ensemble failed"}, status_code=500)


def _page() -> dict[str, tuple[str, str]]:
    """Paths of the page's files to content and media type. It wears the dress of ``dicor report``."""
    own, report = files(__package__), files("lora_ensemble.dicor.report")
    style = "".join(folder.joinpath("page.css").read_text(encoding="utf-8") for folder in (report, own))
    return {
        "/": (own.joinpath("page.html").read_text(encoding="utf-8"), "text/html"),
        "/page.css": (style, "text/css"),
        "/page.js": (own.joinpath("page.js").read_text(encoding="utf-8"), "text/javascript"),
    }


def _file(content: str, kind: str) -> Any:
    async def file() -> Response:
        return Response(content, media_type=kind)

    return file
