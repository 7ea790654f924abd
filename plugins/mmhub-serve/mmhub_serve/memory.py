"""What the server's memory comes to: how much is kept for the next request, and when the rest goes to the system."""

from __future__ import annotations

import ctypes
import os
import sys

_CAPACITY, _FORMER = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"


def keep_few_kernels() -> None:
    """Let oneDNN, which makes a kernel for each shape on a CPU, keep 256 of them instead of 1,024, for the process.

    Requests come in ever new shapes, and a recurrent layer's kernel takes 0.2 MB. Nothing is done where the environment
    says how many; after the first kernel it is too late.
    """
    if _FORMER not in os.environ:
        os.environ.setdefault(_CAPACITY, "256")


def give_back() -> None:
    """Let glibc return the free pages of its heaps, which takes it milliseconds; other C libraries: nothing.

    By itself it returns only what is free at the end of a heap, and a few bytes that stay there, such as a kernel for a
    new shape, hold the rest.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Rests:
    """Says when to give memory back: once the server rests after it has worked, and now and then while it works on."""

    _REST, _EVERY = 0.5, 60.0  # seconds

    def __init__(self, now: float) -> None:
        self._owes = True  # what loading has freed
        self._since = self._worked = now
        self._answered = 0

    def due(self, now: float, busy: bool, answered: int) -> bool:
        """Is it time? `answered` counts requests: some begin and end between two looks."""
        if busy or answered != self._answered:
            self._since = self._since if self._owes else now
            self._owes, self._worked, self._answered = True, now, answered
        due = self._owes and (now - self._worked >= self._REST or now - self._since >= self._EVERY)
        self._owes = self._owes and not due
        return due
