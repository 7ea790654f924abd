"""What a server refuses, as HTTP says it: one JSON shape for every route."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmhub.errors import InputError, MmhubError, NotFoundError, UsageError
from mmhub.interfaces.apart import Busy

_SHOWN = 300  # characters of a message: what a client sent comes back in it


class Refused(Exception):
    """A request that is not answered: `status`, one line that says why, and what to do (`hint`)."""

    def __init__(self, status: int, message: str, hint: str | None = None, *, code: str = "", param: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.hint, self.code, self.param = status, message, hint, code, param
        self.headers = {"Retry-After": "1"} if status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """The answer as OpenAI's clients and ours read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        text = _line(f"{self.message}; {self.hint}" if self.hint else self.message)
        return {"error": {"message": text, "type": kind, "code": self.code or None, "param": self.param or None}}

    def content(self) -> bytes:
        """The answer's bytes."""
        return json.dumps(self.body()).encode()


def refusal_of(error: MmhubError, param: str = "") -> Refused:
    """Return what an error of ours is to a client: its own fault (400, 404) or the server's (500, 503 for a while)."""
    if isinstance(error, Busy):
        return Refused(503, error.message, error.hint, code="busy")
    status = 404 if isinstance(error, NotFoundError) else 400 if isinstance(error, (InputError, UsageError)) else 500
    return Refused(status, error.message, error.hint, param=param)


def malformed(problems: Sequence[Mapping[str, Any]]) -> Refused:
    """Return the refusal of a body or query that has another form than its route takes.

    Args:
        problems: as pydantic lists them.
    """
    first: Mapping[str, Any] = problems[0] if problems else {"msg": "malformed", "loc": ()}
    place = [str(part) for part in first["loc"][1:]] if len(first["loc"]) > 1 else [str(part) for part in first["loc"]]
    param = _line(".".join(place))
    cause = first.get("ctx", {}).get("error") if first.get("type") == "json_invalid" else None
    if cause is not None:
        return Refused(400, f"the body is not JSON: {cause} at character {param}")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Refused(400, f"{param}: {first['msg']}{more}", param=param)


def unexpected(request_id: str) -> Refused:
    """Return what a client is told of a bug of ours."""
    return Refused(500, f"the server failed at this request; its log says why, at {request_id}", code="internal_error")


def _line(text: str) -> str:
    """One line, short, and of characters that can be encoded."""
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
