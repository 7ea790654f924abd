"""Publish a checkpoint: stage, validate, merge the card, and send everything as one commit."""

from __future__ import annotations

import io
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmhub.checkpoint import ALLOWED, is_checkpoint, load, read_config
from mmhub.errors import NotFoundError, TrustError, UsageError
from mmhub.hub.card import join_cards, merge_card, read_card
from mmhub.hub.client import api, download_options, endpoint, hub_errors, is_public_hub
from mmhub.model import Model
from mmhub.weights import check_header

SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_-]{32,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|AIza[0-9A-Za-z_-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY-----|eyJ[A-Za-z0-9_-]{20,}\.eyJ[A-Za-z0-9_-]{20,}\."
)


@dataclass(frozen=True)
class Pushed:
    """What a push did, or with `dry_run` would do: files by name with their size in bytes."""

    repo: str
    url: str
    commit: str
    files: dict[str, int]
    deleted: tuple[str, ...] = ()
    dry_run: bool = False


def push(
    model: Model | str | Path,
    repo: str,
    *,
    license: str = "",
    message: str = "",
    private: bool | None = None,
    revision: str | None = None,
    tag: str = "",
    dry_run: bool = False,
) -> Pushed:
    """Publish a model or checkpoint folder to `repo` ("org/name") as one commit; the repository is made if needed.

    The user's text and metadata in the folder's card are published; where the folder's card has none, those already in
    the repository survive. Files outside the checkpoint layout are never sent.

    Raises:
        UsageError: no licence is known. TrustError: the folder is damaged or holds a secret. NetworkError.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"{repo!r} is no repository name", "use org/name, e.g. my-team/digits")
    if isinstance(model, Model):
        with tempfile.TemporaryDirectory() as temporary:
            return push(
                model.save(Path(temporary) / "model"), repo, license=license, message=message, private=private,
                revision=revision, tag=tag, dry_run=dry_run,
            )  # fmt: skip
    folder = Path(model)
    if not is_checkpoint(folder):
        raise NotFoundError(f"'{folder}' is no mmhub checkpoint folder", "name the folder with config.json")
    load(folder)  # a checkpoint that does not load strictly is not published
    files = stage(folder)
    card = folder / "README.md"
    local = card.read_text(encoding="utf-8") if card.is_file() else ""
    if dry_run:
        return _dry_run(folder, repo, files, _card(folder, repo, local, license))
    with hub_errors(repo, revision):
        head = _find_head(repo, revision)
    text = _card(folder, repo, join_cards(local, head.card) if head else local, license)
    if SECRETS.search(text):
        raise TrustError(f"the card of '{repo}' holds what looks like a secret", "remove it, then push again")
    with hub_errors(repo, revision):
        if head and tag:
            _check_tag(repo, tag)
        head = head or _create(repo, private, revision)
    return _commit(folder, repo, files, text, message, head, revision, tag)


def stage(folder: Path) -> list[str]:
    """List the files of a checkpoint folder that may be sent.

    Raises:
        TrustError: a symbolic link leads out, a secret is inside a text file, or weights are damaged.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or not ALLOWED.fullmatch(name):
            continue
        if path.is_symlink() and not _inside_cache(path, folder):
            raise TrustError(f"'{path}' is a symbolic link", "replace it by the file itself")
        if name.endswith(".safetensors"):
            check_header(path)
        else:
            _check_secrets(path)
        files.append(name)
    return files


def _inside_cache(path: Path, folder: Path) -> bool:
    """Snapshots of the Hugging Face cache consist of links to their own repository's blobs."""
    return path.resolve().parent == (folder.resolve().parent.parent / "blobs")


def _check_secrets(path: Path) -> None:
    found = SECRETS.search(path.read_text(encoding="utf-8", errors="replace"))
    if found:
        raise TrustError(f"'{path}' holds what looks like a secret ('{found[0][:6]}...')", "remove it, then push again")


def _licence_of(card: str) -> str:
    return str(read_card(card)[0].get("license") or "")


def _card(folder: Path, repo: str, old: str, license: str) -> str:
    known = license or _licence_of(old)
    if not known:
        raise UsageError("no licence is given for the model", "add --license, e.g. --license apache-2.0")
    return merge_card(folder, read_config(folder), name=repo, old=old, metadata={"license": known})


def _dry_run(folder: Path, repo: str, files: Sequence[str], card: str) -> Pushed:
    sizes = {name: (folder / name).stat().st_size for name in files} | {"README.md": len(card.encode())}
    return Pushed(repo, f"{endpoint()}/{repo}", "", dict(sorted(sizes.items())), dry_run=True)


@dataclass(frozen=True)
class _Head:
    """The branch to push to, as it is now."""

    commit: str
    files: tuple[str, ...] = ()
    card: str = ""


def _find_head(repo: str, revision: str | None) -> _Head | None:
    """The newest commit with its file names and README, None if there is no such repository yet."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    hub = api()
    try:
        info = hub.model_info(repo, revision=revision)
    except RevisionNotFoundError:
        hub.create_branch(repo, branch=revision, exist_ok=True)
        info = hub.model_info(repo, revision=revision)
    except RepositoryNotFoundError:
        return None
    names = tuple(file.rfilename for file in info.siblings or ())
    card = ""
    if "README.md" in names:
        path = hf_hub_download(repo, "README.md", revision=info.sha, **download_options())
        card = Path(path).read_text(encoding="utf-8")
    return _Head(info.sha, names, card)


def _create(repo: str, private: bool | None, revision: str | None) -> _Head:
    api().create_repo(repo, private=private, exist_ok=True)
    if revision:
        api().create_branch(repo, branch=revision, exist_ok=True)
    return _Head(api().model_info(repo, revision=revision).sha)


def _check_tag(repo: str, tag: str) -> None:
    if any(ref.name == tag for ref in api().list_repo_refs(repo).tags):
        raise UsageError(f"'{repo}' already has a tag '{tag}'", "choose another --tag; nothing was sent")


def _commit(
    folder: Path,
    repo: str,
    files: Sequence[str],
    card: str,
    message: str,
    head: _Head,
    revision: str | None,
    tag: str,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    stale = [name for name in head.files if _is_ours(name) and name not in files and name != "README.md"]
    with _opened(folder, [name for name in files if name != "README.md"]) as contents:
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        operations += [CommitOperationDelete(name) for name in stale]
        with hub_errors(repo, revision), _without_xet_warning():
            done = api().create_commit(
                repo,
                operations,
                commit_message=message or "Publish with mmhub",
                revision=revision,
                parent_commit=head.commit,
            )
    if tag:
        with hub_errors(repo, tag):
            api().create_tag(repo, tag=tag, revision=done.oid)
    sizes = {name: (folder / name).stat().st_size for name in files} | {"README.md": len(card.encode())}
    return Pushed(repo, f"{endpoint()}/{repo}", done.oid, dict(sorted(sizes.items())), tuple(stale))


def _is_ours(name: str) -> bool:
    """Weights and results of an older push that this one no longer has must not stay beside it."""
    return bool(re.fullmatch(r"model.*\.safetensors(\.index\.json)?|tokenizer(-\w+)?\.json|eval/[\w.-]+\.json", name))


@contextmanager
def _opened(folder: Path, files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Paths for the public Hub; open files for another, which makes the client use LFS instead of Xet."""
    if is_public_hub():
        yield {name: str((folder / name).resolve()) for name in files}
        return
    handles: dict[str, io.BufferedIOBase] = {}
    try:
        for name in files:
            handles[name] = (folder / name).open("rb")
        yield dict(handles)
    finally:
        for handle in handles.values():
            handle.close()


@contextmanager
def _without_xet_warning() -> Iterator[None]:
    log = logging.getLogger("huggingface_hub._commit_api")

    def keep(record: logging.LogRecord) -> bool:
        return "not supported by Xet" not in record.getMessage()

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
