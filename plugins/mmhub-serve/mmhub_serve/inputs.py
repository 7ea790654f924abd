"""Raw inputs as requests hold them: texts, and media in base64 or as data URLs. No file is opened by its name.

Addresses are fetched only where the server was told to, at once, so that all else sees bytes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from mmhub.errors import InputError, did_you_mean
from mmhub.interfaces import Policy, raw_bytes
from mmhub_serve.bodies import aside

T = TypeVar("T")
MEDIA = ("image", "audio")
_SEND = 'send the file itself: {"base64": "..."}, or "data:image/png;base64,..."'


_FETCHING = ThreadPoolExecutor(8, "mmhub-fetch")  # apart from other work: whoever is fetched from may be slow


async def read_inputs(size: int, policy: Policy, call: Callable[[Any, Fetcher], T], given: Any) -> T:
    """Return `call(given, fetcher)`, in a thread where it may take long; `size` is that of the request in bytes."""
    fetcher = Fetcher(policy)
    if not policy.urls:
        return await aside(size, call, given, fetcher)
    return await asyncio.get_running_loop().run_in_executor(_FETCHING, call, given, fetcher)


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


def read_sample(given: Mapping[str, Any], fetch: Fetcher) -> dict[str, Any]:
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


def read_talk(messages: Any, fetch: Fetcher) -> Any:
    """Return a conversation whose pictures and sounds are bytes: parts of OpenAI's kinds and of our own.

    The role "developer" is "system". What is malformed otherwise is left to `mmhub.conversation` to say.

    Raises:
        InputError: a part holds no medium, or an address that is not fetched.
    """
    if not isinstance(messages, list):
        return messages
    return [_message(message, fetch) for message in messages]


def _message(message: Any, fetch: Fetcher) -> Any:
    if not isinstance(message, dict):
        return message
    role = "system" if message.get("role") == "developer" else message.get("role")
    content = message.get("content")
    parts = [_part(part, fetch) for part in content] if isinstance(content, list) else content
    return message | {"role": role, "content": parts}


def _part(part: Any, fetch: Fetcher) -> Any:
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


def _own(value: Any, name: str, fetch: Fetcher) -> Any:
    """What is no medium as it is: a text, a pair of texts, a number; base64 is decoded here, too."""
    return _medium(value, name, fetch) if isinstance(value, dict) and "base64" in value else value


def _medium(value: Any, name: str, fetch: Fetcher) -> bytes:
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
