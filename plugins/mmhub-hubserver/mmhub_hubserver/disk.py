"""Writing to the data folder: everything goes to tmp/, is synced and renamed, and counts towards the quota.

A crash leaves the old state or the new one, and a full disk is a refusal (507) that leaves nothing behind.
"""

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mmhub_hubserver.errors import StorageFailed

_FULL = {errno.ENOSPC, errno.EDQUOT}


class Disk:
    """The temporary folder of a store and the number of bytes it may hold (`quota`, None for no limit)."""

    def __init__(self, tmp: Path, quota: int | None = None) -> None:
        self.tmp, self.quota = tmp, quota
        self._used, self._promised = 0, 0
        self._lock = threading.Lock()

    def sweep(self) -> None:
        """Remove what a crash left in tmp/."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(exist_ok=True)

    def recount(self, measure: Callable[[], int]) -> None:
        """Measure anew what is used; between measurements only additions are counted."""
        if self.quota is not None:
            used = measure()
            with self._lock:
                self._used = used

    @contextmanager
    def promised(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes of the quota while they are being written.

        Raises:
            StorageFailed: they do not fit.
        """
        with self._lock:
            taken = self._used + self._promised
            if self.quota is not None and size and taken + size > self.quota:
                raise StorageFailed(
                    f"The hub is full: {taken} of {self.quota} bytes are used and {size} more do not fit. "
                    "Whoever runs it can free space with `mmhub hub gc`, or serve with a larger --quota."
                )
            self._promised += size
        try:
            yield
        finally:
            with self._lock:
                self._promised -= size

    @contextmanager
    def staged(self) -> Iterator[IO[bytes]]:
        """Give a file in tmp/ that is gone afterwards unless it was published."""
        with refusing_when_full():
            file = tempfile.NamedTemporaryFile(dir=self.tmp, delete=False)  # noqa: SIM115 - closed below
            try:
                with file:
                    yield file
            finally:
                Path(file.name).unlink(missing_ok=True)

    def publish(self, file: IO[bytes], path: Path) -> None:
        """Move a staged file to `path`, durably; the folder of `path` exists."""
        self.harden(file)
        self.keep(file, path)
        sync_folder(path.parent)

    def harden(self, file: IO[bytes]) -> None:
        """Bring a staged file onto the disk under its temporary name."""
        file.flush()
        os.fsync(file.fileno())

    def keep(self, file: IO[bytes], path: Path) -> None:
        """Move a staged file to `path` without waiting for the disk: as it is, a power cut may lose it."""
        file.flush()
        replaced = _size(path)
        os.replace(file.name, path)
        self._count(os.fstat(file.fileno()).st_size - replaced)

    def discard(self, path: Path) -> None:
        """Remove a file or folder, if it is there, and count it no longer."""
        if path.is_dir():
            size = usage(path)
            shutil.rmtree(path, ignore_errors=True)
        else:
            size = _size(path)
            path.unlink(missing_ok=True)
        self._count(-size)

    def write(self, path: Path, content: bytes) -> None:
        """Write a small file atomically and durably, with its folders."""
        make_folder(path.parent)
        with self.staged() as file:
            file.write(content)
            self.publish(file, path)

    def _count(self, size: int) -> None:
        with self._lock:
            self._used += size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def usage(folder: Path) -> int:
    """Return the bytes of all files below a folder, a file with several names counted once."""
    total, seen = 0, set()
    waiting = [str(folder)]
    while waiting:
        try:
            found = list(os.scandir(waiting.pop()))
        except FileNotFoundError:
            continue
        for item in found:
            try:
                facts = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if item.is_dir(follow_symlinks=False):
                waiting.append(item.path)
            elif facts.st_nlink == 1 or facts.st_ino not in seen:
                seen.add(facts.st_ino) if facts.st_nlink > 1 else None
                total += facts.st_size
    return total


@contextmanager
def refusing_when_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFailed("There is no space left on the hub's disk; nothing was stored.") from None


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
