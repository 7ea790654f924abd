"""Fetch a checkpoint by name and load it: config.json first, then, if its plugins are here, the rest, checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmhub.checkpoint import ALLOWED, CheckpointConfig, check_requirements, read_config, verify_files
from mmhub.checkpoint import load as load_folder
from mmhub.device import find_device
from mmhub.errors import MmhubError, TrustError, UsageError
from mmhub.hub.client import cache_dir, download_options, hub_errors
from mmhub.model import Model
from mmhub.names import Resolved, resolve

_EXTRAS = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "eval/*.json")
_LIBRARY_FILES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "preprocessor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "1_Pooling/config.json",
)  # fmt: skip


def load(name: str, *, device: str = "cpu", revision: str | None = None, allow_partial: bool = False) -> Model:
    """Load the model called `name`: a registry name, `org/name[@revision]` on the Hub, or a checkpoint folder.

    Raises:
        NotFoundError, PluginError, TrustError, NetworkError: see `pull` and `mmhub.checkpoint.load`.
    """
    target = find_device(device)
    folder = pull(name, revision=revision)
    model = load_folder(folder, allow_partial=allow_partial, name=name)
    return model.to(target) if target.type != "cpu" else model


def pull(name: str, *, revision: str | None = None, local_dir: str | Path | None = None) -> Path:
    """Make the checkpoint called `name` available and return its folder, every file checked against its hash.

    A local checkpoint is returned as it is. `local_dir` copies the files there instead of into the cache.

    Raises:
        PluginError: a plugin it needs is missing; nothing but config.json was fetched.
        TrustError: a file is damaged, also after fetching it again.
    """
    resolved = resolve(name)
    if resolved.kind == "local":
        assert resolved.path is not None
        return resolved.path
    if resolved.kind != "hub":
        raise UsageError(f"{name!r} is a composition, not a checkpoint", "train it from a recipe first")
    return pull_repo(name, resolved, revision, Path(local_dir) if local_dir else None)


def pull_repo(name: str, resolved: Resolved, revision: str | None = None, local_dir: Path | None = None) -> Path:
    """Fetch a checkpoint repository."""
    repo = resolved.repo_id or ""
    wanted = revision or resolved.commit or resolved.revision
    config_path = _fetch_config(repo, wanted)
    config = read_config(config_path.parent)
    check_requirements(name, config)
    commit = config_path.parent.name
    folder = _fetch(repo, commit, config, local_dir)
    _repair(repo, commit, folder, config, local_dir)
    return folder


def _fetch_config(repo: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    with hub_errors(repo, revision):
        return Path(hf_hub_download(repo, "config.json", revision=revision, **download_options()))


def _fetch(repo: str, commit: str, config: CheckpointConfig, local_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["config.json", *_EXTRAS, *config.files]
    options: dict[str, Any] = download_options()
    if local_dir:
        _check_target(local_dir)
        options["local_dir"] = local_dir
    with hub_errors(repo, commit):
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=patterns, **options))
    if local_dir:
        _drop_client_metadata(local_dir)
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).as_posix()
        if not path.is_dir() and not ALLOWED.fullmatch(inside) and not inside.startswith(".cache/"):
            raise TrustError(f"'{repo}' delivered {inside!r}, which no checkpoint may hold")
    return folder


def _check_target(folder: Path) -> None:
    from mmhub.checkpoint import is_checkpoint

    if folder.exists() and not is_checkpoint(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is no mmhub checkpoint", "name another folder")


def _drop_client_metadata(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _repair(repo: str, commit: str, folder: Path, config: CheckpointConfig, local_dir: Path | None) -> None:
    """Check every file, and fetch once more what is damaged: the client itself compares sizes only."""
    from huggingface_hub import hf_hub_download

    for name in config.files:
        try:
            verify_files(folder, config, {name})
            continue
        except TrustError:
            if os.environ.get("HF_HUB_OFFLINE"):
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
    from mmhub.checkpoint import is_checkpoint

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
