"""The installed plugins as objects: look a component up by name, import it, call hooks.

Finding plugins on disk is `mmhub.discovery`'s work. Code of a plugin runs only in `Component.load` and `call_hook`;
whatever it raises (KeyboardInterrupt apart) or prints to stdout is contained there. Plugins may come and go while a
process runs: what is missing is looked for again, and what was replaced says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from mmhub.discovery import command_table, find_plugins, has_changed, problem_lines, strict
from mmhub.errors import NotFoundError, PluginError, did_you_mean
from mmhub.records import Record, canonical, cause
from mmhub.spec import CommandSpec, ComponentSpec, ModelSpec
from mmhub.stdout import diverted_stdout

if TYPE_CHECKING:
    import pluggy

__all__ = [
    "Advice",
    "Component",
    "Index",
    "Plugin",
    "call_hook",
    "command_table",
    "get_index",
    "hook_items",
    "install_line",
    "load_target",
    "newer_index",
    "problem_lines",
]


@dataclass(frozen=True)
class Component:
    """A component of an installed plugin; nothing of it is imported before `load`."""

    spec: ComponentSpec
    distribution: str
    version: str

    @property
    def id(self) -> str:
        """The full id, which is unique for its kind."""
        return f"{self.distribution}/{self.spec.name}"

    def load(self) -> Any:
        """Import and return the class that builds this component.

        Raises:
            PluginError: the plugin's code failed, or has no such class.
        """
        return load_target(self.spec.factory, f"{self.spec.kind} {self.spec.name!r}", self.distribution, self.version)

    def config_type(self) -> Any:
        """Import and return the class of this component's configuration."""
        if not self.spec.config:
            return self.load().Config
        what = f"the configuration of {self.spec.kind} {self.spec.name!r}"
        return load_target(self.spec.config, what, self.distribution, self.version)


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An installed plugin. `status` is "ok", "broken", "incompatible" or "disabled", and `problem` says why.

    `warning` tells of other versions of it that are installed, too, and not used.
    """

    distribution: str
    version: str
    summary: str
    status: str
    problem: str
    manifest: str  # path of its mmhub.toml, '' if it has none
    module: str  # the module its hooks are in, '' if it has none
    hooks: tuple[str, ...]
    components: tuple[Component, ...]
    commands: tuple[CommandSpec, ...]
    models: Mapping[str, ModelSpec]
    location: str = ""  # the folder of its metadata, in a folder or zip file of sys.path
    warning: str = ""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


class Advice(Protocol):
    """What the registries know about plugins; `key` is "kind:name"."""

    def preferred(self, key: str) -> str | None:
        """Return the distribution that `[prefer]` chooses for `key`."""

    def requirement(self, key: str) -> str | None:
        """Return what to install for `key`, such as `mmhub-x>=0.1,<1`."""

    def plugin_requirement(self, distribution: str) -> str | None:
        """Return what to install for a distribution that a registry lists."""


class NoAdvice:
    """Advice of somebody who knows no registry."""

    def preferred(self, key: str) -> str | None:
        return None

    def requirement(self, key: str) -> str | None:
        return None

    def plugin_requirement(self, distribution: str) -> str | None:
        return None


@dataclass(frozen=True)
class Index:
    """All installed plugins, the core included. Short names work while they are unique for their kind."""

    plugins: tuple[Plugin, ...] = field(default=())

    def usable(self) -> Iterator[Plugin]:
        """Yield the plugins whose status is ok."""
        return (plugin for plugin in self.plugins if plugin.status == "ok")

    def plugin(self, distribution: str) -> Plugin | None:
        """Return the plugin of that name, whatever its status."""
        wanted = canonical(distribution)
        return next((plugin for plugin in self.plugins if plugin.distribution == wanted), None)

    def components(self, kind: str | None = None) -> list[Component]:
        """Return the usable components, of one kind or all."""
        every = (component for plugin in self.usable() for component in plugin.components)
        return [component for component in every if kind in (None, component.spec.kind)]

    def find(self, kind: str, name: str, advice: Callable[[], Advice] = NoAdvice) -> Component:
        """Return the component called `name`, a short name or a full id such as "mmhub-x/name".

        `advice` is asked only when the name is missing or not unique. What is missing may have been installed just
        now, and is looked for once more.

        Raises:
            PluginError: two plugins provide it, its plugin cannot be used, or its plugin is known and not installed.
            NotFoundError: no plugin that anybody knows of provides it.
        """
        matches = self._providers(kind, name)
        if not matches:
            newer = newer_index(self)
            matches = newer._providers(kind, name)
            if not matches:
                raise newer._missing(kind, name, advice())
        if len(matches) > 1:
            preferred = advice().preferred(f"{kind}:{name}")
            matches = [component for component in matches if component.distribution == preferred] or matches
        if len(matches) > 1:
            raise _ambiguous(kind, name, matches)
        return matches[0]

    def _providers(self, kind: str, name: str) -> list[Component]:
        return [component for component in self.components(kind) if _matches(component, name)]

    def _missing(self, kind: str, name: str, advice: Advice) -> PluginError | NotFoundError:
        owner, _, short = name.rpartition("/")
        key, owner = f"{kind}:{short}", canonical(owner)
        for plugin in self.plugins:
            declared = any(component.spec.kind == kind and _matches(component, name) for component in plugin.components)
            if plugin.status != "ok" and (declared or plugin.distribution == owner):
                return _unusable(f"{kind} {name!r}", plugin)
        requirement = advice.plugin_requirement(owner) if owner else advice.requirement(key)
        if requirement:
            return self._uninstalled(f"{kind} {name!r}", requirement)
        names = [component.spec.name for component in self.components(kind)]
        known = f"available: {', '.join(sorted(set(names)))}" if names else f"no installed plugin provides any {kind}"
        return NotFoundError(
            f"there is no {kind} {name!r}", " ".join(filter(None, [did_you_mean(short, names), known]))
        )

    def _uninstalled(self, what: str, requirement: str) -> PluginError:
        plugin = self.plugin(_distribution_of(requirement))
        if plugin and plugin.status != "ok":
            return _unusable(what, plugin)
        if plugin:
            return PluginError(f"{what} is not in the installed {plugin}", install_line([requirement], upgrade=True))
        return PluginError(
            f"{what} is in the plugin {_distribution_of(requirement)}, which is not installed",
            install_line([requirement]),
        )


_index: Index | None = None


def get_index(rescan: bool = False) -> Index:
    """Return the index of installed plugins, built once per process.

    Raises:
        PluginError: a plugin has a problem, and MMHUB_STRICT_PLUGINS=1 is set.
    """
    global _index
    if _index is None or rescan:
        _index = _read_index(rescan)
        if strict():
            problem_lines()
    return _index


def newer_index(index: Index) -> Index:
    """Return an index that knows what was installed, removed or edited since, or `index` if nothing was."""
    if index is not _index:  # another thread has looked since, or somebody made an index of their own
        return index
    return get_index(rescan=True) if has_changed() else index


def install_line(requirements: Iterable[str], upgrade: bool = False) -> str:
    """Return the one command that installs `requirements`, as a hint."""
    quoted = " ".join(f'"{requirement}"' for requirement in requirements)
    return f"install: mmhub plugins install {'--upgrade ' if upgrade else ''}{quoted}"


def _read_index(rescan: bool) -> Index:
    try:
        return Index(tuple(_plugin(record) for record in find_plugins(rescan)))
    except (ValueError, TypeError, KeyError, AttributeError):
        if rescan:
            raise
        return _read_index(rescan=True)  # the cache was tampered with


def _plugin(record: Record) -> Plugin:
    import msgspec

    distribution, version = record["distribution"], record["version"]
    specs = msgspec.convert(record["components"], list[ComponentSpec])
    plain = ("distribution", "version", "summary", "status", "problem", "manifest", "module", "location", "warning")
    return Plugin(
        **{key: msgspec.convert(record[key], str) for key in plain},
        hooks=tuple(msgspec.convert(record["hooks"], list[str])),
        components=tuple(Component(spec, distribution, version) for spec in specs),
        commands=tuple(msgspec.convert(record["commands"], list[CommandSpec])),
        models=msgspec.convert(record["models"], dict[str, ModelSpec]),
    )


def _matches(component: Component, name: str) -> bool:
    owner, _, short = name.rpartition("/")
    return component.spec.name == short and (not owner or canonical(owner) == component.distribution)


def _ambiguous(kind: str, name: str, matches: Sequence[Component]) -> PluginError:
    providers = " and ".join(f"{component.distribution} {component.version}" for component in matches)
    first = matches[0]
    return PluginError(
        f"{kind} {name!r} is provided by {providers}",
        f'write "{first.id}", or add under [prefer] in registry.toml: "{kind}:{name}" = "{first.distribution}"',
    )


def _unusable(what: str, plugin: Plugin) -> PluginError:
    return PluginError(
        f"{what} is in {plugin}, which is {plugin.status}: {plugin.problem}",
        f"see `mmhub plugins show {plugin.distribution}`",
    )


def _distribution_of(requirement: str) -> str:
    from packaging.requirements import Requirement

    return canonical(Requirement(requirement).name)


# --- the code of a plugin

_loaded: dict[str, str] = {}  # distribution: the version of it that this process has imported


def load_target(target: str, what: str, distribution: str, version: str) -> Any:
    """Import "module:attribute" of a plugin, turning whatever its code raises into a PluginError of one line."""
    changed = _changed(distribution, version)
    if changed:
        raise changed
    module, _, path = target.partition(":")
    try:
        with diverted_stdout():
            value: Any = import_module(module)
            for step in path.split("."):
                value = getattr(value, step)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may even call sys.exit
        raise _changed(distribution, version, failed=True) or PluginError(
            f"plugin {distribution} {version} cannot load {what}: {cause(error)}",
            f"see `mmhub plugins show {distribution} --load`",
        ) from error
    _loaded.setdefault(distribution, version)
    return value


def _changed(distribution: str, version: str, failed: bool = False) -> PluginError | None:
    """Return an error if a plugin was removed or replaced under this process: old and new code would be mixed.

    One `stat` call where all is well; after a failure everything that may have changed is looked at.
    """
    plugin = known = _index.plugin(distribution) if _index else None
    if known and (_is_gone(known.location) or (failed and has_changed())):
        plugin = get_index(rescan=True).plugin(distribution)
    running = _loaded.get(distribution, version)
    current = plugin.version if plugin else version
    if known and plugin is None:
        what, hint = f"{running} was removed", "install it and start again"
    elif not current == version == running:
        what, hint = f"{running} was replaced by {version if current == running else current}", "start again"
    elif failed and plugin != known:
        what, hint = f"{running} was changed", "start again"
    else:
        return None
    return PluginError(f"plugin {distribution} {what} while this process ran", hint)


def _is_gone(location: str) -> bool:
    return bool(location) and not os.path.lexists(location) and not os.path.isfile(os.path.dirname(location))


# --- hooks

_manager: pluggy.PluginManager | None = None
_told: set[str] = set()


def call_hook(name: str, **kwargs: Any) -> list[Any]:
    """Call one hook of every plugin that declares it, and return all the items they gave as one flat list.

    A plugin that fails costs one line on stderr and its own items, nothing else. What it prints goes to stderr.

    Raises:
        PluginError: a plugin failed, and MMHUB_STRICT_PLUGINS=1 is set.
    """
    return [item for _, item in hook_items(name, **kwargs)]


def hook_items(name: str, *, required: bool = False, **kwargs: Any) -> list[tuple[Plugin, Any]]:
    """Like `call_hook`, with the plugin that gave each item; with `required` a plugin that fails is an error.

    Raises:
        PluginError: a plugin failed, and `required` or MMHUB_STRICT_PLUGINS=1 is set.
    """
    items: list[tuple[Plugin, Any]] = []
    for plugin in get_index().usable():
        if name in plugin.hooks:
            items += [(plugin, item) for item in _call_one(plugin, name, kwargs, required)]
    return items


def _call_one(plugin: Plugin, name: str, kwargs: Mapping[str, Any], required: bool) -> list[Any]:
    try:
        with diverted_stdout():
            manager = _register(plugin)
            others = [other for key, other in manager.list_name_plugin() if key != plugin.distribution]
            results = manager.subset_hook_caller(name, others)(**kwargs)
            items = [item for result in results for item in result]  # a generator runs here, inside the guard
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        changed = _changed(plugin.distribution, plugin.version, failed=True)
        what = str(changed) if changed else f"plugin {plugin} failed in {name}: {cause(error)}"
        _tell(f"{what} (mmhub plugins show {plugin.distribution} --load)", required or strict(), error)
        return []
    _compare_hooks(plugin, manager)
    return items


def _tell(line: str, fatal: bool, error: BaseException | None = None) -> None:
    """Say in one line, once per process, what is wrong with a plugin's hooks."""
    if fatal:
        raise PluginError(line) from error
    if line not in _told:
        _told.add(line)
        print(line, file=sys.stderr)


def _register(plugin: Plugin) -> pluggy.PluginManager:
    """Import a plugin's hook module on first use. One bad module never stays registered."""
    global _manager
    import pluggy

    from mmhub import hookspecs

    if _manager is None:
        _manager = pluggy.PluginManager("mmhub")
        _manager.add_hookspecs(hookspecs)
    if not _manager.has_plugin(plugin.distribution):
        try:
            _manager.register(import_module(plugin.module), plugin.distribution)
        except BaseException:
            if _manager.has_plugin(plugin.distribution):  # before pluggy 1.7
                _manager.unregister(name=plugin.distribution)
            raise
        _loaded.setdefault(plugin.distribution, plugin.version)
    return _manager


def _compare_hooks(plugin: Plugin, manager: pluggy.PluginManager) -> None:
    """Say where a manifest and its module differ: such a hook would silently never be called."""
    module = manager.get_plugin(plugin.distribution)
    hooks = {
        caller.name
        for caller in manager.get_hookcallers(module) or []
        if any(one.plugin is module and not one.optionalhook for one in caller.get_hookimpls())
    }
    declared, implemented = sorted(set(plugin.hooks) - hooks), sorted(hooks - set(plugin.hooks))
    faults = [f"its manifest declares {', '.join(declared)}, which {plugin.module} does not implement"] * bool(declared)
    faults += [f"{plugin.module} implements {', '.join(implemented)}, not declared in its manifest"] * bool(implemented)
    if faults:
        _tell(f"plugin {plugin}: {'; '.join(faults)} (mmhub plugins check {plugin.distribution})", strict())
