"""Raw inputs as requests hold them: texts, and media in base64 or as data URLs. Nothing is fetched or opened."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from mmhub.errors import InputError, did_you_mean

MEDIA = ("image", "audio")
_SEND = 'send the file itself: {"base64": "..."}, or "data:image/png;base64,..."'


def read_sample(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample whose media, {"base64": text} or data URLs, are bytes; a list holds several.

    "messages" are a conversation, as `read_talk` takes it. Bytes, which parts of a form are, stay what they are.

    Raises:
        InputError: what stands there is no medium, or what stands there as base64 is none.
    """
    found = {}
    for name, value in given.items():
        if name == "messages":
            found[name] = read_talk(value)
        elif value is not None:
            read = _medium if name in MEDIA else _own
            found[name] = [read(one, name) for one in value] if isinstance(value, list) else read(value, name)
    return found


def read_talk(messages: Any) -> Any:
    """Return a conversation whose pictures and sounds are bytes: parts of OpenAI's kinds and of our own.

    The role "developer" is "system". What is malformed otherwise is left to `mmhub.conversation` to say.

    Raises:
        InputError: a part holds no medium, or an address where something would have to be fetched.
    """
    if not isinstance(messages, list):
        return messages
    return [_message(message) for message in messages]


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role = "system" if message.get("role") == "developer" else message.get("role")
    content = message.get("content")
    parts = [_part(part) for part in content] if isinstance(content, list) else content
    return message | {"role": role, "content": parts}


def _part(part: Any) -> Any:
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
    return {"type": kind, kind: _medium(value, kind)}


def _own(value: Any, name: str) -> Any:
    """What is no medium as it is: a text, a pair of texts, a number; base64 is decoded here, too."""
    return _medium(value, name) if isinstance(value, dict) and "base64" in value else value


def _medium(value: Any, name: str) -> bytes:
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
    if value.startswith(("http://", "https://")):
        raise InputError(f"{name}: this server fetches no addresses", _SEND)
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
