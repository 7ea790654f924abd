"""Hold this environment, or one file, alone: others who want it wait."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError
from mmhub.files import disk_errors
from mmhub.install.places import prefix, state_folder

_WAIT = 600  # seconds for another process that changes this environment


@contextmanager
def locked(*, to_change: bool, waiting: Any = None) -> Iterator[bool]:
    """Hold this environment alone. Waits for another process that does, after calling `waiting()` once.

    Yields False if it is not held: without `to_change`, where nobody has changed it or this user may not.

    Raises:
        MmhubError: the other one takes more than ten minutes.
    """
    file = state_folder() / ".lock"
    if not to_change and not file.exists():
        yield False
        return
    try:
        descriptor = _open(file)
    except OSError:
        if not to_change:
            yield False
            return
        with disk_errors("this environment", prefix()):
            raise
    with _held(descriptor, waiting):
        yield True


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold a lock file alone, waiting as long as ten minutes for another process that does."""
    with _held(_open(file), None):
        yield


def _open(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError:  # of another user who shares this environment: enough to wait for
        if not file.exists():
            raise
        return os.open(file, os.O_RDONLY)


@contextmanager
def _held(descriptor: int, waiting: Any) -> Iterator[None]:
    until, told = time.monotonic() + _WAIT, False
    try:
        while not _try_lock(descriptor):
            if waiting and not told:
                waiting()
            told = True
            if time.monotonic() > until:
                raise MmhubError("another mmhub is changing this environment for more than ten minutes", "end it first")
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock a file; False if another process has.

    Raises:
        MmhubError: the file system cannot lock.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise MmhubError(
                f"the file system of '{prefix()}' cannot lock files ({error.strerror})", "use one that can"
            ) from None
        return False
    return True
