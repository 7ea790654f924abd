"""Write the installed plugins and what they need down with hashes (PEP 751), and plan to have them again."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement

from mmhub import __version__
from mmhub.errors import MmhubError, NotFoundError, PluginError, TrustError, UsageError
from mmhub.files import disk_errors, sha256, write_file
from mmhub.install.environment import Installed, installed
from mmhub.install.journal import pins_of_history
from mmhub.install.pins import Pin, read_pins, without_secret
from mmhub.install.plan import Plan, Refused, check_moves, make_changes
from mmhub.install.tools import Tool
from mmhub.records import CORE, canonical

FILE = "pylock.mmhub.toml"
_SOURCE = "add --allow-source if you trust it"


def write_lock(path: Path, find_tool: Callable[[], Tool]) -> list[Pin]:
    """Write a lock of the installed plugins to `path` and return what it lists.

    Raises:
        UsageError: the file's name is no lock's. MmhubError: the hash of something cannot be found out.
    """
    if not re.fullmatch(r"pylock(\.[^.]+)?\.toml", path.name):
        raise UsageError(f"'{path.name}' is no name of a lock file", f"PEP 751 wants pylock.NAME.toml, such as {FILE}")
    dists = installed()
    packages, protected = _closure(dists)
    pins = _with_hashes([_pin(dist) for dist in packages], find_tool)
    for pin in pins:
        if pin.kind in ("index", "file") and not (pin.sha256 and pin.url):
            raise MmhubError(f"no index gives the hash of {pin.name} {pin.version}", "install it from one that does")
    with disk_errors("the lock", path.parent):
        write_file(path, _document(pins, protected, path.resolve().parent))
    return pins


def read_lock(path: Path) -> tuple[list[Pin], dict[str, str]]:
    """Return the pins of a lock, and the versions of protected distributions it was made beside.

    Raises:
        NotFoundError: there is no such file. UsageError: it is no lock.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        pins = read_pins(document, path.resolve().parent)
        noted = document.get("tool", {}).get(CORE, {}).get("protected", {})
        return pins, {str(name): str(version) for name, version in noted.items()}
    except FileNotFoundError:
        raise NotFoundError(f"there is no file '{path}'", "`mmhub plugins lock` writes one") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"'{path}' cannot be read: {error}") from None
    except UsageError as error:
        raise UsageError(f"'{path}': {error.message}", error.hint) from None


def plan_restore(pins: list[Pin], allowed: Collection[str], source: bool = False) -> Plan:
    """Return the plan that installs what a lock lists and this environment lacks or has in another version.

    Raises:
        PluginError: something protected that is no plugin would move.
        TrustError: something would have to be built, and `source` is not set.
    """
    dists = installed()
    missing = [pin for pin in pins if not _there(pin, dists.get(pin.name))]
    leaving = tuple(dists[pin.name] for pin in missing if pin.name in dists and dists[pin.name].own)
    asked = {pin.name: replace(pin, sha256="").line() for pin in pins if _is_plugin(pin, dists)}
    built = [pin.name for pin in missing if not _is_wheel(pin)]
    if built and not source:
        raise TrustError(f"the lock has source code of {', '.join(built)}, and building it runs its code", _SOURCE)
    changes = make_changes(missing, dists)
    names = tuple(pin.name for pin in missing if _is_plugin(pin, dists))
    plan = Plan(changes=changes, names=names, leaving=leaving, asked=asked, source=bool(built))
    try:
        check_moves(plan, allowed, dists, requested=[pin.name for pin in pins])
    except PluginError as error:
        raise Refused(plan, error.message, error.hint) from None
    return plan


def _closure(dists: Mapping[str, Installed]) -> tuple[list[Installed], dict[str, str]]:
    """Return the plugins with all they need, and the protected distributions where that ends."""
    packages: dict[str, Installed] = {}
    protected: dict[str, str] = {}
    pending = [one.name for one in dists.values() if one.plugin]
    while pending:
        one = dists.get(pending.pop())
        if one is None or one.name in packages:
            continue
        if one.protected and not one.plugin:
            protected[one.name] = one.version
            continue
        packages[one.name] = one
        pending += [canonical(need.name) for need in one.requires]
        pending += [canonical(need.name) for need in _extras(one, dists)]
    return [packages[name] for name in sorted(packages)], protected


def _extras(one: Installed, dists: Mapping[str, Installed]) -> list[Requirement]:
    """What the extras that `one` asks of others bring in."""
    found = []
    for need in one.requires:
        other = dists.get(canonical(need.name))
        for extra in need.extras if other else ():
            assert other
            found += other.requires_of(extra)
    return found


def _pin(dist: Installed) -> Pin:
    table = dist.direct_url
    pin = Pin(name=dist.name, version=dist.version, url=str(table.get("url", "")))
    if "dir_info" in table:
        return replace(pin, kind="editable" if table["dir_info"].get("editable") else "folder")
    if "vcs_info" in table:
        info = table["vcs_info"]
        return replace(pin, url=f"{info['vcs']}+{pin.url}@{info['commit_id']}", kind="vcs")
    if "archive_info" in table:
        info = table["archive_info"]
        digest = info.get("hashes", {}).get("sha256", "") or str(info.get("hash", "")).removeprefix("sha256=")
        local = unquote(urlsplit(pin.url).path)
        if not digest and pin.url.startswith("file:") and os.path.isfile(local):
            digest = sha256(Path(local))
        return replace(pin, sha256=digest, kind="file")
    return pin


def _with_hashes(pins: list[Pin], find_tool: Callable[[], Tool]) -> list[Pin]:
    """Fill in addresses and hashes: from the transactions where mmhub installed it, else from the index."""
    history = pins_of_history()
    known = []
    for pin in pins:
        row = history.get((pin.name, pin.version))
        usable = row and not pin.sha256 and pin.kind == row["kind"] and pin.kind in ("index", "file")
        known.append(Pin(**row) if row and usable else pin)  # type: ignore[arg-type]
    unknown = [pin for pin in known if pin.kind in ("index", "file") and not pin.sha256]
    if not unknown:
        return known
    found = {pin.name: pin for pin in find_tool().locate(unknown, source=True)}
    return [found.get(pin.name, pin) for pin in known]


def _document(pins: list[Pin], protected: Mapping[str, str], beside: Path) -> str:
    import tomlkit

    document = tomlkit.document()
    for key, value in (("lock-version", "1.0"), ("created-by", CORE)):
        document.add(key, tomlkit.item(value))
    packages = tomlkit.aot()
    for pin in pins:
        packages.append(tomlkit.item(_package(pin, beside)))
    if pins:
        document.add("packages", packages)
    else:
        document.add("packages", tomlkit.array())
    document.add("tool", tomlkit.item({CORE: {"version": __version__, "protected": dict(sorted(protected.items()))}}))
    return tomlkit.dumps(document)


def _package(pin: Pin, beside: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": pin.name}
    if pin.kind in ("folder", "editable"):
        where = {"path": _relative(pin.url, beside)}
        return row | {"directory": where | ({"editable": True} if pin.kind == "editable" else {})}
    row["version"] = pin.version
    if pin.kind == "vcs":
        kind, _, rest = pin.url.partition("+")
        address, _, commit = without_secret(rest).rpartition("@")
        return row | {"vcs": {"type": kind, "url": address, "commit-id": commit}}
    local = pin.url.startswith("file:")
    file: dict[str, Any] = {"path": _relative(pin.url, beside)} if local else {"url": pin.public_url}
    file["hashes"] = {"sha256": pin.sha256}
    if pin.kind == "file":
        return row | {"archive": file}
    name = unquote(os.path.basename(urlsplit(pin.url).path))
    return row | ({"wheels": [{"name": name} | file]} if _is_wheel(pin) else {"sdist": {"name": name} | file})


def _relative(url: str, beside: Path) -> str:
    return Path(os.path.relpath(unquote(urlsplit(url).path), beside)).as_posix()


def _there(pin: Pin, dist: Installed | None) -> bool:
    if dist is None or (pin.version and pin.version != dist.version):
        return False
    if pin.kind in ("folder", "editable"):
        table = dist.direct_url
        return table.get("url") == pin.url and table.get("dir_info", {}).get("editable", False) == (
            pin.kind == "editable"
        )
    return True


def _is_wheel(pin: Pin) -> bool:
    return pin.kind in ("index", "file") and urlsplit(pin.url).path.endswith(".whl")


def _is_plugin(pin: Pin, dists: Mapping[str, Installed]) -> bool:
    return pin.name.startswith("mmhub-") or (pin.name in dists and dists[pin.name].plugin)
