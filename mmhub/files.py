"""Durable files: everything mmhub publishes or resumes from is written aside, synced, and renamed into place."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmhub.errors import MmhubError


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

    An older `target` is replaced; a crash between the two renames leaves it beside as `.NAME.old`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        for path in (*sorted(aside.rglob("*")), aside):
            sync(path)
        _swap(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(new, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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
    number = getattr(error, "errno", None)
    text = str(error)
    if number == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        return "no space left on the device", "free some space; nothing that was there before is lost"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return os.strerror(number).lower(), "choose a folder you may write to"
    return None
