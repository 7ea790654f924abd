"""Which plugins are installed and what they offer, without importing any of them.

The result is a list of plain records, one per plugin, kept in a JSON file so that the next start costs a few `stat`
calls. This module imports nothing heavy, so that `mmhub --help` stays as fast as click alone; reading what is installed
is left to `mmhub.distributions`, which describes a record, and turning records into objects to `mmhub.plugins`.
"""

from __future__ import annotations

import os
import sys

from mmhub import __version__
from mmhub.errors import PluginError
from mmhub.records import CORE, Record, Watched, canonical

_FORMAT = 2
_found: list[Record] | None = None
_watched: tuple[Watched, Watched] = ([], [])  # the folders of sys.path, and files, when `_found` was true


def find_plugins(rescan: bool = False) -> list[Record]:
    """Return one record per installed plugin, the core first, from the cache where that is still true."""
    global _found
    if rescan or _found is None:
        _found = (None if rescan else _read_cache()) or _scan()
    if "MMHUB_PLUGINS" not in os.environ and "MMHUB_DISABLE_PLUGINS" not in os.environ:
        return list(_found)
    return [_switched(record) for record in _found]


def has_changed() -> bool:
    """Has anything been installed, removed or edited since `find_plugins` looked? A few `stat` calls."""
    paths, files = _watched
    return _found is not None and not (_search_path() == paths and _are_unchanged(files))


def command_table() -> dict[str, tuple[str, str, str, str]]:
    """Return {command: (factory, summary, distribution, version)} of the usable plugins.

    A command that two plugins provide has an empty factory, and both of their names as its distribution.
    """
    table: dict[str, tuple[str, str, str, str]] = {}
    for record in find_plugins():
        if record["status"] != "ok":
            continue
        for command in record["commands"]:
            name, provider = command["name"], f"{record['distribution']} {record['version']}"
            row = (command["factory"], command["summary"], record["distribution"], record["version"])
            if name in table:
                first = table[name][2] if not table[name][0] else f"{table[name][2]} {table[name][3]}"
                row = ("", command["summary"], f"{first} and {provider}", "")
            table[name] = row
    return table


def problem_lines() -> list[str]:
    """Return one line for each plugin that cannot be used, or that hides another version of itself.

    Raises:
        PluginError: there is one, and MMHUB_STRICT_PLUGINS=1 is set.
    """
    lines = [line for line in map(_problem_line, find_plugins()) if line]
    if lines and strict():
        raise PluginError(lines[0], "fix it, or unset MMHUB_STRICT_PLUGINS to go on without it")
    return lines


def _problem_line(record: Record) -> str:
    unusable = record["status"] in ("broken", "incompatible")
    told = [record["problem"] if unusable else "", record["warning"] if record["status"] != "disabled" else ""]
    if not any(told):
        return ""
    who, name = f"{record['distribution']} {record['version']}", record["distribution"]
    state = f" {record['status']}" if unusable else ""
    line = f"plugin {who}{state}: {'; '.join(filter(None, told))} (mmhub plugins show {name})"
    return line if line.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def strict() -> bool:
    """Are plugin problems fatal?"""
    return os.environ.get("MMHUB_STRICT_PLUGINS", "") not in ("", "0")


# --- which plugins are switched on


def _switched(record: Record) -> Record:
    """Apply MMHUB_PLUGINS and MMHUB_DISABLE_PLUGINS, which are no part of the cache."""
    reason = _switched_off_by(record["distribution"])
    return {**record, "status": "disabled", "problem": reason} if reason else record


def _switched_off_by(distribution: str) -> str:
    allowed, denied = os.environ.get("MMHUB_PLUGINS"), os.environ.get("MMHUB_DISABLE_PLUGINS")
    if distribution == CORE or (allowed is None and not denied):
        return ""
    if allowed is not None and distribution not in _names(allowed):
        return "it is not listed in MMHUB_PLUGINS" if allowed else "MMHUB_PLUGINS is set to nothing"
    return "it is listed in MMHUB_DISABLE_PLUGINS" if denied and distribution in _names(denied) else ""


def _names(text: str) -> set[str]:
    return {canonical(name) for name in text.replace(",", " ").split()}


# --- the cache


def cache_folder() -> str:
    """Return the folder that holds the plugin index; model files are never kept there."""
    own = os.environ.get("MMHUB_CACHE")
    home = os.path.expanduser("~")
    if home == "~":  # nobody knows this user: a folder that cannot exist, rather than one called ~ right here
        home = os.devnull
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return own or os.path.join(base, "mmhub")


def _cache_file() -> str:
    return os.path.join(cache_folder(), f"index-{_checksum(repr(_key())):08x}.json")


def _checksum(text: str) -> int:
    from zlib import crc32  # hashlib would cost a tenth of the whole start

    return crc32(text.encode(errors="surrogatepass"))


def _key() -> list[str]:
    return [sys.version, sys.prefix, __version__]


def _search_path() -> Watched:
    """Every folder and zip file of sys.path with its mtime, which every install and uninstall changes.

    Relative entries that do not exist are left out: setuptools marks editable namespace packages with such words.
    """
    entries = (entry or os.curdir for entry in sys.path if isinstance(entry, str))
    folders = (os.path.abspath(entry) for entry in entries if os.path.isabs(entry) or os.path.exists(entry))
    return [[folder, _mtime(folder)] for folder in dict.fromkeys(folders)]


def _mtime(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        return 0


def _are_unchanged(files: Watched) -> bool:
    return all(_mtime(path) == mtime for path, mtime in files)


def _read_cache() -> list[Record] | None:
    import json

    global _watched
    try:
        with open(_cache_file(), encoding="utf-8") as file:
            head, _, body = file.read().partition("\n")
        if head != f"mmhub plugins {_FORMAT} {_checksum(body):08x}":
            return None
        document = json.loads(body)
        paths, files, records = document["paths"], document["files"], document["plugins"]
        if document["key"] != _key() or paths != _search_path() or not _are_unchanged(files):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    _watched = (paths, files)
    return list(records)


def _write_cache(paths: Watched, files: Watched, records: list[Record]) -> None:
    import json
    from threading import get_ident

    target = _cache_file()
    draft = f"{target}.{os.getpid()}-{get_ident()}.tmp"
    try:
        body = json.dumps({"key": _key(), "paths": paths, "files": files, "plugins": records})
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(draft, "w", encoding="utf-8") as file:
            file.write(f"mmhub plugins {_FORMAT} {_checksum(body):08x}\n{body}")
        os.replace(draft, target)
    except (OSError, TypeError, ValueError):  # an unwritable cache costs a scan each time, nothing else
        from contextlib import suppress

        with suppress(OSError):
            os.unlink(draft)


# --- the scan


def _scan() -> list[Record]:
    import importlib

    from mmhub.distributions import read_installed

    global _watched
    paths = _search_path()  # before looking, so that an install meanwhile invalidates what is written
    importlib.invalidate_caches()
    records, files = read_installed()
    manifests = [record["manifest"] for record in records if record["manifest"]]
    files += [[path, _mtime(path)] for path in (*manifests, *_own_files())]
    _watched = (paths, files)
    _write_cache(paths, files, records)
    return records


def _own_files() -> list[str]:
    """What decides how a manifest is judged, for those who work on mmhub itself."""
    folder = os.path.dirname(__file__)
    names = ("discovery.py", "distributions.py", "manifests.py", "hookspecs.py", "spec.py")
    return [os.path.join(folder, name) for name in names]
