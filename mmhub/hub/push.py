"""Publish a checkpoint: stage, validate, merge the card, send everything as one commit, and check what arrived."""

from __future__ import annotations

import io
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmhub.checkpoint import ALLOWED, is_checkpoint, load, read_config
from mmhub.errors import NetworkError, NotFoundError, TrustError, UsageError
from mmhub.hashes import git_sha1_of, sha256_of
from mmhub.hub.card import join_cards, merge_card, read_card
from mmhub.hub.client import api, download_options, endpoint, hub_errors, is_public_hub
from mmhub.hub.secrets import find_secret
from mmhub.hub.staging import Staged, stage
from mmhub.model import Model

PROPOSAL = "pr"  # as a revision: a pull request instead of a commit to a branch
Gate = Literal["auto", "manual"]


@dataclass(frozen=True)
class Pushed:
    """What a push did, or with `dry_run` would do: files by name with their size in bytes.

    `left_out` are files of the folder that belong to no checkpoint and are never sent; `pull_request` is its address.
    """

    repo: str
    url: str
    commit: str
    files: dict[str, int]
    deleted: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    pull_request: str = ""
    dry_run: bool = False


def push(
    model: Model | str | Path,
    repo: str,
    *,
    license: str = "",
    message: str = "",
    private: bool | None = None,
    gated: Gate | None = None,
    revision: str | None = None,
    tag: str = "",
    dry_run: bool = False,
) -> Pushed:
    """Publish a model or checkpoint folder to `repo` ("org/name") as one commit; the repository is made if needed.

    The user's text and metadata in the folder's card are published; where the folder's card has none, those already in
    the repository survive. Files outside the checkpoint layout are never sent. Files that an interrupted push sent
    whole are not sent again. `revision` is a branch, made if needed; "pr" opens a pull request instead, and
    "refs/pr/N" adds to one.

    Raises:
        UsageError: no licence is known, or the repository holds something else. TrustError: the folder is damaged or
        holds a secret, or what arrived is not what was sent. NetworkError. MmhubError: somebody else pushed meanwhile.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"{repo!r} is no repository name", "use org/name, e.g. my-team/digits")
    if revision and revision.startswith((PROPOSAL, "refs/pr/")) and tag:
        raise UsageError("a pull request cannot be tagged", "leave out --tag, and tag after it is merged")
    if isinstance(model, Model):
        with tempfile.TemporaryDirectory() as temporary:
            return push(
                model.save(Path(temporary) / "model"), repo, license=license, message=message, private=private,
                gated=gated, revision=revision, tag=tag, dry_run=dry_run,
            )  # fmt: skip
    folder = Path(model)
    if not is_checkpoint(folder):
        inside = folder / "model" / "config.json"
        hint = f"push '{inside.parent}'" if inside.is_file() else "name the folder with config.json"
        raise NotFoundError(f"'{folder}' is no mmhub checkpoint folder", hint)
    staged = stage(folder)
    load(folder)  # a checkpoint that does not load strictly is not published
    path = folder / "README.md"
    local = path.read_text(encoding="utf-8") if path.is_file() else ""
    if dry_run:
        card = _card(folder, repo, local, license)
        _check_texts(repo, card, message)
        return _pushed(folder, repo, staged, card, dry_run=True)
    branch = None if revision == PROPOSAL else revision
    with hub_errors(repo, branch):
        head = _find_head(repo, branch)
    if head:
        _check_head(repo, head, private)
    card = _card(folder, repo, join_cards(local, head.card) if head else local, license)
    _check_texts(repo, card, message)
    if revision == PROPOSAL and head is None:
        raise NotFoundError(f"no repository '{repo}' at {endpoint()} to propose a change to", "leave out --revision pr")
    with hub_errors(repo, branch):
        if head and tag:
            _check_tag(repo, tag)
        if head is None:
            head = _create(repo, private, branch)
        if gated:
            api().update_repo_settings(repo, gated=gated)
    try:
        return _commit(_Job(folder, repo, staged, card, message), head, revision, tag)
    except NetworkError as error:
        raise NetworkError(error.message, "push again: files that arrived whole are not sent a second time") from None


def _check_texts(repo: str, card: str, message: str) -> None:
    for what, text in ((f"the card of '{repo}'", card), ("the commit message", message)):
        secret = find_secret(text)
        if secret:
            raise TrustError(f"{what} holds what looks like a secret, {secret}", "remove it, then push again")


def _licence_of(card: str) -> str:
    return str(read_card(card)[0].get("license") or "")


def _card(folder: Path, repo: str, old: str, license: str) -> str:
    known = license or _licence_of(old)
    if not known:
        raise UsageError("no licence is given for the model", "add --license, e.g. --license apache-2.0")
    return merge_card(folder, read_config(folder), name=repo, old=old, metadata={"license": known})


@dataclass(frozen=True)
class _Job:
    """What is to be sent, and where."""

    folder: Path
    repo: str
    staged: Staged
    card: str
    message: str


def _pushed(folder: Path, repo: str, staged: Staged, card: str, *, commit: str = "", dry_run: bool = False) -> Pushed:
    sizes = {name: (folder / name).stat().st_size for name in staged.files} | {"README.md": len(card.encode())}
    return Pushed(
        repo, f"{endpoint()}/{repo}", commit, dict(sorted(sizes.items())), left_out=staged.left_out, dry_run=dry_run
    )


@dataclass(frozen=True)
class _Head:
    """The branch to push to, as it is now."""

    commit: str
    files: tuple[str, ...] = ()
    card: str = ""
    private: bool | None = None


def _find_head(repo: str, revision: str | None) -> _Head | None:
    """The newest commit with its file names and README, None if there is no such repository yet."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    hub = api()
    try:
        return _read_head(repo, revision)
    except RevisionNotFoundError:
        if revision and revision.startswith("refs/"):
            raise
        hub.create_branch(repo, branch=revision, exist_ok=True)
        return _read_head(repo, revision)
    except RepositoryNotFoundError:
        return None


def _read_head(repo: str, revision: str | None) -> _Head:
    from huggingface_hub import hf_hub_download

    info = api().model_info(repo, revision=revision)
    names = tuple(file.rfilename for file in info.siblings or ())
    card = ""
    if "README.md" in names:
        path = hf_hub_download(repo, "README.md", revision=info.sha, **download_options())
        card = Path(path).read_text(encoding="utf-8", errors="replace")
    return _Head(info.sha, names, card, info.private)


def _check_head(repo: str, head: _Head, private: bool | None) -> None:
    """Refuse to write over another library's model, and to publish openly what was meant to be private."""
    other = read_card(head.card)[0].get("library_name") or "mmhub"
    if other != "mmhub" and "config.json" in head.files:
        raise UsageError(f"'{repo}' at {endpoint()} holds a model of {other}", "choose another repository name")
    if private is not None and head.private is not None and head.private != private:
        is_now = "private" if head.private else "public"
        raise UsageError(
            f"'{repo}' at {endpoint()} exists and is {is_now}; nothing was sent",
            "change that in its settings, or leave out --private/--public",
        )


def _create(repo: str, private: bool | None, revision: str | None) -> _Head:
    api().create_repo(repo, private=private, exist_ok=True)
    head = _find_head(repo, revision)
    assert head is not None, "it was made just now"
    return head


def _check_tag(repo: str, tag: str) -> None:
    if any(ref.name == tag for ref in api().list_repo_refs(repo).tags):
        raise UsageError(f"'{repo}' already has a tag '{tag}'", "choose another --tag; nothing was sent")


def _commit(job: _Job, head: _Head, revision: str | None, tag: str) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, files = job.repo, job.staged.files
    stale = [name for name in head.files if _is_ours(name) and name not in files]
    proposal = revision == PROPOSAL
    with _opened(job.folder, [name for name in files if name != "README.md"]) as contents:
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
        operations.append(CommitOperationAdd("README.md", job.card.encode()))
        operations += [CommitOperationDelete(name) for name in stale]
        with hub_errors(repo, revision), _without_xet_warning():
            done = api().create_commit(
                repo,
                operations,
                commit_message=job.message or "Publish with mmhub",
                revision=None if proposal else revision,
                create_pr=proposal,
                parent_commit=head.commit,
            )
    _check_arrived(job, done.oid)
    if tag:
        with hub_errors(repo, tag):
            api().create_tag(repo, tag=tag, revision=done.oid)
    pushed = _pushed(job.folder, repo, job.staged, job.card, commit=done.oid)
    return replace(pushed, deleted=tuple(stale), pull_request=done.pr_url or "")


def _check_arrived(job: _Job, commit: str) -> None:
    """Compare the server's record of the new commit with the files here, byte for byte by their hashes.

    Raises:
        TrustError: they differ: the folder changed while it was sent, or the server is broken.
    """
    from mmhub.hub.download import list_files

    with hub_errors(job.repo, commit):
        there = list_files(job.repo, commit)
    for name in (name for name in job.staged.files if name != "README.md"):
        hash = there[name].hash if name in there else "nothing"
        if hash != (git_sha1_of if len(hash) == 40 else sha256_of)(job.folder / name):
            raise TrustError(
                f"'{job.repo}' at {commit[:12]} does not hold the '{name}' that is in '{job.folder}'",
                "the folder was changed while it was sent, or the server is damaged; push again",
            )


def _is_ours(name: str) -> bool:
    """Files of an older push that this one no longer has must not stay beside it; the user's own texts may."""
    return bool(ALLOWED.fullmatch(name)) and not re.fullmatch(r"README\.md|LICENSE.*|config\.json", name)


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
