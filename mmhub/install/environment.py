"""What is installed in this Python environment: read from the metadata folders as they are, damaged ones included."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhub.errors import MmhubError, UsageError
from mmhub.files import disk_errors
from mmhub.records import CORE, canonical

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# What half of all plugins need and nothing may move in passing; installed plugins and what conda installed join them.
PROTECTED = (
    "torch", "torchvision", "torchaudio", "numpy", "transformers", "timm", "huggingface-hub", "safetensors", CORE,
)  # fmt: skip
_WAIT = 600  # seconds for another process that changes this environment


@dataclass(frozen=True)
class Installed:
    """One installed distribution. `info` is its metadata folder; `own` says that it lies in this environment."""

    name: str
    version: str
    info: Path
    own: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @cached_property
    def plugin(self) -> bool:
        """Does it declare entry points of mmhub?"""
        text = self.read("entry_points.txt")
        return self.name != CORE and ("[mmhub.manifest]" in text or "[mmhub]" in text)

    @property
    def protected(self) -> bool:
        """May it move only with `--allow-change`?"""
        return self.name in PROTECTED or self.plugin or self.read("INSTALLER").strip() == "conda"

    @cached_property
    def direct_url(self) -> dict[str, Any]:
        """Where it came from, if not from an index (PEP 610)."""
        try:
            table = json.loads(self.read("direct_url.json") or "{}")
        except ValueError:
            return {}
        return table if isinstance(table, dict) else {}

    @cached_property
    def requires(self) -> list[Requirement]:
        """Its requirements that apply here; those of its extras are left out, and what cannot be parsed."""
        return self.requires_of("")

    def requires_of(self, extra: str) -> list[Requirement]:
        """Return its requirements that apply here with one of its extras."""
        from packaging.requirements import InvalidRequirement, Requirement

        found = []
        for line in self.read("METADATA").partition("\n\n")[0].splitlines():
            if line.startswith("Requires-Dist:"):
                try:
                    one = Requirement(line.partition(":")[2].strip())
                except InvalidRequirement:
                    continue
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    found.append(one)
        return found

    def read(self, name: str) -> str:
        """Return the text of a metadata file, '' where there is none."""
        try:
            return (self.info / name).read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        except OSError:
            return ""

    @cached_property
    def files(self) -> list[str]:
        """Every file of it, relative to the environment: what RECORD lists inside it, and all of its metadata.

        Raises:
            MmhubError: it has no RECORD, so that nobody knows its files.
        """
        if not self._rows:
            raise MmhubError(
                f"{self} has no list of its files ({self.info / 'RECORD'})",
                f"delete by hand: {' '.join(self._by_hand())}",
            )
        listed = {os.path.normpath(self.info.parent / row) for row in self._rows}
        listed |= {str(path) for path in self.info.rglob("*")}
        places, root = Places(), str(prefix())
        found = {where for path in listed if (where := places.of(path)) and not is_pythons_own(where)}
        return sorted(where for where in found if is_file(os.path.join(root, where)))

    @property
    def claims(self) -> list[str]:
        """Its `files`; none where nobody knows them."""
        return self.files if self._rows else []

    @cached_property
    def _rows(self) -> list[str]:
        try:
            rows = [row[0] for row in csv.reader(self.read("RECORD").splitlines()) if row and row[0]]
        except csv.Error:
            return []
        return rows if self.info.is_dir() else []

    def _by_hand(self) -> list[str]:
        tops = self.read("top_level.txt").split() or [self.name.replace("-", "_")]
        folders = [self.info.parent / top for top in tops if (self.info.parent / top).exists()]
        return [f"'{path}'" for path in (*folders, self.info)]


def prefix() -> Path:
    """Return the root of this environment."""
    return Path(os.path.realpath(sys.prefix))


def site_folders() -> list[Path]:
    """Return the folders that packages of this environment lie in, as they are called; each once."""
    found: dict[str, Path] = {}
    for name in site_names():
        found.setdefault(os.path.realpath(prefix() / name), prefix() / name)
    return list(found.values())


def site_names() -> list[str]:
    """Return those folders relative to the environment; `lib64`, a link to `lib` in many, is another name."""
    return list(dict.fromkeys(os.path.relpath(sysconfig.get_path(key), sys.prefix) for key in ("purelib", "platlib")))


def is_file(path: str | Path) -> bool:
    """Is there something other than a folder? A link is, wherever it leads."""
    return os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path))


class Places:
    """Where paths lie in this environment: by its one name for each folder, although links may give it several."""

    def __init__(self) -> None:
        self._roots = [(os.path.realpath(site), os.path.relpath(site, prefix())) for site in site_folders()]
        self._roots.append((str(prefix()), "."))
        self._known: dict[str, str | None] = {}  # folder: its name

    def inside(self, path: str | Path) -> str | None:
        """Return the place of a path relative to the environment, None where it lies outside."""
        folder, name = os.path.split(path)
        if folder not in self._known:
            self._known[folder] = self._name(os.path.realpath(folder))
        home = self._known[folder]
        return None if home is None else os.path.normpath(os.path.join(home, name))

    def of(self, path: str) -> str | None:
        """Return the same, and for what lies behind a link that leads outside, the place of that link."""
        while (where := self.inside(path)) is None and path != os.path.dirname(path):
            path = os.path.dirname(path)
        return where

    def _name(self, folder: str) -> str | None:
        for root, name in self._roots:
            if folder == root or folder.startswith(root + os.sep):
                return os.path.normpath(os.path.join(name, folder[len(root) + 1 :]))
        return None


def is_pythons_own(place: str) -> bool:
    """Is this a place of the interpreter, of conda, or of mmhub's records, that no package may list or bring?"""
    folder, name = os.path.split(place)
    if folder in ("bin", "Scripts") and _INTERPRETER.fullmatch(name):
        return True
    if place == "pyvenv.cfg" or place.startswith((f"share{os.sep}mmhub{os.sep}", f"conda-meta{os.sep}")):
        return True
    sites = [os.path.relpath(site, prefix()) for site in site_folders()]
    beside = any(place.startswith(os.path.dirname(site) + os.sep) for site in sites)  # the standard library
    return beside and not any(place.startswith(site + os.sep) for site in sites)


_INTERPRETER = re.compile(r"python[\d.]*w?(\.exe)?|(de)?activate.*", re.IGNORECASE)


def installed() -> dict[str, Installed]:
    """Return what is installed by name: this environment first, then what else Python sees (sys.path)."""
    found: dict[str, Installed] = {}
    own = site_folders()
    real = {os.path.realpath(folder) for folder in own}
    others = [Path(entry) for entry in sys.path if entry and os.path.realpath(entry) not in real]
    for folder in (*own, *others):
        for one in read_folder(folder, own=folder in own):
            found.setdefault(one.name, one)
    return found


def every_copy(dists: Iterable[Installed]) -> list[Installed]:
    """Return these and what else of the same names lies in this environment, left by whatever went wrong before.

    Raises:
        MmhubError: the files of one are not known.
    """
    names = {one.name: one for one in dists if one.files}
    copies = [one for folder in site_folders() for one in read_folder(folder) if one.name in names]
    return [one for one in copies if one == names[one.name] or one.claims]


def read_folder(folder: Path, own: bool = True) -> Iterator[Installed]:
    """Yield the distributions of one folder, sorted; name and version come from the name of their metadata."""
    try:
        entries = sorted(entry for entry in os.listdir(folder) if entry.endswith((".dist-info", ".egg-info")))
    except OSError:
        return
    for entry in entries:
        name, _, version = entry.rpartition(".")[0].partition("-")
        if name and not name.startswith("~"):  # what pip leaves behind
            yield Installed(canonical(name), version.partition("-")[0] or _stated(folder / entry), folder / entry, own)


def _stated(info: Path) -> str:
    """Return the version that an old kind of metadata states, '' if it does not."""
    match = re.search(r"^Version: *(\S+)", Installed("", "", info).read("PKG-INFO"), re.MULTILINE)
    return match[1] if match else ""


def meets(version: str, need: Requirement) -> bool:
    """Is a version one that a requirement allows? One that is no version by today's rules (PEP 440) is."""
    from packaging.version import InvalidVersion

    try:
        return need.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return True


def check_changeable() -> None:
    """Raise UsageError where packages belong to the operating system."""
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and marker.exists():
        raise UsageError(
            f"the packages of this Python ({sys.prefix}) are managed by the operating system",
            "make an environment (`python3 -m venv ENV`), install mmhub into it, and run it from there",
        )


def broken_by(versions: Mapping[str, str], dists: Iterable[Installed]) -> dict[str, str]:
    """Return {"a 1.0 needs b<2, and not b 2.1": "b"} for each requirement of `dists` that `versions` does not meet.

    A version that is '' is not known yet, and meets everything.
    """
    found = {}
    for one in dists:
        for need in one.requires:
            name = canonical(need.name)
            version = versions.get(name)
            if version == "" or (version and meets(version, need)):
                continue
            but = f", and not {name} {version}" if version else ", which is not installed"
            found[f"{one} needs {name}{need.specifier}{but}"] = name
    return found


def state_folder() -> Path:
    """Return the folder of this environment that mmhub keeps its transactions in."""
    return prefix() / "share" / "mmhub" / "transactions"


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
