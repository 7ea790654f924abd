"""Where computed features of frozen encoders are kept: a folder for each set, bounded in size.

A set is complete or not there: it is written aside and renamed, and removed the same way. A process that reads one
holds a lock on its manifest, and what is held is never removed. `mmhub.engine.features` makes and reads sets.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmhub.discovery import cache_folder
from mmhub.files import alive, publish

MANIFEST = "manifest.json"
FORMAT = 1
_KEY = "[0-9a-f]{32}"  # what the folder of a set is called
_STALE = 86_400.0  # seconds after which nobody writes to an unfinished folder any more


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """One set of features on disk: bytes, and when it was last used in seconds since 1970."""

    path: Path
    size: int
    used: float
    facts: dict[str, Any] = field(repr=False)

    @property
    def title(self) -> str:
        """What they are features of."""
        if not self.facts:
            return "damaged"
        return (
            f"{self.facts['modality']} by {self.facts['encoder']}, {self.facts['rows']} rows of {self.facts['source']}"
        )


def features_folder() -> Path:
    """Return the folder of all sets, in mmhub's cache folder."""
    return Path(cache_folder()) / "features"


def read_manifest(path: Path) -> dict[str, Any]:
    """Return what a set's manifest says.

    Raises:
        FileNotFoundError: there is none. ValueError: it is not one of this version.
    """
    facts = json.loads((path / MANIFEST).read_bytes())
    needed = {"modality", "encoder", "source", "rows", "shards", "unreadable"}
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not needed <= facts.keys():
        raise ValueError("its manifest is not one of this version")
    return facts


def feature_sets() -> list[FeatureSet]:
    """Return the sets, the least recently used first; the facts of a damaged one are empty."""
    found = []
    for path in features_folder().glob("*"):
        if not re.fullmatch(_KEY, path.name):
            continue
        with suppress(OSError):  # it was removed just now
            size = sum(file.stat().st_size for file in path.iterdir())
            found.append(FeatureSet(path=path, size=size, used=_used(path), facts=_facts(path)))
    return sorted(found, key=lambda one: one.used)


def _used(path: Path) -> float:
    try:
        return (path / MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _facts(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path)
    except (OSError, ValueError):
        return {}


def hold(path: Path, owner: object) -> None:
    """Keep a set from being removed for as long as `owner` lives, and note that it was used."""
    file = os.open(path / MANIFEST, os.O_RDONLY)
    weakref.finalize(owner, os.close, file)
    with suppress(OSError):
        os.utime(path / MANIFEST)
        _lock(file, exclusive=False)


@contextmanager
def new_set(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes the set `path` when the block ends well, and vanishes when it does not."""
    aside = _aside(path)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        publish(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node()) or "-"


def remove_set(path: Path) -> bool:
    """Remove a set that nobody holds; say whether it is gone."""
    aside = _aside(path)
    try:
        with _claimed(path):
            os.rename(path, aside)
    except FileNotFoundError:
        return True
    except OSError:  # in use
        return False
    shutil.rmtree(aside, ignore_errors=True)
    return True


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Hold a set alone, or raise OSError. Windows has no such lock, and renames no folder with an open file anyway.

    The file is opened for writing, for over NFS only then it can be locked exclusively.
    """
    file = None
    with suppress(FileNotFoundError):  # a set without a manifest can be held by nobody
        file = os.open(path / MANIFEST, os.O_RDWR) if os.name == "posix" else None
    try:
        if file is not None:
            _lock(file, exclusive=True)
        yield
    finally:
        if file is not None:
            os.close(file)


def make_room(needed: int, limit: int) -> bool:
    """Remove sets, the least recently used first, until `needed` bytes fit under `limit`; say whether they do.

    None is removed for what would not fit even then.
    """
    sweep()
    sets = feature_sets()
    total = sum(one.size for one in sets)
    if total + needed > limit:
        sets = [one for one in sets if not _in_use(one.path)]
        if needed and total - sum(one.size for one in sets) + needed > limit:
            return False
    for one in sets:
        if total + needed <= limit:
            break
        total -= one.size if remove_set(one.path) else 0
    return total + needed <= limit


def _in_use(path: Path) -> bool:
    try:
        with _claimed(path):
            return False
    except OSError:
        return True


def sweep() -> None:
    """Remove what killed processes have left unfinished; on other machines they are taken for killed after a day."""
    for path in features_folder().glob(".*.tmp"):
        match = re.fullmatch(rf"\.{_KEY}\.(.+)\.(\d+)\.tmp", path.name)
        with suppress(OSError):
            old = time.time() - path.stat().st_mtime > _STALE
            if match and (old or (match[1] == _host() and not alive(int(match[2])))):
                shutil.rmtree(path, ignore_errors=True)


def _lock(file: int, *, exclusive: bool) -> None:
    """Lock at once or raise OSError."""
    if os.name == "posix":
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
