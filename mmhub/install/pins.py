"""Exact things to install: from an index, a file, a folder or a repository, and as a lock file (PEP 751) lists them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from mmhub.errors import UsageError
from mmhub.files import sha256
from mmhub.records import canonical

_WORD = re.compile(r"[^-\s]\S*|")  # neither several words nor an option
_VCS = ("git", "hg+", "svn", "bzr")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One exact thing to install. `kind` says where from; `url` and `sha256` are '' where unknown or impossible."""

    name: str
    version: str = ""
    url: str = ""
    sha256: str = ""
    uploaded: str = ""  # ISO date
    kind: Literal["index", "file", "folder", "editable", "vcs"] = "index"
    links: str = ""  # a folder to look for its wheel in, beside the indexes

    @property
    def public_url(self) -> str:
        """The address without a name and password in it, to show and to write down."""
        return without_secret(self.url)

    def line(self) -> str:
        """Return the requirement line that means exactly this, with its hash where there is one."""
        if self.kind == "editable":
            return f"-e {self.url}"
        what = f"{self.name}=={self.version}" if self.kind == "index" else f"{self.name} @ {self.url}"
        return f"{what} --hash=sha256:{self.sha256}" if self.sha256 else what


def without_secret(text: str) -> str:
    """Return a text without the name, password or token in the web addresses in it (`https://TOKEN@host`)."""
    return re.sub(r"(https?://)[^/@\s]*@", r"\1", text)


def pin_of_url(name: str, version: str, url: str) -> Pin:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme.startswith(_VCS):
        return Pin(name=name, version=version, url=url, kind="vcs")
    if parts.scheme == "file" and os.path.isdir(path):
        return Pin(name=name, version=version, url=url, kind="folder")
    if path.endswith(".whl"):
        version = str(parse_wheel_filename(os.path.basename(path))[1])
    digest = sha256(Path(path)) if parts.scheme == "file" and os.path.isfile(path) else ""
    return Pin(name=name, version=version, url=url, sha256=digest, kind="file")


def merge(pin: Pin, found: Pin | None) -> Pin:
    if found is None:
        return pin
    return replace(
        pin,
        version=pin.version or found.version,
        url=pin.url or found.url,
        sha256=pin.sha256 or found.sha256,
        uploaded=found.uploaded,
    )


def read_pins(document: Mapping[str, Any], beside: Path) -> list[Pin]:
    """Return the packages of a pylock document (PEP 751) that apply here; its relative paths start at `beside`.

    Raises:
        UsageError: it is no such document, or holds no wheel for this Python.
    """
    from packaging.markers import Marker

    rows = document.get("packages")
    if not str(document.get("lock-version", "")).startswith("1.") or not isinstance(rows, list):
        raise UsageError("it is no lock file of PEP 751 (lock-version 1.x and [[packages]])")
    try:
        applying = [row for row in rows if "marker" not in row or Marker(row["marker"]).evaluate()]
        pins = [_locked_pin(row, beside) for row in applying]
        odd = [
            text for pin in pins for text in (pin.name, pin.version, pin.url, pin.sha256) if not _WORD.fullmatch(text)
        ]
        if odd:
            raise ValueError(f"{odd[0]!r} cannot stand in a requirement")
        return pins
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"its packages cannot be read: {type(error).__name__}: {error}") from None


def _locked_pin(row: Mapping[str, Any], beside: Path) -> Pin:
    pin = Pin(name=canonical(row["name"]), version=str(row.get("version", "")))
    if "directory" in row:
        url = (beside / row["directory"]["path"]).resolve().as_uri()
        return replace(pin, url=url, kind="editable" if row["directory"].get("editable") else "folder")
    if "vcs" in row:
        table = row["vcs"]
        return replace(pin, url=f"{table['type']}+{table['url']}@{table['commit-id']}", kind="vcs")
    if "archive" in row:
        return _file_pin(pin, row["archive"], beside, "file")
    wheel = _best_wheel(row.get("wheels", []))
    if wheel is None and "sdist" not in row:
        raise ValueError(f"'{pin.name}' has no wheel for this Python")
    return _file_pin(pin, wheel or row["sdist"], beside, "index")


def _file_pin(pin: Pin, table: Mapping[str, Any], beside: Path, kind: Literal["file", "index"]) -> Pin:
    path = (beside / table["path"]).resolve() if "path" in table and "url" not in table else None
    url = path.as_uri() if path else table["url"]
    links = str(path.parent) if path and kind == "index" else ""
    digest, when = table["hashes"]["sha256"], str(table.get("upload-time", ""))[:10]
    return replace(pin, url=url, sha256=digest, uploaded=when, kind=kind, links=links)


def _best_wheel(wheels: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    order = {tag: rank for rank, tag in enumerate(sys_tags())}
    ranked = []
    for number, wheel in enumerate(wheels):
        name = wheel.get("name") or unquote(os.path.basename(urlsplit(wheel.get("url") or wheel.get("path", "")).path))
        try:
            ranks = [order[tag] for tag in parse_wheel_filename(name)[3] if tag in order]
        except InvalidWheelFilename:
            continue
        ranked += [(min(ranks), number)] if ranks else []
    return wheels[min(ranked)[1]] if ranked else None
