"""Where the chunks of a repository lie: the small database behind Xet uploads.

    <repository>/xet/<epoch>/<xorb>        index: length and place of every chunk
    <repository>/xet/<epoch>/<xorb>.data   the chunks themselves, uncompressed, until files hold them all

A xorb that arrives is checked, unpacked to `.data` and indexed. A shard then says which chunks make a file; once that
file is stored, the index is pointed at *the file* for these chunks, and a `.data` that no index needs is deleted. So a
push takes its size twice while it runs and once afterwards, and yet every chunk ever pushed can still be referred to:
the next push of a slightly changed file sends the changed chunks only. An index is 16 bytes per chunk of about 64 KiB.

Clients remember for weeks which chunks they sent to which address. The epoch, a random name that is part of this
address, makes them forget: whenever a chunk cannot be produced any more (its file was garbage-collected, an abandoned
upload was swept, the disk lost what was never synced), the whole area is dropped and the next client starts with a new
epoch. It also keeps apart repositories, a deleted one from its successor, and those who only propose from the others:
their area goes, and nobody else's, when they name chunks that are not here. Losing an area loses no file, only saved
work; that is why nothing here is synced to disk: the sha256 of the file finds a mismatch, and then the area is dropped.
"""

import fcntl
import hashlib
import os
import secrets
import struct
import time
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO

from mmhub_hubserver.disk import Disk, make_folder
from mmhub_hubserver.errors import Invalid, TooLarge
from mmhub_hubserver.pool import MAX_BYTES
from mmhub_hubserver.store import KINDS, Repo, Store
from mmhub_hubserver.xet.formats import ShardFile, Term, chunk_hash, hash_text, xorb_hash

KEEP_SECONDS = 3 * 24 * 3600  # how long an upload may pause before its chunks are swept
_BLOCK = 1 << 18  # bytes read at a time: few enough to stay in the processor's cache
_EPOCH = 32  # letters
_CACHED = 32  # indexes in memory
_CHUNK = struct.Struct("<IIQ")  # length, number of the file that holds it (0: `.data`), offset there


class Lost(Invalid):
    """The client refers to a chunk that is not here (any more)."""

    def __init__(self) -> None:
        super().__init__("The hub has forgotten chunks of an earlier upload. Push again: it then sends everything.")


@dataclass
class Xorb:
    """The index of one xorb."""

    table: bytearray
    holders: list[str] = field(default_factory=list)  # sha256 of the files that hold chunks
    _ends: "array[int] | None" = field(default=None, repr=False)  # where each chunk ends if they are put in a row

    @classmethod
    def unpacked(cls, lengths: Iterable[int]) -> "Xorb":
        """Index chunks that lie one after the other in `.data`."""
        table, offset = bytearray(), 0
        for length in lengths:
            table += _CHUNK.pack(length, 0, offset)
            offset += length
        return cls(table)

    @classmethod
    def load(cls, path: Path) -> "Xorb":
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise Lost from None
        end = 4 + 32 * int.from_bytes(content[:4], "little")
        if len(content) <= end or (len(content) - end) % _CHUNK.size:
            raise Lost
        return cls(bytearray(content[end:]), [content[at : at + 32].hex() for at in range(4, end, 32)])

    def dump(self) -> bytes:
        return len(self.holders).to_bytes(4, "little") + bytes.fromhex("".join(self.holders)) + self.table

    def __len__(self) -> int:
        return len(self.table) // _CHUNK.size

    def size(self, term: Term) -> int:
        """Return how many bytes a term makes up, without looking at its chunks: a shard may hold millions of terms."""
        self._check_range(term)
        if self._ends is None:
            lengths = (length for length, _, _ in _CHUNK.iter_unpack(self.table))
            self._ends = array("Q", accumulate(lengths, initial=0))
        return self._ends[term.end] - self._ends[term.start]

    def runs(self, term: Term) -> Iterator[tuple[str | None, int, int]]:
        """Yield the holder (None: `.data`), offset and length of what makes up a term, neighbours joined."""
        holder = start = end = 0
        for length, at, offset in self._chunks(term):
            if (at, offset) != (holder, end):
                if end > start:
                    yield self._holder(holder), start, end - start
                holder, start = at, offset
            end = offset + length
        yield self._holder(holder), start, end - start

    def move(self, term: Term, sha256: str, offset: int) -> None:
        """Note that the chunks of a term lie in a file, from `offset` on; those already in a file stay there."""
        if sha256 not in self.holders:
            self.holders.append(sha256)
        number = self.holders.index(sha256) + 1
        for chunk, (length, holder, _) in enumerate(list(self._chunks(term)), term.start):
            if holder == 0:
                _CHUNK.pack_into(self.table, chunk * _CHUNK.size, length, number, offset)
            offset += length

    @property
    def needs_data(self) -> bool:
        return any(holder == 0 for _, holder, _ in _CHUNK.iter_unpack(self.table))

    def _holder(self, number: int) -> str | None:
        if number > len(self.holders):
            raise Lost
        return self.holders[number - 1] if number else None

    def _chunks(self, term: Term) -> Iterator[tuple[int, int, int]]:
        self._check_range(term)
        return _CHUNK.iter_unpack(memoryview(self.table)[term.start * _CHUNK.size : term.end * _CHUNK.size])

    def _check_range(self, term: Term) -> None:
        if not 0 <= term.start < term.end <= len(self):
            raise Invalid(f"Chunks {term.start} to {term.end} are asked of a xorb that has {len(self)}.")


class Area:
    """The chunks of one repository in one epoch."""

    def __init__(self, repo: Repo, epoch: str) -> None:
        """`epoch` has 32 letters; in an area of somebody who is no member their mark follows."""
        self.repo, self.epoch = repo, epoch
        self.folder = _root(repo) / epoch
        self._cache: OrderedDict[str, Xorb] = OrderedDict()

    @classmethod
    def current(cls, repo: Repo, guest: str | None = None) -> "Area":
        """Return the area of a repository, a new one if it has none or was abandoned in the middle of an upload.

        The members of its namespace share one, and everybody else (`guest`) has one of their own.
        """
        mark = hashlib.sha256(guest.encode()).hexdigest()[:16] if guest is not None else ""
        if (found := _existing(repo, mark)) is not None:
            if not found.abandoned(KEEP_SECONDS):
                return found
            found.drop()
        with repo.writing():
            if (found := _existing(repo, mark)) is None:
                found = cls(repo, secrets.token_hex(16) + mark)
                make_folder(found.folder)
        return found

    @property
    def exists(self) -> bool:
        return self.folder.is_dir()

    def has(self, xorb: str) -> bool:
        return (self.folder / xorb).exists()

    def add(self, name: str, chunks: Iterable[bytes | bytearray]) -> None:
        """Store a xorb.

        Raises:
            Invalid: the chunks do not have this hash.
            StorageFailed: the disk or the quota is full.
        """
        nodes: list[tuple[bytes, int]] = []
        with self._disk.staged() as file:
            for chunk in chunks:
                nodes.append((chunk_hash(chunk), len(chunk)))
                file.write(chunk)
            if not nodes or hash_text(xorb_hash(nodes)) != name:
                raise Invalid(f"The chunks do not make up the xorb {name}.")
            with self._disk.promised(file.tell()):
                self._keep(file, self._data(name))
        self._save(name, Xorb.unpacked(size for _, size in nodes))

    def register_all(self, files: Iterable[ShardFile]) -> None:
        """Store the files of a shard (see `register`), if there is room for all of them."""
        files, new, total = list(dict.fromkeys(files)), 0, 0
        with self._dropped_if_lost():
            for file in files:
                size = self._size(file)
                known = self.repo.uploaded(file.sha256)
                if known is not None and known.size != size:
                    raise Invalid(f"The chunks do not make up a file of sha256 {file.sha256}.")
                total, new = total + size, new + (size if known is None else 0)
            if total > MAX_BYTES:
                raise TooLarge(f"The files of this shard have {total} bytes; at most {MAX_BYTES} are accepted.")
        self.repo.store.check_room(new)  # a few bytes can stand for petabytes
        for file in files:
            self.register(file)

    def register(self, file: ShardFile) -> None:
        """Store the file that a shard describes and note that it was uploaded to the repository.

        Raises:
            Lost: a chunk is not here; the area was dropped.
            Invalid: the chunks do not make up a file of this sha256.
        """
        with self._dropped_if_lost():
            try:
                _upload(self.repo, file.sha256, self._size(file), self._read(file.terms()))
            except Invalid as error:
                if not isinstance(error, Lost):
                    self._check(file)
                raise
            self._settle(file)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold this area: no chunk moves while others read it."""
        if not self.exists:
            raise Lost
        with open(self.folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._cache.clear()
            yield

    def drop(self) -> None:
        """Forget everything, so that the next client starts afresh."""
        trash = self.repo.store.tmp / f"xet-{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):  # somebody else did
            os.rename(self.folder, trash)
        self._disk.discard(trash)

    def useless(self, keep_seconds: float) -> bool:
        """Say whether a chunk is missing, or has waited for its file for too long."""
        try:
            return self.abandoned(keep_seconds) or any(map(self._incomplete, self.folder.iterdir()))
        except Lost:
            return True

    def abandoned(self, keep_seconds: float) -> bool:
        """Say whether a chunk has waited for its file for too long. Quick, unlike `useless`."""
        oldest = time.time() - keep_seconds
        for path in self.folder.glob("*.data"):
            with suppress(FileNotFoundError):  # settled meanwhile
                if path.stat().st_mtime <= oldest:
                    return True
        return False

    @contextmanager
    def _dropped_if_lost(self) -> Iterator[None]:
        try:
            yield
        except Lost:
            self.drop()
            raise

    def _size(self, file: ShardFile) -> int:
        return sum(self._load(term.xorb).size(term) for term in file.terms())

    def _incomplete(self, path: Path) -> bool:
        if path.name == "lock" or path.suffix == ".data":
            return False
        return any(_object(self.repo, sha256) is None for sha256 in Xorb.load(path).holders)

    def _settle(self, file: ShardFile) -> None:
        """Point the indexes of a stored file's chunks at that file, and delete every `.data` that nothing needs now."""
        places: defaultdict[str, list[tuple[Term, int]]] = defaultdict(list)
        offset = 0
        for term in file.terms():
            places[term.xorb].append((term, offset))
            offset += self._load(term.xorb).size(term)
        for name, moves in places.items():
            if not self._data(name).exists():
                continue
            xorb = self._load(name)
            for term, offset in moves:
                xorb.move(term, file.sha256, offset)
            self._save(name, xorb)
            if not xorb.needs_data:
                self._disk.discard(self._data(name))

    def _check(self, file: ShardFile) -> None:
        """Raise `Lost` if it is this disk's fault that a file does not come out right."""
        for name in {term.xorb for term in file.terms()}:
            chunks = (b"".join(self._read([Term(name, at, at + 1)])) for at in range(len(self._load(name))))
            if hash_text(xorb_hash([(chunk_hash(chunk), len(chunk)) for chunk in chunks])) != name:
                raise Lost

    def _read(self, terms: Iterable[Term]) -> Iterator[bytes]:
        """Yield the bytes that terms make up, a block at a time."""
        for term in terms:
            for holder, start, length in self._load(term.xorb).runs(term):
                path = self._data(term.xorb) if holder is None else _object(self.repo, holder)
                if path is None or not path.exists():
                    raise Lost
                yield from _blocks(path, start, length)

    def _load(self, name: str) -> Xorb:
        xorb = self._cache.pop(name, None) or Xorb.load(self.folder / name)
        self._cache[name] = xorb
        if len(self._cache) > _CACHED:
            self._cache.popitem(last=False)
        return xorb

    def _save(self, name: str, xorb: Xorb) -> None:
        with self._disk.staged() as file:
            file.write(xorb.dump())
            self._keep(file, self.folder / name)

    def _keep(self, file: IO[bytes], target: Path) -> None:
        try:
            self._disk.keep(file, target)
        except FileNotFoundError:  # the area was dropped
            raise Lost from None

    @property
    def _disk(self) -> Disk:
        return self.repo.store.disk

    def _data(self, name: str) -> Path:
        return self.folder / f"{name}.data"


def sweep(store: Store, keep_seconds: float = KEEP_SECONDS) -> int:
    """Drop the areas in which a chunk is missing or an upload was abandoned; return their number.

    Safe at any time: an upload that is in the middle of it fails and starts afresh when repeated.
    """
    dropped = 0
    for kind in KINDS:
        for repo in store.repos(kind):
            for area in _areas(repo):
                with suppress(FileNotFoundError):  # deleted or dropped meanwhile
                    if area.useless(keep_seconds):
                        area.drop()
                        dropped += 1
    return dropped


def _existing(repo: Repo, mark: str) -> Area | None:
    return next((area for area in _areas(repo) if area.epoch[_EPOCH:] == mark), None)


def _areas(repo: Repo) -> list[Area]:
    try:
        return [Area(repo, folder.name) for folder in sorted(_root(repo).iterdir())]
    except FileNotFoundError:
        return []


def _root(repo: Repo) -> Path:
    return repo.folder / "xet"


def _blocks(path: Path, start: int, length: int) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while length:
            block = file.read(min(_BLOCK, length))
            if not block:
                raise Lost
            length -= len(block)
            yield block


def _upload(repo: Repo, sha256: str, size: int, blocks: Iterable[bytes]) -> None:
    """Store a large file in a repository, or check that it is the one which is there."""
    if repo.uploaded(sha256) is None:
        repo.store.add_stream(blocks, sha256, size)
        repo.add_object(sha256)
        return
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    if digest.hexdigest() != sha256:
        raise Invalid(f"The chunks do not make up a file of sha256 {sha256}.")


def _object(repo: Repo, sha256: str) -> Path | None:
    """Return where a large file of this repository lies."""
    return None if repo.uploaded(sha256) is None else repo.store.blob(sha256)
