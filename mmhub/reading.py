"""Files of strangers, read whole: plain files alone, no larger than they may be, and JSON that says one thing.

What the content means is left to those who ask for it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from mmhub.errors import TrustError

CONFIG_BYTES = 10_000_000
TOKENIZER_BYTES = 100_000_000
INDEX_BYTES = 100_000_000


def read_plain(path: Path, limit: int) -> bytes:
    """Return the content of a plain file of at most `limit` bytes.

    Raises:
        OSError: it is not there, or must not be read. TrustError: it is a pipe, a device, a folder or a link in a
            circle, or larger.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise TrustError(f"'{path}' is a link that leads in a circle", "fetch the checkpoint again") from None
        raise
    check_plain(path, status)
    # Not waiting, for what was a file a moment ago may be a pipe by now.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        check_plain(path, os.fstat(descriptor))
        content = file.read(limit + 1) if status.st_size <= limit else b""
    if status.st_size > limit or len(content) > limit:
        size = max(status.st_size, len(content))
        raise TrustError(f"'{path}' has {size:,} bytes, more than the {limit:,} it may", "fetch the checkpoint again")
    return content


def check_plain(path: Path, status: os.stat_result) -> None:
    """Raise TrustError for a pipe, a device, a socket or a folder."""
    if not stat.S_ISREG(status.st_mode):
        raise TrustError(f"'{path}' is no plain file", "fetch the checkpoint again")


def parse_json(content: bytes) -> Any:
    """Return what JSON in UTF-8 says.

    Raises:
        ValueError: it is none, or not sure: a key twice, half a character, a number that is none or infinite, or
            nested too deeply.
    """
    try:
        found = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant, parse_float=_finite
        )
        if b"\\u" in content:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character") from None
    return found


class Twice(ValueError):
    """A JSON table has a key twice."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a table of pairs whose keys differ."""
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Twice(f"it names {name!r} twice")
            seen.add(name)
    return table


def no_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python's reader takes for JSON."""
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number
