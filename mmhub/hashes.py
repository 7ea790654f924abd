"""Hashes of files, remembered: a file that no one wrote to since is not read again.

What is known of a file is kept under its device, inode, size, mtime and ctime, so that any write makes it unknown. The
record is one small JSON file in mmhub's cache folder, replaced whole; losing it costs a second of hashing. Where a file
system tells no change of content (Windows has no ctime), nothing is remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mmhub.discovery import cache_folder

MAX_FILES = 2048  # about 500 kB; the oldest are forgotten
RACY_SECONDS = 2.0  # a file written this recently could be written again within one tick of a coarse clock, as FAT's
_FINE_SECONDS = 0.1  # ten ticks of a slow kernel's clock, where that is what times come from
_NAME = "hashes.json"
_FORMAT = 1
_BLOCK = 2**20

Facts = dict[str, Any]


def sha256_of(path: Path, *, fresh: bool = False) -> str:
    """Return the SHA-256 of a file as hex, read at most once for as long as nobody writes to it.

    `fresh` reads it in any case, as a check for a failing disk should.
    """
    return str(_remembered(path, "sha256", fresh))


def git_sha1_of(path: Path, *, fresh: bool = False) -> str:
    """Return the name git gives a file's content: the SHA-1 of its header and bytes, as hex."""
    return str(_remembered(path, "git", fresh))


def facts_of(path: Path) -> Facts:
    """Return what is remembered of a file as it is now, {} if nothing."""
    try:
        known = _read().get(_key(os.stat(path)))
    except OSError:
        return {}
    return dict(known) if known else {}


def remember(path: Path, facts: Mapping[str, Any], *, written_by_us: bool = False) -> None:
    """Add facts about a file as it is now; a recently written one only if its writer is the one to know them."""
    try:
        stat = os.stat(path)
    except OSError:
        return
    if written_by_us or not _is_racy(stat):
        _add(_key(stat), facts)


def git_hasher(size: int) -> Any:
    """Return a hash object that yields git's name for a blob of `size` bytes."""
    hasher = hashlib.sha1(usedforsecurity=False)
    hasher.update(b"blob %d\0" % size)
    return hasher


def _remembered(path: Path, kind: str, fresh: bool) -> str:
    known = None if fresh else _read().get(_key(os.stat(path)), {}).get(kind)
    if isinstance(known, str):
        return known
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = _read_hash(file, kind, before.st_size)
        after = os.fstat(file.fileno())
    if _key(before) == _key(after) and not _is_racy(after):
        _add(_key(after), {kind: digest})
    return digest


def _read_hash(file: BinaryIO, kind: str, size: int) -> str:
    hasher = git_hasher(size) if kind == "git" else hashlib.sha256()
    while block := file.read(_BLOCK):
        hasher.update(block)
    return str(hasher.hexdigest())


def _key(stat: os.stat_result) -> str:
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _is_racy(stat: os.stat_result) -> bool:
    fine = stat.st_ctime_ns % 1_000_000 != 0  # a clock of whole milliseconds or seconds never says so
    seconds = min(RACY_SECONDS, _FINE_SECONDS) if fine else RACY_SECONDS
    return time.time() - max(stat.st_mtime, stat.st_ctime) < seconds


# -- the record -------------------------------------------------------------------------------------------------

_last: tuple[str, dict[str, Facts]] = ("", {})


def _file() -> Path:
    return Path(cache_folder()) / _NAME


def _read() -> dict[str, Facts]:
    """The record, parsed again only when it was replaced."""
    global _last
    if os.name != "posix":
        return {}
    try:
        path = os.path.join(cache_folder(), _NAME)
        if f"{path}:{_key(os.stat(path))}" != _last[0]:
            with open(path, "rb") as file:
                version = f"{path}:{_key(os.fstat(file.fileno()))}"
                _last = (version, _parse(file.read()))
    except OSError:
        return {}
    return _last[1]


def _parse(content: bytes) -> dict[str, Facts]:
    try:
        table = json.loads(content)
        files = table["files"] if table["format"] == _FORMAT else {}
        return {str(key): facts for key, facts in files.items() if isinstance(facts, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _add(key: str, facts: Mapping[str, Any]) -> None:
    """Write the record anew; if that cannot be done, the next load hashes again, and nothing else happens."""
    if os.name != "posix":
        return
    with suppress(OSError), _only_one():
        files = dict(_read())
        files[key] = files.pop(key, {}) | dict(facts)
        kept = dict(list(files.items())[-MAX_FILES:])
        aside = _file().with_name(f"hashes.{os.getpid()}.tmp")
        try:
            aside.write_text(json.dumps({"format": _FORMAT, "files": kept}, separators=(",", ":")))
            os.replace(aside, _file())
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def _only_one() -> Iterator[None]:
    """Let no two processes or threads change the record at once: one would lose what the other adds."""
    import fcntl

    _file().parent.mkdir(parents=True, exist_ok=True)
    with _file().with_name("hashes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
