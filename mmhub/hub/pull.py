"""Fetch a checkpoint by name and load it: config.json first, then, if its plugins are here, the rest, checked."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from mmhub.checkpoint import ALLOWED, CheckpointConfig, check_requirements, is_checkpoint, read_config, verify_files
from mmhub.checkpoint import load as load_folder
from mmhub.device import find_device
from mmhub.errors import MmhubError, TrustError, UsageError
from mmhub.files import disk_errors, new_folder
from mmhub.hub.client import cache_dir, download_options, hub_errors, is_offline, is_reachable
from mmhub.model import Model
from mmhub.names import Resolved, resolve

_EXTRAS = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "provenance.json", "eval/*.json")
_LIBRARY_FILES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "modules.json", "sentence_bert_config.json", "1_Pooling/config.json",
    "0_Transformer/*.json", "0_Transformer/*.safetensors",
)  # fmt: skip


def load(
    name: str | os.PathLike[str], *, device: str = "cpu", revision: str | None = None, allow_partial: bool = False
) -> Model:
    """Load the model called `name`: a registry name, `org/name[@revision]` on the Hub, or a checkpoint folder.

    A `Path` is always a folder.

    Raises:
        NotFoundError, PluginError, TrustError, NetworkError: see `pull` and `mmhub.checkpoint.load`.
    """
    target = find_device(device)
    folder = pull(name, revision=revision)
    model = load_folder(folder, allow_partial=allow_partial, name=os.fspath(name))
    return model.to(target) if target.type != "cpu" else model


def pull(name: str | os.PathLike[str], *, revision: str | None = None, local_dir: str | Path | None = None) -> Path:
    """Make the checkpoint called `name` available and return its folder, every file checked against its hash.

    A local checkpoint is returned as it is. `local_dir` puts the files there instead of into the cache, replacing an
    older checkpoint at once or not at all. `revision` is what `name@revision` says.

    Raises:
        PluginError: a plugin it needs is missing; nothing but config.json was fetched.
        TrustError: a file is damaged, also after fetching it again.
    """
    name = name if isinstance(name, str) else f"local:{os.fspath(name)}"
    resolved = resolve(_at_revision(name, revision))
    if resolved.kind == "local":
        assert resolved.path is not None
        return resolved.path
    if resolved.kind != "hub":
        raise UsageError(f"{name!r} is a composition, not a checkpoint", "train it from a recipe first")
    return pull_repo(name, resolved, Path(local_dir) if local_dir else None)


def _at_revision(name: str, revision: str | None) -> str:
    """`name` with its revision replaced, so that pins and `require_pinned` are checked for what is asked."""
    if revision is None:
        return name
    if name.startswith((".", "/", "~", "\\", "local:", "local-dir:")):
        raise UsageError(f"'{name}' is a local folder, which has no revision", "leave out --revision")
    plain, mark, component = name.partition("#")
    return f"{plain.partition('@')[0]}@{revision}{mark}{component}"


def pull_repo(name: str, resolved: Resolved, local_dir: Path | None = None) -> Path:
    """Fetch a checkpoint repository."""
    repo = resolved.repo_id or ""
    config_path = _fetch_config(repo, resolved.commit or resolved.revision)
    config = read_config(config_path.parent)
    check_requirements(name, config)
    commit = config_path.parent.name
    if local_dir is not None:
        _check_target(local_dir)
        with disk_errors("the checkpoint", local_dir), new_folder(local_dir) as aside:
            _fetch(repo, commit, config, aside)
            _repair(repo, commit, aside, config, aside)
        return local_dir
    folder = config_path.parent
    if not all((folder / file).is_file() for file in config.files):
        _fetch(repo, commit, config)
    _repair(repo, commit, folder, config)
    return folder


def _fetch_config(repo: str, revision: str | None) -> Path:
    """The cached file if a commit is asked for or the Hub cannot be reached, else what the Hub has now."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        cached = try_to_load_from_cache(repo, "config.json", cache_dir=cache_dir(), revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    cached_only = not is_offline() and not is_reachable()
    with hub_errors(repo, revision):
        return Path(
            hf_hub_download(repo, "config.json", revision=revision, local_files_only=cached_only, **download_options())
        )


def _fetch(repo: str, commit: str, config: CheckpointConfig, local_dir: Path | None = None) -> None:
    from huggingface_hub import snapshot_download

    patterns = ["config.json", *_EXTRAS, *config.files]
    options: dict[str, Any] = download_options()
    if local_dir:
        options["local_dir"] = local_dir
    with hub_errors(repo, commit):
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=patterns, **options))
    if local_dir:
        _drop_client_metadata(local_dir)
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).as_posix()
        if not path.is_dir() and not ALLOWED.fullmatch(inside):
            raise TrustError(f"'{repo}' delivered {inside!r}, which no checkpoint may hold")


def _check_target(folder: Path) -> None:
    """Only a checkpoint and nothing else may be replaced."""
    if not folder.exists():
        return
    inside = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    if not folder.is_dir() or (inside and not is_checkpoint(folder)):
        raise UsageError(f"'{folder}' exists and is no mmhub checkpoint", "name another folder")
    own = [name for name in inside if not ALLOWED.fullmatch(name)]
    if own:
        raise UsageError(f"'{folder}' also holds {own[0]!r}, which would be lost", "name another folder")


def _drop_client_metadata(folder: Path) -> None:
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _repair(repo: str, commit: str, folder: Path, config: CheckpointConfig, local_dir: Path | None = None) -> None:
    """Check every file, and fetch once more what is damaged: the client itself compares sizes only."""
    from huggingface_hub import hf_hub_download

    for name in config.files:
        try:
            verify_files(folder, config, {name})
            continue
        except TrustError:
            if is_offline():
                raise
        options: dict[str, Any] = download_options()
        if local_dir:
            options["local_dir"] = local_dir
        with hub_errors(repo, commit):
            hf_hub_download(repo, name, revision=commit, force_download=True, **options)
        if local_dir:
            _drop_client_metadata(local_dir)
        verify_files(folder, config, {name})


def fetch_library_model(name: str, resolved: Resolved) -> Path:
    """Fetch another library's model (transformers, timm): known data files only, never code or pickle."""
    from huggingface_hub import snapshot_download

    repo = resolved.repo_id or ""
    with hub_errors(repo, resolved.revision):
        folder = snapshot_download(
            repo,
            revision=resolved.commit or resolved.revision,
            allow_patterns=list(_LIBRARY_FILES),
            **download_options(),
        )
    if not any(Path(folder).glob("*.safetensors")):
        raise MmhubError(f"'{name}' has no safetensors weights", "mmhub does not read pickle files; convert it first")
    return Path(folder)


def find_pretrained(name: str) -> tuple[str, Path, str | None]:
    """Locate what an `init` names: ("mmhub" | "library", path, component).

    Ours are checkpoint folders or repositories with an mmhub config.json; anything else is the library's own format.
    """
    resolved = resolve(name)
    if resolved.kind == "local":
        assert resolved.path is not None
        return ("mmhub" if is_checkpoint(resolved.path) else "library"), resolved.path, resolved.component
    if resolved.kind != "hub":
        raise UsageError(f"init = {name!r} is a composition, not a checkpoint", "name a checkpoint")
    config = _fetch_config(resolved.repo_id or "", resolved.commit or resolved.revision)
    if is_checkpoint(config.parent):
        return "mmhub", pull_repo(name, resolved), resolved.component
    return "library", fetch_library_model(name, resolved), resolved.component


__all__ = ["cache_dir", "fetch_library_model", "find_pretrained", "load", "pull", "pull_repo"]
