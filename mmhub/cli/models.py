"""`mmhub models`: which names exist, what each of them means, what is on the Hub, and what is pinned."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmhub.cli.output import emit, note, quiet_option, result_options, table
from mmhub.cli.text import fit, parse_size, printable, short, size_text
from mmhub.errors import MmhubError, NetworkError, UsageError
from mmhub.names import Resolved, definitions, looked_at, pin_of, resolve
from mmhub.registry import Named, lock_file, read_lock, read_registries

if TYPE_CHECKING:
    from mmhub.hub.describe import Description
    from mmhub.hub.pins import Change
    from mmhub.hub.search import Hit

_SCOPES = ("project", "user", "plugins", "shipped")


@click.group()
def models() -> None:
    """Find models, and say what their names mean."""


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
        [
            (row["name"], row["scope"] + " (shadowed)" * row["shadowed"], row["task"], printable(row["summary"]))
            for row in rows
        ],
    )
    empty = "no model is registered; `mmhub models search` looks on the Hub, too"
    emit({"models": rows}, as_json, text or empty)


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


# --- search


@models.command()
@click.argument("query", nargs=-1)
@click.option("--task", default="", help="Such as classification; also the Hub's own task names.")
@click.option("--modality", "modalities", multiple=True, help="text, image or audio; repeat it for several at once.")
@click.option("--license", default="", help="Such as apache-2.0.")
@click.option("--max-size", metavar="SIZE", help="Of the weights, such as 500MB.")
@click.option("--plugin", default="", help="A plugin the model needs, such as mmhub-image.")
@click.option("--source", type=click.Choice(["registry", "hub", "cache"]), help="Look there alone.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Results to show.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def search(
    query: tuple[str, ...],
    task: str,
    modalities: tuple[str, ...],
    license: str,
    max_size: str | None,
    plugin: str,
    source: str | None,
    limit: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Find models in the registries, on the Hub and in the cache.

    Every word of QUERY must stand in a model's name, summary or tags. Without the Hub, what is here is searched.
    """
    from mmhub.hub.search import Wanted, select

    wanted = Wanted(
        query=" ".join(query),
        task=task,
        modalities=tuple(word.strip().lower() for text in modalities for word in text.split(",") if word.strip()),
        license=license,
        max_size=parse_size(max_size) if max_size else None,
        plugin=plugin,
    )
    hits, unsized = select(_find(wanted.query, source, quiet), wanted)
    if unsized:
        note(f"{unsized} more of unknown size left out", quiet)
    if len(hits) > limit:
        note(f"{len(hits)} found, the first {limit} shown; --limit {len(hits)} shows all", quiet)
    emit([_hit(hit) for hit in hits[:limit]], as_json, fit(_hits_text(hits[:limit])))
    if not hits:
        note("nothing found: try fewer words or options, or `mmhub models ls` for every registered name", quiet)


def _find(query: str, source: str | None, quiet: bool) -> list[Hit]:
    """Every model of the sources asked for; those that may not be fetched here are left out."""
    from mmhub.hub.search import from_cache, from_hub, from_registries, merge

    registries = read_registries()
    found = from_registries(registries) if source in (None, "registry") else []
    if source in (None, "hub"):
        try:
            found += from_hub(query)
        except MmhubError as error:  # also one that wants a token
            if source == "hub":
                raise
            note(f"the Hub is not searched ({error.message}): these are the registered and cached models", quiet)
    found += from_cache() if source in (None, "cache") else []
    merged = merge(found)
    allowed = [hit for hit in merged if not hit.repo_id or registries.allows(hit.repo_id)]
    if len(allowed) < len(merged):
        note(f"{len(merged) - len(allowed)} left out: [hub] allow in a registry.toml does not list them", quiet)
    return allowed


def _hit(hit: Hit) -> dict[str, Any]:
    return dataclasses.asdict(hit)


def _hits_text(hits: list[Hit]) -> str:
    from mmhub.hub.search import distribution

    rows = []
    for hit in hits:
        marks = [word for word, is_so in (("cached", "cache" in hit.sources), ("gated", hit.gated)) if is_so]
        where = ", ".join([*(one for one in hit.sources if one != "cache"), *marks])
        used = f"{hit.downloads}" if hit.downloads is not None else "-"
        missing = {distribution(one) for one in hit.missing}
        needs = [
            f"{plugin} (missing)" if plugin in missing else plugin
            for plugin in dict.fromkeys(distribution(one) for one in hit.requires)
        ]
        rows.append(
            (
                short(hit.name, 60),
                short(hit.task or "-", 24),
                short("+".join(hit.modalities) or "-", 20),
                short(hit.license or "-", 20),
                size_text(hit.size),
                used,
                short(hit.updated[:10] or "-", 10),
                where,
                short(", ".join(needs) or "-", 60),
                short(hit.summary, 70),
            )
        )
    return table(
        ["name", "task", "inputs", "licence", "size", "downloads", "updated", "from", "needs", "summary"], rows
    )


# --- show


@models.command()
@click.argument("name")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show(name: str, quiet: bool, as_json: bool) -> None:
    """Show what NAME is made of, needs, weighs, may be used for and reaches, without fetching its weights."""
    found = resolve(name)
    _no_bars()
    from mmhub.hub.describe import Description, describe

    try:
        about = describe(found)
    except NetworkError as error:
        if not found.entry:
            raise
        entry = found.entry
        about = Description(task=entry.task, license=entry.license, summary=entry.summary, requires=[*entry.requires])
        about.note = f"{error.message}; only what the registry says is shown"
    if about.note:
        note(f"note: {about.note}", quiet)
    data = _resolved(found) | ({"entry": _entry(found)} if found.entry else {}) | dataclasses.asdict(about)
    data["commit"] = about.commit or found.commit
    emit(data, as_json, _about_text(name, found, about))


def _resolved(found: Resolved) -> dict[str, Any]:
    keys = ("name", "kind", "scope", "repo_id", "revision", "commit", "component", "source")
    data = {key: getattr(found, key) for key in keys}
    return data | {"path": str(found.path) if found.path else None}


def _entry(found: Resolved) -> dict[str, Any]:
    assert found.entry
    entry = found.entry
    keys = ("task", "license", "summary", "ref", "compose", "deprecated")
    lists = {"requires": list(entry.requires), "aliases": list(entry.aliases)}
    return {key: value for key in keys if (value := getattr(entry, key))} | {k: v for k, v in lists.items() if v}


def _about_text(name: str, found: Resolved, about: Description) -> str:
    where = str(found.path or found.repo_id or found.source or "")
    facts = {
        "name": found.name,
        "kind": {"hub": "a Hub repository", "local": "a local folder", "compose": "a composition"}[found.kind],
        "where": where + (f" @ {found.revision}" if found.revision else ""),
        "commit": (about.commit or found.commit or "") + (" (pinned)" if found.commit else ""),
        "library": about.library,
        "task": about.task,
        "inputs": ", ".join(about.modalities),
        "licence": about.license or "none given",
        "size": size_text(about.size) if about.size is not None else "",
        "updated": about.updated[:10],
        "downloads": "" if about.downloads is None else str(about.downloads),
        "guards": ", ".join(about.guards),
        "base": ", ".join(map(_base_text, about.bases)),
        "needs": ", ".join(about.requires),
        "missing": ", ".join(about.unmet),
        "loads": about.loadable,
        "cached": (about.cached or "no") if found.kind == "hub" else "",
    }
    blocks = ["\n".join(f"{key}: {printable(value)}" for key, value in facts.items() if value)]
    blocks[:0] = [printable(about.summary)] if about.summary else []
    blocks += [_parts_text(about), _licences_text(about), *map(_result_text, about.results)]
    if about.install:
        blocks.append(printable(about.install))
    if found.kind == "hub" and not about.cached and about.library in ("mmhub", ""):
        blocks.append(f"to have it here: mmhub pull {printable(name)}")
    return "\n\n".join(block for block in blocks if block)


def _base_text(base: dict[str, Any]) -> str:
    """Such as 'org/bert @ 0123456789ab (438 MB, fetched with it)'."""
    where = f"{base['name']} @ {base['commit'][:12]}" if base["commit"] else base["name"]
    size = size_text(base["bytes"]) if base["bytes"] is not None else "of unknown size"
    here = "on this machine" if not base["commit"] else "cached" if base["cached"] else "fetched with it"
    return f"{where} ({size}, {here})"


def _parts_text(about: Description) -> str:
    rows = [
        (short(role, 24), short(part["use"], 40), size_text(part["bytes"]), short(_settings(part), 90))
        for role, part in about.components.items()
    ]
    return fit(table(["part", "component", "size", "settings"], rows))


def _settings(part: dict[str, Any]) -> str:
    config = part["config"] if isinstance(part["config"], dict) else {}
    init = [f"init {part['init']}"] if "init" in part else []
    return ", ".join([*init, *(f"{key} {value}" for key, value in config.items() if value not in (None, "", [], {}))])


def _licences_text(about: Description) -> str:
    lines = [f"warning: {printable(line)}" for line in about.warnings]
    if len(about.licences) < 2:
        return "\n".join(lines)
    rows = [(short(one.name, 60), short(one.relation, 40), short(one.license or "?", 40)) for one in about.licences]
    return "\n".join([table(["made from", "as", "licence"], rows), *lines])


def _result_text(result: dict[str, Any]) -> str:
    from mmhub.metrics import flat

    subsets = result["subsets"] if isinstance(result["subsets"], dict) else {}
    rows = {"all inputs": result["metrics"], **subsets}
    rows = {label: flat(one) for label, one in rows.items() if isinstance(one, dict)}
    keys = list(rows.get("all inputs", ()))
    cells = [
        (short(label, 40), *(f"{one[key]:.4g}" if key in one else "" for key in keys)) for label, one in rows.items()
    ]
    title = f"measured on {printable(result['data'] or 'held-out data')} ({printable(result['rows'])} rows)"
    return f"{title}\n" + table(["inputs", *(short(key, 20) for key in keys)], cells)


# --- merge


@models.command()
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path))
@result_options
def merge(name: str, out: Path, as_json: bool) -> None:
    """Write the model NAME to the folder OUT with its low-rank adapters added to the weights they change.

    The result is an ordinary checkpoint that needs neither the base nor peft.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"'{out}' exists", "name another folder")
    from mmhub.adapters import merge as run
    from mmhub.hub import load

    folder = run(load(name)).save(out)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    emit({"name": name, "path": str(folder), "files": files}, as_json, str(folder))


# --- which


@models.command()
@click.argument("name")
@result_options
def which(name: str, as_json: bool) -> None:
    """Say what NAME leads to, everything that was looked at on the way, and what would be fetched."""
    found = resolve(name)
    hidden = [_row(named) for named in _hidden(found)]
    looks = _looks(name, found)
    data = _resolved(found) | {
        "alias_of": _alias(looks),
        "looked_at": looks,
        "pin": _pin(found),
        "fetch": _fetch(found),
        "shadows": hidden,
    }
    emit(data, as_json, _which_text(found, data))


def _hidden(found: Resolved) -> list[Named]:
    if found.scope not in _SCOPES:
        return []
    every = definitions(found.name.partition("@")[0], read_registries())
    return [named for named in every if (named.scope, named.source) != (found.scope, found.source)]


def _looks(name: str, found: Resolved) -> list[dict[str, Any]]:
    if found.scope not in _SCOPES or ":" in name:
        reasons = {
            "scheme": f"{name.partition(':')[0]}: says it",
            "path": "a path is a local folder and nothing else",
            "hub": "org/name is a Hub repository; there is no local folder of that name",
        }
        return [{"scope": found.scope, "source": reasons.get(found.scope, found.source), "found": found.name}]
    bare = name.partition("#")[0].partition("@")[0]
    return [dataclasses.asdict(look) for look in looked_at(bare, read_registries())]


def _alias(looks: list[dict[str, Any]]) -> str | None:
    first = next((look for look in looks if look["found"]), {})
    return first["found"] if first.get("alias") else None


def _pin(found: Resolved) -> dict[str, Any] | None:
    """What holds the name at one commit: itself, its registry, or mmhub.lock; None if nothing does."""
    if found.kind != "hub":
        return None
    pin, holds = pin_of(found)
    if found.entry and found.entry.commit and found.commit == found.entry.commit:
        return {"by": found.source, "commit": found.commit, "holds": True}
    if pin:
        return {"by": str(lock_file()), "ref": pin.ref, "commit": pin.commit, "holds": holds}
    return {"by": "the name itself", "commit": found.commit, "holds": True} if found.commit else None


def _fetch(found: Resolved) -> dict[str, Any] | None:
    """What loading would fetch and from where; None if it needs no Hub."""
    if found.kind != "hub":
        return None
    from mmhub.hub.client import endpoint

    cached = None
    if found.commit:  # only then it is known without a request
        from mmhub.hub.cache import snapshot

        cached = snapshot(found.repo_id or "", found.commit)
    return {
        "endpoint": endpoint(),
        "repo_id": found.repo_id,
        "revision": found.commit or found.revision or "main",
        "cached": str(cached) if cached else None,
    }


def _which_text(found: Resolved, data: dict[str, Any]) -> str:
    keys = ("name", "kind", "scope", "alias_of", "repo_id", "path", "revision", "commit", "component", "source")
    lines = [f"{key.replace('_', ' ')}: {printable(data[key])}" for key in keys if data[key]]
    pin = data["pin"]
    if pin:
        void = "" if pin["holds"] else f" (void: the name leads elsewhere now; it was {pin.get('ref')})"
        lines.append(f"pinned: {pin['commit']} by {pin['by']}{void}")
    elif found.kind == "hub":
        lines.append("pinned: no; it follows its branch (`mmhub models lock` pins it)")
    if data["fetch"]:
        lines.append(f"fetch: {_fetch_text(data['fetch'])}")
    lines += [f"looked at: {_look_text(look)}" for look in data["looked_at"]]
    lines += [
        f"shadows: {row['scope']} {row['source']}: {printable(row['ref'] or 'a composition')}"
        for row in data["shadows"]
    ]
    return "\n".join(lines)


def _fetch_text(fetch: dict[str, Any]) -> str:
    if fetch["cached"]:
        return f"what is not yet in {fetch['cached']}; no request if all of it is"
    return f"{fetch['endpoint']}/{fetch['repo_id']} at {fetch['revision']}: config.json first, then its files"


def _look_text(look: dict[str, Any]) -> str:
    said = ("alias of " if look.get("alias") else "") + (look["found"] or "nothing")
    return f"{look['scope']}: {printable(look['source'])}: {printable(said)}"


# --- lock


@models.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--update", is_flag=True, help="Move pins on to the newest commit; all of them if no NAME is given.")
@click.option("--remove", is_flag=True, help="Remove the pins of the names.")
@click.option("--dry-run", is_flag=True, help="Say what would change, and write nothing.")
@result_options
def lock(names: tuple[str, ...], update: bool, remove: bool, dry_run: bool, as_json: bool) -> None:
    """Pin names to commits in mmhub.lock, so that they never follow a branch that moves.

    A name that is pinned keeps its commit until --update, which shows what the new one changes. Without names the
    pins are listed.
    """
    if remove and (update or not names):
        raise UsageError("--remove needs names and no --update", "see `mmhub models lock --help`")
    if not names and not update:
        _list_pins(as_json)
        return
    from mmhub.hub import pins

    _no_bars()
    if remove:
        path, changes = pins.unlock([*names], dry_run=dry_run)
    else:
        path, changes = pins.lock([*names], update=update, dry_run=dry_run)
    data = {"lock": str(path), "dry_run": dry_run, "names": [dataclasses.asdict(one) for one in changes]}
    text = "\n".join(_change_text(one, dry_run) for one in changes)
    if not dry_run and any(one.state in ("added", "moved", "removed") for one in changes):
        text += f"\nwritten to {path}"
    emit(data, as_json, text or f"nothing is pinned in {path}")


def _no_bars() -> None:
    """A few kilobytes need no bar; huggingface_hub reads this when it is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _list_pins(as_json: bool) -> None:
    pins = read_lock()
    rows = [(name, pin.ref, pin.commit) for name, pin in pins.items()]
    data = {
        "lock": str(lock_file()),
        "dry_run": False,
        "names": [{"name": name, "ref": ref, "commit": commit} for name, ref, commit in rows],
    }
    empty = f"nothing is pinned in {lock_file()}; `mmhub models lock NAME` pins a name"
    emit(data, as_json, table(["name", "means", "commit"], [tuple(map(printable, row)) for row in rows]) or empty)


def _change_text(one: Change, dry_run: bool) -> str:
    would = "would be " if dry_run else ""
    said = {
        "added": f"{would}pinned to {one.new}" + (f" (before: {one.old}, for another ref)" if one.old else ""),
        "moved": f"{would}moved from {one.old} to {one.new}",
        "unchanged": f"is at the newest commit, {one.new}",
        "kept": f"stays at {one.new}; --update moves it on",
        "removed": f"{would}no longer pinned (was {one.old})",
    }[one.state]
    return "\n".join([f"{printable(one.name)} {said}", *(f"  {printable(line)}" for line in one.changes)])
