"""Which plugins may go: installed here, wanted by no other plugin, and not mmhub itself."""

from __future__ import annotations

from collections.abc import Sequence

from mmhub.errors import NotFoundError, PluginError, UsageError, did_you_mean
from mmhub.install.environment import Installed, installed
from mmhub.install.places import prefix
from mmhub.install.plan import Change, Plan
from mmhub.records import CORE, canonical


def plan_removal(names: Sequence[str]) -> Plan:
    """Return the plan that removes plugins, broken ones included; what they needed stays.

    Raises:
        NotFoundError: it is not installed. UsageError: it is no plugin, or lies outside this environment.
        PluginError: another plugin needs it.
    """
    dists = installed()
    going = {one.name: one for one in (_find(name, dists) for name in names)}
    for other in dists.values():
        needed = {canonical(need.name) for need in other.requires} & set(going)
        if other.plugin and needed and other.name not in going:
            raise PluginError(
                f"the plugin {other} needs {', '.join(sorted(needed))}",
                f"remove it, too: mmhub plugins uninstall {' '.join([*going, other.name])}",
            )
    leaving = tuple(going[name] for name in sorted(going))
    return Plan(changes=tuple(Change(name=one.name, old=one.version) for one in leaving), leaving=leaving)


def _find(word: str, dists: dict[str, Installed]) -> Installed:
    name = canonical(word)
    if name == CORE:
        raise UsageError("mmhub itself is no plugin", "remove it with the tool that installed it")
    one = dists.get(f"mmhub-{name}") or dists.get(name)
    if one is None:
        plugins = [other.name for other in dists.values() if other.plugin]
        raise NotFoundError(
            f"the plugin '{word}' is not installed", did_you_mean(name, plugins) or "see `mmhub plugins ls`"
        )
    if not one.plugin and not one.name.startswith("mmhub-"):
        raise UsageError(f"'{one}' is no plugin of mmhub", "remove it with uv or pip")
    if not one.own:
        raise UsageError(f"the plugin {one} lies outside this environment ({one.info.parent})", f"this is {prefix()}")
    return one
