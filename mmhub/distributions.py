"""The installed distributions that are plugins, read from their metadata: names, versions, places, and duplicates.

Installations in the wild are half-upgraded, copied, zipped and edited. Here each of their faults is made the `problem`
or `warning` of one record; nothing that is wrong with one distribution hides another, and nothing is imported.

A record has the keys distribution, version, summary, package, location (its metadata folder), manifest (file), module
(entry point of group `mmhub`), status ("ok", "broken", "incompatible", "disabled"), problem, warning, hooks,
components, commands, models.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mmhub import __version__
from mmhub.errors import MmhubError, UsageError
from mmhub.manifests import fill, locate
from mmhub.records import CORE, Record, Watched, canonical, cause
from mmhub.stdout import diverted_stdout

if TYPE_CHECKING:
    from importlib.metadata import Distribution

YOUNG_SECONDS = 10.0  # a metadata folder younger than this may be one that an installer is still writing


def read_installed() -> tuple[list[Record], Watched]:
    """Return one record per installed plugin, the core first, and the metadata folders that may not be complete yet."""
    young: Watched = []
    copies: dict[str, list[tuple[Record, Any]]] = {}
    with diverted_stdout():  # finders of strangers run here
        for distribution in _distributions():
            found = _identify(distribution, young)
            if found and found[0]["distribution"] != CORE:
                copies.setdefault(found[0]["distribution"], []).append(found)
        records = [_read_first(found) for _, found in sorted(copies.items())]
    return [_read_core(), *records], young


def _read_core() -> Record:
    record = _record(CORE, __version__, summary="the core") | {"package": CORE}
    record["location"] = os.path.dirname(os.path.abspath(__file__))
    record["manifest"] = os.path.join(record["location"], "mmhub.toml")

    def read() -> None:
        with open(record["manifest"], "rb") as file:
            fill(record, file.read())

    return _contained(record, read)


def _record(distribution: str, version: str, summary: str = "") -> Record:
    named: Record = {"distribution": distribution, "version": version, "summary": summary, "package": ""}
    state = {"location": "", "manifest": "", "module": "", "status": "broken", "problem": "", "warning": ""}
    return named | state | {"hooks": [], "components": [], "commands": [], "models": {}}


def _contained(record: Record, read: Callable[[], None]) -> Record:
    """Let `read` fill in a record; whatever goes wrong becomes its `problem`."""
    try:
        read()
    except MmhubError as error:
        record["problem"] = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stranger's finder may even call sys.exit
        record["problem"] = cause(error)
    return record


# --- one distribution


def _distributions() -> Iterator[Distribution]:
    """Yield every installed distribution. `importlib.metadata.distributions` ends where one finder raises."""
    from importlib.metadata import DistributionFinder

    for finder in list(sys.meta_path):
        find = getattr(finder, "find_distributions", None)
        try:
            yield from find(DistributionFinder.Context()) if find else ()
        except Exception:  # what a stranger's finder would have found is not told
            continue


def _identify(distribution: Distribution, young: Watched) -> tuple[Record, Any] | None:
    """Return a record without its manifest, and the entry points to find that by; None if this is no plugin.

    Metadata is parsed only for plugins: it is slow.
    """
    try:
        location = str(getattr(distribution, "_path", "") or distribution.locate_file("")).rstrip(os.sep)
        if os.path.basename(location).startswith("~"):  # where pip moved what it was about to replace
            return None
        _watch(location, young)
        points, problem = _read_points(distribution, location)
        if not points and not problem:
            return None
        record = _read_names(distribution, location)
    except Exception:
        return None  # without a name nobody could be told whom to blame
    record["problem"] = problem or record["problem"]
    return (record, points) if points or record["distribution"].startswith("mmhub-") else None


def _watch(location: str, young: Watched) -> None:
    try:
        mtime = os.stat(location).st_mtime_ns
    except (OSError, ValueError):
        return
    if time.time() - mtime / 1e9 < YOUNG_SECONDS:
        young.append([location, mtime])


def _read_points(distribution: Distribution, location: str) -> tuple[dict[str, list[str]], str]:
    """Return the values of mmhub's entry points by group, {} if there are none, and why they cannot be read."""
    try:
        text = distribution.read_text("entry_points.txt") or ""
        if not text and _is_denied(location):
            raise PermissionError("permission denied")
        points = _parse_points(text) if "mmhub" in text else {}
        return points if any(points.values()) else {}, ""
    except UsageError as error:
        return {}, str(error)
    except Exception as error:  # bytes that are no text, a damaged zip file, a failing disk
        return {}, f"its entry points cannot be read: {cause(error)}"


def _is_denied(location: str) -> bool:
    """May this process not read a plugin's metadata? importlib.metadata takes that for having none."""
    if not os.path.basename(location).startswith("mmhub"):
        return False
    paths = (location, os.path.join(location, "entry_points.txt"))
    return any(os.path.exists(path) and not os.access(path, os.R_OK) for path in paths)


def _parse_points(text: str) -> dict[str, list[str]]:
    """Parse the two groups that matter here; faults in others are their readers' concern."""
    found: dict[str, list[str]] = {"mmhub": [], "mmhub.manifest": []}
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
        elif group in found and line and line[0] not in "#;":
            _, equals, value = (part.strip() for part in line.partition("="))
            if not equals or not value:
                raise UsageError(f"its entry_points.txt has a line {line[:80]!r}, which is not 'name = value'")
            found[group].append(value.partition("[")[0].strip())  # without extras
    return found


def _read_names(distribution: Distribution, location: str) -> Record:
    """Return a record with name, version and summary: from the metadata or, where that is damaged, its folder's name.

    Raises:
        ValueError: neither tells a name.
    """
    stem, _, _ = os.path.basename(location).rpartition(".")
    name, _, version = stem.partition("-")
    headers, problem = _read_headers(distribution)
    record = _record(_name(headers.get("name", "")) or _name(name), headers.get("version") or version or "?")
    if not record["distribution"]:
        raise ValueError(location)
    missing = [key for key in ("Name", "Version") if not headers.get(key.lower())]
    if missing and not problem:
        problem = f"its METADATA in {location} has no {' and no '.join(missing)}; reinstall it"
    return record | {"summary": headers.get("summary", ""), "location": location, "problem": problem}


def _name(given: str) -> str:
    plain = given.replace("-", "").replace("_", "").replace(".", "")
    return canonical(given) if plain.isascii() and plain.isalnum() else ""


def _read_headers(distribution: Distribution) -> tuple[dict[str, str], str]:
    """Return the first value of each header, by its name in lower case, and why they cannot be read."""
    headers: dict[str, str] = {}
    try:
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    except Exception as error:
        return {}, f"its METADATA cannot be read: {cause(error)}; reinstall it"
    for line in text.lstrip().splitlines():
        if not line.strip():
            break
        key, _, value = line.partition(":")
        headers.setdefault(key.strip().lower(), value.strip())
    return headers, ""


# --- duplicates


def _read_first(copies: list[tuple[Record, Any]]) -> Record:
    """Read the copy that counts of one plugin: the first on sys.path; of two in one folder the whole, newer one."""
    root = _root(copies[0][0])
    beside = [found for found in copies if _root(found[0]) == root]
    record, points = max(beside, key=lambda found: (not found[0]["problem"], *_age(found[0]["location"])))
    if not record["problem"]:
        _contained(record, lambda: fill(record, locate(record, points, root)))
    hidden = {other["version"]: other["location"] for other, _ in copies if other["version"] != record["version"]}
    if hidden:
        others = " and ".join(f"version {version} in {location}" for version, location in hidden.items())
        record["warning"] = f"{record['location']} hides {others}; uninstall one, or delete what is left of it"
    return record


def _root(record: Record) -> str:
    return os.path.dirname(record["location"])


def _age(location: str) -> tuple[int, str]:
    try:
        return os.stat(location).st_mtime_ns, location
    except (OSError, ValueError):
        return 0, location
