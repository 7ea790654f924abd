"""Who may ask: bearer keys, the names that a server on loopback goes by, and web pages of other origins."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmhub.errors import NotFoundError, UsageError
from mmhub_serve.errors import Refused
from mmhub_serve.settings import Settings

VARIABLE = "MMHUB_SERVE_KEYS"
OPEN = frozenset({"/healthz", "/readyz"})  # what supervisors ask, without a key
_SAFE = frozenset({"GET", "HEAD"})
_HOST = re.compile(r"([A-Za-z0-9.\-_]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
_ORIGIN = re.compile(r"https?://([A-Za-z0-9.\-_]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?/?")
_KEY = re.compile(r"[\x21-\x7e]{8,512}")


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches an address of that name."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Return the keys of a file, one a line ('#' starts a comment), and of MMHUB_SERVE_KEYS, comma-separated.

    Raises:
        NotFoundError: there is no such file. UsageError: it has no key, or one that no header can hold.
    """
    given = [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        found = _lines(file)
        if not found:
            raise UsageError(f"{file} has no key", "write one a line, such as what `openssl rand -hex 24` prints")
        given += found
    for number, key in enumerate(given, 1):
        if not _KEY.fullmatch(key):  # the key itself is not shown
            raise UsageError(f"key {number} is not 8 to 512 visible ASCII characters", "make another")
    return tuple(dict.fromkeys(given))


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}", "--key-file takes a text file with a key a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as text: {error}", "it has a key a line") from None
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def check_address(settings: Settings, *, private: bool) -> None:
    """Refuse to open a server to others without keys, and keys that `private` says there are none of.

    Raises:
        UsageError: with what to do.
    """
    if private and settings.keys:
        raise UsageError(
            "--no-keys, but there are keys", f"leave out --key-file and {VARIABLE}, or --no-keys to ask for them"
        )
    if settings.keys or private or (is_loopback(settings.host) and not settings.behind_proxy):
        return
    what = "--behind-proxy" if is_loopback(settings.host) else f"--host {settings.host}"
    raise UsageError(
        f"{what}: without keys only loopback is served",
        f"give --key-file FILE or set {VARIABLE}, or --no-keys if everybody on that network may ask",
    )


def check_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Return them as browsers write them.

    Raises:
        UsageError: one is no origin.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(f"--cors {origin} is no origin", "write https://NAME or http://NAME:PORT, without a path")
    return tuple(origin.rstrip("/").lower() for origin in origins)


class Access:
    """Decides on each request from its headers alone."""

    def __init__(self, settings: Settings) -> None:
        self._hashes = [_hash(key.encode()) for key in settings.keys]
        self._origins = frozenset(check_origins(settings.origins))
        self._loopback = is_loopback(settings.host) and not settings.behind_proxy

    def check_host(self, host: bytes) -> None:
        """Refuse a Host header that a web page may have chosen (DNS rebinding).

        Raises:
            Refused: 400, it is no host name; 403, this server answers to loopback names only.
        """
        match = _HOST.fullmatch(host.decode("latin-1"))
        if match is None:
            raise Refused(400, "the Host header is not a host name")
        if self._loopback and not is_loopback(match[1]):
            raise Refused(403, "this server answers to loopback host names only", "ask 127.0.0.1 or localhost")

    def allowed(self, headers: Mapping[str, str], scheme: str = "http") -> str | None:
        """Return the origin of the web page that asks, where it may read the answer."""
        origin = headers.get("origin")
        own = f"{scheme}://{headers.get('host', '')}".lower()
        return origin if origin and (origin.lower() == own or origin.lower() in self._origins) else None

    def check(self, method: str, path: str, headers: Mapping[str, str], scheme: str = "http") -> None:
        """Refuse web pages of other origins, and who has no key.

        Raises:
            Refused: 403 or 401.
        """
        if "origin" in headers and method not in _SAFE and self.allowed(headers, scheme) is None:
            raise Refused(403, "this server does not answer to web pages of other origins", "allow one with --cors")
        if self._hashes and path not in OPEN and method != "OPTIONS":
            self._check_key(headers.get("authorization", ""))

    def _check_key(self, given: str) -> None:
        scheme, _, key = given.partition(" ")
        hashed = _hash(key.strip().encode("utf-8", "surrogateescape"))
        good = [hmac.compare_digest(hashed, known) for known in self._hashes]  # all of them: time tells nothing
        if scheme.lower() != "bearer" or not any(good):
            refused = Refused(
                401, "this server asks for a key", "send Authorization: Bearer KEY", code="invalid_api_key"
            )
            refused.headers["WWW-Authenticate"] = "Bearer"
            raise refused


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
