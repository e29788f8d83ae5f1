"""The service: its routes, and what they answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lora_ensemble import __version__
from lora_ensemble.dicor.table import decides
from lora_ensemble.ensemble.options import Limits
from lora_ensemble.ensemble.restored import Ensemble
from lora_ensemble.ensemble.serve import messages
from lora_ensemble.ensemble.serve.batching import Batcher, BusyError
from lora_ensemble.ensemble.serve.guard import Guard, Metrics
from lora_ensemble.ensemble.serve.messages import Question, answers

_PAGE = Path(__file__).with_name("page")
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
    """The ASGI application for texts of ``columns``, two for pairs; ``hosts``: Host headers that are answered to."""
    record = ensemble.record
    metrics = Metrics()
    batcher = Batcher(ensemble.logits, limits, metrics.batches.observe)
    metrics.waiting.set_function(lambda: batcher.waiting)

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
    _add_predict(app, ensemble, batcher, messages.question(columns, limits))

    @app.get("/ensemble", response_model=messages.About)
    async def about() -> dict[str, Any]:
        """Which ensemble it is."""
        described = {key: getattr(record, key) for key in ("task", "kind", "labels", "method")}
        of_run = {"text": columns, "decides": decides(record.strategy, record.kind), "limits": limits}
        return {**described, "members": record.rows(), **of_run}

    _add_health(app, batcher, metrics)
    app.get("/", include_in_schema=False)(lambda: FileResponse(_PAGE / "index.html"))
    app.mount("/page", StaticFiles(directory=_PAGE))
    return Guard(app, metrics, max_bytes=limits.bytes)


def _add_predict(app: FastAPI, ensemble: Ensemble, batcher: Batcher, question_type: type[Question]) -> None:
    async def predict(question: Question, request: Request) -> Any:
        """Decide about texts."""
        try:
            logits = await _while_there(request, batcher.ask(question.texts))
        except BusyError as e:
            raise HTTPException(503, "too many texts wait; try again soon", {"Retry-After": "1"}) from e
        if logits is None:
            return Response(status_code=_GONE)
        if not np.isfinite(logits).all():
            wrong = [name for name, own in zip(ensemble.members, logits, strict=True) if not np.isfinite(own).all()]
            raise HTTPException(500, f"members that say what is no number: {', '.join(wrong)}")
        return answers(ensemble, logits, members=question.members)

    # Its limits, which are known only now, are part of the type.
    predict.__annotations__["question"] = question_type
    app.post(
        "/predict",
        response_model=messages.Answers,
        response_model_exclude_none=True,
        dependencies=[Depends(_json)],
        responses={status: {"model": messages.Problem, "description": why} for status, why in _PROBLEMS.items()},
    )(predict)


def _add_health(app: FastAPI, batcher: Batcher, metrics: Metrics) -> None:
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
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


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
    mistakes = [
        {
            "loc": [part if isinstance(part, int) else part[:_LONGEST_KEY] for part in mistake["loc"]],
            "msg": ": ".join(filter(None, [mistake["msg"], str(mistake.get("ctx", {}).get("error", ""))])),
            "type": mistake["type"],
        }
        for mistake in e.errors()[:_MOST_MISTAKES]
    ]
    # As ASCII, since a key may hold lone surrogates too.
    return Response(json.dumps({"detail": mistakes}), status_code=422, media_type="application/json")


async def _failed(_: Request, e: Exception) -> Response:
    """500 as promised; what it was is logged, and is no business of the client's."""
    return JSONResponse({"detail": "the ensemble failed"}, status_code=500)
