"""What a server refuses, as HTTP says it: one JSON shape for every route."""

from __future__ import annotations

from typing import Any

from mmhub.errors import InputError, MmhubError, NotFoundError, UsageError


class Refused(Exception):
    """A request that is not answered: `status`, one line that says why, and what to do (`hint`)."""

    def __init__(self, status: int, message: str, hint: str | None = None, *, code: str = "", param: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.hint, self.code, self.param = status, message, hint, code, param
        self.headers = {"Retry-After": "1"} if status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """The answer as OpenAI's clients and ours read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        text = f"{self.message}; {self.hint}" if self.hint else self.message
        return {"error": {"message": text, "type": kind, "code": self.code or None, "param": self.param or None}}


def refusal_of(error: MmhubError, param: str = "") -> Refused:
    """Return what an error of ours is to a client: its own fault (400, 404) or the server's (500)."""
    status = 404 if isinstance(error, NotFoundError) else 400 if isinstance(error, (InputError, UsageError)) else 500
    return Refused(status, error.message, error.hint, param=param)
