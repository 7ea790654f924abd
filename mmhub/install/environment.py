"""What is installed in this Python environment: read from the metadata folders as they are, damaged ones included."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhub.errors import MmhubError, UsageError
from mmhub.install.places import Places, is_file, prefix, site_folders
from mmhub.records import CORE, canonical

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# What half of all plugins need and nothing may move in passing; installed plugins and what conda installed join them.
PROTECTED = (
    "torch", "torchvision", "torchaudio", "numpy", "transformers", "timm", "huggingface-hub", "safetensors", CORE,
)  # fmt: skip


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
        found = {where for path in listed if (where := places.of(path)) and not places.reserved(where)}
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
