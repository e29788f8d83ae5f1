"""What ``GET /metrics`` says, in Prometheus' text format, version 0.0.4.

Three counts and two histograms need no client library. They are touched by the event loop alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of values by upper bound."""

    def __init__(self, name: str, about: str, bounds: Sequence[float]) -> None:
        self._name, self._about, self._bounds = name, about, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> list[str]:
        """As Prometheus reads it: each bucket holds the smaller ones too."""
        lines, below = _head(self._name, "histogram", self._about), 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            below += count
            lines.append(f'{self._name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{self._name}_sum {self._sum}", f"{self._name}_count {below}"]


class Metrics:
    """All that is counted."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By route, never by what the client wrote, which could be anything, and status."""
        self.seconds = Histogram(
            "lora_ensemble_predict_seconds",
            "Seconds from a request's head to its answer's end, of POST /predict with status 200.",
            (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
        )
        self.batches = Histogram(
            "lora_ensemble_batch_texts",
            "Texts of a call of the ensemble; the sum is all texts that it was asked.",
            (1, 2, 4, 8, 16, 32, 64, 128, 256),
        )

    def text(self, *, waiting: int) -> str:
        """The whole answer; ``waiting``: texts that wait for a call."""
        lines = _head("lora_ensemble_requests_total", "counter", "Requests by route and status.")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'lora_ensemble_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += self.seconds.lines() + self.batches.lines()
        lines += _head("lora_ensemble_waiting_texts", "gauge", "Texts that wait for a call.")
        return "\n".join([*lines, f"lora_ensemble_waiting_texts {waiting}", ""])


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
