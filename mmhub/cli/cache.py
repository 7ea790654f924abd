"""`mmhub cache`: what is in the Hugging Face cache, whether it is sound, and how to free its space."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from mmhub.cli.output import emit, note, quiet_option, result_options, table
from mmhub.cli.text import ago_text, counted, fit, printable, short, size_text
from mmhub.errors import MmhubError, NetworkError, NotFoundError, TrustError, UsageError, did_you_mean

if TYPE_CHECKING:
    from mmhub.hub.cache import Checked, Damage, Removal, Repo

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def cache() -> None:
    """Look after the files of models that were pulled, and the features that training keeps.

    The files are in the Hugging Face cache, which other programs use, too.
    """


# --- ls


@cache.command()
@quiet_option
@_json
def ls(quiet: bool, as_json: bool) -> None:
    """List what is cached, of every library and endpoint, the last used first."""
    from mmhub.hub.cache import caches, scan

    repos = scan()
    for repo in repos:
        if repo.problem:
            note(f"warning: {repo.id}: {printable(repo.problem)}", quiet)
    rows = [_row(repo) for repo in repos]
    total = sum(repo.size + _partial_size(repo) for repo in repos)
    text = table(
        ["repository", "of", "endpoint", "size", "revisions", "used", "partial"],
        [
            (
                short(row["repo_id"], 70),
                row["library"] if row["kind"] == "model" else row["kind"],
                short(row["endpoint"], 40),
                size_text(row["size"]) + (" (broken)" if row["problem"] else ""),
                short(_revisions_text(row), 50) or "-",
                ago_text(row["used"]),
                f"{len(row['partial'])} ({size_text(row['partial_size'])})" if row["partial"] else "-",
            )
            for row in rows
        ],
    )
    folders = {name: str(folder) for name, folder in caches().items()}
    summary = f"\n{size_text(total)} in {counted(len(rows), 'repository')}" if len(rows) != 1 else ""
    empty = f"nothing is cached in {next(iter(folders.values()))}"
    emit({"folders": folders, "size": total, "repos": rows}, as_json, fit(text) + summary if text else empty)


def _row(repo: Repo) -> dict[str, Any]:
    return {
        "repo_id": repo.id,
        "kind": repo.kind,
        "library": "mmhub" if repo.is_checkpoint else "other",
        "endpoint": repo.endpoint,
        "size": repo.size,
        "used": repo.used,
        "path": str(repo.path),
        "revisions": [
            {"commit": one.commit, "refs": list(one.refs), "size": one.size, "files": one.files, "path": str(one.path)}
            for one in repo.revisions
        ],
        "partial": [str(path) for path in repo.partial],
        "partial_size": _partial_size(repo),
        "problem": repo.problem,
    }


def _partial_size(repo: Repo) -> int:
    return sum(path.stat().st_size for path in repo.partial if path.is_file())


def _revisions_text(row: dict[str, Any]) -> str:
    return ", ".join("/".join(one["refs"]) or one["commit"][:12] for one in row["revisions"])


# --- verify


@cache.command()
@click.argument("name", required=False)
@click.option("--repair", is_flag=True, help="Remove what is damaged and fetch it again.")
@quiet_option
@_json
def verify(name: str | None, repair: bool, quiet: bool, as_json: bool) -> None:
    """Hash every cached file again and compare it with what the Hub said it was; exit 5 if one is damaged.

    Of NAME alone, if one is given. Files are read from the disk, however recently they were checked.
    """
    from mmhub.hub import cache as store

    repos = _matching(name)[0] if name else store.scan()
    results = []
    for repo in repos:
        note(f"{repo.id} ({size_text(repo.size)})", quiet or as_json or not sys.stderr.isatty())
        results.append((repo, store.verify(repo)))
    damaged = [damage for _, checked in results for damage in checked.damaged]
    fixed = _repair(damaged, quiet) if repair else {}
    rows = [_damage_row(damage, fixed.get(id(damage), "")) for damage in damaged]
    left = [row for row in rows if not row["repaired"]]
    counts = _counts([checked for _, checked in results])
    text = [f"{counted(counts['files'], 'file')}, {size_text(counts['bytes'])}: " + _verdict(len(damaged), len(left))]
    text += [
        f"{row['repo_id']} {row['file']} @ {row['commit'][:12] or 'no revision'}: {row['problem']}"
        + (f" ({row['repaired']})" if row["repaired"] else "")
        for row in rows
    ]
    if counts["unknown"]:
        text.append(f"nothing to compare with: {counted(counts['unknown'], 'file')}")
    emit({"repos": len(repos), **counts, "damaged": rows}, as_json, "\n".join(printable(line) for line in text))
    if left:
        hint = "what is left is not what its publisher recorded" if repair else "`mmhub cache verify --repair`"
        raise TrustError(f"{counted(len(left), 'damaged file')} in the cache", hint)


def _counts(results: list[Checked]) -> dict[str, int]:
    return {key: sum(getattr(one, key) for one in results) for key in ("files", "bytes", "unknown")}


def _verdict(damaged: int, left: int) -> str:
    if not damaged:
        return "all sound"
    return f"{damaged} damaged" + (f", {damaged - left} repaired" if left < damaged else "")


def _damage_row(damage: Damage, repaired: str) -> dict[str, Any]:
    return {
        "repo_id": damage.repo.id,
        "endpoint": damage.repo.endpoint,
        "file": damage.file,
        "commit": damage.commit,
        "problem": damage.problem,
        "path": str(damage.blob) if damage.blob else None,
        "repaired": repaired,
    }


def _repair(damaged: list[Damage], quiet: bool) -> dict[int, str]:
    """Discard everything that is damaged, then fetch what can be; return what was done by the damage's id()."""
    from mmhub.hub.cache import discard, refetch
    from mmhub.hub.client import is_offline

    for damage in damaged:
        discard(damage)
    done = {id(damage): "removed; the next pull fetches it" for damage in damaged}
    if not damaged or is_offline():
        return done
    for damage in damaged:
        try:
            if refetch(damage):
                done[id(damage)] = "fetched again"
        except NetworkError as error:
            note(f"{error}; nothing more is fetched", quiet)
            break
        except MmhubError as error:
            note(f"{damage.repo.id} {damage.file}: {error}", quiet)
    return done


# --- rm


@cache.command()
@click.argument("names", metavar="[NAME[@REVISION]]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every mmhub model, of every endpoint.")
@click.option("--others", is_flag=True, help="With --all: models of other libraries and data sets, too.")
@click.option("--partial", is_flag=True, help="What downloads that did not end have left.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would be freed, and remove nothing.")
@quiet_option
@_json
def rm(
    names: tuple[str, ...],
    everything: bool,
    others: bool,
    partial: bool,
    yes: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Remove models, or single revisions of them, from the cache. A later pull fetches them again."""
    from mmhub.hub.cache import remove

    if sum((bool(names), everything, partial)) != 1 or (others and not everything):
        raise UsageError("name what to remove: NAMEs, --all (with --others) or --partial", "see `mmhub cache ls`")
    removal = _partials(quiet) if partial else _every(others, quiet) if everything else _named(names)
    lines = _removal_lines(removal)
    freed = remove(removal, dry_run=True)
    if removal and not dry_run and not yes:
        _ask(lines, freed)
    if not dry_run:
        remove(removal)
    data = {"removed": lines, "freed": freed, "dry_run": dry_run}
    verb = "would free" if dry_run else "freed"
    text = "\n".join([*lines, f"{verb} {size_text(freed)}"]) if removal else "nothing to remove"
    emit(data, as_json, text)


def _named(names: tuple[str, ...]) -> Removal:
    from mmhub.hub.cache import Removal, find_revision

    repos, revisions = [], []
    for name in dict.fromkeys(names):
        found, revision = _matching(name)
        if revision:
            revisions.append((found[0], find_revision(found[0], revision)))
        else:
            repos += [repo for repo in found if repo not in repos]
    return Removal(repos=tuple(repos), revisions=tuple(pair for pair in revisions if pair[0] not in repos))


def _every(others: bool, quiet: bool) -> Removal:
    from mmhub.hub.cache import Removal, scan

    repos = scan()
    chosen = [repo for repo in repos if others or repo.is_checkpoint]
    rest = [repo for repo in repos if repo not in chosen]
    if rest:
        size = size_text(sum(repo.size for repo in rest))
        noun = "1 repository of another library" if len(rest) == 1 else f"{len(rest)} repositories of other libraries"
        stay = "stays" if len(rest) == 1 else "stay"
        note(f"{noun} ({size}) {stay}; --all --others frees that, too", quiet)
    return Removal(repos=tuple(chosen))


def _partials(quiet: bool) -> Removal:
    from mmhub.hub.cache import Removal, is_live, scan

    files = [path for repo in scan() for path in repo.partial]
    live = [path for path in files if is_live(path)]
    if live:
        note(f"left out: {counted(len(live), 'download')} still going on", quiet)
    return Removal(partial=tuple(path for path in files if path not in live))


def _removal_lines(removal: Removal) -> list[str]:
    lines = [
        f"{printable(repo.id)} ({repo.kind}, {counted(len(repo.revisions), 'revision')})" for repo in removal.repos
    ]
    lines += [f"{printable(repo.id)} @ {revision.commit}" for repo, revision in removal.revisions]
    return lines + [str(path) for path in removal.partial]


def _ask(lines: list[str], freed: int) -> None:
    """Ask on a terminal; elsewhere nobody can answer."""
    if not sys.stdin.isatty():
        raise UsageError("removing needs a yes, and this is no terminal", "add --yes, or --dry-run to look first")
    for line in lines:
        click.echo(line, err=True)
    click.confirm(f"remove this and free {size_text(freed)}?", abort=True, err=True)


# --- features


@cache.command()
@click.option("--clear", is_flag=True, help="Remove all that no run reads now; they are computed again when needed.")
@quiet_option
@_json
def features(clear: bool, quiet: bool, as_json: bool) -> None:
    """List what training keeps of frozen encoders, the least recently used first; or remove it."""
    from mmhub.feature_cache import feature_sets, features_folder, remove_set

    found = feature_sets()
    removed = [one for one in found if clear and remove_set(one.path)]
    if clear and len(removed) < len(found):
        note(f"left out: {counted(len(found) - len(removed), 'set')} in use", quiet)
    shown = removed if clear else found
    rows = [{"path": str(one.path), "of": one.title, "size": one.size, "used": one.used} for one in shown]
    total = sum(one.size for one in shown)
    if clear:
        text = f"freed {size_text(total)} in {counted(len(shown), 'set')}"
    else:
        cells = [(short(printable(one.title), 90), size_text(one.size), ago_text(one.used)) for one in shown]
        empty = f"no features are kept in {features_folder()}"
        text = fit(table(["features of", "size", "used"], cells)) if cells else empty
    emit({"folder": str(features_folder()), "size": total, "sets": rows, "cleared": clear}, as_json, text)


# --- where


@cache.command()
@click.argument("name", required=False)
@result_options
def where(name: str | None, as_json: bool) -> None:
    """Print the folder of the current endpoint's cache, or the folder that NAME is in."""
    from mmhub.hub.cache import caches, find_revision

    if name is None:
        folders = {one: str(folder) for one, folder in caches().items()}
        emit({"path": next(iter(folders.values())), "folders": folders}, as_json, next(iter(folders.values())))
        return
    if _is_local(name):
        from mmhub.names import resolve

        path = resolve(name).path
        emit({"path": str(path), "revisions": []}, as_json, str(path))
        return
    found, revision = _matching(name)
    chosen = [find_revision(found[0], revision)] if revision else list(found[0].revisions)
    data = {"path": str(found[0].path), "revisions": [{"commit": one.commit, "path": str(one.path)} for one in chosen]}
    emit(data, as_json, "\n".join(str(one.path) for one in chosen) or str(found[0].path))


# --- names


def _is_local(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\", "local:", "local-dir:"))


def _matching(name: str) -> tuple[list[Repo], str | None]:
    """The cached repositories of the current endpoint that a name means, and the revision it asks for.

    What is on no allow list or not pinned may still be looked at and removed.
    """
    from mmhub.hub.cache import caches, scan_one

    repo_id, revision = _repository(name)
    (here, folder), *others = caches().items()
    repos = scan_one(here, folder)
    found = [repo for repo in repos if repo.id == repo_id]
    if found:
        models = [repo for repo in found if repo.kind == "model"]
        return models or found, revision
    elsewhere = [other for other, place in others if any(repo.id == repo_id for repo in scan_one(other, place))]
    if elsewhere:
        hint = f"it is in that of {' and '.join(elsewhere)}: set HF_ENDPOINT to work on it"
    else:
        hint = did_you_mean(repo_id, [repo.id for repo in repos]) or "see `mmhub cache ls`"
    raise NotFoundError(f"'{repo_id}' is not in the cache of {here}", hint)


def _repository(name: str) -> tuple[str, str | None]:
    from mmhub.names import definitions, repository_of
    from mmhub.registry import read_registries

    plain = name.partition("#")[0]
    for scheme in ("hub:", "hf-hub:", "hf://models/", "hf://"):
        plain = plain.removeprefix(scheme)
    repo_id, _, revision = plain.partition("@")
    if "/" not in repo_id:
        named = definitions(repo_id, read_registries())
        repo_id = (repository_of(named[0])[0] if named else "") or repo_id
    return repo_id, revision or None
