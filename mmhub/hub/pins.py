"""Pin names to commits in mmhub.lock, and move a pin on only where its user asks to, with what changed in between."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmhub.errors import NetworkError, NotFoundError, UsageError
from mmhub.hub.cache import as_table, read_json
from mmhub.hub.client import api, hub_errors
from mmhub.hub.describe import fetch_small
from mmhub.hub.download import check_commit, in_cache
from mmhub.hub.readme import read_card
from mmhub.names import Resolved, resolve
from mmhub.registry import Pin, lock_file, read_lock, write_pins

_SECONDS = 10


@dataclass(kw_only=True)
class Change:
    """What locking did, or would do, to one name. `state`: "added", "moved", "unchanged", "kept" or "removed".

    "kept" is an older pin that holds while no update was asked for; `changes` are lines that say what a move brings.
    """

    name: str
    repo_id: str
    ref: str
    state: str
    old: str = ""
    new: str = ""
    changes: list[str] = field(default_factory=list)


def lock(names: list[str], *, update: bool = False, dry_run: bool = False) -> tuple[Path, list[Change]]:
    """Pin names to the commits they lead to now; one that is pinned moves only with `update`, which names all if none.

    Raises:
        UsageError: a name is no Hub repository, or is pinned elsewhere. NotFoundError, NetworkError.
    """
    pins = read_lock()
    if update and not names:
        names = sorted(pins)
    changes = [_lock_one(name, pins, update) for name in dict.fromkeys(names)]
    new = {one.name: Pin(ref=one.ref, commit=one.new) for one in changes if one.state in ("added", "moved")}
    path = write_pins(new) if new and not dry_run else lock_file()
    return path, changes


def unlock(names: list[str], *, dry_run: bool = False) -> tuple[Path, list[Change]]:
    """Remove pins.

    Raises:
        NotFoundError: one of the names is not pinned.
    """
    pins = read_lock()
    changes = []
    for name in dict.fromkeys(names):
        key = name if name in pins else resolve(name, to_pin=True).name
        if key not in pins:
            raise NotFoundError(f"'{name}' is not pinned in {lock_file()}", "see `mmhub models lock`")
        pin = pins[key]
        changes.append(Change(name=key, repo_id=_repo(pin), ref=pin.ref, state="removed", old=pin.commit))
    path = lock_file() if dry_run else write_pins({one.name: None for one in changes})
    return path, changes


def _repo(pin: Pin) -> str:
    return pin.ref.removeprefix("hub:").partition("@")[0]


def _lock_one(name: str, pins: dict[str, Pin], update: bool) -> Change:
    found = resolve(name, to_pin=True)
    if found.kind != "hub":
        what = "a local folder" if found.kind == "local" else "a composition"
        raise UsageError(f"'{name}' is {what}, which has no commit to pin", "only models on a Hub are pinned")
    assert found.repo_id
    if found.commit:
        where = f"by {found.source}" if found.entry and found.entry.commit else "by its own @revision"
        raise UsageError(f"'{name}' is pinned already, {where}", f"it stands at {found.commit}")
    ref = f"hub:{found.repo_id}" + (f"@{found.revision}" if found.revision else "")
    pin = pins.get(found.name)
    held = pin if pin and pin.ref.removeprefix("hub:") in (ref.removeprefix("hub:"), found.repo_id) else None
    one = Change(name=found.name, repo_id=found.repo_id, ref=ref, state="added", old=pin.commit if pin else "")
    if held and not update:
        one.state, one.new = "kept", held.commit
        return one
    one.new = _newest(found)
    if held:
        one.state = "moved" if held.commit != one.new else "unchanged"
        one.changes = compare(found.repo_id, held.commit, one.new) if one.state == "moved" else []
    return one


def _newest(found: Resolved) -> str:
    repo = found.repo_id or ""
    try:
        with hub_errors(repo, found.revision):
            return check_commit(repo, api().model_info(repo, revision=found.revision, timeout=_SECONDS).sha)
    except NetworkError as error:
        hint = "pins that are there still hold"
        raise NetworkError(f"the newest commit of '{repo}' is not known: {error.message}", hint) from None


def compare(repo: str, old: str, new: str) -> list[str]:
    """Say in lines what differs between two commits: files, the configuration and the licence. No weights are read.

    Raises:
        NetworkError: the Hub cannot be reached.
    """
    with hub_errors(repo, new):
        after = api().model_info(repo, revision=new, files_metadata=True, timeout=_SECONDS)
    try:
        with hub_errors(repo, old):
            before = api().model_info(repo, revision=old, files_metadata=True, timeout=_SECONDS)
    except NotFoundError:
        return [f"the old commit {old[:12]} is no longer on the Hub: its history was rewritten"]
    check_commit(repo, after.sha, new)
    check_commit(repo, before.sha, old)
    was, now = _blobs(before), _blobs(after)
    lines = [f"- {name}" for name in sorted(was.keys() - now.keys())]
    lines += [f"+ {name} ({now[name][1]:,} bytes)" for name in sorted(now.keys() - was.keys())]
    same = was.keys() & now.keys()
    lines += [
        f"~ {name} ({was[name][1]:,} -> {now[name][1]:,} bytes)" for name in sorted(same) if was[name] != now[name]
    ]
    texts = {name for name in ("config.json", "README.md") if was.get(name) != now.get(name)}
    return lines + _differences(_facts(repo, before, texts), _facts(repo, after, texts))


def _blobs(info: Any) -> dict[str, tuple[str, int]]:
    return {
        str(file.rfilename): (
            str(file.lfs.sha256 if file.lfs else file.blob_id),
            file.size if isinstance(file.size, int) else 0,
        )
        for file in info.siblings or ()
    }


def _facts(repo: str, info: Any, names: set[str]) -> dict[str, str]:
    """What a person would want to know before they take a new version, as flat text."""
    fetch_small(repo, info.sha, info.siblings or (), re.compile("|".join(map(re.escape, names)) or "-"))
    folder = in_cache(repo).snapshot(info.sha)
    facts = {"licence": read_card(folder).license} if "README.md" in names else {}
    if "config.json" in names:
        config = as_table(read_json(folder / "config.json"))
        facts["task"] = str(config.get("task", ""))
        for role, part in as_table(config.get("components")).items():
            facts[role] = str(as_table(part).get("use", ""))
            facts |= {f"{role}.{key}": str(value) for key, value in as_table(as_table(part).get("config")).items()}
        requires = config.get("requires")
        for one in map(as_table, requires if isinstance(requires, list) else ()):
            facts[f"requires {one.get('distribution')}"] = str(one.get("specifier") or "any version")
    return facts


def _differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return [
        f"{key}: {old.get(key) or 'nothing'} -> {new.get(key) or 'nothing'}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
