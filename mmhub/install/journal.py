"""Change the environment by renames alone, in steps that are written down first, so that each can be taken back.

A transaction is a folder `share/mmhub/transactions/NNNN/` of the environment. The new files are unpacked into its
`new/` while nothing else changes; then the old ones are renamed into `old/` and the new ones out of `new/`.
`record.json` lists both beforehand. Taking back renames in the other direction whatever is there, so it may be cut
short and done again.
"""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError, NotFoundError, PluginError, TrustError
from mmhub.files import disk_errors, sha256, write_file
from mmhub.install import asked
from mmhub.install.environment import Installed, installed, prefix, read_folder, site_folders, site_names, state_folder
from mmhub.records import CORE

KEPT = 3  # transactions whose old files are kept
_OPEN = ("started", "undoing")


@dataclass
class Transaction:
    """One change. `state`: "started", "finished", "undoing" or "undone"."""

    folder: Path
    record: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.folder.name)

    @property
    def new(self) -> Path:
        """Where the new files are unpacked, laid out as in the environment."""
        return self.folder / "new"

    @property
    def old(self) -> Path:
        return self.folder / "old"

    def version_after(self, name: str) -> str:
        """Return the version that a distribution has after it, '' if none."""
        return str(self.record["after"].get(name, "")).partition(" ")[0]

    def write(self, **changes: Any) -> None:
        """Change the record durably."""
        self.record |= changes
        write_file(self.folder / "record.json", json.dumps(self.record, indent=1) + "\n")


def begin(command: str) -> Transaction:
    """Open a transaction."""
    numbers = [int(folder.name) for folder in _folders()]
    folder = state_folder() / f"{max(numbers, default=0) + 1:04d}"
    before = {one.name: one.version for one in installed().values() if one.own}
    record = {"schema": 1, "command": command, "state": "started", "when": _now(), "asked": asked.read_asked()}
    with disk_errors("a transaction", folder.parent):
        folder.mkdir(parents=True)
        one = Transaction(folder, record | {"before": before, "remove": [], "add": [], "after": {}, "left": {}})
        one.write()
        one.new.mkdir()
    return one


def unpacked(one: Transaction) -> dict[str, Installed]:
    """Return the distributions in a transaction's `new/`."""
    folders = {one.new / relative for relative in site_names()}
    return {dist.name: dist for folder in sorted(folders) for dist in read_folder(folder)}


def startup_files(one: Transaction) -> list[str]:
    """Return the new files that Python runs whenever it starts (*.pth), but for those of editable plugins."""
    found = []
    for dist in unpacked(one).values():
        if not dist.direct_url.get("dir_info", {}).get("editable"):
            rows = csv.reader(dist.read("RECORD").splitlines())
            found += [f"{dist}: {row[0]}" for row in rows if row and row[0].endswith(".pth") and "/" not in row[0]]
    return found


def check_files(one: Transaction, leaving: Iterable[Installed]) -> None:
    """Refuse new files that would replace files of distributions that stay and are protected.

    Raises:
        TrustError: names both, and the file.
    """
    new, gone = set(_files_below(one.new)), {dist.name for dist in leaving}
    core = tuple(f"{site}{os.sep}{CORE}{os.sep}" for site in site_names())
    for file in sorted(new):
        if file.startswith(core) and CORE not in unpacked(one):
            raise TrustError(f"a package brings the file '{file}', which is a place of mmhub's own", "do not use it")
    for dist in installed().values():
        if not dist.own or not dist.protected or dist.name in gone or not (dist.info / "RECORD").is_file():
            continue
        taken = new.intersection(dist.files)
        if taken:
            raise TrustError(f"a package would replace '{min(taken)}', a file of {dist}", "do not use it")


def commit(one: Transaction, leaving: Sequence[Installed]) -> None:
    """Take the files of `leaving` out and put those of `new/` in. If that fails, everything is as before.

    Raises:
        MmhubError: it failed; says why.
    """
    add = _files_below(one.new)
    remove = {file for dist in leaving for file in dist.files} - _others_files(leaving)
    remove |= {file for file in add if os.path.lexists(prefix() / file)}
    after = {dist.name: _fingerprint(dist) for dist in unpacked(one).values()}
    left = {dist.name: _fingerprint(dist) for dist in leaving}
    one.write(remove=sorted(remove), add=add, after=after, left=left)
    with disk_errors("plugins", prefix()):
        for file in sorted(remove):
            _move(file, prefix(), one.old)
        _prune(remove)
        for file in add:
            _move(file, one.new, prefix())
    one.write(state="finished")
    shutil.rmtree(one.new, ignore_errors=True)
    _forget_old()


def undo(one: Transaction) -> None:
    """Put the environment back to what it was before a transaction, however far that got. May be repeated."""
    if one.record["state"] == "finished":
        one.write(state="undoing")
    with disk_errors("plugins", prefix()):
        for file in one.record["add"]:
            if not os.path.lexists(one.new / file):
                _move(file, prefix(), one.new)
        _prune(one.record["add"])
        for file in one.record["remove"]:
            _move(file, one.old, prefix())
    if asked.read_asked() != one.record["asked"]:
        asked.write_asked(one.record["asked"])
    with suppress(OSError):  # on a full disk it stays as it is, and is looked at again next time
        one.write(state="undone")
        for folder in (one.new, one.old):
            shutil.rmtree(folder, ignore_errors=True)


def repair() -> str:
    """Take back what a killed process left unfinished; return a line that says so, '' if there was nothing."""
    broken = [one for one in _all() if one.record["state"] in _OPEN]
    for one in reversed(broken):
        undo(one)
    if not broken:
        return ""
    return f"an unfinished `mmhub plugins {broken[0].record['command']}` was taken back; plugins are as before it"


def last_change() -> Transaction:
    """Return the newest transaction that can be taken back.

    Raises:
        NotFoundError: there is none. PluginError: somebody else has changed the same distributions since.
    """
    finished = [one for one in _all() if one.record["state"] == "finished"]
    if not finished:
        raise NotFoundError("no change of plugins is recorded in this environment", "there is nothing to roll back")
    one = finished[-1]
    if one.record["remove"] and not one.old.is_dir():
        raise NotFoundError(
            f"the files that change {one.number} replaced are no longer kept (only those of {KEPT} changes are)",
            "`mmhub plugins restore LOCK` installs what a lock lists",
        )
    now = {dist.name: _fingerprint(dist) for dist in installed().values() if dist.own}
    for name in sorted({*one.record["after"], *one.record["left"]}):
        if now.get(name, "") != one.record["after"].get(name, ""):
            raise PluginError(
                f"'{name}' was changed by another program since mmhub did, so that cannot be rolled back",
                f"install what you want to have, e.g. `mmhub plugins install {name}`",
            )
    return one


def differences(one: Transaction) -> list[tuple[str, str, str]]:
    """Return (name, version before, version after) of what a transaction changed, '' where there is none."""
    before, left = one.record["before"], one.record["left"]
    names = sorted({*one.record["after"], *left})
    return [(name, before[name] if name in left else "", one.version_after(name)) for name in names]


def pins_of_history() -> dict[tuple[str, str], dict[str, str]]:
    """Return {(name, version): {url, sha256, ...}} of what finished transactions installed."""
    rows = [row for one in _all() if one.record["state"] == "finished" for row in one.record.get("pins", [])]
    return {(row["name"], row["version"]): row for row in rows}


def _all() -> list[Transaction]:
    """Every transaction, oldest first, but for those that were killed before their first line."""
    found = []
    for folder in _folders():
        try:
            record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            assert isinstance(record["state"], str)
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise MmhubError(f"{folder / 'record.json'} cannot be read: {error!r}", f"delete '{folder}'") from None
        found.append(Transaction(folder, record))
    return found


def _folders() -> list[Path]:
    return sorted((path for path in state_folder().glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def _forget_old() -> None:
    finished = [one for one in _all() if one.record["state"] == "finished"]
    for one in finished[:-KEPT]:
        shutil.rmtree(one.old, ignore_errors=True)


def _fingerprint(dist: Installed) -> str:
    """What tells whether a distribution was changed: its version and the hash of its list of files."""
    record = dist.info / "RECORD"
    return f"{dist.version} {sha256(record) if record.is_file() else ''}"


def _others_files(leaving: Sequence[Installed]) -> set[str]:
    """The files that distributions which stay claim, too: a RECORD can list what is not its own."""
    names = {dist.name for dist in leaving}
    staying = [dist for dist in installed().values() if dist.own and dist.name not in names]
    return {file for dist in staying if (dist.info / "RECORD").is_file() for file in dist.files} if leaving else set()


def _files_below(folder: Path) -> list[str]:
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in (*files, *links)]
    return sorted(found)


def _move(file: str, source: Path, target: Path) -> None:
    """Rename a file from one root to the other; nothing happens where it is not there (any more)."""
    if not os.path.lexists(source / file):
        return
    end = target / file
    end.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source / file, end)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy2(source / file, end, follow_symlinks=False)  # a link inside the environment leads elsewhere
        os.unlink(source / file)


def _prune(files: Iterable[str]) -> None:
    """Remove what Python compiled from files that are gone, and folders that are empty now."""
    root = prefix()
    stop = {root, *site_folders(), root / "bin", root / "Scripts", root / "share", root / "lib", root / "Lib"}
    parents = set()
    for file in files:
        path = root / file
        if path.suffix == ".py":
            with suppress(OSError, NotImplementedError):
                os.unlink(importlib.util.cache_from_source(str(path)))
            parents.add(path.parent / "__pycache__")
        parents.add(path.parent)
    for folder in sorted({up for one in parents for up in (one, *one.parents)} - stop, reverse=True):
        if folder.is_relative_to(root):
            with suppress(OSError):
                os.rmdir(folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
