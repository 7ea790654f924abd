"""Who is signed in on the web pages: random names for tokens, kept in memory only.

The browser gets such a name instead of the token, since browsers send cookies to every port of a host. A restart signs
everybody out.
"""

import secrets
import threading
import time

LIFETIME = 12 * 3600  # seconds
_MOST = 10_000


class Sessions:
    def __init__(self) -> None:
        self._tokens: dict[str, tuple[str, float]] = {}  # oldest first
        self._lock = threading.Lock()

    def open(self, token: str) -> str:
        """Return a new name for `token`."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            while len(self._tokens) >= _MOST:
                del self._tokens[next(iter(self._tokens))]
            self._tokens[name] = (token, time.monotonic() + LIFETIME)
        return name

    def token(self, name: str) -> str | None:
        """Return the token that `name` stands for, until it is closed or too old."""
        token, end = self._tokens.get(name, (None, 0.0))
        return token if time.monotonic() < end else None

    def close(self, name: str) -> None:
        with self._lock:
            self._tokens.pop(name, None)
