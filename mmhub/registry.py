"""registry.toml and mmhub.lock: which names exist, which plugin to prefer, what may be fetched, what is pinned.

Four scopes, the first hit wins: the project's file (nearest upward), the user's, the installed plugins' manifests, and
the file shipped with mmhub. Turning a name into a checkpoint is left to `mmhub.names`.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from mmhub.errors import TrustError, UsageError
from mmhub.plugins import Component, get_index
from mmhub.records import canonical, check_keys, decode_record
from mmhub.spec import ModelSpec

SCHEMA = 1
FILE, LOCK = "registry.toml", "mmhub.lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who signs without a key of their own: an identity, such as a mail address, and the OpenID issuer it is from."""

    identity: str
    issuer: str


class HubSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[hub]`: where models come from (HF_ENDPOINT wins), which are allowed, must they be pinned or signed.

    `signers` says who signs which repositories: {"org/*": a public key's file, or an identity}; the first that matches
    counts.
    """

    endpoint: str = ""
    allow: tuple[str, ...] | None = None
    require_pinned: bool = False
    require_signed: bool = False
    require_statements: bool = False
    refuse_overlap: bool = False
    signers: dict[str, str | Identity] = {}


class PluginEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[plugins.NAME]`: what to install, who vouches for it, and what it provides, as "kind:name"."""

    requirement: str
    trust: Literal["official", "verified", "community"] = "community"
    source: str = ""
    provides: tuple[str, ...] = ()
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Registry:
    """One registry.toml, validated."""

    scope: str
    path: Path
    hub: HubSettings = field(default_factory=HubSettings)
    prefer: Mapping[str, str] = field(default_factory=dict)
    plugins: Mapping[str, PluginEntry] = field(default_factory=dict)
    models: Mapping[str, ModelSpec] = field(default_factory=dict)

    def signer(self, repo_id: str) -> Path | Identity | None:
        """Return who this file says signs a Hub repository. A Hub takes any case of its name, and so do patterns."""
        known = (
            who for one, who in self.hub.signers.items() if fnmatch.fnmatchcase(repo_id.casefold(), one.casefold())
        )
        who = next(known, None)
        return self.path.parent / os.path.expanduser(who) if isinstance(who, str) else who


@dataclass(frozen=True, kw_only=True)
class Named:
    """A model name and where it is defined; `owner` is the plugin, '' for a file's own entry."""

    name: str
    entry: ModelSpec
    scope: str
    source: str
    owner: str = ""


@dataclass(frozen=True)
class Registries:
    """All registry files that apply, in order of precedence."""

    files: tuple[Registry, ...]

    def preferred(self, key: str) -> str | None:
        """Return the distribution that `[prefer]` chooses for "kind:name"."""
        return next((canonical(file.prefer[key]) for file in self.files if key in file.prefer), None)

    def requirement(self, key: str) -> str | None:
        """Return what to install for "kind:name"."""
        entries = (entry for file in self.files for entry in file.plugins.values())
        return next((entry.requirement for entry in entries if key in entry.provides), None)

    def plugin_requirement(self, distribution: str) -> str | None:
        """Return what to install for a distribution that a registry lists."""
        wanted = canonical(distribution)
        rows = (row for file in self.files for row in file.plugins.items())
        return next((entry.requirement for name, entry in rows if canonical(name) == wanted), None)

    def endpoint(self) -> str:
        """Return the Hub address that the first `[hub] endpoint` sets, '' for the default. HF_ENDPOINT wins."""
        set_in = (file.hub.endpoint for file in self.files if file.hub.endpoint)
        return os.environ.get("HF_ENDPOINT") or next(set_in, "")

    def allows(self, repo_id: str) -> bool:
        """Is a Hub repository on every `allow` list that there is?"""
        lists = (file.hub.allow for file in self.files if file.hub.allow is not None)
        return all(any(fnmatch.fnmatchcase(repo_id, pattern) for pattern in allow) for allow in lists)

    def check_allowed(self, repo_id: str, commit: str | None, *, to_pin: bool = False) -> None:
        """Refuse a Hub repository that any scope's `[hub]` table forbids: a project can tighten, never loosen.

        `to_pin` says that its commit is only asked for, in order to pin it.

        Raises:
            TrustError: it is not on an `allow` list, or not pinned where `require_pinned` is set.
        """
        for file in self.files:
            allow = file.hub.allow
            if allow is not None and not any(fnmatch.fnmatchcase(repo_id, pattern) for pattern in allow):
                listed = ", ".join(allow) or "nothing"
                raise TrustError(f"'{repo_id}' is not allowed by {file.path}", f"[hub] allow lists {listed}")
            if file.hub.require_pinned and commit is None and not to_pin:
                raise TrustError(
                    f"'{repo_id}' is not pinned to a commit, and {file.path} sets [hub] require_pinned",
                    f"pin it with `mmhub models lock {repo_id}`, or write '{repo_id}@<40 hex digits>'",
                )

    def signers(self, repo_id: str) -> list[Path | Identity]:
        """Return who must have signed a Hub repository, one of a scope at most: a project can tighten, never loosen.

        Raises:
            TrustError: a scope sets `require_signed`, and neither it nor one below it in `files`, which a project
            cannot write, names a signer.
        """
        named = [file.signer(repo_id) for file in self.files]
        for at, file in enumerate(self.files):
            if file.hub.require_signed and not any(named[at:]):
                raise TrustError(
                    f"{file.path} sets [hub] require_signed, and nobody is named who signs '{repo_id}'",
                    f'add the key you trust there: [hub] signers = {{"{repo_id.partition("/")[0]}/*" = "KEY.pub"}}',
                )
        return [who for who in named if who is not None]

    def wants_statements(self) -> Path | None:
        """Return the file that sets `require_statements`: nothing is pushed that says not what it was trained on."""
        return next((file.path for file in self.files if file.hub.require_statements), None)

    def refuses_overlap(self) -> Path | None:
        """Return the file that sets `refuse_overlap`: nothing is pushed that was measured on what it was trained on."""
        return next((file.path for file in self.files if file.hub.refuse_overlap), None)

    def named(self) -> Iterator[Named]:
        """Yield every model name of every scope, in order of precedence; aliases are not expanded."""
        for file in self.files:
            if file.scope == "shipped":
                yield from _plugin_models()
            for name, entry in file.models.items():
                yield Named(name=name, entry=entry, scope=file.scope, source=str(file.path))


def find_component(kind: str, name: str) -> Component:
    """Return the installed component called `name` (short name or "mmhub-x/name"), as the registries settle it.

    Raises:
        PluginError: its plugin is missing, unusable, or one of two that provide it.
        NotFoundError: nobody provides it.
    """
    return get_index().find(kind, name, read_registries)


def read_registries(start: Path | None = None) -> Registries:
    """Read the registries that apply in the folder `start`, the current one by default.

    Raises:
        UsageError: a file is invalid; names the file and the table.
    """
    shipped = shipped_file()
    project = find_upward(FILE, start)
    files = []
    if project and not (shipped.exists() and project.samefile(shipped)):
        files.append(read_registry(project, "project"))
    user = config_folder() / FILE
    if user.is_file() and not (project and project.samefile(user)):
        files.append(read_registry(user, "user"))
    files.append(read_registry(shipped, "shipped"))
    return Registries(tuple(files))


def config_folder() -> Path:
    """Return the folder of the user's own settings."""
    own = os.environ.get("MMHUB_CONFIG")
    base = os.environ.get("XDG_CONFIG_HOME")
    return Path(own) if own else (Path(base) if base else Path("~/.config").expanduser()) / "mmhub"


def shipped_file() -> Path:
    """Return the registry that comes with mmhub: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).with_name(FILE)
    return inside if inside.is_file() else Path(__file__).parents[1] / FILE


def find_upward(name: str, start: Path | None = None) -> Path | None:
    """Return the nearest file called `name` in `start` or a folder above it."""
    try:
        folder = (start or Path.cwd()).resolve()
    except OSError:  # the current folder was deleted
        return None
    return next((up / name for up in (folder, *folder.parents) if (up / name).is_file()), None)


def read_registry(path: Path, scope: str) -> Registry:
    """Read and validate one registry.toml.

    Raises:
        UsageError: it is invalid; names the file, the line and the table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return _parse(text, path, scope)


@functools.lru_cache(maxsize=8)  # by content: a name is looked up often, and the files seldom change
def _parse(text: str, path: Path, scope: str) -> Registry:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    _check_schema(table.pop("schema", None), SCHEMA, path)
    try:
        return _decode(table, path, scope)
    except UsageError as error:
        raise UsageError(_with_line(error.message, path, text), error.hint) from None


def _check_schema(schema: Any, newest: int, path: Path) -> None:
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise UsageError(
            f"{path}: the key 'schema' is missing or not a number", f"begin the file with `schema = {newest}`"
        )
    if schema > newest:
        raise UsageError(f"{path}: it has schema {schema}, and this mmhub knows {newest}", "upgrade mmhub")


def _decode(table: dict[str, Any], path: Path, scope: str) -> Registry:
    tables = {key: value for key, value in table.items() if not key.startswith("x-")}
    check_keys(tables, ["schema", "hub", "prefer", "plugins", "models"], str(path))
    for key, value in tables.items():
        if not isinstance(value, dict):
            raise UsageError(f"{path}: [{key}]: expected a table, got {type(value).__name__}")
    plugins = {
        name: decode_record(PluginEntry, entry, f"{path}: [plugins.{name}]")
        for name, entry in tables.get("plugins", {}).items()
    }
    models = {
        name: decode_record(ModelSpec, entry, f"{path}: [models.{name}]")
        for name, entry in tables.get("models", {}).items()
    }
    _check_prefer(tables.get("prefer", {}), path)
    _check_plugins(plugins, path)
    _check_models(models, path)
    hub = decode_record(HubSettings, tables.get("hub", {}), f"{path}: [hub]")
    return Registry(scope=scope, path=path, hub=hub, prefer=tables.get("prefer", {}), plugins=plugins, models=models)


def _check_prefer(prefer: Mapping[str, Any], path: Path) -> None:
    for key, value in prefer.items():
        if ":" not in key or not isinstance(value, str):
            raise UsageError(f'{path}: [prefer]: expected "kind:name" = "distribution", got {key!r} = {value!r}')


def _check_plugins(plugins: Mapping[str, PluginEntry], path: Path) -> None:
    for name, entry in plugins.items():
        where = f"{path}: [plugins.{name}]"
        if canonical(check_requirement(entry.requirement, where)) != canonical(name):
            raise UsageError(f"{where}: requirement {entry.requirement!r} is for another distribution")
        for key in entry.provides:
            if not re.fullmatch(r"[a-z_]+:\S+", key):
                raise UsageError(f'{where}: provides {key!r}, expected "kind:name" such as "image_encoder:timm"')


def check_requirement(requirement: str, where: str) -> str:
    """Return the distribution of a requirement that is safe to show in an install command; UsageError if it is not."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        parsed = Requirement(requirement)
    except InvalidRequirement:
        parsed = None
    if parsed is None or parsed.url or parsed.marker:
        raise UsageError(f"{where}: {requirement!r} is not a requirement such as 'mmhub-image>=0.1,<1'")
    return parsed.name


def _check_models(models: Mapping[str, ModelSpec], path: Path) -> None:
    taken: dict[str, str] = {}
    for name, entry in models.items():
        where = f"{path}: [models.{name}]"
        for word in (name, *entry.aliases):
            if not _NAME.fullmatch(word):
                raise UsageError(f"{where}: the name {word!r} may hold only letters, digits, '.', '_' and '-'")
            if word in taken:
                raise UsageError(f"{where}: the name {word!r} is already taken by [models.{taken[word]}]")
            taken[word] = name
        if bool(entry.ref) == bool(entry.compose):
            raise UsageError(f"{where}: exactly one of 'ref' and 'compose' is needed")
        if entry.commit and not _COMMIT.fullmatch(entry.commit):
            raise UsageError(f"{where}: commit {entry.commit!r} is not 40 hex digits")
        for requirement in entry.requires:
            check_requirement(requirement, where)


def _with_line(message: str, path: Path, text: str) -> str:
    """Put the line number of the table that `message` names after the path, where it can be found."""
    named = re.match(re.escape(str(path)) + r": \[([^\]]+)\]", message)
    if not named:
        return message
    header = re.compile(r"\s*\[" + re.escape(named[1]).replace(r"\.", r'\."?') + r'[".\]]')
    found = [number for number, line in enumerate(text.splitlines(), 1) if header.match(line)]
    return message.replace(f"{path}:", f"{path}:{found[0]}:", 1) if found else message


def _plugin_models() -> Iterator[Named]:
    for plugin in get_index().usable():
        for name, entry in plugin.models.items():
            source, owner = plugin.manifest, plugin.distribution
            yield Named(name=name, entry=entry, scope="plugins", source=source, owner=owner)


# --- mmhub.lock


class Pin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One name pinned to a commit; `ref` is what it meant when it was pinned."""

    ref: str
    commit: str


def read_lock(start: Path | None = None) -> dict[str, Pin]:
    """Return the pins of the nearest mmhub.lock, {} if there is none.

    Raises:
        UsageError: the file is invalid.
    """
    path = find_upward(LOCK, start)
    return _read_lock(path) if path else {}


def lock_file(start: Path | None = None) -> Path:
    """Return the mmhub.lock that applies in `start`: the nearest, or the one `write_pins` would make.

    That is beside the project's registry.toml, or in the current folder.
    """
    registry = find_upward(FILE, start)
    beside = registry.with_name(LOCK) if registry else (start or Path.cwd()) / LOCK
    return find_upward(LOCK, start) or beside


def write_lock(name: str, repo: str, commit: str, start: Path | None = None) -> Path:
    """Pin `name` (a `Resolved.name`) to a commit of `repo`, "org/name[@revision]", and return the lock's path."""
    return write_pins({name: Pin(ref=f"hub:{repo}", commit=commit)}, start)


def write_pins(changes: Mapping[str, Pin | None], start: Path | None = None) -> Path:
    """Add or replace pins in mmhub.lock, remove those that are None, and return the file's path.

    Raises:
        UsageError: a commit is malformed, or the file that is there is invalid.
    """
    from mmhub.files import disk_errors, write_file

    wrong = next(((name, pin) for name, pin in changes.items() if pin and not _COMMIT.fullmatch(pin.commit)), None)
    if wrong:
        raise UsageError(f"cannot pin '{wrong[0]}' to {wrong[1].commit!r}", "a commit has 40 hex digits")
    path = lock_file(start)
    pins = {name: pin for name, pin in (read_lock(start) | dict(changes)).items() if pin}
    models = {name: {"ref": pins[name].ref, "commit": pins[name].commit} for name in sorted(pins)}
    with disk_errors("the pins", path.parent):
        write_file(path, json.dumps({"schema": SCHEMA, "models": models}, indent=2) + "\n")
    return path


def _read_lock(path: Path) -> dict[str, Pin]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        models = document["models"].items()
        schema = document["schema"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read: {error!r}", "it is written by mmhub; delete it to start anew"
        ) from None
    _check_schema(schema, SCHEMA, path)
    pins = {name: decode_record(Pin, entry, f"{path}: {name}") for name, entry in models}
    for name, pin in pins.items():
        if not _COMMIT.fullmatch(pin.commit):
            raise UsageError(f"{path}: {name}: commit {pin.commit!r} is not 40 hex digits")
    return pins
