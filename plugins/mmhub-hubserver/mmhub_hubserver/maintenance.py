"""Looking after a data folder: what is in use, what can be freed, and whether all of it is still sound.

Safe while the hub serves: each repository is held against writers for its turn, readers are never stopped.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmhub_hubserver import git
from mmhub_hubserver.disk import usage
from mmhub_hubserver.errors import BROKEN, HubError, RepoNotFound
from mmhub_hubserver.pool import link_path

if TYPE_CHECKING:
    from mmhub_hubserver.store import Repo, Store


@dataclass
class Collected:
    """What `collect` removed."""

    links: int = 0  # large files taken from a repository none of whose commits names them
    files: int = 0  # large files that no repository links any more
    objects: int = 0  # git objects that no ref leads to
    uploads: int = 0  # uploads in parts or chunks that nobody finished, and chunks whose file is gone
    leftovers: int = 0  # parts of packs and temporary files of killed servers
    bytes: int = 0
    errors: list[str] = field(default_factory=list)  # repositories that could not be looked after

    def __str__(self) -> str:
        counts = {
            "large files": self.files,
            "links to large files": self.links,
            "git objects": self.objects,
            "unfinished uploads": self.uploads,
            "leftovers": self.leftovers,
        }
        what = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        freed = f"freed {self.bytes:,} bytes: {what}" if what else "nothing to free"
        return "\n".join([freed, *(f"not looked after: {error}" for error in self.errors)])


def collect(store: "Store", grace_seconds: float) -> Collected:
    """Free git objects that no ref leads to, large files that no commit names, and what killed servers left.

    `grace_seconds` protects large files uploaded or linked lately: their commit may still come. History that was
    squashed or deleted goes at once. Repacking comes last: it needs room, which on a full disk must be made first.
    A repository that is damaged is reported, keeps all that it has, and does not end the run.
    """
    report = Collected()
    before = time.time() - grace_seconds
    released: set[str] = set()
    _each(store, report, lambda repo: released.update(_release(repo, before, report)))
    report.uploads, freed = _sweep_uploads(store, grace_seconds)
    report.bytes += freed
    for size in store.pool.drop_unlinked(before, released):
        report.files += 1
        report.bytes += size
    for path in store.tmp.rglob("*"):
        if path.is_file() and path.stat().st_mtime <= before:
            _drop(path, report)
    _each(store, report, lambda repo: _repack(repo, report))
    store.disk.recount(store.usage)
    return report


def _each(store: "Store", report: Collected, action: "Callable[[Repo], object]") -> None:
    """Look after each repository in turn, held against writers."""
    for repo in _repos(store):
        try:
            with repo.writing():
                action(repo)
        except RepoNotFound:
            continue  # deleted meanwhile
        except BROKEN as error:
            told = f"{repo.kind}/{repo.id}: {error}"
            report.errors += [told] if told not in report.errors else []


def _sweep_uploads(store: "Store", grace_seconds: float) -> tuple[int, int]:
    """Return how many uploads were dropped, and their bytes."""
    from mmhub_hubserver import lfs, xet  # not at the top: they are built on the store, which imports this module

    before = usage(store.root)
    dropped = lfs.sweep(store, grace_seconds) + xet.sweep(store, grace_seconds)
    return dropped, max(before - usage(store.root), 0)


def _release(repo: "Repo", before: float, report: Collected) -> list[str]:
    """Unlink the large files that no commit names, and return their sha256."""
    wanted, released = repo.objects.reachable(_tips(repo)), []
    named = {repo.objects.entry(oid).sha256 for oid, kind in wanted if kind == git.BLOB}
    for path in (repo.folder / "lfs" / "objects").glob("??/??/*"):
        if path.name not in named and path.stat().st_ctime <= before:
            path.unlink()
            released.append(path.name)
    report.links += len(released)
    return released


def _repack(repo: "Repo", report: Collected) -> None:
    """Free the git objects that no ref leads to."""
    objects = repo.objects
    wanted = dict(objects.reachable(_tips(repo)))
    unwanted = set(objects.all()) - wanted.keys()
    if unwanted:
        size = _size(objects.folder)
        objects.keep_only(wanted, repo.store.disk)
        report.objects += len(unwanted)
        report.bytes += max(size - _size(objects.folder), 0)
    else:
        objects.merge_packs(repo.store.disk)
    for path in (objects.folder / "pack").glob("*.pack"):
        if not path.with_suffix(".idx").exists():
            _drop(path, report)


def problems(store: "Store") -> Iterator[str]:
    """Yield what is wrong with a store: damaged or missing files, objects, links and refs."""
    sound: set[int] = set()
    for path in store.pool.files():
        if _sha256(path) == path.name:
            sound.add(path.stat().st_ino)
        else:
            yield f"pool: the large file {path.name} does not have its sha256"
    for repo in _repos(store):
        try:
            for problem in _repo_problems(repo, sound):
                yield f"{repo.kind}/{repo.id}: {problem}"
        except BROKEN as error:
            yield f"{repo.kind}/{repo.id}: {error}"


def _repo_problems(repo: "Repo", sound: set[int]) -> Iterator[str]:
    if not {"created", "private", "generation"} <= repo.meta.keys():
        yield "mmhub.json is incomplete"
    objects = repo.objects
    yield from objects.check_packs()
    stored = set()
    for oid in objects.all():
        try:
            objects.read(oid)
            stored.add(oid)
        except (HubError, KeyError) as error:
            yield str(error)
    for tip in _tips(repo):
        yield from _unreachable(repo, tip, stored, sound)
    if "refs/heads/main" not in dict(_refs(repo)):
        yield "the branch main is missing"


def _unreachable(repo: "Repo", tip: str, stored: set[str], sound: set[int]) -> Iterator[str]:
    """Yield what a ref leads to and is not there."""
    try:
        for oid, kind in repo.objects.reachable([tip]):
            if oid not in stored:
                yield f"the object {oid} is missing"
            elif kind == git.BLOB and (pointer := git.parse_pointer(repo.objects.read(oid)[1])) is not None:
                yield from _link_problems(link_path(repo.folder, pointer[0]), pointer[1], sound)
    except KeyError as error:
        yield f"the object {error.args[0]} is missing"
    except HubError as error:
        yield str(error)


def _link_problems(link: Path, size: int, sound: set[int]) -> Iterator[str]:
    try:
        facts = link.stat()
    except FileNotFoundError:
        yield f"the large file {link.name} is missing"
        return
    if facts.st_size != size:
        yield f"the large file {link.name} has {facts.st_size} bytes instead of {size}"
    elif facts.st_ino not in sound and _sha256(link) != link.name:
        yield f"the large file {link.name} does not have its sha256"


def _tips(repo: "Repo") -> list[str]:
    return [oid for _, oid in _refs(repo)]


def _refs(repo: "Repo") -> Iterator[tuple[str, str]]:
    """Yield every ref with what it names, tags as objects of their own."""
    for path in sorted((repo.folder / "refs").rglob("*")):
        if path.is_file():
            yield path.relative_to(repo.folder).as_posix(), path.read_text().strip()


def _repos(store: "Store") -> "Iterator[Repo]":
    from mmhub_hubserver.store import KINDS  # not at the top: store imports this module

    for kind in KINDS:
        yield from store.repos(kind)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _drop(path: Path, report: Collected) -> None:
    report.bytes += path.stat().st_size
    report.leftovers += 1
    path.unlink()
