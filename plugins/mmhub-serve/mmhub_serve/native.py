"""The routes of our own: models, predictions and vectors."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from mmhub_serve.inputs import read_sample
from mmhub_serve.pool import Pool
from mmhub_serve.settings import Settings


class PredictRequest(BaseModel):
    model: str | None = None
    samples: list[dict[str, Any]]


def native_routes(pool: Pool, settings: Settings) -> APIRouter:
    """Return /predict and its like for the models of a pool."""
    router = APIRouter()

    @router.post("/predict")
    async def predict(request: PredictRequest) -> dict[str, Any]:
        async with pool.use(request.model) as served:
            return {"predictions": await served.predict([read_sample(sample) for sample in request.samples])}

    return router
