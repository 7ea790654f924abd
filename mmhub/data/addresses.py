"""Files that a stream reads, wherever they are: on this machine, or behind an fsspec address."""

from __future__ import annotations

import glob
import gzip
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

from mmhub.data.parts import (
    anchors,
    brief,
    find_path,
    no_such_path,
    reading,
    scheme_of,
    shown_name,
    started_from,
    without_secrets,
)
from mmhub.errors import InputError, MmhubError, NetworkError, NotFoundError, UsageError, did_you_mean

_LOCAL = re.compile(r"(file|local)://(?=/|[^/]+$)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_NAMES = 100_000  # that one text with braces may stand for


@final
@dataclass(frozen=True, kw_only=True)
class File:
    """One file: its name as shown, its path in a file system (None: this machine), and what identifies its content."""

    name: str
    path: str
    size: int  # bytes
    tag: str = ""  # etag, hash or time of the last change
    filesystem: Any = None
    commit: str = ""  # of a data set on the Hub

    @property
    def folder(self) -> Path | None:
        """The folder that relative media paths start from; None for what is not on this machine."""
        return Path(self.path).parent if self.filesystem is None else None

    def open(self) -> IO[bytes]:
        """Open the file for reading bytes at any place."""
        return open(self.path, "rb") if self.filesystem is None else self.filesystem.open(self.path, "rb")

    def unpacked(self) -> UnpackedFile:
        return UnpackedFile(self)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what the system, the network or Arrow say of a damaged or unreachable file into one line."""
        import pyarrow as pa

        damage: tuple[type[Exception], ...] = (pa.ArrowException, gzip.BadGzipFile, zlib.error, EOFError)
        if zstandard := sys.modules.get("zstandard"):  # whoever unpacks with it has imported it
            damage += (zstandard.ZstdError,)
        try:
            yield
        except MmhubError:
            raise
        except damage as error:
            raise InputError(f"'{self.name}' is damaged: {brief(error)}") from None
        except Exception as error:
            if type(error) is OSError and error.errno is None:  # how Arrow calls what it cannot parse
                raise InputError(f"'{self.name}' is damaged: {brief(error)}") from None
            if self.filesystem is not None:
                raise NetworkError(f"cannot read '{self.name}': {brief(error)}", "check the network") from None
            if isinstance(error, OSError):
                raise InputError(f"cannot read '{self.name}': {error.strerror or brief(error)}") from None
            raise


@final
class UnpackedFile:
    """As much of a path as the readers of text formats use, over any `File`; gzip is unpacked underneath."""

    def __init__(self, file: File) -> None:
        self.file = file
        ending = os.path.splitext(file.name)[1].lower()
        self.suffix = "" if ending in (".gz", ".tgz") else ending
        self._gzipped = ending in (".gz", ".tgz")

    def open(self, mode: str = "rb") -> IO[bytes]:
        raw: Any = self.file.open()
        return _Gunzip(raw) if self._gzipped else raw  # type: ignore[return-value]


class _Gunzip(gzip.GzipFile):
    """A gzip file that closes what is underneath it."""

    def __init__(self, raw: Any) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self._raw = raw

    def close(self) -> None:
        super().close()
        self._raw.close()


def is_url(text: str) -> bool:
    """Say whether `text` is an address that fsspec may open.

    >>> [is_url(text) for text in ("s3://bucket/a.tar", "hf://datasets/org/set", "sql://host/table", "a.tar")]
    [True, True, False, False]
    """
    if "://" not in text:
        return False
    try:
        from fsspec.registry import known_implementations  # type: ignore[import-untyped]
    except ImportError:
        return False
    return text.split("://")[0].split("::")[0] in known_implementations


def find_files(text: str, base: Path | None) -> list[File]:
    """Find the files that a path, a glob, `{0000..0099}` braces or an fsspec address stand for, in order of name.

    Raises:
        NotFoundError: there is none. UsageError: a folder, or an address whose kind nobody reads.
        NetworkError: the place cannot be reached.
    """
    if find_path(text, base) is None and (names := expand_braces(text)) != [text]:
        return [file for name in names for file in find_files(name, base)]
    if _LOCAL.match(text):
        return _local_files(_LOCAL.sub("", text), base)
    return _remote_files(text) if "://" in text else _local_files(text, base)


def expand_braces(text: str) -> list[str]:
    """Write out `{0000..0099}` and `{a,b}`.

    >>> expand_braces("part-{08..10}.{tar,json}")[:3]
    ['part-08.tar', 'part-08.json', 'part-09.tar']
    """
    names = [text]
    while _BRACES.search(names[0]):
        if len(names) * len(_parts(names[0])) > _MOST_NAMES:
            raise UsageError(f"'{shown_address(text)}' stands for more than {_MOST_NAMES:,} files")
        names = [part.join(_BRACES.split(name, maxsplit=1)[::2]) for name in names for part in _parts(name)]
        names = list(dict.fromkeys(names))  # braces within braces give their outer parts again and again
    return names


def _parts(name: str) -> list[str]:
    match = _BRACES.search(name)
    assert match
    bounds = _RANGE.fullmatch(match[1])
    if bounds is None:
        return match[1].split(",")
    first, last, width = int(bounds[1]), int(bounds[2]), len(bounds[1])
    if last - first >= _MOST_NAMES:
        raise UsageError(f"'{shown_address(name)}' stands for more than {_MOST_NAMES:,} files")
    step = 1 if first <= last else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]


def _local_files(text: str, base: Path | None) -> list[File]:
    path = find_path(text, base)
    if path is not None:
        return [_local_file(path, shown_name(text))]
    if not glob.has_magic(text):
        raise no_such_path(text, base)
    for anchor in anchors(base):
        if found := sorted(glob.glob(os.path.expanduser(text), root_dir=anchor, recursive=True)):
            return [_local_file(anchor / name, shown_name(name)) for name in found]
    raise NotFoundError(f"no file matches '{text}'", started_from(text, base))


def _local_file(path: Path, name: str) -> File:
    if path.is_dir():
        raise UsageError(
            f"'{name}' is a folder, and folders are not streamed", f"name the shards, such as '{name}/*.parquet'"
        )
    with reading(name):
        facts = path.stat()
    return File(name=name, path=str(path), size=facts.st_size, tag=f"modified {facts.st_mtime_ns}")


def _remote_files(text: str) -> list[File]:
    filesystem, path = _filesystem(text)
    name = shown_address(text)
    try:
        if "*" in path or ("[" in path and not text.startswith("http")):
            infos = filesystem.glob(path, detail=True)
        else:
            infos = {path: filesystem.info(path)}
    except FileNotFoundError:
        raise NotFoundError(f"no file '{name}'", "check the address") from None
    except Exception as error:  # each file system has its own exceptions
        raise NetworkError(f"cannot look up '{name}': {brief(error)}", "check the address and the network") from None
    found = {path: info for path, info in sorted(infos.items()) if info.get("type") != "directory"}
    if not found:
        raise NotFoundError(f"no file matches '{name}'", "check the address; name files, not folders")
    return [remote_file(filesystem, path, info) for path, info in found.items()]


def remote_file(filesystem: Any, path: str, info: dict[str, Any], *, name: str = "", commit: str = "") -> File:
    """Describe a file from what its file system says about it."""
    lfs = info.get("lfs") or {}
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    keys = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "mtime", "created")
    tag = f"sha256 {sha256}" if sha256 else next((f"{key} {info[key]}" for key in keys if info.get(key)), "")
    name = name or shown_address(str(filesystem.unstrip_protocol(path)))
    return File(name=name, path=path, size=info.get("size") or 0, tag=tag, filesystem=filesystem, commit=commit)


def _filesystem(text: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it."""
    name, scheme = shown_address(text), scheme_of(text)
    if "hf://" in text:  # fsspec would pay no heed to offline mode, nor to whom the token may be sent
        raise UsageError(f"'{name}' chains hf:// to something else", "write hf://datasets/org/name/FILES alone")
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        from fsspec.registry import known_implementations
    except ImportError:
        raise UsageError(f"reading '{name}' needs fsspec", "run: pip install fsspec") from None
    try:
        return url_to_fs(text)
    except ImportError:
        package = known_implementations[scheme]["class"].split(".")[0]
        needed = known_implementations[scheme]["err"] if package == "fsspec" else f"run: pip install {package}"
        raise UsageError(f"'{scheme}://' needs a package that is missing", needed) from None
    except ValueError as error:
        if scheme in known_implementations:
            raise UsageError(f"'{name}' is no usable address: {brief(error)}") from None
        hint = did_you_mean(scheme, known_implementations) or "known are s3://, gs://, abfs://, http://, hf:// and more"
        raise UsageError(f"'{scheme}://' is no known kind of address", hint) from None
    except Exception as error:
        raise NetworkError(f"cannot reach '{name}': {brief(error)}", "check the address and your login") from None


def shown_address(text: str) -> str:
    """Name an address or path in messages: without logins and signatures, or the folders of an absolute path.

    >>> shown_address("simplecache::https://ada:pw@host/a.tar?sig=S"), shown_address("s3://key:sec/ret@bucket/?.tar")
    ('simplecache::https://host/a.tar', 's3://bucket/?.tar')
    """
    return without_secrets(shown_name(text))
