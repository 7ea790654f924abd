"""Decoding in another process, which may crash, hang or be taken over by what it decodes, and is then replaced.

The process has no secrets in its environment, no files but its pipes, and bounds on memory and time. It is no sandbox:
it runs as the same user. What it sends is taken for a stranger's, too: JSON of a few fields and raw numbers, checked
for type and size, never a pickle. What runs in it is a function of an installed plugin, never one that data names.
"""

from __future__ import annotations

import atexit
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmhub.errors import InputError, MmhubError
from mmhub.interfaces.raw import Bounds, Policy
from mmhub.interfaces.wire import read_message, write_message

Decoded = Iterator[Mapping[str, Any] | NDArray[Any]]
# (content, name in messages, policy, **settings) -> facts as JSON data, then arrays of uint8 or float32
Decoder = Callable[..., Decoded]

_KINDS = {"uint8": 1, "float32": 4}  # bytes of each number
_AXES = 3
_TEXT = 500  # characters of a message
_HEADS = 1 << 16  # bytes of a message that says that a process is there
_MESSAGES, _SHORT = 16, 2**16  # messages of one input: so many, and one more for each so many bytes
_START_SECONDS = 120.0  # a busy machine
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP", "PYTHONHOME")
_LIMITS = ("max_bytes", "max_pixels", "max_seconds", "max_channels", "max_ratio", "ratio_floor")


class Busy(InputError):
    """No process became free in time: it says nothing of the input."""


def decode_apart(
    decoder: Decoder, content: bytes, name: str, policy: Policy, bounds: Bounds | None, **settings: Any
) -> Decoded:
    """Yield what `decoder(content, name, policy, **settings)` yields: facts, then arrays of uint8 or float32.

    `decoder` is a function of a module that imports little, and needs no more of the policy than its numbers;
    `settings` are JSON data. Without `bounds` it runs in this process.

    Raises:
        Busy: all processes were at work all the time. InputError: the decoder's own, or it took too much memory or
            time, or its process died.
    """
    if bounds is None:
        return decoder(content, name, policy, **settings)
    target = f"{decoder.__module__}:{decoder.__qualname__}"
    request: dict[str, Any] = {"target": target, "name": name[:_TEXT], "settings": settings, "bounds": asdict(bounds)}
    request["policy"] = {key: getattr(policy, key) for key in _LIMITS}
    return _pool(bounds).run(request, content, name)


class _Pool:
    """Processes of the same bounds, started when they are needed; at most `bounds.workers` decode at a time."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._turns = threading.BoundedSemaphore(bounds.workers)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def run(self, request: Mapping[str, Any], content: bytes, name: str) -> Decoded:
        if not self._turns.acquire(timeout=self._bounds.seconds):
            raise Busy(f"{name} could not be decoded: all {self._bounds.workers} decoders are busy", "try again")
        worker = None
        try:
            worker = self._take()
            yield from worker.run(request, content, name)
        finally:
            if worker is not None:
                self._give_back(worker)
            self._turns.release()

    def _take(self) -> _Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive():
                    return worker
                worker.stop()
        return _Worker(self._bounds)

    def close(self) -> None:
        """Stop the processes that nobody uses."""
        with self._lock:
            while self._idle:
                self._idle.pop().stop()

    def _give_back(self, worker: _Worker) -> None:
        if not worker.is_free:
            worker.stop()
            return
        with self._lock:
            self._idle.append(worker)


_pools: dict[tuple[int, Bounds], _Pool] = {}
_pools_lock = threading.Lock()


@atexit.register
def _close() -> None:
    for (process, _), pool in _pools.items():
        if process == os.getpid():
            pool.close()


def _pool(bounds: Bounds) -> _Pool:
    with _pools_lock:  # by process: after a fork, the pipes would be shared
        return _pools.setdefault((os.getpid(), bounds), _Pool(bounds))


class _Worker:
    """One process, which decodes one input after the other until its standard input ends."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-c", "from mmhub.interfaces.decoding import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            cwd=os.path.abspath(os.sep),
        )
        self.is_free = False
        self._cut = False
        self._left = 0.0
        first = self._read(_HEADS, _START_SECONDS)
        if first is None or first[0] != {"ready": True}:
            self.stop()
            raise MmhubError("the process that decodes media does not start", "decode in this one, without a worker")
        self.is_free = True

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, request: Mapping[str, Any], content: bytes, name: str) -> Decoded:
        """Yield what comes. Whoever stops half-way leaves a process that is not free.

        All waiting for it together has `bounds.seconds`; what is done with the answer meanwhile does not count.
        """
        self.is_free = False
        self._left = self._bounds.seconds
        self._write(request, content)
        allowed = Allowance(Policy(**request["policy"]))
        while True:
            message = self._read(min(allowed.left, self._bounds.memory))
            if message is None:
                raise InputError(f"{name} could not be decoded {self._why()}", "it may be damaged or made to harm")
            head, body = message
            if "end" in head:
                self.is_free = True
                return
            if "error" in head:
                self.is_free = head.get("go_on") is True
                raise InputError(_text(head["error"]), _text(head["hint"]) if head.get("hint") else None)
            yield allowed.take(head, body, name)

    def stop(self) -> None:
        with suppress(OSError):
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._process.wait()

    def _why(self) -> str:
        if self._cut:
            return f"within {self._bounds.seconds:g} s"
        return f"within {self._bounds.memory // 2**20} MiB and {self._bounds.seconds:g} s: its decoder died"

    def _write(self, request: Mapping[str, Any], content: bytes) -> None:
        assert self._process.stdin is not None
        with self._timed(), suppress(OSError):  # reading will tell that it is dead
            write_message(self._process.stdin, request, content)

    def _read(self, most: int, seconds: float | None = None) -> tuple[dict[str, Any], bytearray] | None:
        """Read one message of at most so many bytes; None if there is none, or none that could be one."""
        assert self._process.stdout is not None
        self._left = self._left if seconds is None else seconds
        with self._timed():
            try:
                return read_message(self._process.stdout, most)
            except (OSError, ValueError, RecursionError):
                return None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Kill the process when what is left of its time is over; a timer works for pipes everywhere."""
        since = time.monotonic()
        timer = threading.Timer(max(0.0, self._left), self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._left -= time.monotonic() - since

    def _expire(self) -> None:
        self._cut = True
        self._process.kill()


class Allowance:
    """Takes facts, once, and arrays out of messages as long as they can be what a decoder gives under the policy.

    `left` are the bytes that arrays may still have.
    """

    def __init__(self, policy: Policy) -> None:
        self.left = max(3 * policy.max_pixels, 4 * policy.max_samples)
        self._messages = _MESSAGES + self.left // _SHORT
        self._told = False

    def take(self, head: Mapping[str, Any], body: bytearray, name: str) -> Mapping[str, Any] | NDArray[Any]:
        facts, shape, kind = head.get("facts"), head.get("shape"), head.get("kind")
        self._messages -= 1
        if isinstance(facts, dict) and not body and not self._told:
            self._told = True
            return facts
        if not isinstance(shape, list) or not isinstance(kind, str) or kind not in _KINDS:
            raise _nonsense(name)
        if not 0 < len(shape) <= _AXES or not all(type(size) is int and size >= 0 for size in shape):
            raise _nonsense(name)
        self.left -= len(body)
        if math.prod(shape) * _KINDS[kind] != len(body) or self.left < 0 or self._messages < 0:
            raise _nonsense(name)
        return np.frombuffer(body, kind).reshape(shape)


def _nonsense(name: str) -> InputError:
    return InputError(f"{name} could not be decoded: its decoder answered nonsense", "it may be made to harm")


def _text(value: Any) -> str:
    """One line of a message that a stranger may have written."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:_TEXT])


def _environment() -> dict[str, str]:
    """What a process needs to start, and no tokens. Modules are found where this process finds them."""
    found = {name: os.environ[name] for name in _KEPT if name in os.environ}
    found |= {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path)}
    return found | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
