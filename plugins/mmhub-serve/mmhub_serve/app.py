"""The FastAPI application: routes, what is around them, and how errors leave it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from mmhub import __version__
from mmhub.errors import MmhubError
from mmhub_serve.errors import Refused, malformed, refusal_of, unexpected
from mmhub_serve.health import Health, health_routes
from mmhub_serve.metrics import Metrics
from mmhub_serve.native import native_routes
from mmhub_serve.openai import openai_routes
from mmhub_serve.pool import Pool
from mmhub_serve.settings import Settings
from mmhub_serve.shell import Shell, log


def build_app(settings: Settings, pool: Pool | None = None, *, metrics: Metrics | None = None) -> FastAPI:
    """Return the application for one server.

    It loads its models when it starts, in the background. `app.state` has pool, settings, metrics and health.
    """
    metrics = metrics or Metrics()
    lent = pool or Pool(settings, metrics)
    health = Health(lent)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        health.begin()
        yield
        await health.end()

    # the pages of /docs load their scripts from another server
    app = FastAPI(title="mmhub", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.pool, app.state.settings, app.state.metrics, app.state.health = lent, settings, metrics, health
    routers = (health_routes(health, metrics), native_routes(lent, settings), openai_routes(lent, settings))
    for router in routers:
        app.include_router(router)
    routes = [route for router in routers for route in router.routes]
    app.add_middleware(Shell, settings=settings, health=health, metrics=metrics, routes=routes)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return app


def answer_to(refused: Refused) -> Response:
    """Return a refusal as a response."""
    return Response(refused.content(), refused.status, refused.headers, "application/json")


async def _refused(request: Request, error: Any) -> Response:
    return answer_to(error)


async def _ours(request: Request, error: Any) -> Response:
    refused = refusal_of(error)
    if refused.status == 500:  # of the server: its words may name its files
        return await _failed(request, error)
    return answer_to(refused)


async def _failed(request: Request, error: Any) -> Response:
    request_id = getattr(request.state, "request_id", "")
    log.error("request %s failed: %s", request_id, error)
    return answer_to(unexpected(request_id))


async def _malformed(request: Request, error: Any) -> Response:
    return answer_to(malformed(error.errors()))


async def _of_http(request: Request, error: Any) -> Response:
    words = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    refused = Refused(error.status_code, words.get(error.status_code, str(error.detail)))
    refused.headers |= error.headers or {}
    return answer_to(refused)


async def _too_deep(request: Request, error: Any) -> Response:
    return answer_to(Refused(400, "the body is nested too deeply"))


async def _no_text(request: Request, error: Any) -> Response:
    return answer_to(Refused(400, "a text is not valid Unicode", "send UTF-8, without lone surrogates"))


async def _no_memory(request: Request, error: Any) -> Response:
    return answer_to(Refused(503, "there is no memory for this request now", "ask again later, or for less"))


_HANDLERS: dict[type[Exception], Any] = {
    Refused: _refused,
    MmhubError: _ours,
    RequestValidationError: _malformed,
    HTTPException: _of_http,
    RecursionError: _too_deep,
    UnicodeError: _no_text,
    MemoryError: _no_memory,
}
