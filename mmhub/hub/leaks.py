"""Look for secrets and personal paths in a text as strangers may read it: as it stands, decoded, and from base64.

The forms of secrets are `mmhub.hub.secrets`' part; those of paths, which tell who works where, stand here.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from mmhub.errors import UsageError
from mmhub.hub.secrets import find_secret, line_at

_NOBODY = (  # accounts that are nobody's, or stand for anybody's in instructions
    r"(?i:users?|username|your[\w.-]*|you|me|name|somebody|someone|runner(?:admin)?|ubuntu|jovyan|vscode|app|appuser|node"
    r"|public|default|shared)"
)
_END = r"(?=[\"'\s]|$)"  # of a path that is a folder's alone
_WINDOWS = r"\b[A-Za-z]:(?:\\{1,2}|/)(?:Users|Documents and Settings)(?:\\{1,2}|/)"
_PATHS = (
    rf"(?<![\w.~/\\-])/(?:home|Users)/(?!{_NOBODY}\.*(?![\w-]))[\w.-]+/?",
    rf"{_WINDOWS}(?!{_NOBODY}(?:[/\\]|{_END}))(?:[\w. -]{{1,64}}?[\\/]|[\w.-]{{1,64}}{_END})",
    r"(?<![\\\w:])\\\\[A-Za-z][\w.-]{2,}\\[\w$.-]+\\",
    r"\bfile://(?:localhost)?/(?!path/)[\w.-]+/",
)
_LEARNED = ("vocab", "merges")  # keys of tokenizer files whose texts were learned, and not written by anybody here
_BASE64 = re.compile(r"(?<![\w+/-])[A-Za-z0-9+/_-]{40,65536}={0,2}")
_WRAPPED = re.compile(r"(?<![\w+/-])(?:[A-Za-z0-9+/]{60,76}\r?\n[ \t]{0,8}){1,2000}[A-Za-z0-9+/]{2,76}={0,2}")  # MIME
_SHORTEST_BASE64 = 40
_MOST_BASE64, _MOST_DECODED = 5_000, 2**24  # of them, and bytes
_MOST_PATHS = 3  # named of one file


@dataclass(frozen=True)
class Leak:
    """What is in a text that should not be: `what` and where it stands; a secret is not repeated, `public` no path."""

    kind: Literal["secret", "path"]
    what: str
    public: str


def find_leaks(text: str, *, form: Literal["json", "card", "text"] = "text") -> list[Leak]:
    """Return the first secret and the first personal paths in a text.

    `form` says what else it is read as: JSON, whose escapes are decoded, or a card with YAML at its top.
    """
    values = list(_values(text, form))
    return [*_secrets(text, values), *_paths(text, values)]


def _secrets(text: str, values: list[tuple[str, str]]) -> Iterator[Leak]:
    found = find_secret(text)
    if found is None and find_secret("\n".join(value for _, value in values)):
        where, value = next(((where, value) for where, value in values if find_secret(value)), ("several values", ""))
        found = _named(find_secret(value) or "a secret", "several values" if find_secret(where) else where)
    if found is None and "\\_" in text:  # as Markdown may write it
        found = find_secret(text.replace("\\_", "_"))
    found = found or _encoded_secret([("", text), *values])
    if found:
        yield Leak("secret", f"holds what looks like a secret, {found}", "holds what looks like a secret")


def _named(found: str, where: str) -> str:
    """What `find_secret` said, with the key in place of the line."""
    return f"{found.rpartition(' (')[0] or found} (at {where})"


def _encoded_secret(texts: Iterable[tuple[str, str]]) -> str | None:
    """Look into what is base64, also of several lines; of very much of it, into the first part."""
    left = _MOST_DECODED
    long = ((where, text) for where, text in texts if len(text) >= _SHORTEST_BASE64)
    codes = ((where, text, one) for where, text in long for form in (_BASE64, _WRAPPED) for one in form.finditer(text))
    for where, text, match in islice(codes, _MOST_BASE64):
        plain = _decoded("".join(match[0].split()).rstrip("="))
        left -= len(plain)
        if left < 0:
            return None
        found = find_secret(plain)
        if found:
            kind = f"{found.rpartition(' (')[0]} in base64"
            return _named(f"{kind} (", where) if where else f"{kind} (line {line_at(text, match.start())})"
    return None


def _decoded(code: str) -> str:
    """The text that base64 stands for, bytes that are no letters of ASCII as some other; "" of what is none."""
    try:
        plain = base64.b64decode(code + "=" * (-len(code) % 4), altchars=b"-_" if {*"-_"} & {*code} else None)
    except (binascii.Error, ValueError):
        return ""
    return plain.decode("latin-1")


def _paths(text: str, values: list[tuple[str, str]]) -> Iterator[Leak]:
    seen: dict[str, str] = {}
    own, personal = (re.compile("|".join(forms)) for forms in (_own_forms(), [*_PATHS, *_own_forms()]))
    for where, value in values or [("", text)]:
        learned = any(key in _LEARNED for key in where.split("."))
        for match in (own if learned else personal).finditer(value) if _may_be_path(value) else ():
            seen.setdefault(match[0].strip(), where)
    for path, where in list(seen.items())[:_MOST_PATHS]:
        at = text.find(path) if not where else text.find(json.dumps(path)[1:-1])
        place = f"line {line_at(text, at)}" if at >= 0 else f"at {where}"
        kind = "holds a path or address of this machine or its user"
        yield Leak("path", f"{kind}, '{path}' ({place})", kind)


def _may_be_path(value: str) -> bool:
    """Is there anything that all of them have? Most words of a vocabulary lack it."""
    return "/" in value or "\\" in value or "@" in value


def _own_forms() -> list[str]:
    """This user's own home folder, and this machine as the host of an address."""
    home, host = os.path.expanduser("~").rstrip("/\\"), socket.gethostname()
    forms = [rf"(?<![\w.~/\\-]){re.escape(home)}(?:[/\\]|(?![\w.-]))"] if len(home) > 1 else []
    named = len(host) > 2 and host.lower() != "localhost"
    return [*forms, *([rf"(?://|@){re.escape(host)}(?![\w.-])"] if named else []), r"(?!)"]


def _values(text: str, form: str) -> Iterator[tuple[str, str]]:
    """Yield every key and text of a document with where it stands; of a card also its whole text."""
    if form == "json":
        try:
            yield from _walk(json.loads(text), "")
        except (ValueError, RecursionError):
            return
    elif form == "card":
        from mmhub.hub.card import read_card

        try:
            data = read_card(text)[0]
        except (UsageError, ValueError, RecursionError):
            data = {}
        yield from _walk(data, "")
        yield "", text


def _walk(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where or "the text", value
    elif isinstance(value, dict):
        inside = f"{where}." if where else ""
        learned = where.rpartition(".")[2] in _LEARNED
        for key, item in value.items():
            yield where or "the top", str(key)
            yield from _walk(item, where if learned else f"{inside}{str(key)[:60]}")
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, where)
