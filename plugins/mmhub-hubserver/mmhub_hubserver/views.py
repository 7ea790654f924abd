"""What the Hub API says about repositories, as JSON-ready dicts in the shapes `huggingface_hub` parses."""

import hashlib
import importlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmhub_hubserver.errors import EntryNotFound
from mmhub_hubserver.store import Commit, Entry, Repo, lfs_pointer

MAX_CARD_BYTES = 1 << 20
_MAX_FRONT_MATTER_CHARS = 64 << 10
_MAX_YAML_DEPTH = 50


class CardError(Exception):
    """The front matter of a README is not valid YAML."""


def repo_info(repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    card = card_data(repo, commit)
    meta = repo.meta
    info: dict[str, Any] = {
        "_id": hashlib.sha1(f"{repo.kind}/{repo.id}".encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.id,
        "createdAt": meta["created"],
        "lastModified": commit.date,
        "private": meta["private"],
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(card),
        "cardData": card,
        "usedStorage": sum(entry.size for entry in commit.files.values()),
        "siblings": [_sibling(path, commit.files[path], blobs) for path in sorted(commit.files)],
    }
    if repo.kind == "models":
        info |= {"modelId": repo.id, "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag")}
    return info


def card_data(repo: Repo, commit: Commit) -> dict[str, Any]:
    """Return the front matter of the README at this commit, empty if there is none that can be read."""
    readme = commit.files.get("README.md")
    if readme is None or readme.size > MAX_CARD_BYTES:
        return {}
    try:
        text = _card_text(repo.store.blob(readme.sha256))
    except CardError:
        return {}
    card: dict[str, Any] = json.loads(text)
    return card


def front_matter(readme: str) -> dict[str, Any]:
    """Parse the YAML between the first two `---` lines; empty when PyYAML is not installed.

    Raises:
        CardError: it is not YAML, not a table, or could take unbounded time or memory.
    """
    lines = readme[:_MAX_FRONT_MATTER_CHARS].lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return {}
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        return {}
    text = "\n".join(lines[1:end])
    try:
        _refuse_yaml_bombs(yaml, text)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CardError(" ".join(str(error).split())) from None
    if data is not None and not isinstance(data, dict):
        raise CardError("expected a table of keys and values")
    return {str(key): value for key, value in (data or {}).items()}


def _refuse_yaml_bombs(yaml: Any, text: str) -> None:
    """Aliases expand without bound, and PyYAML takes quadratic time in the depth of open brackets."""
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
        depth -= isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken)
        if depth > _MAX_YAML_DEPTH or isinstance(token, yaml.AliasToken):
            raise CardError("aliases and deep nesting are not supported")


def tree(commit: Commit, folder: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
    """Yield the files and folders below `folder`, by path."""
    prefix = f"{folder}/" if folder else ""
    folders: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for path, entry in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            digest = folders.setdefault(prefix + "/".join(parts[:depth]), hashlib.sha1())
            digest.update(f"{path}\0{entry.git_oid}\n".encode())
        if recursive or len(parts) == 1:
            found[path] = _tree_file(path, entry)
    if folder and not found and not folders:
        raise EntryNotFound(f"There is no folder '{folder}'.", commit=commit.id)
    for path, digest in folders.items():
        found[path] = {"type": "directory", "oid": digest.hexdigest(), "size": 0, "path": path}
    yield from (found[path] for path in sorted(found))


def commit_summary(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.id,
        "title": commit.title,
        "message": commit.message,
        "date": commit.date,
        "authors": [{"user": commit.author}],
    }


def _lfs(entry: Entry) -> dict[str, Any]:
    return {"size": entry.size, "pointerSize": len(lfs_pointer(entry.sha256, entry.size))}


def _tree_file(path: str, entry: Entry) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": "file", "oid": entry.git_oid, "size": entry.size, "path": path}
    return shown | {"lfs": {"oid": entry.sha256, **_lfs(entry)}} if entry.lfs else shown


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"rfilename": path}
    if blobs:
        shown |= {"size": entry.size, "blobId": entry.git_oid}
        shown |= {"lfs": {"sha256": entry.sha256, **_lfs(entry)}} if entry.lfs else {}
    return shown


def _tags(card: dict[str, Any]) -> list[str]:
    tags = [str(card[key]) for key in ("library_name", "pipeline_tag") if card.get(key)]
    tags += _strings(card.get("tags")) + _strings(card.get("language"))
    for key, prefix in (("license", "license"), ("datasets", "dataset"), ("base_model", "base_model")):
        tags += [f"{prefix}:{value}" for value in _strings(card.get(key))]
    return list(dict.fromkeys(tags))


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(item) for item in values if isinstance(item, str | int | float)]


@lru_cache(maxsize=1024)
def _card_text(blob: Path) -> str:
    try:
        card = front_matter(blob.read_text(encoding="utf-8", errors="replace"))
        return json.dumps(card, default=str, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CardError(str(error)) from None
