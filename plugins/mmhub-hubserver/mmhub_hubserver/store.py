"""Repositories on disk: real bare git repositories, large files by sha256, and refs that move atomically.

    lock, format, secret           one server at a time; layout version; key that signs upload URLs
    tmp/                           files being written, emptied at start
    locks/                         one flock per repository and one for the pool
    pool/ab/<sha256>               large files, shared by all repositories
    repos/<kind>/<ns>/<name>.git   `git clone` works; lfs/objects/ hard-links the pool; mmhub.json
    repos/<kind>/<ns>/<name>.moved the id this name redirects to

A commit writes and syncs all its objects and then renames one ref into place, so a crash leaves either the old state or
the new one. HTTP is left to `routes` and `server`, git's formats to `git`, looking after it all to `maintenance`.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from mmhub_hubserver import attributes, git, maintenance, names
from mmhub_hubserver.disk import Disk, make_folder, refusing_when_full, sync_folder, usage
from mmhub_hubserver.errors import (
    Conflict,
    EntryNotFound,
    Forbidden,
    HubError,
    Invalid,
    RepoNotFound,
    RevisionNotFound,
    Stale,
    StorageFailed,
    StoreUnusable,
)
from mmhub_hubserver.git import Commit, Entry, Objects, PackWriter, lfs_pointer
from mmhub_hubserver.pool import Pool, link_path

__all__ = ["DEFAULT_BRANCH", "KINDS", "Add", "Change", "Commit", "Delete", "Entry", "Repo", "Store", "lfs_pointer"]

KINDS = ("models", "datasets", "spaces")
DEFAULT_BRANCH = "main"
_FORMAT = "2"
_META = "mmhub.json"
_ATTRIBUTES = ".gitattributes"
_OPEN_REPOS = 12  # each holds up to some 30 file handles
_HOPS = 10  # of redirects
_SHORT_ID = 7  # characters of a commit id that are enough to name it
# Nothing here may be packed or pruned behind the back of a running server.
_CONFIG = b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n[gc]\n\tauto = 0\n\tpackRefs = false\n"

RefKind = Literal["heads", "tags", "pr"]


@dataclass(frozen=True)
class Add:
    path: str
    entry: Entry


@dataclass(frozen=True)
class Delete:
    path: str
    folder: bool


Change = Add | Delete


class Store:
    """The data folder of one hub, held exclusively until `close`. `quota` limits it in bytes."""

    def __init__(self, root: Path, *, quota: int | None = None) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self.caches = git.Caches()
        self._objects: dict[Path, Objects] = {}
        self._open: OrderedDict[Objects, None] = OrderedDict()  # those that may have open files, used last at the end
        self._open_lock = threading.Lock()
        try:
            self._check_format()
            self.disk = Disk(self.tmp, quota)
            self.disk.sweep()
            if not (root / "format").exists():
                self.disk.write(root / "format", _FORMAT.encode())
            for folder in (root / "pool", root / "locks", *(root / "repos" / kind for kind in KINDS)):
                make_folder(folder)
            self.pool = Pool(root / "pool", root / "locks" / "pool", self.disk)
            self.disk.recount(self.usage)
            self.secret = self._load_secret()
        except BaseException:
            self.close()
            raise

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def close(self) -> None:
        with self._open_lock:
            while self._open:
                self._open.popitem()[0].close()
        self._lock.close()

    def repo(self, kind: str, repo_id: str) -> "Repo":
        """Return an existing repository, also by a former name or in other letter case, or raise `RepoNotFound`."""
        wanted = repo_id
        for _ in range(_HOPS if kind in KINDS else 0):
            if (folder := self._folder(kind, wanted)) is not None:
                return Repo(self, kind, folder)
            try:
                wanted = self._redirect(kind, wanted).read_text()
            except (OSError, Invalid, UnicodeDecodeError):
                break
        raise RepoNotFound(f"There is no repository '{repo_id}' of type {kind.removesuffix('s')} on this hub.")

    def repos(self, kind: str) -> Iterator["Repo"]:
        for path in sorted((self.root / "repos" / kind).glob(f"*/*.git/{_META}")):
            yield Repo(self, kind, _id_of(path.parent))

    def create(self, kind: str, repo_id: str, *, private: bool = False, author: str = "local") -> "Repo":
        """Create a repository with one commit, as the real Hub does.

        Raises:
            Conflict: there is one with this name, or one that differs in letter case only.
        """
        repo = Repo(self, kind, names.check_repo_id(repo_id))
        if kind not in KINDS:
            raise Invalid(f"This hub stores {', '.join(KINDS)} only, not {kind[:20]!a}.")
        with self._names_locked(), repo.locked():
            self._check_free(kind, repo_id)
            with refusing_when_full(), self._staged_folder() as staged:
                self._build(staged / "git", private, author)
                make_folder(repo.folder.parent)
                os.rename(staged / "git", repo.folder)
                sync_folder(repo.folder.parent)
                self._redirect(kind, repo_id).unlink(missing_ok=True)
        return repo

    def delete(self, repo: "Repo") -> None:
        """Remove a repository from view in one step; large files that nobody else links are freed by `gc`."""
        with self._staged_folder() as trash:
            with repo.writing():
                os.rename(repo.folder, trash / "git")
                sync_folder(repo.folder.parent)
            self.forget(repo.folder)

    def move(self, repo: "Repo", new_id: str) -> "Repo":
        """Rename a repository; the old name leads to the new one until it is used again.

        Raises:
            Conflict: the new name is taken.
        """
        target = Repo(self, repo.kind, names.check_repo_id(new_id))
        with self._names_locked(), ExitStack() as locks:
            for item in sorted({repo.id: repo, target.id: target}.values(), key=lambda item: item.id):
                locks.enter_context(item.locked())
            if not repo.exists:
                raise RepoNotFound(f"There is no repository '{repo.id}'.")
            self._check_free(repo.kind, new_id, but=repo.id)
            if new_id == repo.id:
                return repo
            with refusing_when_full():
                make_folder(target.folder.parent)
                # While the old name is in use its redirect is not looked at, so this order survives a crash.
                self.disk.write(self._redirect(repo.kind, repo.id), new_id.encode())
                os.rename(repo.folder, target.folder)
                sync_folder(target.folder.parent)
                sync_folder(repo.folder.parent)
                self._redirect(repo.kind, new_id).unlink(missing_ok=True)
            self.forget(repo.folder)
        return target

    def blob(self, sha256: str) -> Path:
        """Where the pool keeps a large file, whoever uploaded it; to show it use `Repo.large`."""
        return self.pool.path(sha256)

    def add_stream(self, chunks: Iterable[bytes], sha256: str, size: int) -> None:
        """Store a large file from a stream that must have exactly this size and sha256 (see `Pool.add_stream`)."""
        self.pool.add_stream(chunks, sha256, size)

    def write(self, path: Path, content: bytes) -> None:
        """Write a small file atomically and durably."""
        self.disk.write(path, content)

    def check_room(self, size: int) -> None:
        """Raise `StorageFailed` if `size` more bytes do not fit into the quota or onto the disk."""
        with self.disk.promised(size):
            pass
        if size > (free := shutil.disk_usage(self.root).free):
            raise StorageFailed(f"The hub's disk is full: {size} more bytes do not fit; {free} are free.")

    def usage(self) -> int:
        """Return the bytes in use, a file with several names counted once."""
        return usage(self.root)

    def gc(self, *, grace_seconds: float = 24 * 3600) -> maintenance.Collected:
        """Free what nothing refers to; see `maintenance.collect`."""
        return maintenance.collect(self, grace_seconds)

    def verify(self) -> list[str]:
        """Read and check everything; return one line for each problem."""
        return list(maintenance.problems(self))

    def objects(self, git_dir: Path) -> Objects:
        """Return the reader of a repository's objects, shared by all its users."""
        with self._open_lock:
            found = self._objects.setdefault(git_dir, Objects(git_dir, self.caches))
            self._open[found] = None
            self._open.move_to_end(found)
            if len(self._open) > _OPEN_REPOS:
                self._open.popitem(last=False)[0].close()
        return found

    def forget(self, git_dir: Path) -> None:
        """Close the files of a repository that is no longer at this place."""
        with self._open_lock:
            if (found := self._objects.pop(git_dir, None)) is not None:
                self._open.pop(found, None)
                found.close()

    def _build(self, git_dir: Path, private: bool, author: str) -> None:
        for folder in ("objects/pack", "objects/info", "refs/heads", "refs/tags", "refs/pr", "lfs/objects"):
            make_folder(git_dir / folder)
        content = attributes.INITIAL
        tree, contents = git.build_tree({_ATTRIBUTES: Entry.regular(content)})
        with self.disk.staged() as file:
            writer = PackWriter(file, self.disk)
            writer.add(git.BLOB, content)
            for item in contents.values():
                writer.add(git.TREE, item)
            first = writer.add(git.COMMIT, git.commit_content(tree.folders[""], None, author, "initial commit", ""))
            writer.publish(git_dir / "objects" / "pack")
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        meta = {"created": created, "private": private, "gated": False, "generation": secrets.token_hex(8)}
        for name, text in (
            (f"refs/heads/{DEFAULT_BRANCH}", f"{first}\n"),
            ("HEAD", f"ref: refs/heads/{DEFAULT_BRANCH}\n"),
            ("config", _CONFIG.decode()),
            (_META, json.dumps(meta)),
        ):
            self.disk.write(git_dir / name, text.encode())

    def _folder(self, kind: str, repo_id: str) -> str | None:
        """Return the id of the repository with this name, as it is written on disk."""
        try:
            names.check_repo_id(repo_id)
        except Invalid:
            return None
        base = self.root / "repos" / kind
        if (base / f"{repo_id}.git" / _META).exists():
            return repo_id
        namespace, name = repo_id.lower().split("/")
        for folder in _entries(base):
            if folder.name.lower() == namespace:
                for path in _entries(folder):
                    if path.name.lower() == f"{name}.git" and (path / _META).exists():
                        return _id_of(path)
        return None

    def _check_free(self, kind: str, repo_id: str, *, but: str | None = None) -> None:
        found = self._folder(kind, repo_id)
        if found is not None and found != but:
            raise Conflict(f"The repository '{found}' already exists.")

    def _redirect(self, kind: str, repo_id: str) -> Path:
        return self.root / "repos" / kind / f"{names.check_repo_id(repo_id)}.moved"

    @contextmanager
    def _names_locked(self) -> Iterator[None]:
        """Keep two new names that differ only in letter case from being taken at once."""
        with open(self.root / "locks" / "names", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _staged_folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.tmp))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _take_lock(self) -> IO[bytes]:
        lock = open(self.root / "lock", "ab")  # noqa: SIM115 - held as long as the store
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise StoreUnusable(
                f"Another hub server (or gc, or verify) is already using {self.root}. Stop it first."
            ) from None
        return lock

    def _check_format(self) -> None:
        path = self.root / "format"
        if not path.exists() or (found := path.read_text().strip()) == _FORMAT:
            return
        if found == "1":
            raise StoreUnusable(
                f"{self.root} was written by a preview of mmhub (layout 1), which this version does not read. "
                "Start with an empty --data folder and push again; the old folder is left as it is."
            )
        raise StoreUnusable(f"{self.root} has layout {found!r}; this version reads layout {_FORMAT}. Upgrade mmhub.")

    def _load_secret(self) -> bytes:
        path = self.root / "secret"
        if not path.exists():
            self.write(path, secrets.token_hex(32).encode())
        return path.read_bytes()


class Staging:
    """The contents of a commit to come, on disk and out of sight until it is made."""

    def __init__(self, writer: PackWriter, objects: Objects) -> None:
        self.writer, self._objects = writer, objects

    def add_content(self, content: bytes) -> Entry:
        """Store a small file. One that looks like an LFS pointer becomes the large file it names."""
        entry = Entry.regular(content)
        if (pointer := git.parse_pointer(content)) is not None:
            entry = Entry.large(*pointer)
        if entry.git_oid not in self._objects:
            self.writer.add(git.BLOB, content)
        return entry


class Repo:
    """One repository. Readers need no lock: they see the ref before or after a change, never in between."""

    def __init__(self, store: Store, kind: str, repo_id: str) -> None:
        self.store, self.kind, self.id = store, kind, repo_id
        self.folder = store.root / "repos" / kind / f"{repo_id}.git"

    @property
    def exists(self) -> bool:
        return (self.folder / _META).exists()

    @property
    def objects(self) -> Objects:
        return self.store.objects(self.folder)

    @property
    def meta(self) -> dict[str, Any]:
        """What is not in git: created, private, gated (False, "auto" or "manual"), generation, and what was set."""
        try:
            meta: dict[str, Any] = json.loads((self.folder / _META).read_bytes())
        except FileNotFoundError:
            raise RepoNotFound(f"There is no repository '{self.id}'.") from None
        return meta

    @property
    def generation(self) -> str:
        """A random id that tells this repository from a deleted one of the same name."""
        return str(self.meta["generation"])

    def set_meta(self, **fields: Any) -> None:
        with self.writing():
            self.store.write(self.folder / _META, json.dumps(self.meta | fields).encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this repository against other writers."""
        with open(self.store.root / "locks" / f"{self.kind}--{self.id.replace('/', '--')}", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold this repository, which must still exist."""
        with refusing_when_full(), self.locked():
            if not self.exists:
                raise RepoNotFound(f"There is no repository '{self.id}'.")
            yield

    # reading

    def resolve(self, revision: str) -> str:
        """Return the commit id a branch, tag, full ref or (at least 7 characters of a) commit id stands for."""
        full = (revision,) if revision.startswith("refs/") else (f"refs/heads/{revision}", f"refs/tags/{revision}")
        for ref in full:
            if found := self._read_ref(ref):
                return self.objects.peel(found)
        if found := self._commit_named(revision):
            return found
        if not self.exists:
            raise RepoNotFound(f"There is no repository '{self.id}'.")
        raise RevisionNotFound(f"There is no revision '{revision}' in {self.id}.")

    def load(self, commit_id: str) -> Commit:
        try:
            return self.objects.commit(commit_id)
        except KeyError:
            if not self.exists:
                raise RepoNotFound(f"There is no repository '{self.id}'.") from None
            raise RevisionNotFound(f"There is no commit '{commit_id}' in {self.id}.") from None

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
        """Return the commit id of every branch, tag or pull request."""
        found, base = {}, self.folder / "refs" / kind
        for path in sorted(base.rglob("*")):
            name = path.relative_to(base).as_posix()
            if path.is_file() and (oid := self._read_ref(f"refs/{kind}/{name}")):
                found[name] = self.objects.peel(oid)
        return found

    def content(self, entry: Entry) -> bytes:
        """Return a regular file, whole."""
        try:
            return self.objects.read(entry.git_oid)[1]
        except KeyError:
            if not self.exists:
                raise RepoNotFound(f"There is no repository '{self.id}'.") from None
            raise HubError(f"The object {entry.git_oid} is missing on the hub's disk.") from None

    def large(self, entry: Entry) -> Path:
        """Return where a large file of this repository lies."""
        assert entry.sha256 is not None
        return link_path(self.folder, entry.sha256)

    def uploaded(self, sha256: str) -> Entry | None:
        """Return the large file with this sha256 if it was uploaded to this repository."""
        try:
            return Entry.large(sha256, link_path(self.folder, sha256).stat().st_size)
        except FileNotFoundError:
            return None

    def folder_oid(self, commit: Commit, path: str) -> str:
        """Return git's tree id of a folder."""
        try:
            return commit.folders[path]
        except KeyError:
            raise EntryNotFound(f"There is no folder '{path}'.", commit=commit.id) from None

    def last_commits(self, commit: Commit, paths: Collection[str]) -> dict[str, Commit]:
        """Return for each path (of a file or folder) the commit that last changed it, looking back from `commit`."""
        found: dict[str, Commit] = {}
        left, objects = set(paths), self.objects
        while left:
            parent = self.load(commit.parent) if commit.parent else None
            if parent is None or parent.tree != commit.tree:
                for path in left.intersection(objects.changed(parent.tree if parent else None, commit.tree)):
                    found[path] = commit
                left -= found.keys()
            if parent is None:
                break
            commit = parent
        return found

    # writing

    def create_ref(
        self, kind: RefKind, name: str, revision: str, *, message: str | None = None, author: str = "local"
    ) -> None:
        """Let a new name stand for a revision; with `message` it becomes an annotated tag.

        Raises:
            Conflict: the name exists, or is the folder of another.
        """
        ref = f"refs/{kind}/{names.check_ref(name)}"
        with self.writing():
            target = self.resolve(revision)
            self._check_ref_free(ref)
            if message:
                with self.staging() as staged:
                    target = staged.writer.add(git.TAG, git.tag_content(target, name, author, message))
                    self.objects.publish(staged.writer)
            self._write_ref(ref, target)

    def delete_ref(self, kind: RefKind, name: str) -> None:
        path = self.folder / "refs" / kind / names.check_ref(name)
        if kind == "heads" and name == DEFAULT_BRANCH:
            raise Forbidden(f"The branch '{DEFAULT_BRANCH}' cannot be deleted.")
        with self.writing():
            if not path.is_file():
                raise RevisionNotFound(f"There is no '{name}' in {self.id}.")
            path.unlink()
            sync_folder(path.parent)
            with suppress(OSError):  # not empty
                while (path := path.parent) != self.folder / "refs" / kind:
                    path.rmdir()

    def add_object(self, sha256: str) -> None:
        """Note that a large file of the pool was uploaded to this repository."""
        with self.writing():
            self.store.pool.link(sha256, link_path(self.folder, sha256))

    link_object = add_object

    @contextmanager
    def staging(self) -> Iterator[Staging]:
        """Collect the contents of a commit; what is not committed is gone afterwards."""
        with self.store.disk.staged() as file:
            yield Staging(PackWriter(file, self.store.disk), self.objects)

    def commit(
        self,
        branch: str,
        changes: Iterable[Change],
        title: str,
        message: str = "",
        parent: str | None = None,
        *,
        author: str = "local",
        staged: Staging | None = None,
    ) -> str:
        """Apply `changes` to a branch (or `refs/pr/N`) in order and return the new commit id, or the old one if nothing
        differs.

        Raises:
            Stale: `parent` (at least 7 characters of a commit id) is no longer the head of the branch.
            EntryNotFound: a file or folder to delete does not exist.
            Invalid: a path conflicts with another, or a large file was not uploaded to this repository.
            StorageFailed: the disk or the quota is full.
        """
        if staged is None:
            with self.staging() as own:
                return self.commit(branch, changes, title, message, parent, author=author, staged=own)
        with self.writing():
            head = self._head(branch)
            if parent is not None and (len(parent) < _SHORT_ID or not head.id.startswith(parent)):
                raise Stale("The branch was updated since you opened this page. Please refresh and try again.")
            files = _applied(head, changes)
            self._check_contents(files, head, staged)
            return self._advance(_branch_ref(branch), files, head, title, message, author, staged)

    def squash(self, branch: str, message: str, *, author: str = "local") -> str:
        """Replace the history of a branch by one commit with the same files, and return its id."""
        with self.writing(), self.staging() as staged:
            head = self._head(branch)
            content = git.commit_content(head.tree, None, author, message, "")
            new = staged.writer.add(git.COMMIT, content)
            self.objects.publish(staged.writer)
            self._write_ref(_branch_ref(branch), new)
            return new

    def merge(self, branch: str, revision: str, title: str, author: str = "local", message: str = "") -> str:
        """Bring what `revision` changed since it left `branch` to the branch, as one commit, and return its id.

        Raises:
            Conflict: both changed the same file, differently.
        """
        with self.writing(), self.staging() as staged:
            head = self._head(branch)
            ours, theirs = head.files, self.at(revision).files
            left_at = {commit.id for commit in self.history(branch)}
            start = next((commit for commit in self.history(revision) if commit.id in left_at), None)
            files = _merged(start.files if start else {}, ours, theirs)
            return self._advance(_branch_ref(branch), files, head, title, message, author, staged)

    def purge(self, sha256s: Collection[str], *, rewrite_history: bool = True) -> None:
        """Forget large files; with `rewrite_history` all commits that hold them are written anew without them."""
        gone = set(sha256s)
        with self.writing():
            if rewrite_history:
                self._rewrite(gone)
            for sha256 in gone:
                link_path(self.folder, sha256).unlink(missing_ok=True)

    def _rewrite(self, gone: set[str]) -> None:
        refs = {f"refs/{kind}/{name}": oid for kind in ("heads", "tags", "pr") for name, oid in self.refs(kind).items()}
        new: dict[str | None, str | None] = {None: None}
        with self.staging() as staged:
            for tip in refs.values():
                line = []
                for commit in self.history(tip):
                    if commit.id in new:
                        break
                    line.append(commit)
                for commit in reversed(line):
                    new[commit.id] = self._without(commit, gone, new[commit.parent], staged)
            self.objects.publish(staged.writer)
            for ref, tip in refs.items():
                if new[tip] not in (None, tip):
                    self._write_ref(ref, str(new[tip]))

    def _without(self, commit: Commit, gone: set[str], parent: str | None, staged: Staging) -> str:
        files = {path: entry for path, entry in commit.files.items() if entry.sha256 not in gone}
        if len(files) == len(commit.files) and parent == commit.parent:
            return commit.id
        tree = self._add_tree(files, staged)
        content = self.objects.read(commit.id)[1]
        return staged.writer.add(git.COMMIT, git.moved_commit(content, tree, parent))

    def _head(self, branch: str) -> Commit:
        head_id = self._read_ref(_branch_ref(branch))
        if head_id is None:
            raise RevisionNotFound(f"There is no branch '{branch}' in {self.id}.")
        return self.load(head_id)

    def _check_contents(self, files: Mapping[str, Entry], head: Commit, staged: Staging) -> None:
        """Refuse a commit that names what this repository does not have (any more: `gc` may have been faster)."""
        before = head.files
        for path, entry in files.items():
            if before.get(path) == entry:
                continue
            if entry.sha256 is not None:
                known = self.uploaded(entry.sha256)
                if known is None or known.size != entry.size:
                    raise Invalid(f"The content of '{path}' ({entry.sha256}) was not uploaded to {self.id}.")
            elif entry.git_oid not in staged.writer and entry.git_oid not in self.objects:
                raise Invalid(f"The content of '{path}' ({entry.git_oid}) was not sent.")

    def _advance(
        self, ref: str, files: dict[str, Entry], head: Commit, title: str, message: str, author: str, staged: Staging
    ) -> str:
        """Write a commit on top of `head` and let `ref` name it, once everything is on the disk."""
        self._cover_large_files(files, head, staged)
        if files == head.files:
            return head.id
        names.check_tree(files)
        tree = self._add_tree(files, staged)
        new = staged.writer.add(git.COMMIT, git.commit_content(tree, head.id, author, title, message))
        self.objects.publish(staged.writer)
        self._write_ref(ref, new)
        with suppress(HubError, OSError):  # the commit is made; fewer packs are only nicer
            self.objects.merge_packs(self.store.disk)
        return new

    def _add_tree(self, files: Mapping[str, Entry], staged: Staging) -> str:
        tree, contents = git.build_tree(files)
        for entry in files.values():
            if entry.sha256 is not None and entry.git_oid not in staged.writer and entry.git_oid not in self.objects:
                staged.writer.add(git.BLOB, lfs_pointer(entry.sha256, entry.size))
        for oid, content in contents.items():
            if oid not in self.objects:
                staged.writer.add(git.TREE, content)
        return self.objects.keep_tree(tree).folders[""]

    def _cover_large_files(self, files: dict[str, Entry], head: Commit, staged: Staging) -> None:
        """Let .gitattributes name the new large files, so that git-lfs fetches them after a clone."""
        before, own = head.files, files.get(_ATTRIBUTES)
        if own is None and _ATTRIBUTES in before:
            return  # deleted on purpose; the next commit that brings a large file writes it anew
        known = {path for path, entry in before.items() if entry.lfs} if own == before.get(_ATTRIBUTES) else set()
        new = [path for path, entry in files.items() if entry.lfs and path not in known]
        if not new or (own is not None and own.lfs):
            return
        text = b""
        if own is not None:
            text = staged.writer.read_back(own.git_oid) or self.content(own)
        covered = attributes.covering(text, new)
        if covered != text:
            files[_ATTRIBUTES] = staged.add_content(covered)

    def _check_ref_free(self, ref: str) -> None:
        path, top = self.folder / ref, self.folder / "refs"
        if path.exists():
            what = "already exists" if path.is_file() else "is the first part of another name"
            raise Conflict(f"'{ref}' {what} in {self.id}.")
        for parent in path.parents:
            if parent == top:
                break
            if parent.is_file():
                raise Conflict(f"'{parent.relative_to(self.folder)}' already exists in {self.id}.")

    def _write_ref(self, ref: str, oid: str) -> None:
        self.store.write(self.folder / ref, f"{oid}\n".encode())

    def _read_ref(self, ref: str) -> str | None:
        parts = ref.split("/", 2)
        try:
            if len(parts) != 3 or parts[1] not in ("heads", "tags", "pr"):
                return None
            oid = (self.folder / "refs" / parts[1] / names.check_ref(parts[2])).read_text().strip()
        except (Invalid, OSError, UnicodeError):
            return None
        return oid if names.COMMIT_ID.fullmatch(oid) else None

    def _commit_named(self, revision: str) -> str | None:
        """Return the commit whose id is `revision` or, unambiguously, begins with it."""
        if len(revision) == 40 and names.COMMIT_ID.fullmatch(revision):
            matches: Sequence[str] = [revision]
        elif _SHORT_ID <= len(revision) < 40 and set(revision) <= set("0123456789abcdef"):
            matches = self.objects.starting_with(revision)
        else:
            matches = []
        commits = []
        for oid in matches:
            with suppress(KeyError):
                commits.append(self.objects.commit(oid).id)
        return commits[0] if len(commits) == 1 else None


def _branch_ref(branch: str) -> str:
    """Return the full name of what commits can be added to: a branch or a pull request, never a tag."""
    ref = branch if branch.startswith("refs/") else f"refs/heads/{branch}"
    if not re.fullmatch(r"refs/(heads/.+|pr/[0-9]+)", ref):
        raise RevisionNotFound(f"'{branch}' is neither a branch nor a pull request.")
    return ref


def _applied(head: Commit, changes: Iterable[Change]) -> dict[str, Entry]:
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


def _merged(start: Mapping[str, Entry], ours: Mapping[str, Entry], theirs: Mapping[str, Entry]) -> dict[str, Entry]:
    files = dict(ours)
    for path in start.keys() | theirs.keys():
        wanted = theirs.get(path)
        if wanted == start.get(path) or wanted == ours.get(path):
            continue
        if ours.get(path) != start.get(path):
            raise Conflict(f"'{path}' was changed on both sides.")
        if wanted is None:
            del files[path]
        else:
            files[path] = wanted
    return files


def _id_of(git_dir: Path) -> str:
    return f"{git_dir.parent.name}/{git_dir.name.removesuffix('.git')}"


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
