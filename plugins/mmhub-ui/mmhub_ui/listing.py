"""Which models and plugins there are to look at: those that `mmhub models ls` lists, cached ones, and local folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmhub_ui.context import Context

SCOPES = ("Registered", "From plugins", "Cached", "Local folders", "All")
_FOLDERS = 500  # that are looked at for models: a working folder may hold many


@dataclass(frozen=True)
class Listed:
    """A model by the name that loads it."""

    name: str
    scope: str
    task: str = ""
    summary: str = ""
    shadowed: bool = False  # a nearer scope has the name, and this one is not what it means

    @property
    def where(self) -> str:
        return self.scope + " (shadowed)" * self.shadowed


def models(context: Context, scope: str = "All", query: str | None = "") -> list[Listed]:
    """Return the models of one of `SCOPES` in which every word of the query stands.

    Of a locked app these are its own alone.

    Raises:
        UsageError: a registry is invalid.
    """
    if context.locked:
        found = [Listed(name, "offered here") for name in context.names]
    else:
        found = list(_of_scope(context, scope))
    words = (query or "").lower().split()
    return [one for one in found if all(word in f"{one.name} {one.task} {one.summary}".lower() for word in words)]


def offered(context: Context) -> list[str]:
    """Return the names to choose from, those of the command line first. What cannot be listed is left out."""
    from mmhub.errors import MmhubError

    try:
        others = [] if context.locked else [one.name for one in models(context) if not one.shadowed]
    except MmhubError:
        others = []
    return list(dict.fromkeys([*context.names, *others]))


def plugins() -> list[list[str]]:
    """Return a row for each installed plugin: name, version, status, components, summary."""
    from mmhub.plugins import get_index

    rows = []
    for one in get_index().plugins:
        parts = ", ".join(f"{part.spec.kind.replace('_', ' ')} {part.spec.name}" for part in one.components)
        rows.append([one.distribution, one.version, one.status, parts, one.problem or one.warning or one.summary])
    return rows


def _of_scope(context: Context, scope: str) -> Iterator[Listed]:
    if scope in ("Registered", "From plugins", "All"):
        yield from (one for one in _registered() if scope != "From plugins" or one.scope == "plugins")
    if scope in ("Cached", "All"):
        yield from _cached()
    if scope in ("Local folders", "All"):
        yield from _local(context.runs)


def _registered() -> list[Listed]:
    """As `mmhub models ls`."""
    from mmhub.registry import read_registries

    rows: list[Listed] = []
    seen: set[str] = set()
    for named in read_registries().named():
        entry = named.entry
        rows.append(Listed(named.name, named.scope, entry.task, entry.summary, named.name in seen))
        seen.add(named.name)
    return rows


def _cached() -> Iterator[Listed]:
    from mmhub.hub.cache import checkpoints

    for one in checkpoints():
        yield Listed(one.repo_id, "cache", _task(one.config))


def _local(runs: Path) -> Iterator[Listed]:
    """Checkpoints in the current folder, and what training runs have made."""
    from mmhub.hub.cache import checkpoint_config

    for folder in [*_folders(Path.cwd()), *(run / "model" for run in _folders(runs))]:
        config = checkpoint_config(folder)
        if config is not None:
            yield Listed(_spelt(folder), "local", _task(config))


def _folders(parent: Path) -> Sequence[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))[:_FOLDERS]
    except OSError:
        return []


def _spelt(folder: Path) -> str:
    """A folder as it is written in a command: below the current one if it is there."""
    folder = folder.absolute()
    return f"./{folder.relative_to(Path.cwd()).as_posix()}" if folder.is_relative_to(Path.cwd()) else str(folder)


def _task(config: dict[str, Any]) -> str:
    return str(config.get("task") or "")
