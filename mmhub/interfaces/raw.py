"""Raw inputs: what a user may hand over for one item, and the policy that bounds it. Decoding is the processor's part.

A raw input is a path, a URL (policy permitting), bytes, a `{bytes, path}` struct of Hub datasets, or an object the
processor understands (a PIL image, an array with an explicit rate). Nothing is guessed from the shape alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmhub.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Bounds on raw inputs, checked on headers before anything large is allocated."""

    paths: bool = True  # may read local files
    urls: bool = False  # may fetch http(s) addresses
    root: str = ""  # folder that relative paths start from, '' = the current one
    max_bytes: int = 256 * 2**20
    max_pixels: int = 50_000_000
    max_seconds: float = 600.0


def describe_raw(raw: Any) -> str:
    """Name a raw input for an error message, without its content."""
    if isinstance(raw, Mapping):
        return f"'{raw['path']}'" if raw.get("path") else f"{len(raw.get('bytes') or b'')} embedded bytes"
    if isinstance(raw, (str, os.PathLike)):
        text = os.fspath(raw)
        return f"'{text if len(text) <= 200 else text[:200] + '...'}'"
    if isinstance(raw, (bytes, bytearray, memoryview)):
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
            return _bounded(bytes(content), raw, policy)
        if raw.get("path"):
            return raw_bytes(raw["path"], policy)
        raise InputError(f"a struct with keys {sorted(raw)} holds neither bytes nor a path")
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return _bounded(bytes(raw), raw, policy)
    if isinstance(raw, (str, os.PathLike)):
        text = os.fspath(raw)
        if isinstance(text, str) and text.startswith(("http://", "https://")):
            return _bounded(_fetch(text, policy), raw, policy)
        return _bounded(_read_file(text, policy), raw, policy)
    return None


def _bounded(content: bytes, raw: Any, policy: Policy) -> bytes:
    if not content:
        raise InputError(f"{describe_raw(raw)} is empty")
    if len(content) > policy.max_bytes:
        raise InputError(f"{describe_raw(raw)} has {len(content)} bytes, more than the limit of {policy.max_bytes}")
    return content


def _read_file(text: str, policy: Policy) -> bytes:
    if not policy.paths:
        raise InputError(f"'{text}' is a path, and local files may not be read here", "send the bytes instead")
    path = Path(policy.root, text).expanduser()
    try:
        if path.is_file() and path.stat().st_size > policy.max_bytes:
            raise InputError(f"'{path}' has {path.stat().st_size} bytes, more than the limit of {policy.max_bytes}")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no file '{path}'", "check the path") from None
    except IsADirectoryError:
        raise InputError(f"'{path}' is a folder", "name a file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read '{path}': {reason}") from None


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
