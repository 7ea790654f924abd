"""Keep what strangers' code prints out of a command's result: while it runs, its thread's stdout is stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

_lock = RLock()


class _Stdout:
    """Stands in for sys.stdout: the threads that are diverted write to stderr, all others where they did before."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._diverted: dict[int, int] = {}  # thread: how many diversions it is in

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr if get_ident() in self._diverted else self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def _enter(self) -> None:
        self._diverted[get_ident()] = self._diverted.get(get_ident(), 0) + 1

    def _leave(self) -> None:
        self._diverted[get_ident()] -= 1
        if not self._diverted[get_ident()]:
            del self._diverted[get_ident()]


@contextmanager
def diverted_stdout() -> Iterator[None]:
    """Send to stderr what this thread prints meanwhile.

    Python's own `redirect_stdout` moves the stream of all threads, and two that overlap leave it moved. Bytes that are
    written to the file descriptor itself, by C code or child processes, are not diverted.
    """
    if sys.stdout is None or sys.stderr is None:  # as in a program without a console
        yield
        return
    with _lock:
        stream = sys.stdout
        if not isinstance(stream, _Stdout):
            sys.stdout = stream = _Stdout(stream)
        stream._enter()
    try:
        yield
    finally:
        with _lock:
            stream._leave()
            if not stream._diverted and sys.stdout is stream:  # code may have put a stream of its own around this one
                sys.stdout = stream._stream
