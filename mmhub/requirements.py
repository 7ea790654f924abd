"""What a checkpoint requires, compared with what is installed. Nothing is imported for it, and nothing installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmhub.errors import PluginError, TrustError
from mmhub.plugins import Index, Plugin, install_line, newer_index
from mmhub.records import CORE, canonical

MOST = 1000  # that a checkpoint may have


@dataclass(frozen=True)
class Unmet:
    """One requirement of a checkpoint that this environment does not meet; `problem` says how."""

    distribution: str
    specifier: str
    problem: str
    plugin: Plugin | None = None

    @property
    def requirement(self) -> str:
        return f"{self.distribution}{self.specifier}"


def unmet_requirements(requires: Sequence[Mapping[str, Any]], index: Index) -> list[Unmet]:
    """Compare the `requires` records of a checkpoint's config.json with what is installed. Imports no plugin.

    Raises:
        TrustError: a record is not a plain distribution name and version specifier; or they are a thousand and more.
    """
    if len(requires) > MOST:
        raise TrustError(f"the checkpoint's config.json holds more than {MOST:,} requires", "do not use it")
    unmet = _check_all(requires, index)
    newer = newer_index(index) if unmet else index
    return unmet if newer is index else _check_all(requires, newer)


def explain_unmet(name: str, unmet: Sequence[Unmet]) -> PluginError:
    """Return the error that says what `name` needs, with everything to install in one command."""
    plugins = "1 plugin" if len(unmet) == 1 else f"{len(unmet)} plugins"
    listed = ", ".join(f"{one.distribution} {one.specifier}".strip() + f" ({one.problem})" for one in unmet)
    install = [one.requirement for one in unmet if one.plugin is None or one.plugin.status == "ok"]
    look = [f"see `mmhub plugins show {one.distribution}`" for one in unmet if one.requirement not in install]
    hints = [install_line(install)] if install else []
    return PluginError(f"{name} needs {plugins}: {listed}", "; ".join([*hints, *look]))


def _check_all(requires: Sequence[Mapping[str, Any]], index: Index) -> list[Unmet]:
    checked = (_check(record, index) for record in requires)
    return [unmet for unmet in checked if unmet]


def _check(record: Mapping[str, Any], index: Index) -> Unmet | None:
    from packaging.requirements import InvalidRequirement, Requirement

    given, specifier = record.get("distribution"), record.get("specifier", "")
    if not isinstance(given, str) or not isinstance(specifier, str):
        raise TrustError(f"the checkpoint's config.json requires {dict(record)!r}, which names no distribution")
    try:  # these words end up in a command that people paste into a shell
        parsed = Requirement(f"{given}{specifier}")
    except InvalidRequirement:
        parsed = None
    if parsed is None or parsed.name != given or parsed.url or parsed.extras or parsed.marker:
        raise TrustError(f"the checkpoint's config.json requires {given + specifier!r}, which is no valid requirement")
    plugin = index.plugin(given)
    version = plugin.version if plugin else _installed_version(given)
    if version is None:
        return Unmet(given, specifier, "not installed")
    if not parsed.specifier.contains(version, prereleases=True):
        reason = str(record.get("reason") or "")
        return Unmet(given, specifier, f"{version} installed{': ' if reason else ''}{reason}")
    if plugin and plugin.status != "ok":
        return Unmet(given, specifier, f"{plugin.version} is {plugin.status}: {plugin.problem}", plugin)
    return None


def _installed_version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    if canonical(distribution) == CORE:
        from mmhub import __version__

        return __version__
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
