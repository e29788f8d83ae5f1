"""What ``GET /metrics`` says to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


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
