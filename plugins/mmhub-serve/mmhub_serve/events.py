"""Answers that come piece by piece, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mmhub.errors import MmhubError
from mmhub_serve.errors import Refused, refusal_of


class EventStream(StreamingResponse):
    """Sends objects as events, then [DONE]; `close` is called however it ends, also if nothing was ever sent.

    What goes wrong on the way is sent as the last event, {"error": ...}, which OpenAI's clients raise.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], Awaitable[None]]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_lines(events), media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield b"data: " + msgspec.json.encode(event) + b"\n\n"
    except (MmhubError, Refused) as error:
        refusal = error if isinstance(error, Refused) else refusal_of(error)
        yield b"data: " + msgspec.json.encode(refusal.body()) + b"\n\n"
        return
    yield b"data: [DONE]\n\n"
