"""The manifest of one plugin: where it is, what it says, and whether this core can use it.

Nothing is imported for it. Whatever is wrong is raised as a `UsageError` that names the file and the key; other
exceptions come from import hooks of strangers, which run here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mmhub import __version__
from mmhub.errors import UsageError, did_you_mean
from mmhub.records import Record, T, cause, decode_record


def locate(record: Record, points: Mapping[str, list[str]], root: str) -> bytes:
    """Fill in what the entry points of a plugin say, and return the content of its manifest.

    `points` are the values of its entry points by group; `root` is the folder or zip file it is installed in.
    """
    manifests, modules = points["mmhub.manifest"], points["mmhub"]
    if len(manifests) != 1 or len(modules) > 1:
        raise UsageError(
            f"it declares {len(manifests)} mmhub.manifest and {len(modules)} mmhub entry points; one of each is allowed"
            if manifests
            else "it declares no mmhub.manifest entry point"
        )
    record["module"] = modules[0] if modules else ""
    if modules and not all(part.isidentifier() for part in modules[0].split(".")):
        raise UsageError(f"mmhub entry point {modules[0]!r} is not the name of a module")
    package, _, name = (part.strip() for part in manifests[0].partition(":"))
    if not package.isidentifier() or not name or os.path.basename(name) != name:
        raise UsageError(f"mmhub.manifest entry point {manifests[0]!r} is not 'top_level_package:file.toml'")
    record["package"] = package
    return _read_manifest(record, name, root)


def _read_manifest(record: Record, name: str, root: str) -> bytes:
    """Read a data file of a top-level package. `find_spec` does not import it, be it a folder, editable or zipped.

    A namespace package has several folders: the one under `root` comes first, for a neighbour's may hold a file of the
    same name.
    """
    from importlib.util import find_spec

    spec = find_spec(record["package"])
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise UsageError(f"its package {record['package']!r} cannot be found")
    own = os.path.join(root, record["package"])
    folders.sort(key=lambda folder: os.path.abspath(folder) != os.path.abspath(own))
    for folder in folders:
        record["manifest"] = os.path.join(folder, name)
        content = _read_file(record["manifest"])
        if content is not None:
            return content
    record["manifest"] = os.path.join(folders[0], name)
    raise UsageError(f"its manifest {record['manifest']} does not exist")


def _read_file(path: str) -> bytes | None:
    """Read a file in a folder or, as the import system does, in a zip file; None if there is no such file."""
    from pkgutil import get_importer

    try:
        if os.path.lexists(path):
            with open(path, "rb") as file:
                return file.read()
        read: Any = getattr(get_importer(os.path.dirname(path)), "get_data", None)
        return bytes(read(path)) if read else None
    except FileNotFoundError:  # a link that leads nowhere
        return None
    except OSError as error:
        if os.path.lexists(path):
            raise UsageError(f"its manifest {path} cannot be read: {cause(error)}") from None
        return None  # so says a zip file that has no such file


def fill(record: Record, content: bytes) -> None:
    """Fill in a record from the content of its manifest, and set its status."""
    import tomllib

    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
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
