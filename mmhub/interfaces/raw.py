"""Raw inputs: what a user may hand over for one item, and the policy that bounds it. Decoding is the processor's part.

A raw input is a path, a URL (policy permitting), bytes, a `{bytes, path}` struct of Hub datasets, or an object the
processor understands (a PIL image, an array with an explicit rate). Nothing is guessed from the shape alone. Library,
command line, server and browser app bound what they read by the same `Policy`. Tables and shards that a recipe or
command names are the user's own choice, wherever they lie, and `mmhub.data` reads them; the media in them are bounded.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmhub.errors import InputError

_BYTES = (bytes, bytearray, memoryview)
_RATE, _SAMPLES = 48_000, 2**24  # samples a second that a long sound may have, and as many as any may have
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:[^,\s]*,", re.IGNORECASE)  # a scheme of one letter is a drive


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a process that decodes may take, and how many of them there are.

    Attributes:
        memory: bytes of address space (not held on Windows, which has no such limit). seconds: of one input, also of
            waiting for a free process. workers: so many inputs are decoded at a time.
    """

    memory: int = 1536 * 2**20
    seconds: float = 30.0
    workers: int = 2


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Bounds on raw inputs, checked on headers before anything large is allocated.

    Attributes:
        paths: may local files be read? root: folder that relative paths start from, '' = the current one.
        urls: may addresses be fetched? Hosts instead of True are those that it may be from, as `hosts` says.
        schemes: those of addresses. hosts: none = every public one, else names ("example.org", "*.example.org"), IP
            addresses and networks ("10.0.0.0/8"); these two may be private ones, also of names that lead there.
        private: may addresses of this machine's own networks be fetched? max_redirects: that are followed.
        fetch_seconds: of one fetch from its beginning to its end.
        noise: folder of recordings that training may add as noise.
        max_bytes: of a file as it comes. max_pixels: of a picture. max_seconds, max_channels: of a sound, see also
            `max_samples`.
        max_ratio: bytes that one byte of a file may become when it is decoded, if it becomes more than `ratio_floor`.
        worker: bounds of the processes in which bytes are decoded, None = in this one. What was fetched is always
            decoded in another.
    """

    paths: bool = True
    urls: bool | Sequence[str] = False
    schemes: tuple[str, ...] = ("https", "http")
    hosts: tuple[str, ...] = ()
    private: bool = False
    max_redirects: int = 5
    fetch_seconds: float = 30.0
    root: str = ""
    noise: str = ""
    max_bytes: int = 256 * 2**20
    max_pixels: int = 50_000_000
    max_seconds: float = 600.0
    max_channels: int = 32
    max_ratio: float = 2000.0
    ratio_floor: int = 64 * 2**20
    worker: Bounds | None = None

    def __post_init__(self) -> None:
        """Take hosts given as `urls`, and check them.

        Raises:
            UsageError: one is none.
        """
        if not isinstance(self.urls, bool):
            named = (self.urls,) if isinstance(self.urls, str) else self.urls
            object.__setattr__(self, "hosts", (*self.hosts, *named))
            object.__setattr__(self, "urls", bool(self.urls))
        if self.hosts:
            from mmhub.interfaces.fetch import networks_of

            object.__setattr__(self, "hosts", tuple(dict.fromkeys(host.lower() for host in self.hosts)))
            for host in self.hosts:
                networks_of(host)

    @property
    def max_samples(self) -> int:
        """Of each channel of a sound: those of `max_seconds` at 48 kHz, but never less than 2^24, which take 64 MiB."""
        return max(int(min(self.max_seconds * _RATE, 2.0**62)), _SAMPLES)

    def check_ratio(self, decoded: int, encoded: int, name: str) -> None:
        """Refuse a file of `encoded` bytes that becomes `decoded`, where that is out of all proportion.

        Raises:
            InputError: it is.
        """
        if decoded > self.ratio_floor and decoded > encoded * self.max_ratio:
            what = f"{name} would grow from {encoded} to {decoded} bytes when decoded"
            raise InputError(what, f"more than {self.max_ratio:g} times is refused")


def describe_raw(raw: Any) -> str:
    """Name a raw input for an error message, without its content."""
    if isinstance(raw, Mapping):
        if not raw.get("path") and raw.get("array") is not None:
            return "the array"
        if raw.get("path"):
            return describe_raw(raw["path"]) if is_url(raw["path"]) else f"'{raw['path']}'"
        content = raw.get("bytes", b"")
        return f"{len(content)} embedded bytes" if isinstance(content, _BYTES) else "a struct"
    if is_url(raw):
        return f"'{_shown_url(raw)}'"
    if isinstance(raw, (str, os.PathLike)):
        text = os.fspath(raw)
        return f"'{text if len(text) <= 200 else text[:200] + '...'}'"
    if isinstance(raw, _BYTES):
        return f"{len(raw)} bytes"
    return f"a {type(raw).__name__}"


def raw_bytes(raw: Any, policy: Policy) -> bytes | None:
    """Return the encoded bytes behind a path, URL, bytes or `{bytes, path}`; None for any other object.

    Raises:
        InputError: the file is missing, unreadable, empty, too large or not permitted.
    """
    if isinstance(raw, Mapping):
        content = raw.get("bytes")
        if content is not None:
            if not isinstance(content, _BYTES):
                raise InputError(f"a struct holds as its bytes {describe_raw(content)}", "give bytes, or a path")
            return _bounded(bytes(content), raw, policy)
        if raw.get("path"):
            return raw_bytes(raw["path"], policy)
        raise InputError(f"a struct with keys {sorted(map(str, raw))} holds neither bytes nor a path")
    if isinstance(raw, _BYTES):
        return _bounded(bytes(raw), raw, policy)
    if is_url(raw):
        from mmhub.interfaces.fetch import fetch

        return _bounded(fetch(raw, policy), raw, policy)
    if isinstance(raw, (str, os.PathLike)):
        return _bounded(_read_file(os.fspath(raw), policy), raw, policy)
    return None


def is_url(raw: Any) -> bool:
    """Say whether a raw input is an address, of whatever scheme, and not a path.

    >>> [is_url(raw) for raw in ("HTTPS://example.org/a.png", "file:///a.png", "a.png", "C:/a.png")]
    [True, True, False, False]
    """
    return isinstance(raw, str) and _ADDRESS.match(raw) is not None


def worker_of(raw: Any, policy: Policy) -> Bounds | None:
    """Return the bounds of the process that decodes a raw input; None where this process may."""
    if isinstance(raw, Mapping):
        raw = raw.get("path")  # bytes beside an address were fetched from it
    return policy.worker or (Bounds() if is_url(raw) else None)


def open_raw(raw: Any, policy: Policy) -> BinaryIO | None:
    """Open for reading piece by piece what `raw_bytes` would read at once; None for any other object.

    A local file may then have any size, because nothing of it is held.

    Raises:
        InputError: the file is missing, unreadable, empty or not permitted.
    """
    if isinstance(raw, Mapping) and raw.get("bytes") is None and raw.get("path"):
        return open_raw(raw["path"], policy)
    path = local_path(raw, policy)
    if path is None:
        content = raw_bytes(raw, policy)
        return None if content is None else io.BytesIO(content)
    with _readable(path):
        file = path.open("rb")
    if not os.fstat(file.fileno()).st_size:
        file.close()
        raise InputError(f"'{path}' is empty")
    return file


def local_path(raw: Any, policy: Policy) -> Path | None:
    """Return the file that a path names, where the policy permits it; None for anything else."""
    if not isinstance(raw, (str, os.PathLike)) or not policy.paths:
        return None
    text = os.fspath(raw)
    if not isinstance(text, str) or is_url(text):
        return None
    return _home(policy, text)


def _home(policy: Policy, text: str) -> Path:
    """A path from the policy's folder on; `Path.expanduser` would raise for a user that does not exist."""
    path = Path(policy.root, text)
    try:
        return Path(os.path.expanduser(path))
    except ValueError:  # no name of a user; reading it will say what is wrong
        return path


def _bounded(content: bytes, raw: Any, policy: Policy) -> bytes:
    if not content:
        raise InputError(f"{describe_raw(raw)} is empty")
    if len(content) > policy.max_bytes:
        raise InputError(f"{describe_raw(raw)} has {len(content)} bytes, more than the limit of {policy.max_bytes}")
    return content


def _read_file(text: str, policy: Policy) -> bytes:
    if not policy.paths:
        raise InputError(
            f"{describe_raw(text)} is a path, and local files may not be read here", "send the bytes instead"
        )
    path = _home(policy, text)
    with _readable(path), path.open("rb") as file:
        found = os.fstat(file.fileno())
        size = found.st_size if stat.S_ISREG(found.st_mode) else 0  # a pipe or device does not say
        if size > policy.max_bytes:
            raise InputError(f"'{path}' has {size} bytes, more than the limit of {policy.max_bytes}")
        return file.read(size or policy.max_bytes + 1)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in our words why a file cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"no file {describe_raw(path)}", "check the path") from None
    except IsADirectoryError:
        raise InputError(f"{describe_raw(path)} is a folder", "name a file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {describe_raw(path)}: {reason}") from None


def _shown_url(url: str) -> str:
    from mmhub.interfaces.fetch import shown_url

    return shown_url(url)
