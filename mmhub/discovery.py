"""Find the installed plugins and what they offer, without importing any of them.

The result is a list of plain records, one per plugin, kept in a JSON file so that the next start costs a few `stat`
calls. This module imports nothing heavy, so that `mmhub --help` stays as fast as click alone; turning records into
objects is left to `mmhub.plugins`.

A record has the keys distribution, version, summary, package, manifest (file), module (entry point of group `mmhub`),
status ("ok", "broken", "incompatible", "disabled"), problem, hooks, components, commands, models.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from mmhub import __version__
from mmhub.errors import MmhubError, PluginError, UsageError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

    import msgspec

Record = dict[str, Any]
T = TypeVar("T", bound="msgspec.Struct")

CORE = "mmhub"
_FORMAT = 1
_TEXT = ("distribution", "version", "summary", "package", "manifest", "module", "status", "problem")
_KEYS = {*_TEXT, "hooks", "components", "commands", "models"}
_found: list[Record] | None = None


def find_plugins(rescan: bool = False) -> list[Record]:
    """Return one record per installed plugin, the core first, from the cache where that is still true."""
    global _found
    if rescan or _found is None:
        _found = (None if rescan else _read_cache()) or _scan()
    return [_switched(record) for record in _found]


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
    """Return one line for each plugin that cannot be used.

    Raises:
        PluginError: there is one, and MMHUB_STRICT_PLUGINS=1 is set.
    """
    lines = [
        f"plugin {record['distribution']} {record['version']} {record['status']}: {record['problem']}"
        f" (mmhub plugins show {record['distribution']})"
        for record in find_plugins()
        if record["status"] in ("broken", "incompatible")
    ]
    if lines and strict():
        raise PluginError(lines[0], "fix it, or unset MMHUB_STRICT_PLUGINS to go on without it")
    return lines


def strict() -> bool:
    """Are plugin problems fatal?"""
    return os.environ.get("MMHUB_STRICT_PLUGINS", "") not in ("", "0")


def canonical(distribution: str) -> str:
    """Return a distribution's name the way package indexes compare it: `Mmhub_X` -> `mmhub-x`."""
    import re

    return re.sub(r"[-_.]+", "-", distribution).lower()


def cause(error: BaseException) -> str:
    """Return an exception as one short line: its type and the beginning of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def decode_record(cls: type[T], table: Any, where: str) -> T:
    """Build the struct `cls` from plain data.

    Raises:
        UsageError: naming `where`, the key, and the nearest known key.
    """
    import msgspec

    if not isinstance(table, dict):
        raise UsageError(f"{where}: expected a table, got {type(table).__name__}")
    check_keys(table, msgspec.structs.fields(cls), where)
    try:
        return msgspec.convert(table, cls)
    except msgspec.ValidationError as error:
        message, _, path = str(error).replace("`", "'").partition(" - at '$")
        raise UsageError(f"{where}{path.rstrip(chr(39))}: {message[:1].lower()}{message[1:]}") from None


def check_keys(table: Mapping[str, Any], known: Any, where: str) -> None:
    """Raise UsageError for the first key of `table` that is not among `known` (names or msgspec fields)."""
    names = [field if isinstance(field, str) else field.name for field in known]
    for key in table:
        if key not in names:
            hint = did_you_mean(key, names) or f"known keys: {', '.join(sorted(names))}"
            raise UsageError(f"{where}: unknown key {key!r}", hint)


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
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return own or os.path.join(base, "mmhub")


def _cache_file() -> str:
    from zlib import crc32  # hashlib would cost a tenth of the whole start; the full key is compared below

    return os.path.join(cache_folder(), f"index-{crc32(repr(_key()).encode()):08x}.json")


def _key() -> list[str]:
    return [sys.version, sys.prefix, __version__]


def _search_path() -> list[list[Any]]:
    """Every folder of sys.path with its mtime, which every install and uninstall changes."""
    return [[folder, _mtime(folder)] for folder in dict.fromkeys(os.path.abspath(entry) for entry in sys.path)]


def _mtime(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        return 0


def _read_cache() -> list[Record] | None:
    import json

    try:
        with open(_cache_file(), encoding="utf-8") as file:
            document = json.load(file)
        if document["format"] != _FORMAT or document["key"] != _key() or document["paths"] != _search_path():
            return None
        if any(_mtime(path) != mtime for path, mtime in document["files"]):
            return None
        records: list[Record] = document["plugins"]
        return records if records and all(record.keys() == _KEYS for record in records) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write_cache(paths: list[list[Any]], records: list[Record]) -> None:
    import json

    files = [record["manifest"] for record in records if record["manifest"]] + [__file__]
    document = {
        "format": _FORMAT,
        "key": _key(),
        "paths": paths,
        "files": [[path, _mtime(path)] for path in files],
        "plugins": records,
    }
    target = _cache_file()
    draft = f"{target}.{os.getpid()}.tmp"
    try:
        text = json.dumps(document)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, target)
    except (OSError, TypeError, ValueError):  # an unwritable cache costs a scan each time, nothing else
        from contextlib import suppress

        with suppress(OSError):
            os.unlink(draft)


# --- the scan


def _scan() -> list[Record]:
    import importlib

    paths = _search_path()  # before looking, so that an install meanwhile invalidates what is written
    importlib.invalidate_caches()
    records = sorted(_installed(), key=lambda record: str(record["distribution"]))
    core = _record(CORE, __version__, package=CORE, summary="the core")
    records.insert(0, _contained(core, os.path.join(os.path.dirname(__file__), "mmhub.toml")))
    _write_cache(paths, records)
    return records


def _installed() -> Iterator[Record]:
    from importlib.metadata import distributions

    seen = {CORE}
    for distribution in distributions():
        record = _read_distribution(distribution)
        if record and record["distribution"] not in seen:
            seen.add(record["distribution"])
            yield record


def _read_distribution(distribution: Distribution) -> Record | None:
    """Return the record of a distribution, None if it is no plugin. Metadata is parsed only for plugins: it is slow."""
    try:
        text = distribution.read_text("entry_points.txt") or ""
        problem = ""
    except (OSError, ValueError) as error:
        text, problem = "", f"its entry points cannot be read: {cause(error)}"
    if not problem and "mmhub" not in text:
        return None
    try:
        name, version = canonical(distribution.metadata["Name"]), str(distribution.metadata["Version"])
        summary = str(distribution.metadata["Summary"]) if "Summary" in distribution.metadata else ""
    except Exception:
        return None  # without a name nobody could be told whom to blame
    record = _record(name, version, summary)
    if problem:
        return {**record, "problem": problem} if name.startswith("mmhub-") else None
    try:
        points = [point for point in distribution.entry_points if point.group in ("mmhub", "mmhub.manifest")]
    except Exception as error:
        return {**record, "problem": f"its entry points cannot be read: {cause(error)}"}
    return _contained(record, points) if points else None


def _record(distribution: str, version: str, summary: str = "", package: str = "") -> Record:
    empty: Record = {"hooks": [], "components": [], "commands": [], "models": {}}
    named = {"distribution": distribution, "version": version, "summary": summary, "package": package}
    return {**named, "manifest": "", "module": "", "status": "broken", "problem": "", **empty}


def _contained(record: Record, source: list[EntryPoint] | str) -> Record:
    """Fill in a record from entry points or a manifest file; whatever goes wrong becomes its `problem`."""
    try:
        if isinstance(source, str):
            record["manifest"] = source
        else:
            _locate(record, source)
        _fill(record)
    except MmhubError as error:
        record["problem"] = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # finders and metadata of strangers run here
        record["problem"] = cause(error)
    return record


def _locate(record: Record, points: list[EntryPoint]) -> None:
    manifests = [point.value for point in points if point.group == "mmhub.manifest"]
    modules = [point.value for point in points if point.group == "mmhub"]
    if len(manifests) != 1 or len(modules) > 1:
        raise UsageError(
            f"it declares {len(manifests)} mmhub.manifest and {len(modules)} mmhub entry points; one of each is allowed"
            if manifests
            else "it declares no mmhub.manifest entry point"
        )
    record["module"] = modules[0] if modules else ""
    package, _, name = (part.strip() for part in manifests[0].partition(":"))
    if not package.isidentifier() or not name or os.path.basename(name) != name:
        raise UsageError(f"mmhub.manifest entry point {manifests[0]!r} is not 'top_level_package:file.toml'")
    record["package"] = package
    record["manifest"] = _find_manifest(package, name)


def _find_manifest(package: str, name: str) -> str:
    """Return the path of a data file of a top-level package. `find_spec` does not import it, editable or not."""
    from importlib.util import find_spec

    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise UsageError(f"its package {package!r} cannot be found")
    paths = [os.path.join(folder, name) for folder in folders]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def _fill(record: Record) -> None:
    import tomllib

    try:
        with open(record["manifest"], "rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        raise UsageError(f"its manifest {record['manifest']} does not exist") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"its manifest {record['manifest']} cannot be read: {cause(error)}") from None
    reason = _incompatible(table)
    try:
        record.update(_decode_manifest(record, table))
    except UsageError:
        if not reason:
            raise
    record.update(status="incompatible" if reason else "ok", problem=reason)


def _incompatible(table: Mapping[str, Any]) -> str:
    """Why this core cannot use a plugin, '' if it can. Judged first: a newer manifest may have keys unknown here."""
    from mmhub.spec import API

    api, wanted = table.get("api"), table.get("requires_mmhub", "")
    if isinstance(api, int) and api > API:
        return f"it needs plugin interface {api} and mmhub {__version__} has {API}; upgrade mmhub"
    if isinstance(api, int) and api < API - 1:
        return f"it speaks plugin interface {api} and mmhub {__version__} needs {API - 1} or {API}; upgrade the plugin"
    if not isinstance(wanted, str) or not wanted:
        return ""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        fits = SpecifierSet(wanted).contains(__version__, prereleases=True)
    except InvalidSpecifier:
        return f"requires_mmhub = {wanted!r} is not a version specifier"
    return "" if fits else f"it needs mmhub {wanted}, and this is {__version__}"


def _decode_manifest(record: Record, table: dict[str, Any]) -> Record:
    """Check a manifest entry by entry, so that an error names the file and the key; return it as plain data."""
    import msgspec

    from mmhub.spec import CommandSpec, ComponentSpec, Manifest, ModelSpec

    file = record["manifest"]
    components = _entries(ComponentSpec, table, "components", file)
    commands = _entries(CommandSpec, table, "commands", file)
    models_table = table.get("models", {})
    if not isinstance(models_table, dict):
        raise UsageError(f"{file}: models: expected a table, got {type(models_table).__name__}")
    models = {name: decode_record(ModelSpec, entry, f"{file}: [models.{name}]") for name, entry in models_table.items()}
    rest = {key: value for key, value in table.items() if key not in ("components", "commands", "models")}
    manifest = decode_record(Manifest, rest, file)
    _check_hooks(manifest.hooks, record)
    targets = [*(spec.factory for spec in components), *(spec.factory for spec in commands)]
    _check_targets([*targets, *(spec.config for spec in components if spec.config)], record)
    for name, entry in models.items():
        if bool(entry.ref) == bool(entry.compose):
            raise UsageError(f"{file}: [models.{name}]: exactly one of 'ref' and 'compose' is needed")
    plain = {"components": components, "commands": commands, "models": models, "hooks": manifest.hooks}
    data: Record = msgspec.json.decode(msgspec.json.encode(plain))
    return data


def _entries(cls: type[T], table: Mapping[str, Any], key: str, file: str) -> list[T]:
    rows = table.get(key, [])
    if not isinstance(rows, list):
        raise UsageError(f"{file}: {key}: expected an array of tables, got {type(rows).__name__}")
    found: dict[tuple[str, str], T] = {}
    for number, row in enumerate(rows, 1):
        name = row.get("name", "") if isinstance(row, dict) else ""
        where = f"{file}: {key} #{number}" + (f" {name!r}" if isinstance(name, str) and name else "")
        entry = decode_record(cls, row, where)
        identity = (getattr(entry, "kind", ""), str(name))
        if identity in found:
            raise UsageError(f"{where}: the name is already taken in this manifest")
        found[identity] = entry
    return list(found.values())


def _check_targets(targets: list[str], record: Record) -> None:
    for target in targets:
        module, _, attribute = target.partition(":")
        dotted = f"{module}.{attribute}".split(".")
        if not attribute or not all(part.isidentifier() for part in dotted):
            raise UsageError(f"{record['manifest']}: {target!r} is not 'module:attribute'")
        if dotted[0] != record["package"]:
            raise UsageError(f"{record['manifest']}: {target!r} lies outside the package {record['package']!r}")


def _check_hooks(hooks: tuple[str, ...], record: Record) -> None:
    if not hooks:
        return
    from mmhub.hookspecs import hook_names

    known = hook_names()
    for hook in hooks:
        if hook not in known:
            hint = did_you_mean(hook, known) or f"hooks: {', '.join(known)}"
            raise UsageError(f"{record['manifest']}: hooks: unknown hook {hook!r}", hint)
    if not record["module"]:
        raise UsageError(f"{record['manifest']}: it declares hooks, and no entry point of group 'mmhub' to find them")
