"""What a server measures of itself, as Prometheus reads it at /metrics."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536)
Content = tuple[bytes, str]


class Metrics:
    """The counters of one server; every server has its own, so that several fit into one process.

    Every method may be called from any thread and costs microseconds.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        route, model = ["method", "route", "model", "status"], ["model"]
        self._requests = Counter("mmhub_requests", "Requests answered.", route, registry=registry)
        self._seconds = Histogram(
            "mmhub_request_seconds",
            "From the end of a request's headers to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._running = Gauge("mmhub_requests_in_flight", "Requests being answered.", registry=registry)
        self._connections = Gauge("mmhub_connections", "Open connections.", registry=registry)
        self._waiting = Gauge("mmhub_queue_samples", "Samples that wait for their batch.", model, registry=registry)
        self._loaded = Gauge("mmhub_model_loaded", "1 while the model is in memory.", model, registry=registry)
        self._batch = Histogram(
            "mmhub_batch_samples", "Samples computed together.", model, buckets=_SAMPLES, registry=registry
        )
        self._computing = Histogram(
            "mmhub_batch_seconds", "Computing one batch.", model, buckets=_SECONDS, registry=registry
        )
        self._tokens = Histogram(
            "mmhub_new_tokens", "Tokens written for one answer.", model, buckets=_TOKENS, registry=registry
        )

    def observe_request(self, method: str, route: str, model: str, status: int, seconds: float) -> None:
        """Count an answered request. `route` is the pattern, `model` "" or a known name: both few by construction."""
        self._requests.labels(method, route, model, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def request_started(self) -> None:
        self._running.inc()

    def request_ended(self) -> None:
        self._running.dec()

    def set_connections(self, number: int) -> None:
        self._connections.set(number)

    def set_queue(self, model: str, waiting: int) -> None:
        """Say how many samples of a model wait now."""
        self._waiting.labels(model).set(waiting)

    def observe_batch(self, model: str, samples: int, seconds: float) -> None:
        """Count a batch that was computed."""
        self._batch.labels(model).observe(samples)
        self._computing.labels(model).observe(seconds)

    def observe_tokens(self, model: str, tokens: int) -> None:
        """Count the tokens that were written for one answer."""
        self._tokens.labels(model).observe(tokens)

    def loaded(self, model: str, there: bool) -> None:
        """Say whether a model is in memory."""
        self._loaded.labels(model).set(int(there))

    def page(self) -> Content:
        """Return what /metrics answers, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
