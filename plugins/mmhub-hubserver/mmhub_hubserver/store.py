"""Repositories on disk: blobs by sha256, immutable commits, and refs that move atomically.

    lock, format, secret       one server at a time; layout version; key that signs upload URLs
    tmp/                       files being written, emptied at start
    blobs/ab/<sha256>          file contents, shared by all repositories
    locks/<kind>--<ns>--<name> one flock per repository
    repos/<kind>/<ns>/<name>/  repo.json, commits/<id>.json, refs/{heads,tags}/<quoted name>, objects/<sha256>

Everything is written to tmp/, synced and renamed, so a crash leaves either the old state or the new one. A blob becomes
visible only through a commit; `objects/` records which large files were uploaded to a repository, so that knowing
a hash is not enough to read another repository's file. HTTP is left to `routes` and `server`.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote, unquote

from mmhub_hubserver import names
from mmhub_hubserver.errors import (
    Conflict,
    EntryNotFound,
    Forbidden,
    HubError,
    Invalid,
    RepoNotFound,
    RevisionNotFound,
    Stale,
    StoreUnusable,
)

KINDS = ("models", "datasets")
DEFAULT_BRANCH = "main"
LFS_SUFFIXES = (".safetensors",)
_FORMAT = "1"
_GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

RefKind = Literal["heads", "tags"]


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `git_oid` is what git would call it: of the pointer when `lfs`, else of the content."""

    sha256: str
    size: int
    lfs: bool
    git_oid: str

    @classmethod
    def regular(cls, content: bytes) -> "Entry":
        return cls(hashlib.sha256(content).hexdigest(), len(content), False, git_blob_id(content))

    @classmethod
    def large(cls, sha256: str, size: int) -> "Entry":
        return cls(sha256, size, True, git_blob_id(lfs_pointer(sha256, size)))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    author: str
    date: str
    title: str
    message: str
    files: Mapping[str, Entry]


@dataclass(frozen=True)
class Add:
    path: str
    entry: Entry


@dataclass(frozen=True)
class Delete:
    path: str
    folder: bool


Change = Add | Delete


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Store:
    """The data folder of one hub, held exclusively until `close`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._check_format()
            shutil.rmtree(self.tmp, ignore_errors=True)
            for folder in (self.tmp, root / "blobs", root / "locks"):
                folder.mkdir(exist_ok=True)
            self.secret = self._load_secret()
        except BaseException:
            self.close()
            raise

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def close(self) -> None:
        self._lock.close()

    def repo(self, kind: str, repo_id: str) -> "Repo":
        """Return an existing repository, or raise `RepoNotFound`."""
        try:
            repo = Repo(self, kind, names.check_repo_id(repo_id))
        except Invalid:
            repo = None
        if repo is None or kind not in KINDS or not repo.exists:
            raise RepoNotFound(f"There is no repository '{repo_id}' of type {kind.removesuffix('s')} on this hub.")
        return repo

    def repos(self, kind: str) -> Iterator["Repo"]:
        for folder in sorted((self.root / "repos" / kind).glob("*/*/repo.json")):
            yield Repo(self, kind, "/".join(folder.parts[-3:-1]))

    def create(self, kind: str, repo_id: str, *, private: bool = False) -> "Repo":
        """Create a repository with one commit, as the real Hub does, or raise `Conflict`."""
        repo = Repo(self, kind, names.check_repo_id(repo_id))
        if kind not in KINDS:
            raise Invalid("This hub stores models and datasets only.")
        with repo.locked():
            if repo.exists:
                raise Conflict(f"The repository '{repo_id}' already exists.")
            staged = Path(tempfile.mkdtemp(dir=self.tmp))
            for folder in ("commits", "refs/heads", "refs/tags", "objects"):
                (staged / folder).mkdir(parents=True)
            files = {".gitattributes": self.add_content(_GIT_ATTRIBUTES)}
            first = repo.write_commit(None, files, "initial commit", "", staged)
            self.write(staged / "refs/heads" / DEFAULT_BRANCH, first.id.encode())
            meta = {"id": repo_id, "created": first.date, "private": private}
            self.write(staged / "repo.json", json.dumps(meta).encode())
            repo.folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(staged, repo.folder)
            _sync_folder(repo.folder.parent)
        return repo

    def delete(self, repo: "Repo") -> None:
        """Remove a repository from view in one step; its contents stay in the shared blob pool."""
        with repo.locked():
            if not repo.exists:
                raise RepoNotFound(f"There is no repository '{repo.id}'.")
            trash = Path(tempfile.mkdtemp(dir=self.tmp))
            os.rename(repo.folder, trash / "repo")
            _sync_folder(repo.folder.parent)
        shutil.rmtree(trash, ignore_errors=True)

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256[:2] / sha256

    def add_content(self, content: bytes) -> Entry:
        """Store a small file given whole."""
        entry = Entry.regular(content)
        if not self.blob(entry.sha256).exists():
            self.add_stream([content], entry.sha256, entry.size)
        return entry

    def add_stream(self, chunks: Iterable[bytes], sha256: str, size: int) -> None:
        """Store a file from a stream that must have exactly this size and sha256."""
        digest, received = hashlib.sha256(), 0
        with self._staged() as file:
            for chunk in chunks:
                received += len(chunk)
                if received > size:
                    raise Invalid(f"The upload is longer than the announced {size} bytes.")
                digest.update(chunk)
                file.write(chunk)
            if received != size or digest.hexdigest() != sha256:
                raise Invalid(f"The upload does not match its announced size ({size} bytes) and sha256 ({sha256}).")
            self._publish(file, self.blob(sha256))

    def write(self, path: Path, content: bytes) -> None:
        """Write a small file atomically and durably."""
        with self._staged() as file:
            file.write(content)
            self._publish(file, path)

    @contextmanager
    def _staged(self) -> Iterator[IO[bytes]]:
        file = tempfile.NamedTemporaryFile(dir=self.tmp, delete=False)  # noqa: SIM115 - closed below, then maybe gone
        try:
            with file:
                yield file
        finally:
            Path(file.name).unlink(missing_ok=True)

    def _publish(self, file: IO[bytes], path: Path) -> None:
        file.flush()
        os.fsync(file.fileno())
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            _sync_folder(path.parent.parent)
        os.replace(file.name, path)
        _sync_folder(path.parent)

    def _take_lock(self) -> IO[bytes]:
        lock = open(self.root / "lock", "ab")  # noqa: SIM115 - held as long as the store
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise StoreUnusable(f"Another hub server is already using {self.root}.") from None
        return lock

    def _check_format(self) -> None:
        path = self.root / "format"
        if not path.exists():
            path.write_text(_FORMAT)
        if (found := path.read_text().strip()) != _FORMAT:
            raise StoreUnusable(
                f"{self.root} has layout {found!r}; this version reads layout {_FORMAT}. Upgrade mmhub."
            )

    def _load_secret(self) -> bytes:
        path = self.root / "secret"
        if not path.exists():
            self.write(path, secrets.token_hex(32).encode())
        return path.read_bytes()


class Repo:
    """One repository. Readers need no lock: they see the ref before or after a change, never in between."""

    def __init__(self, store: Store, kind: str, repo_id: str) -> None:
        self.store, self.kind, self.id = store, kind, repo_id
        self.folder = store.root / "repos" / kind / repo_id

    @property
    def exists(self) -> bool:
        return (self.folder / "repo.json").exists()

    @property
    def meta(self) -> dict[str, Any]:
        with _gone_is_not_found(self.id):
            meta: dict[str, Any] = json.loads((self.folder / "repo.json").read_bytes())
        return meta

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this repository against other writers."""
        with open(self.store.root / "locks" / f"{self.kind}--{self.id.replace('/', '--')}", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def resolve(self, revision: str) -> str:
        """Return the commit id a branch, tag or commit id stands for."""
        found = self._read_ref("heads", revision.removeprefix("refs/heads/"))
        found = found or self._read_ref("tags", revision.removeprefix("refs/tags/"))
        if found is None and names.COMMIT_ID.fullmatch(revision) and self._commit_file(revision).exists():
            found = revision
        if found is None:
            raise RevisionNotFound(f"There is no revision '{revision}' in {self.id}.")
        return found

    def load(self, commit_id: str) -> Commit:
        with _gone_is_not_found(self.id):
            return _load_commit(self._commit_file(commit_id))

    def at(self, revision: str) -> Commit:
        return self.load(self.resolve(revision))

    def history(self, revision: str) -> Iterator[Commit]:
        """Yield the commits from `revision` back to the first."""
        commit_id: str | None = self.resolve(revision)
        while commit_id is not None:
            commit = self.load(commit_id)
            yield commit
            commit_id = commit.parent

    def refs(self, kind: RefKind) -> dict[str, str]:
        found = {}
        for path in sorted((self.folder / "refs" / kind).glob("*")):
            name = unquote(path.name)
            if commit_id := self._read_ref(kind, name):
                found[name] = commit_id
        return found

    def create_ref(self, kind: RefKind, name: str, revision: str) -> None:
        path = self._ref_file(kind, name)
        with self._writing():
            target = self.resolve(revision)
            if path.exists():
                raise Conflict(f"'{name}' already exists in {self.id}.")
            self.store.write(path, target.encode())

    def delete_ref(self, kind: RefKind, name: str) -> None:
        path = self._ref_file(kind, name)
        if kind == "heads" and name == DEFAULT_BRANCH:
            raise Forbidden(f"The branch '{DEFAULT_BRANCH}' cannot be deleted.")
        with self._writing():
            if not path.exists():
                raise RevisionNotFound(f"There is no '{name}' in {self.id}.")
            path.unlink()
            _sync_folder(path.parent)

    def uploaded(self, sha256: str) -> Entry | None:
        """Return the large file with this sha256 if it was uploaded to this repository."""
        if not (self.folder / "objects" / sha256).exists():
            return None
        return Entry.large(sha256, self.store.blob(sha256).stat().st_size)

    def add_object(self, sha256: str) -> None:
        with self._writing():
            self.store.write(self.folder / "objects" / sha256, b"")

    def commit(
        self, branch: str, changes: Iterable[Change], title: str, message: str = "", parent: str | None = None
    ) -> str:
        """Apply `changes` to `branch` in order and return the new commit id, or the old one if nothing differs.

        Raises:
            Stale: `parent` (at least 7 characters of a commit id) is no longer the head of the branch.
            EntryNotFound: a file or folder to delete does not exist.
            Invalid: a path conflicts with another.
        """
        with self._writing():
            head_id = self._read_ref("heads", branch)
            if head_id is None:
                raise RevisionNotFound(f"There is no branch '{branch}' in {self.id}.")
            if parent is not None and (len(parent) < 7 or not head_id.startswith(parent)):
                raise Stale("The branch was updated since you opened this page. Please refresh and try again.")
            head = self.load(head_id)
            files = self._apply(head, changes)
            if files == head.files:
                return head_id
            names.check_tree(files)
            new = self.write_commit(head_id, files, title, message)
            self.store.write(self._ref_file("heads", branch), new.id.encode())
            return new.id

    def write_commit(
        self, parent: str | None, files: Mapping[str, Entry], title: str, message: str, folder: Path | None = None
    ) -> Commit:
        """Write a commit that no ref points at yet. `folder`: where the repository is built, if not in place."""
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        facts = {"parent": parent, "author": "local", "date": date, "title": title, "message": message}
        manifest = {path: asdict(entry) for path, entry in files.items()}
        content = json.dumps({**facts, "files": manifest}, sort_keys=True, separators=(",", ":")).encode()
        commit_id = hashlib.sha1(content).hexdigest()
        self.store.write((folder or self.folder) / "commits" / f"{commit_id}.json", content)
        return Commit(commit_id, parent, "local", date, title, message, files)

    def _apply(self, head: Commit, changes: Iterable[Change]) -> dict[str, Entry]:
        files = dict(head.files)
        for change in changes:
            if isinstance(change, Add):
                files[change.path] = change.entry
                continue
            gone = [path for path in files if change.folder and path.startswith(change.path + "/")]
            gone += [change.path] if not change.folder and change.path in files else []
            if not gone:
                raise EntryNotFound(f"A file with this name doesn't exist: {change.path}", commit=head.id)
            for path in gone:
                del files[path]
        return files

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self.locked():
            if not self.exists:
                raise RepoNotFound(f"There is no repository '{self.id}'.")
            yield

    def _commit_file(self, commit_id: str) -> Path:
        return self.folder / "commits" / f"{commit_id}.json"

    def _ref_file(self, kind: RefKind, name: str) -> Path:
        return self.folder / "refs" / kind / quote(names.check_ref(name), safe="")

    def _read_ref(self, kind: RefKind, name: str) -> str | None:
        try:
            return self._ref_file(kind, name).read_text()
        except (Invalid, FileNotFoundError):
            return None


@lru_cache(maxsize=64)
def _load_commit(path: Path) -> Commit:
    content = path.read_bytes()
    if hashlib.sha1(content).hexdigest() != path.stem:
        raise HubError(f"The commit {path.stem} is damaged on the hub's disk.")
    data = json.loads(content)
    data["files"] = {name: Entry(**entry) for name, entry in data["files"].items()}
    return Commit(id=path.stem, **data)


@contextmanager
def _gone_is_not_found(repo_id: str) -> Iterator[None]:
    """Turn a file that vanished into the reason: the repository was deleted meanwhile."""
    try:
        yield
    except FileNotFoundError:
        raise RepoNotFound(f"There is no repository '{repo_id}'.") from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
