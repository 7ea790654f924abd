"""`mmhub plugins`: what is installed, what it offers, and what is wrong with it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from mmhub.cli.output import LazyCommands, emit, result_options, table
from mmhub.cli.text import counted
from mmhub.errors import NotFoundError, PluginError, did_you_mean
from mmhub.plugins import Component, Plugin, get_index, install_line, load_target
from mmhub.records import canonical
from mmhub.registry import read_registries

# name: (module:attribute, what help says); imported only when one of them runs
COMMANDS = {
    "install": ("mmhub.cli.plugin_install:install", "Install plugins without moving what others need"),
    "uninstall": ("mmhub.cli.plugin_install:uninstall", "Remove plugins"),
    "lock": ("mmhub.cli.plugin_install:lock", "Write down the installed plugins with their hashes"),
    "restore": ("mmhub.cli.plugin_install:restore", "Install what a lock or the record of this environment lists"),
    "rollback": ("mmhub.cli.plugin_install:rollback", "Undo the last change of plugins"),
    "new": ("mmhub.cli.plugin_new:new", "Write the package of a new plugin"),
    "check": ("mmhub.cli.plugin_check:check", "Test an installed plugin against its contracts"),
}


class _Group(LazyCommands):
    lazy = COMMANDS


@click.group(cls=_Group)
def plugins() -> None:
    """Find, install, write and check plugins."""


@plugins.command(short_help="List installed plugins and their state")
@click.option("--rescan", is_flag=True, help="Look at every installed package again instead of using the cache.")
@result_options
def ls(rescan: bool, as_json: bool) -> None:
    """List installed plugins and their state."""
    found = get_index(rescan).plugins
    rows = [
        (one.distribution, one.version, one.status, _offers(one), one.problem or one.warning or one.summary)
        for one in found
    ]
    text = table(["plugin", "version", "status", "offers", "summary"], rows)
    emit({"plugins": [_row(plugin) for plugin in found]}, as_json, text)


@plugins.command(short_help="Show what a plugin offers, and its problems")
@click.argument("name")
@click.option("--load", is_flag=True, help="Import everything it offers, and say what fails. Runs its code.")
@result_options
def show(name: str, load: bool, as_json: bool) -> None:
    """Show what the plugin NAME offers, and its problems."""
    index = get_index()
    plugin = index.plugin(name) or index.plugin(f"mmhub-{name}")
    if plugin is None:
        raise explain_absent(name, [one.distribution for one in index.plugins])
    failures = _failures(plugin) if load else []
    data = _row(plugin) | ({"failures": failures} if load else {})
    emit(data, as_json, _describe(plugin, failures, load))
    if failures:
        what = f"{counted(len(failures), 'part')} of {plugin}" if plugin.status == "ok" else str(plugin)
        name = plugin.distribution
        hint = f"mmhub plugins check {name} tests it, mmhub plugins uninstall {name} removes it"
        raise PluginError(f"{what} cannot be used", hint if plugin.status != "disabled" else None)


def _row(plugin: Plugin) -> dict[str, Any]:
    return {
        "distribution": plugin.distribution,
        "version": plugin.version,
        "status": plugin.status,
        "problem": plugin.problem,
        "warning": plugin.warning,
        "location": plugin.location,
        "summary": plugin.summary,
        "manifest": plugin.manifest,
        "components": [
            {
                "kind": part.spec.kind,
                "name": part.spec.name,
                "id": part.id,
                "schema": part.spec.schema,
                "summary": part.spec.summary,
            }
            for part in plugin.components
        ],
        "commands": [{"name": command.name, "summary": command.summary} for command in plugin.commands],
        "models": sorted(plugin.models),
        "hooks": list(plugin.hooks),
    }


def _describe(plugin: Plugin, failures: list[str], loaded: bool) -> str:
    lines = [f"{plugin}: {plugin.summary}" if plugin.summary else str(plugin), f"status: {plugin.status}"]
    lines += [f"problem: {plugin.problem}"] if plugin.problem else []
    lines += [f"warning: {plugin.warning}"] if plugin.warning else []
    lines += [f"location: {plugin.location}"] if plugin.location else []
    lines += [f"manifest: {plugin.manifest}"] if plugin.manifest else []
    parts = table(["kind", "name", "schema", "summary"], [_cells(part) for part in plugin.components])
    commands = [f"command: mmhub {command.name}  {command.summary}".rstrip() for command in plugin.commands]
    models = [f"model: {name}  {entry.summary}".rstrip() for name, entry in plugin.models.items()]
    lines += [*commands, *models, *(f"hook: {hook}" for hook in plugin.hooks), *([parts] if parts else [])]
    lines += [f"fails: {failure}" for failure in failures]
    return "\n".join(lines + (["everything it offers can be imported"] if loaded and not failures else []))


def _cells(part: Component) -> tuple[str, str, int, str]:
    return part.spec.kind, part.spec.name, part.spec.schema, part.spec.summary


def _offers(plugin: Plugin) -> str:
    """Count what a plugin brings: '2 components, 1 hook'; '-' if it brings nothing that could be read."""
    brought = {"component": plugin.components, "command": plugin.commands, "model": plugin.models, "hook": plugin.hooks}
    return ", ".join(counted(len(those), what) for what, those in brought.items() if those) or "-"


def _failures(plugin: Plugin) -> list[str]:
    if plugin.status != "ok":
        return [plugin.problem]
    targets = [(part.spec.factory, f"{part.spec.kind} {part.spec.name!r}") for part in plugin.components]
    targets += [(command.factory, f"the command '{command.name}'") for command in plugin.commands]
    targets += [(plugin.module + ":__name__", "its hooks")] if plugin.module else []
    failures = []
    for target, what in targets:
        try:
            load_target(target, what, plugin.distribution, plugin.version)
        except PluginError as error:
            failures.append(error.message)
    return failures


def explain_absent(name: str, installed: Iterable[str]) -> NotFoundError:
    """Return the error about a plugin that is not `installed`, with the command that installs it if one is known."""
    short = canonical(name).removeprefix("mmhub-")
    registries = read_registries()
    requirement = registries.plugin_requirement(name) or registries.plugin_requirement(f"mmhub-{short}")
    names = {canonical(name), f"mmhub-{short}"}
    folder = next((place for place in (".", f"mmhub-{short}") if _project(Path(place)) in names), None)
    if folder:
        hint: str | None = f"to work on it here: mmhub plugins install -e {folder}"
    else:
        hint = install_line([requirement]) if requirement else did_you_mean(name, installed)
    return NotFoundError(f"the plugin '{name}' is not installed", hint or "see `mmhub plugins ls`")


def _project(folder: Path) -> str:
    """Return the name of the package whose source a folder holds, '' if it holds none."""
    try:
        return canonical(tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
