"""What the Hub API says about repositories, as JSON-ready dicts in the shapes `huggingface_hub` parses."""

import hashlib
import html
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmhub_hubserver import cards, weights
from mmhub_hubserver.errors import EntryNotFound, Invalid
from mmhub_hubserver.store import Commit, Entry, Repo, lfs_pointer

PAGE = 1000  # entries of one listing

_COMMON = (
    "author cardData createdAt disabled lastModified likes private resourceGroup sha siblings tags trendingScore "
    "usedStorage"
)
_EXPAND = {
    "models": "baseModels childrenModelCount config downloads downloadsAllTime evalResults gated gguf inference "
    "inferenceProviderMapping library_name mask_token model-index pipeline_tag safetensors spaces transformersInfo "
    "widgetData",
    "datasets": "citation description downloads downloadsAllTime gated mainSize paperswithcode_id",
    "spaces": "datasets models region runtime sdk subdomain",
}
_PREFIXED_TAGS = (
    "task_categories",
    "task_ids",
    "language",
    "multilinguality",
    "size_categories",
    "annotations_creators",
    "language_creators",
    "source_datasets",
)


@dataclass(frozen=True)
class Described:
    """One repository at one commit. What takes reading more than the card is worked out only when it is shown."""

    repo: Repo
    commit: Commit
    info: dict[str, Any]
    card: dict[str, Any]
    blobs: bool = False

    def tags(self) -> list[str]:
        return list(self.info["tags"])

    def safetensors(self) -> dict[str, Any] | None:
        """Return the numbers of parameters by type and in all, None without weights at the top of the repository."""
        return weights.parameters(self.repo, self.commit)

    def shown(self, expand: Collection[str], hidden: Collection[str] = ()) -> dict[str, Any]:
        """Return the fields named in `expand`; without any, all but those in `hidden`."""
        late: dict[str, Callable[[], Any]] = {"siblings": self._siblings, "usedStorage": self._size}
        if self.repo.kind == "models":
            late |= {"safetensors": self.safetensors, "config": lambda: cards.config(self.repo, self.commit)}
        known = {**self.info, **late}
        if expand:
            names = [name for name in ("_id", "id", *expand) if name in known]
        else:
            names = [name for name in known if name not in hidden]
        found = {name: known[name]() if name in late else known[name] for name in names}
        return {name: value for name, value in found.items() if value is not None or name in self.info}

    def _siblings(self) -> list[dict[str, Any]]:
        return [_sibling(path, entry, self.blobs) for path, entry in sorted(self.commit.files.items())]

    def _size(self) -> int:
        return sum(entry.size for entry in self.commit.files.values())


def describe(repo: Repo, commit: Commit, *, blobs: bool = False) -> Described:
    """Describe a repository; `blobs` adds sizes and hashes to its list of files."""
    card, meta = cards.card_data(repo, commit), repo.meta
    info: dict[str, Any] = {
        "_id": hashlib.sha1(f"{repo.kind}/{repo.id}".encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.id,
        "createdAt": meta["created"],
        "lastModified": commit.date,
        "private": meta["private"],
        "gated": meta.get("gated", False),
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(repo.kind, card),
        "cardData": card,
    }
    if repo.kind == "models":
        info |= {"modelId": repo.id, "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag")}
        info |= {"model-index": card["model-index"]} if card.get("model-index") else {}
    elif repo.kind == "spaces":
        info |= {"sdk": card.get("sdk") or meta.get("sdk", "static")}
    return Described(repo, commit, info, card, blobs)


def check_expand(kind: str, names: Collection[str]) -> None:
    """Refuse a field that the Hub does not know; those it knows and this hub does not have are left out."""
    known = {*_COMMON.split(), *_EXPAND[kind].split()}
    for name in names:
        if name not in known:
            raise Invalid(f'"expand" has no {name[:50]!a}: it must be one of {sorted(known)}')


def tree(commit: Commit, folder: str, *, recursive: bool) -> list[str]:
    """Return the paths of the files and folders below `folder`, sorted; folders end in `/`."""
    if folder and folder not in commit.folders:
        raise EntryNotFound(f"There is no folder '{folder}'.", commit=commit.id)
    prefix = f"{folder}/" if folder else ""
    below = [path for path in commit.files if path.startswith(prefix)]
    below += [f"{path}/" for path in commit.folders if path.startswith(prefix) and path]
    if not recursive:
        below = [path for path in below if "/" not in path[len(prefix) :].rstrip("/")]
    return sorted(below, key=lambda path: path.rstrip("/"))


def entries(
    repo: Repo, commit: Commit, paths: Sequence[str], *, expand: bool, xet_hash: Any
) -> Iterator[dict[str, Any]]:
    """Describe files and (with a final `/`) folders; with `expand` also the commit that last changed each."""
    last = repo.last_commits(commit, [path.rstrip("/") for path in paths]) if expand else {}
    for path in paths:
        plain = path.rstrip("/")
        if path.endswith("/"):
            shown = {"type": "directory", "oid": repo.folder_oid(commit, plain), "size": 0, "path": plain}
        else:
            shown = _tree_file(plain, commit.files[plain])
            if commit.files[plain].lfs and (found := xet_hash(repo, commit.files[plain])):
                shown["xetHash"] = found
        if plain in last:
            changed = last[plain]
            shown["lastCommit"] = {"id": changed.id, "title": changed.title, "date": changed.date}
        yield shown


def commit_summary(commit: Commit, *, formatted: bool = False) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": commit.id,
        "title": commit.title,
        "message": commit.message,
        "date": commit.date,
        "authors": [{"user": commit.author}],
    }
    if formatted:
        texts = {"title": html.escape(commit.title), "message": html.escape(commit.message).replace("\n", "<br>")}
        shown["formatted"] = texts
    return shown


def _lfs(entry: Entry) -> dict[str, Any]:
    return {"size": entry.size, "pointerSize": len(lfs_pointer(str(entry.sha256), entry.size))}


def _tree_file(path: str, entry: Entry) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": "file", "oid": entry.git_oid, "size": entry.size, "path": path}
    return shown | {"lfs": {"oid": entry.sha256, **_lfs(entry)}} if entry.lfs else shown


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"rfilename": path}
    if blobs:
        shown |= {"size": entry.size, "blobId": entry.git_oid}
        shown |= {"lfs": {"sha256": entry.sha256, **_lfs(entry)}} if entry.lfs else {}
    return shown


def _tags(kind: str, card: dict[str, Any]) -> list[str]:
    tags = [str(card[key]) for key in ("library_name", "pipeline_tag") if card.get(key)]
    tags += _strings(card.get("tags"))
    if kind == "models":
        tags += _strings(card.get("language"))
        tags += [f"dataset:{value}" for value in _strings(card.get("datasets"))]
        tags += [f"base_model:{value}" for value in _strings(card.get("base_model"))]
    else:
        tags += [f"{key}:{value}" for key in _PREFIXED_TAGS for value in _strings(card.get(key))]
    tags += [f"license:{value}" for value in _strings(card.get("license"))]
    return list(dict.fromkeys(tags))


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(item) for item in values if isinstance(item, str | int | float)]
