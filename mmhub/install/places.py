"""The folders of this Python environment, and where in it a path really lies."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path

_INTERPRETER = re.compile(r"python[\d.]*w?(\.exe)?|(de)?activate.*", re.IGNORECASE)


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


def state_folder() -> Path:
    """Return the folder of this environment that mmhub keeps its transactions in."""
    return prefix() / "share" / "mmhub" / "transactions"


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

    def reserved(self, place: str) -> bool:
        """Is a place the interpreter's, conda's, or one of mmhub's records, that no package may list or bring?"""
        folder, name = os.path.split(place)
        if folder in ("bin", "Scripts") and _INTERPRETER.fullmatch(name):
            return True
        if place == "pyvenv.cfg" or place.startswith((f"share{os.sep}mmhub{os.sep}", f"conda-meta{os.sep}")):
            return True
        sites = [name + os.sep for _, name in self._roots[:-1]]
        beside = tuple(os.path.dirname(os.path.dirname(site)) + os.sep for site in sites)  # the standard library
        return place.startswith(beside) and not place.startswith(tuple(sites))
