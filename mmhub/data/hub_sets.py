"""Rows of a data set on the Hub, downloaded once and then read from the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mmhub.data.parts import Part, anchors, brief, find_path, near_miss
from mmhub.data.tables import COMPRESSED, is_table, table_columns
from mmhub.errors import InputError, MmhubError, NetworkError, NotFoundError, UsageError

_HUB_SCHEMES = ("hub:", "hf-hub:")
_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[^:#]+))?(#(?P<config>[^:]+))?(:(?P<split>.+))?")
_HUB_SECONDS = 10.0  # how long the Hub may take to say whether a data set exists


def hub_id(text: str, base: Path | None) -> re.Match[str] | None:
    """Match a Hub data set; without a scheme only `org/name` that cannot be meant as a local path."""
    for scheme in _HUB_SCHEMES:
        if text.startswith(scheme):
            if match := _HUB_ID.fullmatch(text.removeprefix(scheme)):
                return match
            raise UsageError(f"'{text}' does not name a Hub data set", "write hub:org/name[@revision][#config][:split]")
    match = _HUB_ID.fullmatch(text)
    if match is None or "/" not in match["id"] or find_path(text, base):
        return None
    path = Path(match["id"])
    is_file = is_table(path) or path.suffix.lower() in COMPRESSED
    is_typo = any((anchor / path.parent).is_dir() and near_miss(anchor / path) for anchor in anchors(base))
    return None if is_file or is_typo else match


def open_hub(text: str, match: re.Match[str], split: str) -> Part:
    """Open what `hub_id` matched; `split` is for a text that names none."""
    repo, revision, config = match["id"], match["revision"], match["config"]
    split = match["split"] or split
    if not _offline():
        revision = _hub_commit(repo, revision)
    elif not _cached(repo):
        raise NetworkError(f"data set '{repo}' is not in the cache, and offline mode is on", "unset HF_HUB_OFFLINE")
    data = _load_hub(repo, config, revision, split)
    commit = _loaded_commit(data)
    if revision and commit and revision != commit:  # `datasets` quietly falls back to whatever it has in its cache
        problem = f"data set '{repo}' is not in the cache at revision '{revision}', only at commit {commit}"
        raise NetworkError(problem, f"go online, or name that commit: {repo}@{commit}")
    table = data.with_format("arrow")[:]  # media come out as `{bytes, path}`, undecoded
    if not table.num_rows:
        raise InputError(f"data set '{text}' has no rows")
    return Part(
        name=f"{repo}:{split}", columns=table_columns(table, repo), rows=table.num_rows, revision=commit or revision
    )


def _offline() -> bool:
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def _cached(repo: str) -> bool:
    """Say whether the client's caches hold anything of this data set; spares the import of `datasets` when not."""
    from huggingface_hub import constants

    datasets_cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
    folders = (
        os.path.join(datasets_cache, repo.replace("/", "___")),
        os.path.join(constants.HF_HUB_CACHE, "datasets--" + repo.replace("/", "--")),
    )
    return any(os.path.isdir(os.path.expanduser(folder)) for folder in folders)


def _hub_commit(repo: str, revision: str | None) -> str | None:
    """Ask the Hub once for the commit, so that an absent data set or network fails at once and not after retries."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        return api.dataset_info(repo, revision=revision, timeout=_HUB_SECONDS).sha
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"data set '{repo}' has no revision '{revision}'") from None
    except errors.GatedRepoError:
        raise MmhubError(f"data set '{repo}' is gated", "ask for access on its page, then run: hf auth login") from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; a private one needs: hf auth login"
        raise NotFoundError(f"no file, folder or Hub data set '{repo}'", hint) from None
    except errors.HFValidationError as error:
        raise UsageError(f"'{repo}' cannot be a Hub data set: {brief(error)}") from None
    except Exception as error:  # the HTTP library underneath differs between versions of huggingface_hub
        hint = "HF_HUB_OFFLINE=1 uses the cached copy" if _cached(repo) else "check the network and HF_ENDPOINT"
        raise NetworkError(f"cannot ask {api.endpoint} for data set '{repo}': {brief(error)}", hint) from None


def _load_hub(repo: str, config: str | None, revision: str | None, split: str) -> Any:
    """Download and prepare one split."""
    import datasets

    try:
        # a bare id would load a local folder of that name in its place
        return datasets.load_dataset(f"hf://datasets/{repo}", config, revision=revision, split=split)
    except ConnectionError as error:
        raise NetworkError(f"cannot download data set '{repo}': {brief(error)}") from None
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot load data set '{repo}': {brief(error)}") from None
    except ValueError as error:  # an unknown split, or one of several configs must be named
        raise UsageError(f"cannot load data set '{repo}': {brief(error)}", "write org/name#config:split") from None
    except Exception as error:  # a repository can be broken in any way its author managed
        raise MmhubError(f"cannot load data set '{repo}': {brief(error)}") from None


def _loaded_commit(data: Any) -> str | None:
    """Read the commit off the cache folder that the rows lie in."""
    folders = [Path(file["filename"]).parent.name for file in data.cache_files]
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)
