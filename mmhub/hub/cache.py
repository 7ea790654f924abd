"""The Hugging Face cache as mmhub uses it: what is in it, is it sound, and how to free it.

The public Hub's files are in the cache itself, those of another endpoint in a sub-folder of their own. Scanning and
deleting are huggingface_hub's; what its scan gives up on (a broken repository) is described here from its folders.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError, NotFoundError
from mmhub.hub.client import PUBLIC_HUB, cache_dir, endpoint, hub_errors

_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space", "kernels": "kernel"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG_BYTES = 16 * 2**20  # a config.json lists files and settings


@dataclass(frozen=True, kw_only=True)
class Revision:
    """One cached commit: `size` counts its files, also those it shares with other commits."""

    commit: str
    path: Path
    refs: tuple[str, ...] = ()
    size: int = 0
    files: int = 0


@dataclass(frozen=True, kw_only=True)
class Repo:
    """One cached repository; sizes in bytes, times in seconds since 1970. `problem` says what is broken, '' if nothing.

    `partial` are the files of downloads that did not end; `live` is whether one of them is still being written.
    """

    id: str
    kind: str
    endpoint: str
    cache: Path
    path: Path
    size: int
    used: float | None
    revisions: tuple[Revision, ...]
    partial: tuple[Path, ...] = ()
    problem: str = ""

    @property
    def is_checkpoint(self) -> bool:
        """Is one of its revisions an mmhub checkpoint?"""
        return self.kind == "model" and any(checkpoint_config(one.path) for one in self.revisions)


@dataclass(frozen=True, kw_only=True)
class Cached:
    """An mmhub checkpoint in the cache: the commit its main branch was at when it was last asked for."""

    repo_id: str
    commit: str
    path: Path
    config: dict[str, Any] = field(repr=False)


def caches() -> dict[str, Path]:
    """Return every endpoint's folder by endpoint, the current one first. Other endpoints are known by host alone."""
    current, here = endpoint(), cache_dir()
    root = _root()
    found = {current: here}
    if here != root:
        found[PUBLIC_HUB] = root
    with suppress(OSError):
        for folder in sorted((root / "endpoints").iterdir()):
            if folder.is_dir() and folder != here:
                found[folder.name] = folder
    return found


def _root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def checkpoints() -> list[Cached]:
    """Return the mmhub checkpoints cached for the current endpoint, one commit of each repository."""
    found = []
    for folder in sorted(cache_dir().glob("models--*")):
        commit = _main_commit(folder)
        config = checkpoint_config(folder / "snapshots" / commit) if commit else None
        if config is not None:
            path = folder / "snapshots" / commit
            found.append(Cached(repo_id=_repo_id(folder), commit=commit, path=path, config=config))
    return found


def _main_commit(folder: Path) -> str:
    with suppress(OSError, ValueError):
        commit = (folder / "refs" / "main").read_text().strip()
        if (folder / "snapshots" / commit / "config.json").is_file():
            return commit
    configs = list(folder.glob("snapshots/*/config.json"))
    return max(configs, key=_modified).parent.name if configs else ""


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def checkpoint_config(folder: Path) -> dict[str, Any] | None:
    """Return the config.json in `folder` if it is an mmhub checkpoint's, else None. Nothing in it is validated."""
    config = read_json(folder / "config.json")
    return config if isinstance(config, dict) and "mmhub_format" in config else None


def read_json(path: Path) -> Any:
    """Return what a JSON file of moderate size holds, None if it cannot be read."""
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= _CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None


def as_table(value: Any) -> dict[str, Any]:
    """Return parsed JSON that is a table; whatever else it is counts for an empty one."""
    return value if isinstance(value, dict) else {}


def snapshot(repo_id: str, revision: str | None) -> Path | None:
    """Return the cached folder of a model at a branch, tag or commit (default: what main was, or else the newest)."""
    folder = cache_dir() / f"models--{repo_id.replace('/', '--')}"
    commit = revision or _main_commit(folder)
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / commit).read_text().strip()
        except (OSError, ValueError):
            return None
    path = folder / "snapshots" / commit
    return path if _COMMIT.fullmatch(commit) and path.is_dir() else None


# --- scanning


def scan() -> list[Repo]:
    """Return every cached repository of every endpoint, broken ones included."""
    return [repo for name, folder in caches().items() for repo in scan_one(name, folder)]


def scan_one(name: str, folder: Path) -> list[Repo]:
    """Return the repositories in one endpoint's folder, the last used first."""
    sound, problems = _scan(folder)
    repos = []
    for path in _repo_folders(folder):
        info = sound.get(path)
        partial = tuple(sorted(path.glob("blobs/*.incomplete")))
        if info is None:
            repos.append(_broken(name, folder, path, partial, problems.get(path.name, "")))
            continue
        revisions = [
            Revision(
                commit=one.commit_hash,
                path=one.snapshot_path,
                refs=tuple(sorted(one.refs)),
                size=one.size_on_disk,
                files=len(one.files),
            )
            for one in sorted(info.revisions, key=lambda one: -one.last_modified)
        ]
        repos.append(
            Repo(
                id=info.repo_id,
                kind=info.repo_type,
                endpoint=name,
                cache=folder,
                path=path,
                size=info.size_on_disk,
                used=max(info.last_accessed, info.last_modified),
                revisions=tuple(revisions),
                partial=partial,
            )
        )
    return sorted(repos, key=lambda repo: (-(repo.used or 0), repo.id))


def _repo_folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.resolve().iterdir() if path.name.partition("--")[0] in _KINDS)
    except OSError:
        return []


def _scan(folder: Path) -> tuple[dict[Path, Any], dict[str, str]]:
    """What huggingface_hub finds, by folder, and its complaints, by the folder's name."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        info = scan_cache_dir(folder)
    except CacheNotFound:
        return {}, {}
    except (OSError, ValueError):  # an unreadable file in one repository ends its whole scan
        return {}, {path.name: _unreadable(path) for path in _repo_folders(folder)}
    problems = {}
    for warning in info.warnings:
        named = re.search(r"((?:models|datasets|spaces|kernels)--[^/\\\s`)]+)", str(warning))
        if named:
            problems[named[1]] = str(warning)
    return {repo.repo_path: repo for repo in info.repos}, problems


def _unreadable(folder: Path) -> str:
    """Say which of a repository's references cannot be read."""
    for ref in _files(folder / "refs"):
        try:
            ref.read_text()
        except (OSError, ValueError) as error:
            return f"refs/{ref.relative_to(folder / 'refs').as_posix()} cannot be read: {error}"
    return "not scanned: another repository in this cache is broken"


def _repo_id(folder: Path) -> str:
    return folder.name.partition("--")[2].replace("--", "/")


def _broken(name: str, cache: Path, path: Path, partial: tuple[Path, ...], problem: str) -> Repo:
    stats = [blob.lstat() for blob in _files(path / "blobs") if blob not in partial]
    revisions = [
        Revision(commit=folder.name, path=folder, files=len(_files(folder)))
        for folder in sorted(path.glob("snapshots/*"))
        if folder.is_dir()
    ]
    return Repo(
        id=_repo_id(path),
        kind=_KINDS[path.name.partition("--")[0]],
        endpoint=name,
        cache=cache,
        path=path,
        size=sum(stat.st_size for stat in stats),
        used=max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=None),
        revisions=tuple(revisions),
        partial=partial,
        problem=problem or "it has an unknown layout",
    )


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]


# --- verifying


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file that is not what it should be; `blob` is where its bytes are, None if they are gone."""

    repo: Repo
    file: str
    commit: str
    problem: str
    blob: Path | None = None


@dataclass
class Checked:
    """What a verification saw: files and bytes hashed, files that nothing is known of, and the damage."""

    files: int = 0
    bytes: int = 0
    unknown: int = 0
    damaged: list[Damage] = field(default_factory=list)


def verify(repo: Repo) -> Checked:
    """Hash every file of a cached repository again and compare it with its name and the checkpoint's own list."""
    checked = Checked()
    sound: dict[Path, str] = {}  # blob -> problem, '' if none
    for revision in repo.revisions:
        listed = as_table((checkpoint_config(revision.path) or {}).get("files"))
        for path in _files(revision.path):
            name = path.relative_to(revision.path).as_posix()
            problem = _problem(path, listed.get(name), sound, checked)
            if problem:
                blob = path.resolve() if path.exists() else None
                damage = Damage(repo=repo, file=name, commit=revision.commit, problem=problem, blob=blob)
                checked.damaged.append(damage)
    for blob in _files(repo.path / "blobs"):
        if blob.name.endswith(".incomplete") or blob.resolve() in sound:
            continue
        problem = _blob_problem(blob, sound, checked)  # no revision uses it, but one may again
        if problem:
            checked.damaged.append(Damage(repo=repo, file=blob.name, commit="", problem=problem, blob=blob))
    return checked


def _problem(path: Path, record: Any, sound: dict[Path, str], checked: Checked) -> str:
    from mmhub.hashes import sha256_of

    if not path.exists():
        return "missing: its link leads nowhere"
    problem = _blob_problem(path, sound, checked)
    if problem or not isinstance(record, dict):
        return problem
    size, digest = record.get("bytes"), record.get("sha256")
    if isinstance(size, int) and size != path.stat().st_size:
        return f"{path.stat().st_size} bytes, config.json says {size}"
    blob = Path(os.path.realpath(path))
    if isinstance(digest, str) and digest != blob.name and digest != sha256_of(path, fresh=True):
        return f"its sha256 is not the {digest[:12]}… of config.json"
    return ""


def _blob_problem(path: Path, sound: dict[Path, str], checked: Checked) -> str:
    """Compare a blob with its name, once however many revisions use it."""
    from mmhub.hashes import git_sha1_of, sha256_of

    hop = Path(os.path.abspath(path.parent / os.readlink(path))) if path.is_symlink() else path
    blob = hop if hop.parent.name == "blobs" else path  # a blob may itself be a link into a shared store
    place = path.resolve()
    if place not in sound:
        checked.files += 1
        checked.bytes += place.stat().st_size
        if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            try:
                found = (git_sha1_of if len(blob.name) == 40 else sha256_of)(place, fresh=True)
                wrong = f"damaged: its hash is {found[:12]}…, not {blob.name[:12]}…"
                sound[place] = "" if found == blob.name else wrong
            except OSError as error:  # what a failing disk says
                sound[place] = f"cannot be read: {error.strerror or error}"
        else:
            checked.unknown += 1
            sound[place] = ""
    return sound[place]


def discard(damage: Damage) -> None:
    """Remove a damaged file with every link to it, so that the next pull fetches it anew."""
    doomed = damage.blob
    for path in _files(damage.repo.path / "snapshots"):
        if (doomed and path.resolve() == doomed.resolve()) or not path.exists():
            path.unlink(missing_ok=True)
    if doomed:
        for blob in _files(damage.repo.path / "blobs"):
            if blob.resolve() == doomed.resolve():
                blob.unlink(missing_ok=True)
        doomed.unlink(missing_ok=True)


def refetch(damage: Damage) -> bool:
    """Fetch a model's file that was discarded again, verified; False where the Hub of its cache is not the current one.

    Raises:
        NotFoundError, NetworkError: the Hub no longer has it, or cannot be reached.
    """
    from mmhub.hub.download import fetch, in_cache, list_files

    repo = damage.repo
    if repo.endpoint != endpoint() or not damage.commit or repo.kind != "model":
        return False
    with hub_errors(repo.id, damage.commit):
        remote = list_files(repo.id, damage.commit).get(damage.file)
        if remote is None:
            raise NotFoundError(f"'{repo.id}' at {damage.commit[:12]} has no file '{damage.file}'")
        fetch(in_cache(repo.id), damage.commit, [remote])
    return True


# --- freeing


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What is to go: whole repositories, single commits of others, and partial downloads."""

    repos: tuple[Repo, ...] = ()
    revisions: tuple[tuple[Repo, Revision], ...] = ()
    partial: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.repos or self.revisions or self.partial)


def find_revision(repo: Repo, wanted: str) -> Revision:
    """Return the cached revision that a branch, tag or (the beginning of a) commit names.

    Raises:
        NotFoundError: there is none, or more than one.
    """
    found = [
        one
        for one in repo.revisions
        if wanted in one.refs or (re.fullmatch(r"[0-9a-f]{7,40}", wanted) and one.commit.startswith(wanted))
    ]
    if len(found) == 1:
        return found[0]
    known = ", ".join([*(ref for one in repo.revisions for ref in one.refs), *(r.commit[:12] for r in repo.revisions)])
    what = "more than one revision" if found else "no revision"
    raise NotFoundError(f"the cache has {what} '{wanted}' of '{repo.id}'", f"cached: {known}" if known else None)


def remove(removal: Removal, *, dry_run: bool = False) -> int:
    """Free what `removal` names and return the bytes that are (or with `dry_run` would be) freed.

    Raises:
        MmhubError: something of it may not be removed.
    """
    partial = {path for repo in removal.repos for path in repo.partial} | set(removal.partial)
    freed = sum(_size(path) for path in partial)
    for repo, commits in _by_repo(removal):
        freed += _remove_revisions(repo, commits, dry_run)
        if len(commits) == len(repo.revisions) and not dry_run:
            shutil.rmtree(repo.path, ignore_errors=True)  # partial downloads are no part of huggingface_hub's plan
    for path in partial if not dry_run else ():
        with suppress(OSError):
            path.unlink(missing_ok=True)
    doomed = [*(repo.path for repo in removal.repos), *(one.path for _, one in removal.revisions), *partial]
    left = [path for path in doomed if path.exists() and not dry_run]
    if left:
        raise MmhubError(f"'{left[0]}' could not be removed", "its folder belongs to another user, or is read-only")
    return freed


def _by_repo(removal: Removal) -> Iterator[tuple[Repo, set[str]]]:
    for repo in removal.repos:
        yield repo, {one.commit for one in repo.revisions}
    single: dict[Path, tuple[Repo, set[str]]] = {}
    for repo, revision in removal.revisions:
        single.setdefault(repo.path, (repo, set()))[1].add(revision.commit)
    yield from single.values()


def _remove_revisions(repo: Repo, commits: set[str], dry_run: bool) -> int:
    from huggingface_hub import scan_cache_dir

    if repo.problem or not commits:
        if not repo.problem or len(commits) == len(repo.revisions):
            return repo.size
        raise NotFoundError(f"'{repo.id}' is broken: {repo.problem}", "remove it as a whole, without @revision")
    found = scan_cache_dir(repo.cache)
    own = frozenset(one for one in found.repos if one.repo_path == repo.path)  # a copy may have the same commits
    plan = replace(found, repos=own).delete_revisions(*commits)
    if not dry_run:
        try:
            plan.execute()
        except OSError as error:
            what = f"'{error.filename or repo.path}' could not be removed: {(error.strerror or str(error)).lower()}"
            raise MmhubError(what, "its folder belongs to another user, or is read-only") from None
    return int(plan.expected_freed_size)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def is_live(partial: Path) -> bool:
    """Is some process still downloading this file? huggingface_hub holds a lock named after the blob meanwhile."""
    from filelock import FileLock, Timeout

    repo = partial.parents[1]
    lock = repo.parent / ".locks" / repo.name / f"{partial.name.split('.')[0]}.lock"
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
