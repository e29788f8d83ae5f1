"""What holds for every request, whatever route it asks for: its size, its answer's headers, that it is counted."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # The page's own files and requests, and nothing else; no frame may hold it. The icon is empty.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Metrics:
    """All that one service counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lora_ensemble_requests", "Requests by route and status.", ["path", "status"], registry=self.registry
        )
        """By route, never by what the client wrote, which could be anything."""
        self.seconds = Histogram(
            "lora_ensemble_predict_seconds",
            "Seconds from a request's head to its answer's end, of POST /predict with status 200.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
            registry=self.registry,
        )
        self.batches = Histogram(
            "lora_ensemble_batch_texts",
            "Texts of a call of the ensemble; the sum is all texts that it was asked.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )
        self.waiting = Gauge("lora_ensemble_waiting_texts", "Texts that wait for a call.", registry=self.registry)


class Guard:
    """ASGI around an ASGI application; outermost, so that what the framework itself answers is held to it too."""

    def __init__(self, app: ASGIApp, metrics: Metrics, *, max_bytes: int) -> None:
        self._app, self._metrics, self._max_bytes = app, metrics, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, size, status = time.perf_counter(), 0, 500

        async def limited() -> Message:
            # While it is read: a length may be missing, or a lie.
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise HTTPException(413, f"the body has more than {self._max_bytes} bytes")
            return message

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, limited, send_guarded)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, status).inc()
            if path == "/predict" and status == 200:
                self._metrics.seconds.observe(time.perf_counter() - start)
