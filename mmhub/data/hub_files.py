"""The files of a data set on the Hub, for reading them in passing instead of downloading them first."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from mmhub.data.addresses import File, remote_file
from mmhub.errors import NetworkError, NotFoundError, UsageError, did_you_mean
from mmhub.hub.client import api, hub_errors, is_offline, request_address, token

_ADDRESS = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<path>.*))?")
_SPLITS = ("train", "training", "valid", "validation", "val", "dev", "test", "testing")
_CONVERTED = "refs/convert/parquet"  # where the Hub keeps its own parquet copy of a data set
_FORMATS = re.compile(r"\.(parquet|tar|tar\.gz|tgz|tar\.zst|(jsonl|ndjson|csv|tsv|txt)(\.gz|\.zst)?)$")


def hub_address_files(text: str, split: str) -> list[File]:
    """Find the files of `hf://datasets/org/name[@revision][/path or glob]`; without a path, those of a split."""
    match = _ADDRESS.fullmatch(text.rstrip("/"))
    if match is None:
        raise UsageError(f"'{text}' names no data set", "write hf://datasets/org/name/FILES, or hub:org/name")
    repo, path = match["repo"], match["path"]
    revision = match["revision"].replace("%2F", "/") if match["revision"] else None
    if not path:
        return hub_split_files(repo, revision, None, split)
    filesystem, root, commit = _open(repo, revision)
    found = _listing(filesystem, root, repo, path)
    if not found:
        raise NotFoundError(
            f"data set '{repo}' has no file '{path}'", did_you_mean(path, _listing(filesystem, root, repo))
        )
    return _files(filesystem, repo, commit, found)


def hub_split_files(repo: str, revision: str | None, config: str | None, split: str) -> list[File]:
    """Find the files that make up a split: those its card names, else those whose path says so.

    Raises:
        NotFoundError: there is no such data set, revision, configuration or split.
        UsageError: it has several configurations, and none was chosen. NetworkError: the Hub cannot be reached.
    """
    filesystem, root, commit = _open(repo, revision)
    listed = {path: info for path, info in _listing(filesystem, root, repo).items() if _FORMATS.search(path)}
    patterns = _card_patterns(filesystem, root, repo, config, split)
    if patterns:
        chosen = {
            path: info for pattern in patterns for path, info in _listing(filesystem, root, repo, pattern).items()
        }
    else:
        if revision == _CONVERTED:
            config = _converted_config(listed, repo, config)
        chosen = _by_path(listed, config, split)
    if chosen:
        return _files(filesystem, repo, commit, chosen)
    if not listed and revision is None:
        return hub_split_files(repo, _CONVERTED, config, split)
    wanted = f"split '{split}'" + (f" of '{config}'" if config else "")
    there = ", ".join(list(listed)[:4]) or "no file of a format that is streamed"
    raise NotFoundError(
        f"data set '{repo}' has no {wanted}", f"it has {there}; or name the files: hf://datasets/{repo}/…"
    )


def _open(repo: str, revision: str | None) -> tuple[Any, str, str]:
    """Return the Hub's file system, the root of a data set at one commit in it, and that commit."""
    from huggingface_hub import HfFileSystem

    if is_offline():
        raise NetworkError(
            f"data set '{repo}' is streamed from the Hub, and offline mode is on", "unset HF_HUB_OFFLINE"
        )
    with hub_errors(repo, revision):
        commit = api().dataset_info(repo, revision=revision).sha
    filesystem = HfFileSystem(endpoint=request_address(), token=token())
    return filesystem, f"datasets/{repo}@{commit}", commit


def _listing(filesystem: Any, root: str, repo: str, pattern: str = "**") -> dict[str, dict[str, Any]]:
    with hub_errors(repo):
        found = filesystem.glob(f"{root}/{pattern}", detail=True)
    return {path.removeprefix(f"{root}/"): info for path, info in sorted(found.items()) if info["type"] == "file"}


def _files(filesystem: Any, repo: str, commit: str, found: dict[str, dict[str, Any]]) -> list[File]:
    root = f"datasets/{repo}@{commit}"
    return [
        remote_file(filesystem, f"{root}/{path}", info, name=f"{repo}/{path}", commit=commit)
        for path, info in found.items()
    ]


def _card_patterns(filesystem: Any, root: str, repo: str, config: str | None, split: str) -> list[str]:
    """Return the globs under which a data card lists a split (`configs:` in its header), [] where it lists none."""
    tables = _card_configs(filesystem, root, repo)
    if not tables:
        return []
    names = [str(table["config_name"]) for table in tables]
    chosen = [table for table in tables if table["config_name"] == (config or "default")]
    chosen = chosen or [table for table in tables if table.get("default") and not config]
    if not chosen and (config or len(tables) > 1):
        raise _no_config(repo, config, names)
    files = (chosen or tables)[0]["data_files"]
    if isinstance(files, dict):
        files = [{"split": name, "path": path} for name, path in files.items()]
    files = files if isinstance(files, list) else [files]
    paths: list[Any] = [part if isinstance(part, str) else part["path"] for part in files if _is_of(part, split)]
    return [pattern for path in paths for pattern in (path if isinstance(path, list) else [path])]


def _no_config(repo: str, config: str | None, names: list[str]) -> NotFoundError | UsageError:
    if config:
        hint = did_you_mean(config, names) or f"it has {', '.join(names)}"
        return NotFoundError(f"data set '{repo}' has no configuration '{config}'", hint)
    return UsageError(f"data set '{repo}' has configurations {', '.join(names)}", f"name one: hub:{repo}#{names[0]}")


def _converted_config(listed: dict[str, Any], repo: str, config: str | None) -> str | None:
    """Return the configuration to read of the Hub's parquet copy, whose files are CONFIGURATION/SPLIT/….parquet."""
    names = list(dict.fromkeys(path.split("/")[0] for path in listed if "/" in path))
    if config in names or not names:
        return config
    if config or (len(names) > 1 and "default" not in names):
        raise _no_config(repo, config, names)
    return "default" if len(names) > 1 else names[0]


def _is_of(part: Any, split: str) -> bool:
    return split == "train" if isinstance(part, str) else part.get("split") == split


def _card_configs(filesystem: Any, root: str, repo: str) -> list[dict[str, Any]]:
    import yaml

    try:
        with hub_errors(repo):
            text = filesystem.cat_file(f"{root}/README.md").decode()
        header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        known = yaml.safe_load(header[1]) if header else {}
    except (NotFoundError, FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return []
    tables = known.get("configs") if isinstance(known, dict) else None
    return [t for t in tables or [] if isinstance(t, dict) and "config_name" in t and "data_files" in t]


def _by_path(listed: dict[str, Any], config: str | None, split: str) -> dict[str, Any]:
    """Choose the files whose folders name the configuration and whose path names the split.

    Where no path names any split, all files are the training split.
    """
    kinds = Counter(_format(path) for path in listed)
    kind = "parquet" if kinds["parquet"] else next(iter(kinds.most_common(1)), ("", 0))[0]
    chosen = {path: info for path, info in listed.items() if _format(path) == kind}
    if config:
        chosen = {path: info for path, info in chosen.items() if config in path.split("/")[:-1]}
    of_split = {path: info for path, info in chosen.items() if _names(path, split)}
    if of_split or split != "train" or any(_names(path, name) for path in chosen for name in _SPLITS):
        return of_split
    return chosen


def _format(path: str) -> str:
    match = _FORMATS.search(path)
    assert match
    return match[1].removesuffix(".gz").removesuffix(".zst")


def _names(path: str, split: str) -> bool:
    return re.search(rf"(^|[/._-]){re.escape(split)}([/._-]|$)", path) is not None
