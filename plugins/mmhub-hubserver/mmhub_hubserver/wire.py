"""One HTTP request and response as plain values, and a body reader that never trusts the announced length.

Knows nothing of sockets being accepted (that is `server`) nor of what the paths mean (that is `routes`).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode

from mmhub_hubserver.accounts import Account
from mmhub_hubserver.errors import HubError, Invalid, TooLarge

JSON_LIMIT = 16 << 20  # bytes of a JSON or form body, and of one line of a commit
_CHUNK = 1 << 20
T = TypeVar("T")
_HEX = frozenset(b"0123456789abcdefABCDEF")


class Body:
    """A request body of known length or in chunks.

    Raises:
        Invalid: the framing headers are contradictory or malformed (the connection cannot be used further).
        ConnectionError: the client went away before the end.
    """

    def __init__(self, stream: BufferedIOBase, headers: Message) -> None:
        self._stream = stream
        lengths, encodings = headers.get_all("Content-Length", []), headers.get_all("Transfer-Encoding", [])
        if len(lengths) + len(encodings) > 1:
            raise Invalid("More than one Content-Length or Transfer-Encoding header.")
        if encodings and encodings[0].strip().lower() != "chunked":
            raise Invalid("The only Transfer-Encoding understood is 'chunked'.")
        if lengths and not (lengths[0].isascii() and lengths[0].isdigit() and len(lengths[0]) < 19):
            raise Invalid("Content-Length is not a number.")
        self._chunked = bool(encodings)
        self._left = int(lengths[0]) if lengths else 0  # of the body, or of the current chunk
        self.length = None if self._chunked else self._left
        self.done = not self._chunked and self._left == 0

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, and b"" only at the end."""
        if self._chunked and not self._left and not self.done:
            self._next_chunk()
        if self.done or not size:
            return b""
        data = self._stream.read(min(size, self._left))
        if not data:
            raise ConnectionResetError("the request body ended early")
        self._left -= len(data)
        if self._chunked and not self._left and self._line() != b"":
            raise Invalid("Malformed chunk.")
        self.done = not self._chunked and not self._left
        return data

    def chunks(self) -> Iterator[bytes]:
        while data := self.read(_CHUNK):
            yield data

    def lines(self, limit: int) -> Iterator[bytes]:
        """Yield the lines of a body of any number of lines, each at most JSON_LIMIT bytes, in all `limit`."""
        rest, seen, received = bytearray(), 0, 0
        while data := self.read(_CHUNK):
            received += len(data)
            rest += data
            while (end := rest.find(b"\n", seen)) >= 0:
                yield bytes(rest[:end])
                del rest[: end + 1]
                seen = 0
            seen = len(rest)
            if seen > JSON_LIMIT or received > limit:
                raise TooLarge("The request body is too large.")
        yield bytes(rest)

    def all(self, limit: int = JSON_LIMIT) -> bytes:
        content = bytearray()
        while data := self.read(_CHUNK):
            content += data
            if len(content) > limit:
                raise TooLarge(f"The request body is over {limit} bytes.")
        return bytes(content)

    def drain(self, limit: int) -> None:
        """Throw the rest away, up to `limit` bytes."""
        while limit > 0 and (data := self.read(_CHUNK)):
            limit -= len(data)

    def ends_within(self, limit: int) -> bool:
        """Say whether at most `limit` bytes are left, as far as the client announced it."""
        return self.done or (not self._chunked and self._left <= limit)

    def _next_chunk(self) -> None:
        size = self._line().split(b";")[0].strip()
        if not size or len(size) > 15 or not _HEX.issuperset(size):
            raise Invalid("Malformed chunk.")
        self._left = int(size, 16)
        if self._left == 0:
            while self._line():
                pass
            self.done = True

    def _line(self) -> bytes:
        line = self._stream.readline(4096)
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the request body ended early")
        return line.rstrip(b"\r\n")


@dataclass
class Request:
    """`path` is still percent-encoded, because a `%2F` inside a revision is not a separator."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: Body
    base: str  # http://host:port as the client sees this server
    account: Account | None = None  # who asks; `routes` finds out
    parts: dict[str, str] = field(default_factory=dict)  # of the path, decoded, as the client wrote them

    def flag(self, name: str) -> bool:
        return (self.option(name) or "").lower() in ("1", "true")

    def option(self, name: str) -> str | None:
        values = self.query.get(name)
        return values[-1] if values else None

    def values(self, name: str) -> list[str]:
        """Return the values of a repeated option; clients write its name with or without `[]`."""
        return [*self.query.get(name, []), *self.query.get(f"{name}[]", [])]

    def number(self, name: str, default: int) -> int:
        text = self.option(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise Invalid(f"'{name}' is not a number.")
        return int(text)

    def json(self, limit: int = JSON_LIMIT) -> dict[str, Any]:
        """Return the JSON object of the body, empty if there is no body."""
        content = self.body.all(limit)
        return json_object(content) if content else {}

    def page(self, items: Iterable[T], most: int) -> tuple[list[T], dict[str, str]]:
        """Return one page of a listing, of which nothing beyond is read, and the header that names the next page."""
        start = self.number("cursor", 0)
        count = min(max(self.number("limit", most), 1), most)
        found, headers = list(islice(items, start, start + count + 1)), {}
        if len(found) > count:
            query = urlencode({**self.query, "cursor": [start + count]}, doseq=True)
            headers["Link"] = f'<{self.base}{self.path}?{query}>; rel="next"'
        return found[:count], headers


@dataclass
class Response:
    """`file` is a file to send instead of `body`: its path, first byte and number of bytes."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: tuple[Path, int, int] | None = None

    @classmethod
    def of(cls, data: Any, status: int = 200, headers: Mapping[str, str] | None = None, **named: str) -> "Response":
        """Answer in JSON, with headers as a mapping or as arguments like `X_Error_Code`."""
        headers = {**(headers or {}), **{name.replace("_", "-"): value for name, value in named.items()}}
        return cls(status, json.dumps(data).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})

    @classmethod
    def refusal(cls, error: HubError) -> "Response":
        text = " ".join(error.message.split()).encode("ascii", "replace").decode()[:500]
        response = cls.of({"error": error.message}, error.status, {"X-Error-Message": text})
        if error.code:
            response.headers["X-Error-Code"] = error.code
        if error.commit:
            response.headers["X-Repo-Commit"] = error.commit
        return response


def json_object(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        raise Invalid("The request is not valid JSON.") from None
    if not isinstance(data, dict):
        raise Invalid("The request is not a JSON object.")
    return data


def form(text: str) -> dict[str, list[str]]:
    """Parse a query string or a posted form."""
    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=10_000)
    except ValueError:
        raise Invalid("Too many fields.") from None


def member(data: Any, name: str, kind: type[T], default: T | None = None) -> T:
    """Return `data[name]`, checked to be of `kind`; without a default it must be there."""
    value = data.get(name) if isinstance(data, dict) else None
    value = default if value is None else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Invalid(f"The request needs '{name}' as {kind.__name__}.")
    return value
