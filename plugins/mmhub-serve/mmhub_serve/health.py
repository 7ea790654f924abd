"""Is the server alive, is it ready: what supervisors and load balancers ask."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Response

from mmhub_serve.errors import Refused
from mmhub_serve.metrics import Metrics
from mmhub_serve.pool import Pool


class Health:
    """From the first model that is loaded to the last request that is answered."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.stopping = False
        self.loading: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Load what is loaded at the start, while requests may come already: they wait for it."""
        self.loading = asyncio.get_running_loop().create_task(self._pool.start())
        self.loading.add_done_callback(_seen)

    async def end(self) -> None:
        """Let go of the models once what they work on is answered."""
        self.stopping = True
        if self.loading is not None:
            self.loading.cancel()
        await self._pool.close()

    def check(self) -> None:
        """Say whether requests are answered at once.

        Raises:
            Refused: 503.
        """
        if self.stopping:
            raise Refused(503, "the server is stopping", code="stopping")
        if not self._pool.ready:
            raise Refused(503, "the model is being loaded", "ask again in a moment", code="loading")


def _seen(task: asyncio.Task[None]) -> None:
    """Whoever waits for a model is told of a failure itself; here it only must not be reported as forgotten."""
    if not task.cancelled():
        task.exception()


def health_routes(health: Health, metrics: Metrics) -> APIRouter:
    """Return /healthz, /readyz and /metrics."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def alive() -> dict[str, Any]:
        """Say that the process lives and answers."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def ready() -> dict[str, Any]:
        """Say that a model is loaded and the server is not stopping; 503 otherwise."""
        health.check()
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    async def measured() -> Response:
        """Return the metrics in Prometheus' text format."""
        content, kind = metrics.page()
        return Response(content, media_type=kind)

    for path, answer in {"/healthz": alive, "/readyz": ready, "/metrics": measured}.items():  # load balancers ask so
        router.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
    return router
