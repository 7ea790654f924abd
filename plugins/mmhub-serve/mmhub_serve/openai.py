"""The routes that OpenAI's clients ask."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from mmhub_serve.pool import Pool
from mmhub_serve.settings import Settings


def openai_routes(pool: Pool, settings: Settings) -> APIRouter:
    """Return the routes under /v1 for the models of a pool."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in pool.names]}

    return router
