"""The FastAPI application: routes, and how errors leave it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from mmhub import __version__
from mmhub.errors import MmhubError
from mmhub_serve.errors import Refused, refusal_of
from mmhub_serve.native import native_routes
from mmhub_serve.openai import openai_routes
from mmhub_serve.pool import Pool
from mmhub_serve.settings import Settings


def build_app(settings: Settings, pool: Pool | None = None) -> FastAPI:
    """Return the application for one server."""
    lent = pool or Pool(settings)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await lent.start()
        yield
        await lent.close()

    app = FastAPI(title="mmhub", version=__version__, lifespan=life)
    app.state.pool, app.state.settings = lent, settings
    app.include_router(native_routes(lent, settings))
    app.include_router(openai_routes(lent, settings))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(MmhubError)
    async def ours(request: Request, error: MmhubError) -> JSONResponse:
        return await refused(request, refusal_of(error))

    return app
