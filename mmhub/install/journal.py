"""Change the environment by renames alone, in steps that are written down first, so that each can be taken back.

A transaction is a folder `share/mmhub/transactions/NNNN/` of the environment. The new files are unpacked into its
`new/` while nothing else changes; then the old ones are renamed into `old/` and the new ones out of `new/`.
`record.json` lists both beforehand. Taking back renames in the other direction whatever is there, so it may be cut
short and done again. It is "finished" only when mmhub was seen to start after it.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError, NotFoundError, PluginError, TrustError
from mmhub.files import disk_errors, sha256, write_file
from mmhub.install import asked, moves
from mmhub.install.environment import Installed, installed, read_folder
from mmhub.install.places import Places, is_file, prefix, site_folders, site_names, state_folder
from mmhub.records import CORE

KEPT = 3  # transactions whose old files are kept
_AT_START = ("sitecustomize.py", "usercustomize.py")  # what Python imports whenever it starts, beside *.pth


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
        with disk_errors("the record of this change", self.folder):
            write_file(self.folder / "record.json", json.dumps(self.record, indent=1) + "\n")


def begin(command: str) -> Transaction:
    """Open a transaction."""
    numbers = [int(folder.name) for folder in _folders()]
    folder = state_folder() / f"{max(numbers, default=0) + 1:04d}"
    before = {one.name: one.version for one in installed().values() if one.own}
    record = {"schema": 1, "command": command, "state": "started", "when": _now(), "asked": asked.read_asked()}
    with disk_errors("a transaction", folder.parent):
        folder.mkdir(parents=True)
        shutil.copyfile(moves.__file__, folder.with_name("undo.py"))
        one = Transaction(folder, record | {"before": before, "remove": [], "add": [], "after": {}, "left": {}})
        one.write()
        one.new.mkdir()
    return one


def unpacked(one: Transaction) -> dict[str, Installed]:
    """Return the distributions in a transaction's `new/`."""
    folders = {one.new / relative for relative in site_names()}
    return {dist.name: dist for folder in sorted(folders) for dist in read_folder(folder)}


def startup_files(one: Transaction) -> list[str]:
    """Return the new files that Python runs whenever it starts, but for the *.pth of editable plugins."""
    found = []
    places, sites = Places(), [os.path.relpath(site, prefix()) for site in site_folders()]
    for dist in unpacked(one).values():
        if dist.direct_url.get("dir_info", {}).get("editable"):
            continue
        for row in csv.reader(dist.read("RECORD").splitlines()):
            path = os.path.normpath(dist.info.parent / row[0]) if row else ""
            folder, name = os.path.split(places.inside(prefix() / os.path.relpath(path, one.new)) or "")
            if folder in sites and (name.endswith(".pth") or name in _AT_START):
                found.append(f"{dist}: {name}")
    return found


def check_files(one: Transaction, leaving: Iterable[Installed]) -> None:
    """Refuse new files that would replace those of somebody else: of Python, of mmhub, of what is protected.

    Raises:
        TrustError: names the file, and whose it is.
    """
    names = {dist.name for dist in leaving}
    gone = {file for dist in leaving for file in dist.files}
    staying = [dist for dist in installed().values() if dist.own and dist.name not in names]
    owners = {file: dist for dist in sorted(staying, key=lambda dist: dist.protected) for file in dist.claims}
    places, core = Places(), CORE in unpacked(one)
    for file in _files_below(one.new):
        place = places.inside(prefix() / file)
        said = _objection(file, place, places, gone, core)
        if not said and place in owners and owners[place].protected:
            said = f"it would replace a file of {owners[place]}"
        elif not said and place not in owners and place not in gone and _is_strangers(str(place)):
            said = "it would replace a file that is no package's; if that is a remnant, move it away"
        if said:
            raise TrustError(f"a package brings the file '{file}': {said}", "do not use it")


def _objection(file: str, place: str | None, places: Places, gone: set[str], core: bool) -> str:
    """Why may a new file not lie there, whatever lies there now? '' if it may."""
    if place is None:
        link = places.of(str(prefix() / file))
        return "" if link in gone else f"'{link}' is a link that leads out of this environment"
    sites = [os.path.relpath(site, prefix()) + os.sep for site in site_folders()]
    tops = [place[len(site) :].split(os.sep)[0] for site in sites if place.startswith(site)]
    if places.reserved(place) or (not core and any(top.split(".")[0] == CORE for top in tops)):
        return f"that is a place of Python's or {CORE}'s own"
    above = [str(path) for path in Path(place).parents if str(path) not in gone and is_file(prefix() / path)]
    if (prefix() / place).is_dir() and not (prefix() / place).is_symlink():
        return "a folder is there"
    return f"'{above[0]}' is a file" if above and not (prefix() / above[0]).is_dir() else ""


def _is_strangers(place: str) -> bool:
    """Is there a file outside the folders of packages, where conda and other programs have theirs?"""
    sites = tuple(os.path.relpath(site, prefix()) + os.sep for site in site_folders())
    return not place.startswith(sites) and is_file(prefix() / place)


def commit(one: Transaction, leaving: Sequence[Installed]) -> None:
    """Take the files of `leaving` out and put those of `new/` in. It can be taken back until `finish` and after.

    Raises:
        MmhubError: it failed; says why.
    """
    add = _files_below(one.new)
    remove = {file for dist in leaving for file in dist.files} - _claimed_beside({dist.name for dist in leaving})
    remove |= {file for file in add if os.path.lexists(prefix() / file)}
    after = {dist.name: _fingerprint(dist) for dist in unpacked(one).values()}
    left = {dist.name: _fingerprint(dist) for dist in leaving}
    one.write(remove=sorted(remove), add=add, after=after, left=left)
    with disk_errors("plugins", prefix()), _undisturbed():
        for file in sorted(remove):
            moves.move(file, prefix(), one.old)
        _prune(remove)
        for file in add:
            moves.move(file, one.new, prefix())


def finish(one: Transaction) -> None:
    """Make a change last, and forget what only older ones need."""
    one.write(state="finished")
    shutil.rmtree(one.new, ignore_errors=True)
    every = _all()
    finished = [other for other in every if other.record["state"] == "finished"]
    for other in finished[:-KEPT]:
        shutil.rmtree(other.old, ignore_errors=True)
    for other in every:
        if other.record["state"] == "undone":  # an installer that outlived mmhub may have gone on unpacking
            shutil.rmtree(other.new, ignore_errors=True)


def undo(one: Transaction) -> None:
    """Put the environment back to what it was before a transaction, however far that got. May be repeated."""
    if one.record["state"] == "finished":
        since = _claimed_beside(set(one.record["after"])) - set(one.record["remove"])
        one.write(state="undoing", add=[file for file in one.record["add"] if file not in since])
    with disk_errors("plugins", prefix()), _undisturbed():
        moves.take_out(one.record, one.folder, prefix())
        _prune(one.record["add"])
        moves.put_back(one.record, one.folder, prefix())
        if asked.read_asked() != one.record["asked"]:
            asked.write_asked(one.record["asked"])
        if not one.record["add"]:  # nothing was moved, and what was unpacked may have filled the disk
            shutil.rmtree(one.new, ignore_errors=True)
        with suppress(MmhubError):  # on a full disk it stays as it is, and is looked at again next time
            one.write(state="undone")
            for folder in (one.new, one.old):
                shutil.rmtree(folder, ignore_errors=True)


def repair() -> list[Transaction]:
    """Take back what a killed process left unfinished, and return it, newest first."""
    broken = [one for one in reversed(_all()) if one.record["state"] in moves.OPEN]
    for one in broken:
        undo(one)
    return broken


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
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
            raise MmhubError(f"{folder / 'record.json'} cannot be read: {error!r}", f"delete '{folder}'") from None
        found.append(Transaction(folder, record))
    return found


def _folders() -> list[Path]:
    return sorted((path for path in state_folder().glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def _fingerprint(dist: Installed) -> str:
    """What tells whether a distribution was changed: its version and the hash of its list of files."""
    record = dist.info / "RECORD"
    return f"{dist.version} {sha256(record) if record.is_file() else ''}"


def _claimed_beside(names: set[str]) -> set[str]:
    """The files that distributions other than these claim: a RECORD can list what others have, too."""
    return {file for dist in installed().values() if dist.own and dist.name not in names for file in dist.claims}


def _files_below(folder: Path) -> list[str]:
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in (*files, *links)]
    return sorted(found)


def _prune(files: Iterable[str]) -> None:
    """Remove what Python compiled from files that are gone, and folders that are empty now."""
    root = prefix()
    tops = ("bin", "Scripts", "share", "include", "lib", "Lib")
    stop, parents = {root, *site_folders(), *(root / name for name in tops)}, set()
    for file in files:
        path = root / file
        if path.suffix == ".py":
            for compiled in (path.parent / "__pycache__").glob(f"{glob.escape(path.stem)}.*.pyc"):
                with suppress(OSError):
                    compiled.unlink()
            parents.add(path.parent / "__pycache__")
        parents.add(path.parent)
    for folder in sorted({up for one in parents for up in (one, *one.parents)} - stop, reverse=True):
        if folder.is_relative_to(root):
            with suppress(OSError):
                os.rmdir(folder)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off the signals that end a process (Ctrl-C, a closed terminal, `kill`) until files have been moved."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
