"""The process in which strangers' bytes are decoded. It imports little, and bounds itself before it reads any."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import IO, Any

import numpy as np

from mmhub.errors import MmhubError
from mmhub.interfaces.raw import Policy
from mmhub.interfaces.wire import read_message, write_message

_MOST = 2**40  # bytes of an input; whoever asks has bounded it


def main() -> None:
    """Decode what comes on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # what a library prints is no message
        os.dup2(nowhere, number)
    write_message(sink, {"ready": True})
    with suppress(OSError):
        while message := read_message(source, _MOST):
            _answer(sink, *message)


def _answer(sink: IO[bytes], request: Mapping[str, Any], content: bytearray) -> None:
    policy = Policy(paths=False, **request["policy"])
    try:
        module, _, name = request["target"].partition(":")
        decoder = getattr(import_module(module), name)
        _bound(**request["bounds"])
        for found in decoder(bytes(content), request["name"], policy, **request["settings"]):
            if isinstance(found, np.ndarray):
                whole = np.ascontiguousarray(found)
                write_message(sink, {"shape": whole.shape, "kind": whole.dtype.name}, whole.reshape(-1).data)
            else:
                write_message(sink, {"facts": found})
        write_message(sink, {"end": True})
    except MmhubError as error:
        _refuse(sink, error.message, error.hint or "", go_on=True)
    except MemoryError:
        most = request["bounds"]["memory"] // 2**20
        _refuse(sink, f"{request['name']} could not be decoded within {most} MiB", "make it smaller", go_on=False)
        sys.exit(1)


def _refuse(sink: IO[bytes], message: str, hint: str, go_on: bool) -> None:
    write_message(sink, {"error": message[:2000], "hint": hint[:2000], "go_on": go_on})


def _bound(memory: int, seconds: float, workers: int) -> None:
    """Limit this process; what it was allowed to use already is counted in."""
    try:
        import resource
    except ImportError:  # Windows: the process that asks watches the time
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime + seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, limit in limits.items():
        with suppress(OSError, ValueError):  # macOS refuses some
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
