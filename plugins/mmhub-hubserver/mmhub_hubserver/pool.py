"""Large files by sha256, each stored once and hard-linked into every repository it was uploaded to.

The link at `<repo>.git/lfs/objects/ab/cd/<sha256>` (git-lfs's own place) is the proof that the repository may show the
file, so knowing a hash is not enough to read another repository's file.
"""

import fcntl
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmhub_hubserver.disk import Disk, make_folder, refusing_when_full, sync_folder
from mmhub_hubserver.errors import EntryNotFound, Invalid

MAX_BYTES = 5 << 40  # of one file


class Pool:
    def __init__(self, folder: Path, lock: Path, disk: Disk) -> None:
        self.folder, self._lock_file, self._disk = folder, lock, disk

    def path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def files(self) -> Iterator[Path]:
        yield from sorted(self.folder.glob("??/*"))

    def add_stream(self, chunks: Iterable[bytes], sha256: str, size: int) -> None:
        """Store a file from a stream that must have exactly this size and sha256.

        Raises:
            Invalid: it has not.
            StorageFailed: the disk or the quota is full; the latter is told before anything is read.
        """
        digest, received = hashlib.sha256(), 0
        with self._disk.promised(size), self._disk.staged() as file:
            for chunk in chunks:
                received += len(chunk)
                if received > size:
                    raise Invalid(f"The upload is longer than the announced {size} bytes.")
                digest.update(chunk)
                file.write(chunk)
            if received != size or digest.hexdigest() != sha256:
                raise Invalid(f"The upload does not match its announced size ({size} bytes) and sha256 ({sha256}).")
            path = self.path(sha256)
            make_folder(path.parent)
            with self._locked():
                if path.exists() and path.stat().st_size == size:
                    os.utime(path)  # so that gc sees it is wanted again
                else:
                    self._disk.publish(file, path)

    def link(self, sha256: str, target: Path) -> None:
        """Hard-link a file to `target`, durably.

        Raises:
            EntryNotFound: it is not in the pool.
        """
        with refusing_when_full():
            make_folder(target.parent)
            with self._locked():
                try:
                    os.link(self.path(sha256), target)
                except FileNotFoundError:
                    raise EntryNotFound(f"No file with sha256 {sha256} was uploaded.") from None
                except FileExistsError:
                    return
            sync_folder(target.parent)

    def drop_unlinked(self, before: float, released: Collection[str] = ()) -> Iterator[int]:
        """Remove files that no repository links and that were last touched before this time; yield their sizes.

        To take the last link away touches a file too, except those that were `released` for being old.
        """
        for path in self.files():
            with self._locked(), suppress(FileNotFoundError):
                facts = path.stat()
                touched = facts.st_mtime if path.name in released else facts.st_ctime
                if facts.st_nlink == 1 and touched <= before:
                    path.unlink()
                    yield facts.st_size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep a file from being removed between being found and being linked."""
        with open(self._lock_file, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def link_path(git_dir: Path, sha256: str) -> Path:
    return git_dir / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256
