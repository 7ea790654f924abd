"""How the process that decodes talks to the one that asks: JSON of a stated length, then bytes of a stated length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

_HEAD = 1 << 16  # bytes of JSON


def write_message(file: IO[bytes], head: Mapping[str, Any], body: bytes | memoryview = b"") -> None:
    """Write one message. `head` is JSON data of at most 64 KiB."""
    text = json.dumps(head).encode()
    assert len(text) <= _HEAD
    file.write(len(text).to_bytes(4) + memoryview(body).nbytes.to_bytes(8) + text)
    file.write(body)
    file.flush()


def read_message(file: IO[bytes], most: int) -> tuple[dict[str, Any], bytearray] | None:
    """Read one message, whose body has at most so many bytes; None at the end.

    Raises:
        ValueError: it is none.
    """
    start = file.read(12)
    if len(start) < 12:
        return None
    size, rest = int.from_bytes(start[:4]), int.from_bytes(start[4:])
    if size > _HEAD or rest > most:
        raise ValueError("a message is too long")
    head = json.loads(file.read(size))
    if not isinstance(head, dict):
        raise ValueError("a message is no table")
    body = bytearray(rest)
    view, count = memoryview(body), 0
    while count < rest and (now := file.readinto(view[count:])):  # type: ignore[attr-defined]
        count += now
    return (head, body) if count == rest else None
