"""The git objects of one repository: read by id, written many at a time as one durable pack.

One pack for each commit costs the same few fsyncs for one file as for a thousand; small packs are merged when there are
many (`Objects.merge_packs`). dulwich knows the formats; it neither syncs folders nor survives its own lock files after
a kill, so files are written here. Refs, locks and who may do what are left to `store`.
"""

import hashlib
import os
import re
import stat
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from dulwich import objects as formats
from dulwich.errors import ApplyDeltaError, ChecksumMismatch, ObjectFormatException
from dulwich.object_format import DEFAULT_OBJECT_FORMAT
from dulwich.pack import Pack, PackData, PackFileDisappeared, load_pack_index, write_pack_index_v2, write_pack_object

from mmhub_hubserver.disk import Disk, sync_folder
from mmhub_hubserver.errors import HubError

COMMIT, TREE, BLOB, TAG = 1, 2, 3, 4
_NAMES = {COMMIT: b"commit", TREE: b"tree", BLOB: b"blob", TAG: b"tag"}
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d{1,18})\n")
_POINTER_LIMIT = 200  # bytes; no LFS pointer is longer
_SMALL_PACK = 16 << 20  # bytes; larger packs are not rewritten for the sake of their number
_MANY_PACKS = 8
_READ_BACK_LIMIT = 32 << 20  # compressed bytes
_FILE, _FOLDER = 0o100644, 0o040000
_DAMAGED = (zlib.error, AssertionError, ApplyDeltaError, ChecksumMismatch, ObjectFormatException, ValueError)
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `git_oid` is the blob's: the pointer's when `lfs`, and then `sha256` names the content."""

    git_oid: str
    size: int
    lfs: bool
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> "Entry":
        return cls(object_id(BLOB, content), len(content), False)

    @classmethod
    def large(cls, sha256: str, size: int) -> "Entry":
        return cls(object_id(BLOB, lfs_pointer(sha256, size)), size, True, sha256)

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_oid


@dataclass(frozen=True)
class Tree:
    """All files of a commit and the ids of its folders, by path."""

    files: Mapping[str, Entry]
    folders: Mapping[str, str]


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    author: str
    date: str
    title: str
    message: str
    tree: str
    _objects: "Objects" = field(repr=False, compare=False)

    @property
    def files(self) -> Mapping[str, Entry]:
        return self._objects.tree(self.tree).files

    @property
    def folders(self) -> Mapping[str, str]:
        """Git's tree id of every folder; the root is ''."""
        return self._objects.tree(self.tree).folders


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def parse_pointer(content: bytes) -> tuple[str, int] | None:
    """Return sha256 and size if `content` is an LFS pointer."""
    match = _POINTER.fullmatch(content) if len(content) < _POINTER_LIMIT else None
    return (match[1].decode(), int(match[2])) if match else None


def object_id(kind: int, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (_NAMES[kind], len(content)) + content).hexdigest()


class Cache(Generic[T]):
    """The values used last, up to a total weight. For what never changes: objects named by their hash."""

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._items: OrderedDict[Any, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> T | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: Any, value: T, weight: int = 1) -> T:
        with self._lock:
            if key not in self._items:
                self._items[key] = (value, weight)
                self._total += weight
            while self._total > self._limit and len(self._items) > 1:
                self._total -= self._items.popitem(last=False)[1][1]
        return value


class Caches:
    """What all repositories of a store share; the numbers are items, about 300 bytes each."""

    def __init__(self) -> None:
        self.trees: Cache[Tree] = Cache(500_000)
        self.entries: Cache[Entry] = Cache(200_000)
        self.commits: Cache[Commit] = Cache(20_000)


class Objects:
    """The objects below one `<repo>.git`. Any number of threads may read; files are reopened when they were closed."""

    def __init__(self, git_dir: Path, caches: Caches) -> None:
        self.folder = git_dir / "objects"
        self._caches = caches
        self._packs: dict[str, _OpenPack] = {}
        self._lock = threading.RLock()

    def __contains__(self, oid: str) -> bool:
        with self._lock:
            return self._find(oid) is not None or self._loose(oid).exists()

    def read(self, oid: str) -> tuple[int, bytes]:
        """Return type and content of an object.

        Raises:
            KeyError: there is none.
            HubError: it does not have this id: the disk is damaged.
        """
        try:
            with self._lock:
                found = self._find(oid)
                kind, content = found[0].read(oid) if found else self._read_loose(oid)
        except _DAMAGED:
            raise _damaged(oid) from None
        if object_id(kind, content) != oid:
            raise _damaged(oid)
        return kind, content

    def entry(self, oid: str) -> Entry:
        """Return what a listing shows of a blob; reads no more of it than needed."""
        if (known := self._caches.entries.get(oid)) is not None:
            return known
        size = self._size(oid)
        if size is None or size < _POINTER_LIMIT:
            content = self.read(oid)[1]
            pointer = parse_pointer(content)
            entry = Entry(oid, pointer[1], True, pointer[0]) if pointer else Entry(oid, len(content), False)
        else:
            entry = Entry(oid, size, False)
        return self._caches.entries.put(oid, entry)

    def tree(self, oid: str) -> Tree:
        """Return everything below a tree."""
        if (known := self._caches.trees.get(oid)) is not None:
            return known
        files: dict[str, Entry] = {}
        folders = {"": oid}
        waiting = [("", oid)]
        while waiting:
            prefix, folder = waiting.pop()
            for name, is_folder, child in self.children(folder):
                if is_folder:
                    folders[prefix + name] = child
                    waiting.append((f"{prefix}{name}/", child))
                else:
                    files[prefix + name] = self.entry(child)
        return self.keep_tree(Tree(files, folders))

    def keep_tree(self, tree: Tree) -> Tree:
        return self._caches.trees.put(tree.folders[""], tree, 1 + len(tree.files) + len(tree.folders))

    def children(self, oid: str) -> Iterator[tuple[str, bool, str]]:
        """Yield name, is-a-folder and id of what is directly in a tree."""
        for name, mode, child in formats.parse_tree(self.read(oid)[1], 20):
            yield name.decode("utf-8", "surrogateescape"), stat.S_ISDIR(mode), child.decode()

    def commit(self, oid: str) -> Commit:
        """Raises `KeyError` if `oid` is no commit of this repository."""
        key = (self, oid)  # and not the folder: a new repository of this name must not show the old one's commits
        if (known := self._caches.commits.get(key)) is not None:
            return known
        kind, content = self.read(oid)
        if kind != COMMIT:
            raise KeyError(oid)
        data: Any = formats.ShaFile.from_raw_string(COMMIT, content)
        title, _, message = data.message.decode("utf-8", "replace").partition("\n\n")
        commit = Commit(
            id=oid,
            parent=data.parents[0].decode() if data.parents else None,
            author=data.author.rpartition(b" <")[0].decode("utf-8", "replace"),
            date=datetime.fromtimestamp(data.commit_time, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            title=title.rstrip("\n"),
            message=message.rstrip("\n"),
            tree=data.tree.decode(),
            _objects=self,
        )
        return self._caches.commits.put(key, commit)

    def peel(self, oid: str) -> str:
        """Return the commit an annotated tag stands for; any other id is returned as it is."""
        if self._caches.commits.get((self, oid)) is not None:
            return oid
        kind, content = self.read(oid)
        while kind == TAG:
            oid = content.split(b"\n", 1)[0].removeprefix(b"object ").decode("ascii", "replace")
            kind, content = self.read(oid)
        return oid

    def changed(self, old: str | None, new: str | None, prefix: str = "") -> Iterator[str]:
        """Yield the paths of files and folders that differ between two trees."""
        before = {name: (folder, oid) for name, folder, oid in self.children(old)} if old else {}
        after = {name: (folder, oid) for name, folder, oid in self.children(new)} if new else {}
        for name in before.keys() | after.keys():
            one, two = before.get(name), after.get(name)
            if one == two:
                continue
            yield prefix + name
            folders = [item[1] if item and item[0] else None for item in (one, two)]
            if any(folders):
                yield from self.changed(folders[0], folders[1], f"{prefix}{name}/")

    def reachable(self, tips: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Yield id and type of every object that can be reached. Blobs are named, not read."""
        seen: set[str] = set()
        waiting = [(tip, 0) for tip in tips]
        while waiting:
            oid, kind = waiting.pop()
            if oid in seen:
                continue
            seen.add(oid)
            if kind == BLOB:
                yield oid, kind
                continue
            kind, content = self.read(oid)
            yield oid, kind
            if kind == TREE:
                children = formats.parse_tree(content, 20)
                waiting += [(child.decode(), TREE if stat.S_ISDIR(mode) else BLOB) for _, mode, child in children]
            elif kind != BLOB:
                head = content.split(b"\n\n", 1)[0]
                waiting += [(match.decode(), 0) for match in re.findall(rb"(?m)^(?:tree|parent|object) (\w+)$", head)]

    def all(self) -> Iterator[str]:
        """Yield the ids of all stored objects."""
        with self._lock:
            self.refresh()
            packed = {oid for pack in self._packs.values() for oid in pack.ids()}
        yield from packed
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if re.fullmatch("[0-9a-f]{38}", path.name):
                yield path.parent.name + path.name

    def starting_with(self, prefix: str) -> list[str]:
        """Return the ids of packed objects that begin with some characters."""
        with self._lock:
            self.refresh()
            found = {oid for pack in self._packs.values() for oid in pack.ids_like(prefix)}
        return sorted(found)

    def check_packs(self) -> Iterator[str]:
        """Yield what is wrong with the pack files themselves."""
        with self._lock:
            self.refresh()
            for name, pack in self._packs.items():
                try:
                    pack.pack.data.check()
                    pack.pack.index.check()
                except _DAMAGED:
                    yield f"the pack {name} does not match its checksum"
        found = {path.stem for path in (self.folder / "pack").glob("*.idx")}
        yield from (f"the pack {name} cannot be opened" for name in sorted(found - self._packs.keys()))

    def merge_packs(self, disk: Disk) -> None:
        """Put many small packs into one. Only who holds the repository against other writers may do this."""
        with self._lock:
            small = [name for name, pack in self._packs.items() if pack.size < _SMALL_PACK]
            wanted = [oid for name in small for oid in self._packs[name].ids()]
        if len(small) >= _MANY_PACKS:
            self._rewrite(small, wanted, disk)

    def keep_only(self, wanted: Collection[str], disk: Disk) -> None:
        """Write the `wanted` objects into one pack and remove all others. Only for who holds the repository."""
        self.refresh()
        self._rewrite(list(self._packs), wanted, disk)
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            path.unlink()

    def publish(self, writer: "PackWriter") -> None:
        """Make the objects of a pack part of this repository, durably."""
        writer.publish(self.folder / "pack")
        with self._lock:
            self.refresh()

    def refresh(self) -> None:
        """Open packs that appeared and close those that vanished."""
        with self._lock:
            names = {path.stem for path in (self.folder / "pack").glob("*.idx")}
            for name in self._packs.keys() - names:
                self._packs.pop(name).close()
            for name in names - self._packs.keys():
                with suppress(OSError, PackFileDisappeared, *_DAMAGED):  # merged meanwhile, or for `verify` to tell
                    self._packs[name] = _OpenPack(self.folder / "pack" / name)

    def close(self) -> None:
        with self._lock:
            while self._packs:
                self._packs.popitem()[1].close()

    def _rewrite(self, old: Iterable[str], wanted: Iterable[str], disk: Disk) -> None:
        with disk.staged() as file:
            writer = PackWriter(file, disk)
            for oid in wanted:
                writer.add(*self.read(oid))
            new = writer.publish(self.folder / "pack")
        with self._lock:
            for name in old:
                if name != new:
                    for path in sorted((self.folder / "pack").glob(f"{name}.*")):  # .idx before .pack
                        disk.discard(path)
            sync_folder(self.folder / "pack")
            self.refresh()

    def _find(self, oid: str) -> "tuple[_OpenPack, int] | None":
        if not self._packs:
            self.refresh()
        sha: Any = bytes.fromhex(oid)
        for pack in self._packs.values():
            with suppress(KeyError):
                return pack, pack.pack.index.object_offset(sha)
        return None

    def _size(self, oid: str) -> int | None:
        with self._lock:
            found = self._find(oid)
            return found[0].size_at(found[1]) if found else None

    def _loose(self, oid: str) -> Path:
        return self.folder / oid[:2] / oid[2:]

    def _read_loose(self, oid: str) -> tuple[int, bytes]:
        """Read what this hub never writes itself, but git does; or what another process packed meanwhile."""
        if not self._loose(oid).exists():
            self.refresh()
            if (found := self._find(oid)) is None:
                raise KeyError(oid)
            return found[0].read(oid)
        loose = formats.ShaFile.from_path(str(self._loose(oid)))
        return loose.type_num, loose.as_raw_string()


class _OpenPack:
    """A pack and its index, mapped into memory."""

    def __init__(self, base: Path) -> None:
        self._file = open(base.with_suffix(".pack"), "rb")  # noqa: SIM115 - open as long as the pack
        self.size = os.fstat(self._file.fileno()).st_size
        with ExitStack() as failed:
            failed.callback(self._file.close)
            data = PackData(str(base.with_suffix(".pack")), file=self._file, object_format=DEFAULT_OBJECT_FORMAT)
            failed.callback(data.close)
            index = load_pack_index(base.with_suffix(".idx"), DEFAULT_OBJECT_FORMAT)
            failed.callback(index.close)
            self.pack = Pack.from_objects(data, index)
            failed.pop_all()

    def read(self, oid: str) -> tuple[int, bytes]:
        try:
            return self.pack.get_raw(formats.RawObjectID(bytes.fromhex(oid)))
        except (KeyError, IndexError) as error:  # a nonsensical header; that it is in the index is known
            raise ValueError(str(error)) from None

    def ids(self) -> Iterator[str]:
        return (bytes(oid).hex() for oid, _, _ in self.pack.index.iterentries())

    def ids_like(self, prefix: str) -> Iterator[str]:
        found = self.pack.index.iter_prefix(bytes.fromhex(prefix[: len(prefix) // 2 * 2]))
        return (oid for oid in (bytes(sha).hex() for sha in found) if oid.startswith(prefix))

    def size_at(self, offset: int) -> int | None:
        """Return the size that the header of an object tells, None for a delta (which git may write, we do not)."""
        header = os.pread(self._file.fileno(), 12, offset)
        if header[0] >> 4 & 7 > TAG:
            return None
        size, shift = header[0] & 15, 4
        for last, byte in pairwise(header):
            if last < 128:
                break
            size |= (byte & 127) << shift
            shift += 7
        return size

    def close(self) -> None:
        self.pack.close()
        self._file.close()


class PackWriter:
    """Collects objects in a staged file; `publish` gives them to a repository at once.

    Memory stays flat: contents go to the disk as they come.
    """

    def __init__(self, file: IO[bytes], disk: Disk) -> None:
        self._file, self._disk = file, disk
        self._index: dict[str, tuple[bytes, int, int]] = {}
        file.write(b"PACK" + struct.pack(">LL", 2, 0))

    def __contains__(self, oid: str) -> bool:
        return oid in self._index

    def read_back(self, oid: str) -> bytes | None:
        """Return the content of a blob that was added, whole."""
        if oid not in self._index:
            return None
        self._file.flush()
        with open(self._file.name, "rb") as written:
            written.seek(self._index[oid][1])
            while written.read(1)[0] & 128:
                pass  # the header of the object: its type and size
            return zlib.decompressobj().decompress(written.read(_READ_BACK_LIMIT))

    def add(self, kind: int, content: bytes) -> str:
        """Add an object and return its id."""
        oid = object_id(kind, content)
        if oid not in self._index:
            start = self._file.tell()
            crc = write_pack_object(self._file.write, kind, [content], DEFAULT_OBJECT_FORMAT, compression_level=1)
            self._index[oid] = (bytes.fromhex(oid), start, crc)
        return oid

    def publish(self, folder: Path) -> str | None:
        """Move the pack into `folder`, durably, and return its name; None if there is nothing in it."""
        if not self._index:
            return None
        with self._disk.promised(self._file.tell()), self._disk.staged() as index:
            checksum = self._finish()
            write_pack_index_v2(index, sorted(self._index.values()), checksum)
            self._disk.harden(self._file)
            self._disk.harden(index)
            name = f"pack-{checksum.hex()}"
            self._disk.keep(self._file, folder / f"{name}.pack")
            self._disk.keep(index, folder / f"{name}.idx")  # git and we look for this one: the pack is there already
            sync_folder(folder)
        return name

    def _finish(self) -> bytes:
        self._file.seek(8)
        self._file.write(struct.pack(">L", len(self._index)))
        self._file.flush()
        with open(self._file.name, "rb") as written:
            checksum = hashlib.file_digest(written, "sha1").digest()
        self._file.seek(0, os.SEEK_END)
        self._file.write(checksum)
        return checksum


def build_tree(files: Mapping[str, Entry]) -> tuple[Tree, dict[str, bytes]]:
    """Return the tree of `files`, and the content of each of its git trees by id."""
    folders: dict[str, formats.Tree] = {"": formats.Tree()}
    for path, entry in files.items():
        parent, name = _split(path)
        _folder(folders, parent).add(name, _FILE, formats.ObjectID(entry.git_oid.encode()))
    contents, ids = {}, {}
    for path in sorted(folders, key=lambda path: path.count("/") + bool(path), reverse=True):
        content = folders[path].as_raw_string()
        ids[path] = object_id(TREE, content)
        contents[ids[path]] = content
        if path:
            parent, name = _split(path)
            folders[parent].add(name, _FOLDER, formats.ObjectID(ids[path].encode()))
    return Tree(dict(files), ids), contents


def _split(path: str) -> tuple[str, bytes]:
    parent, _, name = path.rpartition("/")
    return parent, name.encode("utf-8", "surrogateescape")


def _folder(folders: dict[str, formats.Tree], path: str) -> formats.Tree:
    """Return the tree at `path`, adding it and its parents to `folders` if they are new."""
    found = folders[path] if path in folders else folders.setdefault(path, formats.Tree())
    while path:
        path = path.rpartition("/")[0]
        if path in folders:
            break
        folders[path] = formats.Tree()
    return found


def commit_content(tree: str, parent: str | None, author: str, title: str, message: str) -> bytes:
    now = int(datetime.now(UTC).timestamp())
    who = signature(author, now)
    lines = [b"tree " + tree.encode(), *([b"parent " + parent.encode()] if parent else [])]
    return b"\n".join([*lines, b"author " + who, b"committer " + who, b"", _text(f"{title}\n\n{message}")])


def moved_commit(content: bytes, tree: str, parent: str | None) -> bytes:
    """Return the same commit with another tree and parent."""
    head, _, text = content.partition(b"\n\n")
    kept = [line for line in head.split(b"\n") if not line.startswith((b"tree ", b"parent "))]
    links = [b"tree " + tree.encode(), *([b"parent " + parent.encode()] if parent else [])]
    return b"\n".join([*links, *kept]) + b"\n\n" + text


def tag_content(commit: str, name: str, author: str, message: str) -> bytes:
    who = signature(author, int(datetime.now(UTC).timestamp()))
    head = [b"object " + commit.encode(), b"type commit", b"tag " + name.encode(), b"tagger " + who]
    return b"\n".join([*head, b"", _text(message)])


def signature(author: str, time: int) -> bytes:
    name = re.sub(r"[<>\x00-\x1f]", "", author).strip() or "unknown"
    email = re.sub(r"[^A-Za-z0-9._\-]", "-", name)
    return f"{name} <{email}@mmhub.invalid> {time} +0000".encode("utf-8", "replace")


def _text(message: str) -> bytes:
    return message.replace("\0", "").strip("\n").encode("utf-8", "replace") + b"\n"


def _damaged(oid: str) -> HubError:
    return HubError(f"The object {oid} is damaged on the hub's disk.")
