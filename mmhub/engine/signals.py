"""Stop signals while training: the first lets the step finish and saves, a second Ctrl-C stops at once.

A second SIGTERM within half a minute does not: a cluster may send it to `torchrun` and to each process, and `torchrun`
passes it on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_PATIENCE = 30.0  # seconds after which a second signal of any kind stops at once


class StopSignal:
    """Remember the first Ctrl-C or SIGTERM; `number` is 0 until then."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.number, self._since = 0, 0.0
        self._say = say

    def __bool__(self) -> bool:
        return self.number != 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Catch signals in the main thread, where alone Python allows it; the handlers before are put back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        main = os.getpid()

        def on_signal(number: int, frame: Any) -> None:
            if os.getpid() != main:  # a decoding worker, which Ctrl-C reaches too; the main process ends it
                return
            if self.number:
                if self.number == number == signal.SIGINT or time.monotonic() - self._since > _PATIENCE:
                    raise KeyboardInterrupt
                return
            self.number, self._since = number, time.monotonic()
            self._say("stopping after this step; once more to stop at once")

        old = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
