"""The routes that OpenAI's clients ask, below /v1; each is described where it is answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from mmhub_serve.chat import complete_chat
from mmhub_serve.completions import complete
from mmhub_serve.pool import Pool
from mmhub_serve.settings import Settings
from mmhub_serve.transcripts import transcribe
from mmhub_serve.vectors import embed_texts

Route = Callable[[Request], Awaitable[Response]]


def openai_routes(pool: Pool, settings: Settings) -> APIRouter:
    """Return the routes under /v1 for the models of a pool."""
    limits = settings.limits
    routes: dict[str, Route] = {
        "/v1/chat/completions": partial(complete_chat, pool=pool, limits=limits),
        "/v1/completions": partial(complete, pool=pool, limits=limits),
        "/v1/embeddings": partial(embed_texts, pool=pool, limits=limits),
        "/v1/audio/transcriptions": partial(transcribe, pool=pool, limits=limits),
        "/v1/audio/translations": partial(transcribe, pool=pool, limits=limits, translate=True),
    }
    router = APIRouter()
    for path, route in routes.items():
        router.add_route(path, route, methods=["POST"])
    return router
