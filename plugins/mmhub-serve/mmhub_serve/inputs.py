"""Raw inputs as requests hold them: texts, and media in base64 or as data URLs. No file is opened by its name.

Addresses are fetched only where the server was told to, at once, so that all else sees bytes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request

from mmhub.errors import InputError, did_you_mean
from mmhub.interfaces import Policy, raw_bytes
from mmhub_serve.bodies import aside, size_of
from mmhub_serve.errors import Refused
from mmhub_serve.settings import Limits

T = TypeVar("T")
MEDIA = ("image", "audio")
_SEND = 'send the file itself: {"base64": "..."}, or "data:image/png;base64,..."'


_FETCHES, _SHARE = 16, 4  # requests that are fetched for at a time, and those of one client among them
_FETCHING = ThreadPoolExecutor(_FETCHES, "mmhub-fetch")  # apart from other work: whoever is fetched from may be slow
_asking: Counter[str] = Counter()  # requests that are fetched for, by client
_counting = threading.Lock()
Fetch = Callable[[str, str], bytes]  # (address, name in messages)


async def read_inputs(request: Request, limits: Limits, call: Callable[[Any, Fetch], T], given: Any) -> T:
    """Return `call(given, fetch)`, in a thread where it may take long. It is called again if it asks for an address.

    Raises:
        Refused: 503, others are fetched for already. Besides what `call` raises.
    """
    try:
        return await aside(size_of(request), call, given, _nothing if limits.policy.urls else Fetcher(limits.policy))
    except _Asked:
        pass
    client = _client(request)
    with _counting:
        if _asking.total() >= _FETCHES or _asking[client] >= _SHARE:
            hint = "ask again later, or send the files themselves"
            raise Refused(503, "the server fetches for as many requests as it can at a time", hint, code="busy")
        _asking[client] += 1
    work = _FETCHING.submit(call, given, Fetcher(limits.policy))
    work.add_done_callback(lambda _: _done(client))  # a client that hangs up does not end it
    return await asyncio.wrap_future(work)


def _done(client: str) -> None:
    with _counting:
        _asking[client] -= 1
        if not _asking[client]:
            del _asking[client]


def _client(request: Request) -> str:
    """Who asks: the address of the other side, or what a proxy that vouches for it says."""
    address = request.client.host if request.client else ""
    told = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    return told if told and request.app.state.settings.behind_proxy else address


class _Asked(Exception):
    """An address stands where a medium is expected."""


def _nothing(url: str, name: str) -> bytes:
    raise _Asked


class Fetcher:
    """Fetches what one request names, all of it together within the bytes and seconds that one may have.

    Raises:
        InputError: the server fetches nothing, or see `mmhub.interfaces.fetch`.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy, self._left = policy, policy.max_bytes
        self._end = time.monotonic() + policy.fetch_seconds

    def __call__(self, url: str, name: str) -> bytes:
        if not self._policy.urls:
            raise InputError(f"{name}: this server fetches no addresses", _SEND)
        seconds = max(0.0, self._end - time.monotonic())
        found = raw_bytes(url, replace(self._policy, max_bytes=self._left, fetch_seconds=seconds))
        assert found is not None
        self._left -= len(found)
        return found


def read_sample(given: Mapping[str, Any], fetch: Fetch) -> dict[str, Any]:
    """Return a sample whose media, {"base64": text} or data URLs, are bytes; a list holds several.

    "messages" are a conversation, as `read_talk` takes it. Bytes, which parts of a form are, stay what they are.

    Raises:
        InputError: what stands there is no medium, or what stands there as base64 is none.
    """
    found = {}
    for name, value in given.items():
        if name == "messages":
            found[name] = read_talk(value, fetch)
        elif value is not None:
            read = _medium if name in MEDIA else _own
            many = isinstance(value, list)
            found[name] = [read(one, name, fetch) for one in value] if many else read(value, name, fetch)
    return found


def read_talk(messages: Any, fetch: Fetch) -> Any:
    """Return a conversation whose pictures and sounds are bytes: parts of OpenAI's kinds and of our own.

    The role "developer" is "system". What is malformed otherwise is left to `mmhub.conversation` to say.

    Raises:
        InputError: a part holds no medium, or an address that is not fetched.
    """
    if not isinstance(messages, list):
        return messages
    return [_message(message, fetch) for message in messages]


def _message(message: Any, fetch: Fetch) -> Any:
    if not isinstance(message, dict):
        return message
    role = "system" if message.get("role") == "developer" else message.get("role")
    content = message.get("content")
    parts = [_part(part, fetch) for part in content] if isinstance(content, list) else content
    return message | {"role": role, "content": parts}


def _part(part: Any, fetch: Fetch) -> Any:
    """A part of a message: {"type": "image_url", "image_url": {"url"}}, {"type": "input_audio", "input_audio": {"data",
    "format"}}, or ours, {"type": "image", "image": medium}."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return part
    own = part["type"]
    kind = own.removeprefix("input_").removesuffix("_url")
    if kind not in MEDIA:
        return part
    allowed = ("type", own, "detail", "format")
    for key in part:
        if key not in allowed and part[key] is not None:
            hint = did_you_mean(key, allowed) or f"it takes {', '.join(allowed)}"
            raise InputError(f"a part of the type {own!r} has the unknown key {key!r}", hint)
    value = part.get(own)
    if own != kind and isinstance(value, dict):
        value = value.get("url", value.get("data"))
    if value is None:
        raise InputError(f"a part of the type {own!r} holds no {own!r}", _SEND)
    if own == "input_audio" and isinstance(value, str) and not value.startswith("data:"):
        return {"type": kind, kind: of_base64(value, kind)}
    return {"type": kind, kind: _medium(value, kind, fetch)}


def _own(value: Any, name: str, fetch: Fetch) -> Any:
    """What is no medium as it is: a text, a pair of texts, a number; base64 is decoded here, too."""
    return _medium(value, name, fetch) if isinstance(value, dict) and "base64" in value else value


def _medium(value: Any, name: str, fetch: Fetch) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        if set(value) != {"base64"}:
            raise InputError(f"{name}: an object with the keys {sorted(value)}", _SEND)
        return of_base64(value["base64"], name)
    if not isinstance(value, str):
        raise InputError(f"{name}: a {type(value).__name__} where a file is expected", _SEND)
    if value.startswith("data:"):
        head, comma, content = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise InputError(f"{name}: a data URL without ';base64,'", _SEND)
        return of_base64(content, name)
    if value.lower().startswith(("http://", "https://")):
        return fetch(value, name)
    raise InputError(f"{name}: a text that is no data URL, and this server opens no files by name", _SEND)


def of_base64(text: Any, name: str) -> bytes:
    """Return the bytes that a text in base64 stands for; line breaks in it do not matter.

    Raises:
        InputError: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        pass
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (AttributeError, binascii.Error, TypeError, ValueError):
        raise InputError(f"{name}: the value of 'base64' is no base64", "encode the file's bytes") from None
