"""Clients that go before they are answered: whatever the size of what they sent, it is noticed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .conftest import Serving


def test_a_client_that_sent_a_large_body_and_goes_is_noticed(serve: Serving) -> None:
    ended: list[str] = []

    async def wait(request: Request) -> Response:
        ended.append(f"has {len(await request.body())}")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return Response()

    def extend(app: Any) -> None:
        app.add_route("/wait", wait, methods=["POST"])

    with serve(extend) as running:
        with running.connect() as sock:
            head = b"POST /wait HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            sock.sendall(head + b"Content-Length: 300000\r\n\r\n" + b" " * 300_000)
            until = time.monotonic() + 10
            while not ended and time.monotonic() < until:
                time.sleep(0.005)
        while len(ended) < 2 and time.monotonic() < until:
            time.sleep(0.005)
        assert ended == ["has 300000", "cancelled"]
