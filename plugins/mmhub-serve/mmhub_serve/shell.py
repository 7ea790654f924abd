"""Around every request: an id, who may ask, how long it may take, what it is counted as, and what a failure says."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmhub_serve.access import Access
from mmhub_serve.errors import Refused, unexpected
from mmhub_serve.health import Health
from mmhub_serve.metrics import Metrics
from mmhub_serve.settings import Settings

log = logging.getLogger("mmhub_serve")
access_log = logging.getLogger("mmhub_serve.access")
_SCHEMES = frozenset({"http", "https"})
_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"})
_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_JSON = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json", re.IGNORECASE)
SAFETY = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]
_GONE = 499  # what nginx counts clients as that did not wait
_SERVER, _NUMBERS = secrets.token_hex(4), itertools.count(1)


def new_id() -> str:
    """Return an id for a request: nothing secret, but none that another process gives."""
    return f"{_SERVER}{next(_NUMBERS):08x}"


class Shell:
    """ASGI middleware; nothing that the application raises passes it."""

    def __init__(
        self, app: ASGIApp, *, settings: Settings, health: Health, metrics: Metrics, routes: Sequence[BaseRoute] = ()
    ) -> None:
        self._app, self._health, self._metrics, self._routes = app, health, metrics, routes
        self._access, self._settings = Access(settings), settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        state = scope.setdefault("state", {})
        if self._settings.behind_proxy and (scheme := _last(headers, "x-forwarded-proto").lower()) in _SCHEMES:
            scope["scheme"] = scheme
        answer = _Answer(send, headers.get("x-request-id", ""), state, self._health)
        began = perf_counter()
        self._metrics.request_started()
        try:
            await self._answered(scope, headers, receive, answer)
        finally:
            self._metrics.request_ended()
            self._tell(scope, headers, answer, perf_counter() - began)

    async def _answered(self, scope: Scope, headers: Mapping[str, str], receive: Receive, answer: _Answer) -> None:
        state = scope["state"]
        state["task"], state["request_id"] = asyncio.current_task(), answer.id
        if state.get("gone"):  # before it began
            answer.status = _GONE
            return
        try:
            await self._run(scope, headers, receive, answer)
        except ClientDisconnect:
            answer.status = answer.status or _GONE
        except Refused as refused:
            await answer.refuse(refused)
        except asyncio.CancelledError:
            if state.get("gone"):
                answer.status = answer.status or _GONE
            else:
                await answer.refuse(Refused(503, "the server stopped", code="stopping"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # tokenizers' PanicException is no Exception
            log.exception("request %s failed", answer.id)
            await answer.refuse(unexpected(answer.id))

    async def _run(self, scope: Scope, headers: Mapping[str, str], receive: Receive, answer: _Answer) -> None:
        method, scheme = scope["method"], scope.get("scheme", "http")
        origin = self._access.allowed(headers, scheme)
        if origin is not None:
            answer.headers += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
        self._access.check(method, scope["path"], headers, scheme)
        if origin is not None and method == "OPTIONS" and "access-control-request-method" in headers:
            await answer.allow(headers)
            return
        if method not in ("GET", "HEAD", "OPTIONS"):
            _check_type(headers)
        seconds = self._settings.limits.answer_seconds
        try:
            async with asyncio.timeout(seconds) as limit:
                await self._app(scope, receive, answer.send)
        except TimeoutError:
            if not limit.expired():
                raise
            raise Refused(503, f"there was no answer within {seconds:g} s", code="timeout") from None

    def _route(self, scope: Scope) -> str:
        """The pattern of the route, nothing that a client wrote: there are few of those."""
        if "endpoint" not in scope:
            return "other"
        found = [one for one in self._routes if isinstance(one, Route) and one.path_regex.match(scope["path"])]
        best = min(found, key=lambda one: scope["method"] not in (one.methods or ()), default=scope.get("route"))
        return str(getattr(best, "path_format", "other"))

    def _tell(self, scope: Scope, headers: Mapping[str, str], answer: _Answer, seconds: float) -> None:
        """Count the request, and write its line: neither queries nor headers, which may hold secrets."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        model = scope.get("state", {}).get("model", "")
        self._metrics.observe_request(method, self._route(scope), model, answer.status, seconds)
        if self._settings.access_log:
            client = (scope.get("client") or ("-",))[0]
            if self._settings.behind_proxy:
                client = _last(headers, "x-forwarded-for") or client
            log_line(client, method, scope["path"], answer.status, answer.size, seconds, answer.id)


def log_line(client: str, method: str, path: str, status: int, size: int, seconds: float, request_id: str) -> None:
    """Write the line of a request to the access log."""
    line = (client, method, path, status, size, seconds * 1000, request_id)
    access_log.info("%s %s %s %d %d bytes %.1f ms %s", *map(_printable, line))


def _last(headers: Mapping[str, str], name: str) -> str:
    """What the nearest proxy says: each adds its word to those before."""
    return headers.get(name, "").rpartition(",")[2].strip()


def _printable(value: Any) -> Any:
    return ascii(value)[1:-1][:200] if isinstance(value, str) else value


def _check_type(headers: Mapping[str, str]) -> None:
    """Refuse bodies that no route reads.

    Raises:
        Refused: 415; 400, a form without a boundary.
    """
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, f"Content-Encoding {headers['content-encoding']} is not read", "send it as it is")
    given = headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    if kind == "multipart/form-data":
        if "boundary=" not in given.lower():
            raise Refused(400, "the form's Content-Type has no boundary")
    elif not _JSON.fullmatch(kind) and not (empty and not kind):
        what = f"Content-Type {kind}" if kind else "a body without Content-Type"
        raise Refused(415, f"{what} is not read", "send application/json or multipart/form-data")


class _Answer:
    """What was sent so far."""

    def __init__(self, send: Send, request_id: str, state: Mapping[str, Any], health: Health) -> None:
        self._send, self._state, self._health = send, state, health
        self.id = request_id if _ID.fullmatch(request_id) else new_id()
        self.headers = [(b"x-request-id", self.id.encode()), *SAFETY]
        self.status = self.size = 0

    async def send(self, message: Message) -> None:
        """Send on.

        Raises:
            ClientDisconnect: nobody reads it any more; one that never waits would not notice that it is cancelled.
        """
        if "gone" in self._state:
            raise ClientDisconnect
        if message["type"] == "http.response.start":
            self.status = message["status"]
            close = [(b"connection", b"close")] if self._health.stopping else []
            message["headers"] = [*message.get("headers", ()), *self.headers, *close]
        else:
            self.size += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """Answer with an error; an answer that has begun stays without its end, so that nobody takes it for whole."""
        if self.status:
            return
        given = {"Content-Type": "application/json"} | refused.headers
        await self._whole(refused.status, refused.content(), given)

    async def allow(self, asked: Mapping[str, str]) -> None:
        """Answer the question that a browser asks before it lets a page send."""
        names = asked.get("access-control-request-headers", "authorization, content-type")
        given = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": names}
        await self._whole(204, b"", given | {"Access-Control-Max-Age": "600"})

    async def _whole(self, status: int, content: bytes, given: Mapping[str, str]) -> None:
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
        if status != 204:
            headers.append((b"content-length", str(len(content)).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})


def log_to_stderr() -> None:
    """Write access lines to stderr, nowhere else."""
    access_log.handlers[:] = [logging.StreamHandler(sys.stderr)]
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
