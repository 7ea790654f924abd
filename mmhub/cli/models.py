"""`mmhub models`: which names exist, and what each of them means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mmhub.cli.output import emit, result_options, table
from mmhub.errors import UsageError
from mmhub.names import Resolved, definitions, resolve
from mmhub.plugins import get_index, unmet_requirements
from mmhub.registry import Named, read_registries


@click.group()
def models() -> None:
    """List and explain model names."""


@models.command()
@result_options
def ls(as_json: bool) -> None:
    """List every registered name, and where it is defined."""
    rows, seen = [], set()
    for named in read_registries().named():
        rows.append(_row(named) | {"shadowed": named.name in seen})
        seen.add(named.name)
    text = table(
        ["name", "scope", "task", "summary"],
        [(row["name"], row["scope"] + " (shadowed)" * row["shadowed"], row["task"], row["summary"]) for row in rows],
    )
    emit({"models": rows}, as_json, text or "no model is registered; write 'org/name' for one on the Hub")


@models.command()
@click.argument("name")
@result_options
def which(name: str, as_json: bool) -> None:
    """Say what NAME leads to, and which definitions it hides."""
    found = resolve(name)
    hidden = [_row(named) for named in _hidden(found)]
    data = _resolved(found) | {"shadows": hidden}
    lines = [f"{key}: {value}" for key, value in data.items() if value and key != "shadows"]
    lines += [f"shadows: {row['scope']} {row['source']}: {row['ref'] or 'a composition'}" for row in hidden]
    emit(data, as_json, "\n".join(lines))


@models.command()
@click.argument("name")
@result_options
def show(name: str, as_json: bool) -> None:
    """Show what is known about NAME without fetching anything."""
    found = resolve(name)
    data = _resolved(found)
    if found.entry:
        data["entry"] = _row_entry(found)
    if found.kind == "local":
        data |= _checkpoint(found)
    lines = [f"{key}: {_text(value)}" for key, value in data.items() if value]
    if found.kind == "hub":
        lines.append(f"for its configuration and results: mmhub pull {name}")
    emit(data, as_json, "\n".join(lines))


def _row(named: Named) -> dict[str, Any]:
    entry = named.entry
    return {
        "name": named.name,
        "scope": named.scope,
        "task": entry.task,
        "summary": entry.summary,
        "ref": entry.ref,
        "aliases": list(entry.aliases),
        "deprecated": entry.deprecated,
        "source": named.source,
    }


def _hidden(found: Resolved) -> list[Named]:
    if found.scope not in ("project", "user", "plugins", "shipped"):
        return []
    every = definitions(found.name.partition("@")[0], read_registries())
    return [named for named in every if (named.scope, named.source) != (found.scope, found.source)]


def _resolved(found: Resolved) -> dict[str, Any]:
    keys = ("name", "kind", "scope", "repo_id", "revision", "commit", "component", "source")
    data = {key: getattr(found, key) for key in keys}
    return data | {"path": str(found.path) if found.path else None}


def _row_entry(found: Resolved) -> dict[str, Any]:
    assert found.entry
    entry = found.entry
    keys = ("task", "license", "summary", "ref", "compose", "deprecated")
    lists = {"requires": list(entry.requires), "aliases": list(entry.aliases)}
    return {key: value for key in keys if (value := getattr(entry, key))} | {k: v for k, v in lists.items() if v}


def _checkpoint(found: Resolved) -> dict[str, Any]:
    """What the config.json of a local checkpoint says, and what it needs that is not installed."""
    assert found.path
    config = _read_config(found.path / "config.json")
    requires = [record for record in config.get("requires", []) if isinstance(record, dict)]
    unmet = unmet_requirements(requires, get_index())
    return {
        "task": config.get("task"),
        "components": config.get("components"),
        "requires": [f"{record.get('distribution')} {record.get('specifier', '')}".strip() for record in requires],
        "unmet": [f"{one.distribution} {one.specifier}".strip() + f" ({one.problem})" for one in unmet],
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"'{path.parent}' is not a checkpoint: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' cannot be read: {error}") from None
    if not isinstance(config, dict) or "mmhub_format" not in config:
        raise UsageError(f"'{path}' is not the config.json of an mmhub checkpoint")
    return config


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _brief(value: Any) -> str:
    return str(value["use"]) if isinstance(value, dict) and "use" in value else _text(value)
