"""Durable files: everything mmhub publishes or resumes from is written aside, synced, and renamed into place."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmhub.errors import MmhubError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file durably, replacing an old one at once or not at all."""
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    An older `target` is replaced, where the file system can swap two names at once; elsewhere a crash between the two
    renames leaves it beside as `.NAME.old`. What a killed process left aside is swept up.
    """
    target = Path(os.path.realpath(target))  # a link stays, and what it points to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir()
        yield aside
        publish(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove the unfinished folders of processes that are no more."""
    for path in target.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(target.name)}\.(\d+)\.tmp", path.name)
        if match and (int(match[1]) == os.getpid() or not alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def alive(process: int) -> bool:
    """Say whether a process of this machine is running."""
    if os.name != "posix":  # elsewhere asking means killing
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def publish(new: Path, target: Path) -> None:
    """Sync a folder and all in it, and give it the name `target`; an older one there ends up under the first name.

    Where the file system cannot swap two names, the older one is removed.
    """
    for path in (*sorted(new.rglob("*")), new):
        if not path.is_symlink():
            sync(path)
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once, if the system can (Linux's renameat2 with RENAME_EXCHANGE)."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(current, os.fsencode(one), current, os.fsencode(other), exchange) == 0


@contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn a full disk or missing permission while writing `what` into one line that says what to do."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise MmhubError(f"cannot write {what} to '{folder}': {reason[0]}", reason[1]) from None


def _reason(error: Exception) -> tuple[str, str] | None:
    said = re.search(r"\(os error (\d+)\)", str(error))  # as libraries written in Rust report it
    number = int(said[1]) if said else getattr(error, "errno", None)
    if number in _FULL:
        plain = "no space left on the device" if number == errno.ENOSPC else os.strerror(number).lower()
        told = getattr(error, "strerror", None) or ""
        detail = f" ({told})" if told and told != os.strerror(number) else ""
        return plain + detail, "free some space; nothing that was there before is lost"
    if number == errno.ENAMETOOLONG:
        return os.strerror(number).lower(), "choose a shorter name"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
        return os.strerror(number).lower(), "choose a folder you may write to"
    return None
