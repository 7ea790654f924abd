"""Watch what code does to the outside: connections, and files written outside one folder. Both are refused and noted.

Python's audit events (PEP 578) tell of everything done in Python; what a library writes from C, the caller must look
for itself. An audit hook cannot be taken away again, so there is one for the process, which does nothing in between.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NETWORK = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
_WRITES = {  # event: how many of its first arguments are paths that change
    "os.chmod": 1, "os.link": 2, "os.mkdir": 1, "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.symlink": 2,
    "os.truncate": 1, "os.utime": 1,
}  # fmt: skip
_FREE = ("/dev/", "/proc/")


@dataclass
class Watch:
    """What was seen. `folder` is where writing is allowed, None for everywhere."""

    folder: Path | None
    connections: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _NETWORK:
            self._connection(event, args)
        elif event == "open":
            self._open(*args)
        elif event in _WRITES and self.folder is not None:
            for path in args[: _WRITES[event]]:
                self._write(path)

    def _connection(self, event: str, args: tuple[Any, ...]) -> None:
        address = args[0] if event.endswith(("getaddrinfo", "byname")) else args[1]
        if isinstance(address, (tuple, list)):  # a path is a socket of this machine's own services
            address = ":".join(map(str, address[:2]))
        elif "info" not in event and "byname" not in event:
            return
        self.connections.append(f"{event}({address})")
        raise ConnectionRefusedError(f"the contract kit allows no connection: {event}({address})")

    def _open(self, path: Any, mode: str | None, flags: int) -> None:
        writing = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writing and self.folder is not None:
            self._write(path)

    def _write(self, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        real = os.path.realpath(os.fsdecode(path))
        if real.startswith(_FREE) or "__pycache__" in real or Path(real).is_relative_to(self.folder or "/"):
            return
        self.writes.append(real)
        raise PermissionError(f"the contract kit allows no writing here: {real}")


_watch: Watch | None = None
_installed = False


@contextmanager
def watched(folder: Path | None) -> Iterator[Watch]:
    """Refuse connections, and writing outside `folder` if one is given, inside the block."""
    global _watch, _installed
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True
    before, _watch = _watch, Watch(folder)
    try:
        yield _watch
    finally:
        _watch = before


def _audit(event: str, args: tuple[Any, ...]) -> None:
    watch = _watch
    if watch is not None and (event == "open" or event in _NETWORK or event in _WRITES):
        watch.see(event, args)
