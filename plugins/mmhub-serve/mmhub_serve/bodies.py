"""Bodies of requests and answers: JSON and forms in, JSON out, how a wrong shape is refused, and for whom they are.

JSON is decoded and checked by msgspec, large bodies in a thread: at a thousand requests a second this is what costs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from mmhub.errors import UsageError
from mmhub.interfaces import decode_config
from mmhub_serve.errors import Refused, refusal_of
from mmhub_serve.pool import Pool
from mmhub_serve.served import Served
from mmhub_serve.settings import Limits

T = TypeVar("T")
_ASIDE = 64 * 2**10  # bytes from which on a body is worth a thread
_OBJECTS, _VALUES = 250_000, 2_000_000  # of one body: decoded, an object takes 230 bytes, however short it is written


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of what a route takes; unknown keys are refused with a suggestion."""


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request) -> dict[str, Any]:
    """Return the object that a request's body is.

    Raises:
        Refused: 415, the body is said to be something else; 400, it is no JSON object.
    """
    kind = content_type(request)
    if kind != "application/json":
        raise Refused(415, f"the content type is {kind or 'not given'}", "send application/json")
    content = await request.body()
    return await aside(len(content), _decoded, content)


def _decoded(content: bytes) -> dict[str, Any]:
    if content.count(b"{") + content.count(b"[") > _OBJECTS or content.count(b",") > _VALUES:
        raise Refused(413, "the body holds too many objects or values", "send fewer samples at once")
    try:
        found = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"the body is no JSON: {what}", "send one JSON object") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the body is a JSON {type(found).__name__}", "send one JSON object")
    return found


def size_of(request: Request) -> int:
    """Return how many bytes the body has; many where that is not said."""
    told = request.headers.get("content-length", "")
    return int(told) if told.isascii() and told.isdigit() else 2 * _ASIDE


async def aside(size: int, call: Callable[..., T], *args: Any) -> T:
    """Call at once what is small, and in a thread what would hold up the event loop."""
    return await asyncio.to_thread(call, *args) if size > _ASIDE else call(*args)


def shaped(kind: type[T], table: Mapping[str, Any]) -> T:
    """Return a body in its shape.

    Raises:
        Refused: 400 with the key at fault as `param`.
    """
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError:
        pass
    try:
        return decode_config(kind, table, "body")
    except UsageError as error:
        refusal = refusal_of(error, _key_in(error.message))
        refusal.message = refusal.message.removeprefix("body: ").removeprefix("body.")
        refusal.hint = None if "is missing" in refusal.message else refusal.hint
        raise refusal from None


def _key_in(message: str) -> str:
    found = re.match(r"body\.(\w+)|body: (?:unknown key|the key) '([^']*)'", message)
    return (found[1] or found[2]) if found else ""


async def read_form(request: Request, limits: Limits) -> dict[str, list[str | bytes]]:
    """Return the values of a multipart form by name, files as bytes; names may end in "[]", as OpenAI's clients say.

    Raises:
        Refused: 415, the body is no such form; 400, it is malformed, or has too many parts; 413, a value is too large.
    """
    kind = content_type(request)
    if kind != "multipart/form-data":
        raise Refused(415, f"the content type is {kind or 'not given'}", "send multipart/form-data")
    most = 4 * limits.samples
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=most, max_fields=most, max_part_size=limits.body
    )
    parser.spool_max_size = limits.body + 1  # never on disk, which may be full
    found: dict[str, list[str | bytes]] = {}
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"the form cannot be read: {error.message}") from None
    try:
        for name, value in form.multi_items():
            part = await value.read() if isinstance(value, UploadFile) else value
            found.setdefault(name.removesuffix("[]"), []).append(part)
    finally:
        await form.close()
    return found


def only_value(form: Mapping[str, list[str | bytes]], name: str) -> str | None:
    """Return a field that is given once, as text; None where it is not given.

    Raises:
        Refused: 400, it is given several times, or is no text.
    """
    values = form.get(name, [])
    if len(values) > 1:
        raise Refused(400, f"{name} is given {len(values)} times", "give it once", param=name)
    return as_text(name, values[0]) if values else None


def as_text(name: str, value: str | bytes) -> str:
    """Return a value of a form as text; a file is read as UTF-8."""
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError:
        raise Refused(400, f"{name} is no text in UTF-8", param=name) from None


@asynccontextmanager
async def lent(request: Request, pool: Pool, name: str | None) -> AsyncIterator[Served]:
    """Lend the model that a request names, and note its name for what is measured of the request."""
    async with pool.use(name) as served:
        request.state.model = served.name
        yield served


def answer(table: Any) -> Response:
    """Return an answer in JSON."""
    return Response(msgspec.json.encode(table), media_type="application/json")
