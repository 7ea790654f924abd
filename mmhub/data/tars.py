"""Samples of a webdataset tar: members that share a name up to its first dot, each extension a column.

The format is that of https://github.com/webdataset/webdataset. Names of members are only labels: nothing is written to
disk, whatever they say; links, devices and sparse files are left out. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, final

from mmhub.data.addresses import File
from mmhub.data.parts import brief
from mmhub.errors import InputError, UsageError

_MEMBER = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
_TEXTS = frozenset({"txt", "text", "transcript", "caption"})
_NUMBERS = frozenset({"cls", "cls2", "class", "count", "index", "inx", "id"})
_BLOCK = 512
_MOST_BYTES = 2**30  # of one member; a packed tar may claim any size

Sample = dict[str, Any]


def samples(file: File, wanted: Collection[str] | None = None, start: int = 0) -> Iterator[Sample | InputError]:
    """Yield the samples of a tar from number `start` on; an unreadable one as the error that says why.

    A sample is {column: value} for its `wanted` extensions, in lower case, and `__key__`, the name they share:
    .txt is text, .cls a number where it is one, .json what it holds; all else stays `{bytes, path}`.

    Raises:
        InputError: the tar is damaged, ends early, or has no samples. NetworkError: it cannot be reached.
    """
    number, sample = 0, None
    with file.reading(), _unpacked(file) as unpacked:
        for member in _members(file, unpacked):
            if sample is None or member.key != sample.key:
                if sample is not None:
                    if number >= start:
                        yield sample.finished()
                    number += 1
                sample = _Sample(file, member.key)
            sample.add(member, wanted=number >= start and (wanted is None or member.column in wanted))
    if sample is None:
        raise InputError(f"'{file.name}' has no samples", "members are named KEY.EXTENSION, as in webdataset")
    if number >= start:
        yield sample.finished()


@dataclass(frozen=True)
class _Member:
    name: str
    key: str
    column: str
    read: Callable[[], bytes]


@final
class _Sample:
    def __init__(self, file: File, key: str) -> None:
        self.file, self.key = file, key
        self.columns: Sample = {"__key__": key}
        self.seen: set[str] = set()
        self.error: InputError | None = None

    def add(self, member: _Member, *, wanted: bool) -> None:
        if member.column in self.seen:
            raise InputError(f"'{self.file.name}' has two members '{_shown(member.name)}' in a row", "rename one")
        self.seen.add(member.column)
        if wanted:
            content = member.read()
            try:
                self.columns[member.column] = _value(member.column, content, member.name)
            except (ValueError, RecursionError) as error:
                self.error = InputError(f"member '{_shown(member.name)}' cannot be read: {brief(error)}")

    def finished(self) -> Sample | InputError:
        return self.error or self.columns


def _value(column: str, content: bytes, name: str) -> Any:
    kind = column.rsplit(".", 1)[-1]
    if kind in _TEXTS:
        return content.decode()
    if kind in _NUMBERS:
        text = content.decode().strip()
        return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text
    return json.loads(content) if kind in ("json", "jsn") else {"bytes": content, "path": name}


def _members(file: File, unpacked: IO[bytes]) -> Iterator[_Member]:
    """Yield the members that belong to samples."""
    raw, name = _Watched(unpacked), ""
    with _damage(file):
        archive = tarfile.TarFile(fileobj=raw)  # type: ignore[arg-type]
    while True:
        with _damage(file, name):
            info = archive.next()
        if info is None:
            break
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        name = info.name.encode(errors="replace").decode()
        match = _MEMBER.fullmatch(name)
        if match and info.isreg() and not info.issparse() and not _is_meta(match[1]):
            read = partial(_content, file, archive, info)
            yield _Member(name, match[1], match[2].lower(), read)
    if raw.last != bytes(_BLOCK):  # tarfile takes any rubbish after the first member for the end
        place = f" after member '{_shown(name)}'" if name else ""
        raise InputError(
            f"'{file.name}' is damaged: it has no end mark{place}", "it may have been cut off; make it anew"
        )


def _content(file: File, archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if info.size > _MOST_BYTES:
        raise InputError(f"'{file.name}' member '{_shown(info.name)}' claims {info.size:,} bytes", "the most is 1 GiB")
    with _damage(file, info.name):
        data = archive.extractfile(info)
        assert data is not None  # a regular file
        return data.read()  # checks the length


@contextmanager
def _damage(file: File, member: str = "") -> Iterator[None]:
    with file.reading():
        try:
            yield
        except tarfile.TarError as error:
            place = f" at member '{_shown(member)}'" if member else ""
            raise InputError(f"'{file.name}' is not a readable tar{place}: {brief(error)}") from None


def _is_meta(key: str) -> bool:
    name = key.rsplit("/", 1)[-1]
    return name.startswith("__") and name.endswith("__")


def _unpacked(file: File) -> IO[bytes]:
    unpacked = file.unpacked()
    if unpacked.suffix != ".zst":
        return unpacked.open()
    try:
        import zstandard
    except ImportError:
        raise UsageError(f"reading '{file.name}' needs zstandard", "run: pip install zstandard") from None
    return zstandard.ZstdDecompressor().stream_reader(file.open(), read_across_frames=True)


def _shown(name: str) -> str:
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    return printable if len(printable) <= 80 else printable[:80] + "..."


@final
class _Watched:
    """As much of a file as tarfile needs, remembering the last block that was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.last = file, b""

    def read(self, size: int = -1) -> bytes:
        self.last = self.file.read(size)
        return self.last

    def seek(self, place: int, whence: int = 0) -> int:
        return self.file.seek(place, whence)

    def tell(self) -> int:
        return self.file.tell()
