"""What is installed in this Python environment: read from the metadata folders as they are, damaged ones included."""

from __future__ import annotations

import csv
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

from mmhub.discovery import CORE, canonical
from mmhub.errors import MmhubError, UsageError

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
        rows = [row for row in csv.reader(self.read("RECORD").splitlines()) if row and row[0]]
        if not rows or not self.info.is_dir():
            raise MmhubError(
                f"{self} has no list of its files ({self.info / 'RECORD'})",
                f"delete by hand: {' '.join(self._by_hand())}",
            )
        listed = [os.path.normpath(self.info.parent / row[0]) for row in rows]
        listed += [str(path) for path in self.info.rglob("*") if not path.is_dir() or path.is_symlink()]
        root = str(prefix()) + os.sep  # a RECORD that points outside is not followed
        return sorted({path[len(root) :] for path in listed if path.startswith(root) and os.path.lexists(path)})

    def _by_hand(self) -> list[str]:
        tops = self.read("top_level.txt").split() or [self.name.replace("-", "_")]
        folders = [self.info.parent / top for top in tops if (self.info.parent / top).exists()]
        return [f"'{path}'" for path in (*folders, self.info)]


def prefix() -> Path:
    """Return the root of this environment."""
    return Path(os.path.realpath(sys.prefix))


def site_folders() -> list[Path]:
    """Return the folders that packages of this environment lie in."""
    return [Path(path) for path in dict.fromkeys(os.path.realpath(sysconfig.get_path(key)) for key in _SCHEMES)]


def site_names() -> set[str]:
    """Return those folders relative to the environment; `lib64`, a link to `lib` in many, is named as it is called."""
    return {os.path.relpath(sysconfig.get_path(key), sys.prefix) for key in _SCHEMES}


_SCHEMES = ("purelib", "platlib")


def installed() -> dict[str, Installed]:
    """Return what is installed by name: this environment first, then what else Python sees (sys.path)."""
    found: dict[str, Installed] = {}
    own = site_folders()
    others = [Path(entry) for entry in sys.path if entry and Path(os.path.realpath(entry)) not in own]
    for folder in (*own, *others):
        for one in read_folder(folder, own=folder in own):
            found.setdefault(one.name, one)
    return found


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
def locked(*, to_change: bool, waiting: Any = None) -> Iterator[None]:
    """Hold this environment alone. Waits for another process that does, after calling `waiting()` once.

    Without `to_change`, an environment that nobody may write to is not held.

    Raises:
        MmhubError: the other one takes more than ten minutes.
    """
    from mmhub.files import disk_errors

    file = state_folder() / ".lock"
    if not to_change and not file.exists():
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        if not to_change:
            yield
            return
        with disk_errors("this environment", prefix()):
            raise
    try:
        _hold(descriptor, waiting)
        yield
    finally:
        os.close(descriptor)


def _hold(descriptor: int, waiting: Any) -> None:
    until = time.monotonic() + _WAIT
    told = False
    while not _try_lock(descriptor):
        if waiting and not told:
            waiting()
        told = True
        if time.monotonic() > until:
            raise MmhubError("another mmhub is changing this environment for more than ten minutes", "end it first")
        time.sleep(0.1)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
