"""Decoders for tests, which do what a decoder must never do. They run in a process of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmhub.interfaces import Policy

Found = Iterator[Any]


def doubled(content: bytes, name: str, policy: Policy, times: int = 2) -> Found:
    yield {"size": len(content), "pixels": policy.max_pixels}
    yield times * np.frombuffer(content, np.uint8)


def crash(content: bytes, name: str, policy: Policy) -> Found:
    import ctypes

    yield ctypes.string_at(0)


def hang(content: bytes, name: str, policy: Policy) -> Found:
    time.sleep(600)
    yield {}


def drip(content: bytes, name: str, policy: Policy) -> Found:
    """Answer again and again, each time soon."""
    while True:
        time.sleep(0.05)
        yield np.zeros(1, np.uint8)


def chatter(content: bytes, name: str, policy: Policy) -> Found:
    while True:
        yield {"word": "x" * 60_000}


def crumble(content: bytes, name: str, policy: Policy) -> Found:
    while True:
        yield np.zeros(0, np.uint8)


def spin(content: bytes, name: str, policy: Policy) -> Found:
    while True:
        pass
    yield {}


def hoard(content: bytes, name: str, policy: Policy) -> Found:
    yield {"bytes": len(bytearray(2**31))}


def fail(content: bytes, name: str, policy: Policy) -> Found:
    raise RuntimeError("nobody expects this")
    yield {}


def tell(content: bytes, name: str, policy: Policy) -> Found:
    """What a decoder that was taken over would look for."""
    files = []
    for number in range(3, 64):
        try:
            os.fstat(number)
        except OSError:
            continue
        files.append(number)
    os.write(1, b"on standard output, as some libraries do")
    yield {"environment": sorted(os.environ), "files": len(files), "folder": os.getcwd(), "modules": sorted(_heavy())}


def _heavy() -> set[str]:
    import sys

    return {"torch", "transformers", "huggingface_hub"} & set(sys.modules)


def write(content: bytes, name: str, policy: Policy, folder: str) -> Found:
    with open(os.path.join(folder, "written"), "w") as file:
        file.write("x" * 10)
    yield {}


def shout(content: bytes, name: str, policy: Policy) -> Found:
    """Answer with what is no message, on all pipes there are."""
    for number in range(3, 20):
        try:
            os.write(number, content)
        except OSError:
            continue
    yield {}


def lie(content: bytes, name: str, policy: Policy, head: Any, size: int) -> Found:
    """Answer with a message that was made by hand."""
    from mmhub.interfaces.wire import write_message

    for number in range(3, 20):
        try:
            with os.fdopen(os.dup(number), "wb") as file:
                write_message(file, head, bytes(size))
        except OSError:
            continue
    time.sleep(60)
    yield {}
