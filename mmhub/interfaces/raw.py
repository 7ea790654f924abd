"""Raw inputs: what a user may hand over for one item, and the policy that bounds it. Decoding is the processor's part.

A raw input is a path, a URL (policy permitting), bytes, a `{bytes, path}` struct of Hub datasets, or an object the
processor understands (a PIL image, an array with an explicit rate). Nothing is guessed from the shape alone.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmhub.errors import InputError

_BYTES = (bytes, bytearray, memoryview)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Bounds on raw inputs, checked on headers before anything large is allocated."""

    paths: bool = True  # may read local files
    urls: bool = False  # may fetch http(s) addresses
    root: str = ""  # folder that relative paths start from, '' = the current one
    noise: str = ""  # folder of recordings that training may add as noise
    max_bytes: int = 256 * 2**20
    max_pixels: int = 50_000_000
    max_seconds: float = 600.0


def describe_raw(raw: Any) -> str:
    """Name a raw input for an error message, without its content."""
    if isinstance(raw, Mapping):
        if not raw.get("path") and raw.get("array") is not None:
            return "the array"
        if raw.get("path"):
            return f"'{raw['path']}'"
        content = raw.get("bytes", b"")
        return f"{len(content)} embedded bytes" if isinstance(content, _BYTES) else "a struct"
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
    if isinstance(raw, (str, os.PathLike)):
        text = os.fspath(raw)
        if isinstance(text, str) and text.startswith(("http://", "https://")):
            return _bounded(_fetch(text, policy), raw, policy)
        return _bounded(_read_file(text, policy), raw, policy)
    return None


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
    if not isinstance(text, str) or text.startswith(("http://", "https://")):
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


def _fetch(url: str, policy: Policy) -> bytes:
    if not policy.urls:
        raise InputError(f"'{url}' is a URL, and fetching is off", "download the file, or pass --allow-urls")
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # the scheme was checked by the caller
            content: bytes = answer.read(policy.max_bytes + 1)
            return content
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InputError(f"cannot fetch '{url}': {error}") from None
