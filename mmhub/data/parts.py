"""What all sources of rows share: the part that one file, folder or Hub data set gives, its columns, and its path."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from mmhub.errors import InputError, NotFoundError, did_you_mean

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):")  # one letter is a Windows drive
_SECRETS = (  # what is left out of texts, and what stands there instead
    (re.compile(r"://[^\s/@:]*:(?!:|\d{1,5}(?:/|$))[^\s@]*@"), "://"),  # a login, whose password may hold a slash
    (re.compile(r"://[^\s/]*@"), "://"),
    (re.compile(r"(https?://[^\s?'\"<>]*)\?[^\s'\"<>]*"), r"\1"),
    (re.compile(r"[?#][\w.%~$-]+=[^\s'\"<>]*"), ""),  # a query, also of an address without its beginning
)

Column: TypeAlias = "pa.ChunkedArray | list[Any]"  # a list only where values are nested or of several types


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one file, folder or Hub data set holds."""

    name: str  # as shown in messages and provenance
    columns: dict[str, Column]
    rows: int
    files: Mapping[str, Path] = field(default_factory=dict)  # shown name -> path
    folder: Path | None = None
    row_names: list[str] | None = None  # the file behind each row of a media folder
    revision: str | None = None  # the commit of a Hub data set
    reader: str = ""  # the plugin that read it, with its version

    def fingerprint(self) -> list[dict[str, Any]]:
        """Return an entry for every file; the files of a media folder are one."""
        files: list[dict[str, Any]] = [
            {"name": name, "sha256": _sha256(path), "bytes": path.stat().st_size} for name, path in self.files.items()
        ]
        if self.row_names is None:
            return files
        digest = hashlib.sha256("".join(f"{file['name']}\n{file['sha256']}\n" for file in files).encode())
        size = sum(file["bytes"] for file in files)
        return [{"name": self.name, "sha256": digest.hexdigest(), "bytes": size, "files": len(files)}]


def _sha256(path: Path) -> str:
    with reading(path.name), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(values: Sequence[Any]) -> Column:
    """Pack values of one plain type into Arrow; nested and mixed ones stay the Python objects they are."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.chunked_array([pa.nulls(len(values))])
    if len(kinds) == 1 and kinds <= _PACKERS.keys():
        try:
            return pa.chunked_array([_array(values, kinds.pop())])
        except (OverflowError, ValueError):  # an integer beyond 64 bits, or half of a surrogate pair
            pass
    return list(values)


def _array(values: Sequence[Any], kind: type) -> pa.Array:
    """Make an array from its buffers: `pa.array` imports pandas, if there is one, which takes a second."""
    there = np.fromiter((value is not None for value in values), bool, len(values))
    gaps = None if there.all() else pa.py_buffer(np.packbits(there, bitorder="little"))
    arrow, buffers = _PACKERS[kind](values)
    return pa.Array.from_buffers(arrow, len(values), [gaps, *map(pa.py_buffer, buffers)])


def _pack_texts(values: Sequence[str | None]) -> tuple[pa.DataType, list[Any]]:
    encoded = [b"" if value is None else value.encode() for value in values]
    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(values)), out=ends[1:])
    return pa.large_string(), [ends, b"".join(encoded)]


def _pack_bools(values: Sequence[bool | None]) -> tuple[pa.DataType, list[Any]]:
    return pa.bool_(), [np.packbits(np.fromiter(map(bool, values), bool, len(values)), bitorder="little")]


def _pack_ints(values: Sequence[int | None]) -> tuple[pa.DataType, list[Any]]:
    return pa.int64(), [np.fromiter((value or 0 for value in values), np.int64, len(values))]


def _pack_floats(values: Sequence[float | None]) -> tuple[pa.DataType, list[Any]]:
    return pa.float64(), [np.fromiter((0.0 if value is None else value for value in values), np.float64, len(values))]


_PACKERS: dict[type, Callable[[Sequence[Any]], tuple[pa.DataType, list[Any]]]] = {
    str: _pack_texts, bool: _pack_bools, int: _pack_ints, float: _pack_floats,
}  # fmt: skip


def values_of(column: Column) -> Iterator[Any]:
    """Yield the values of a column as Python objects."""
    if isinstance(column, list):
        yield from column
    else:
        for chunk in column.chunks:
            yield from (scalar.as_py() for scalar in chunk)


def join(pieces: Sequence[Column]) -> Column:
    """Join pieces of a column; pieces of different types become a list."""
    arrays = [piece for piece in pieces if not isinstance(piece, list)]
    types = {piece.type for piece in arrays if piece.type != pa.null()}
    if len(arrays) < len(pieces) or len(types) > 1:
        return [value for piece in pieces for value in (piece if isinstance(piece, list) else piece.to_pylist())]
    kind = types.pop() if types else pa.null()
    whole = [piece if piece.type == kind else pa.chunked_array([pa.nulls(len(piece), kind)]) for piece in arrays]
    return pa.chunked_array([chunk for piece in whole for chunk in piece.chunks], kind)


# Paths.


def scheme_of(text: str) -> str:
    """Return the scheme of a data address, '' if it has none.

    >>> [scheme_of(text) for text in ("sql:sales.db", "C:/data.csv", "org/name:train", "train.csv")]
    ['sql', '', '', '']
    """
    match = _SCHEME.match(text)
    return match[1] if match else ""


def shown_name(path: str | os.PathLike[str]) -> str:
    """Name a source in provenance and messages: as given, but without the folders of an absolute path, or a login.

    >>> shown_name("/home/ada/train.csv"), shown_name("sql:/home/ada/sales.db"), shown_name("sql://ada:pw@host/sales")
    ('train.csv', 'sql:sales.db', 'sql://host/sales')
    """
    text = os.fspath(path)
    scheme = scheme_of(text)
    if text.startswith(f"{scheme}://"):
        return without_secrets(text)
    if scheme:
        return without_secrets(f"{scheme}:{shown_name(text[len(scheme) + 1 :])}")
    return os.path.basename(text.rstrip("/")) if os.path.isabs(os.path.expanduser(text)) else text


def without_secrets(text: str) -> str:
    """Leave logins and queries, which may be signatures, out of the addresses in a text.

    >>> without_secrets("no answer from https://ada:pw@host:80/a.tar?sig=S, nor from s3://key:sec/ret@bucket/b.tar")
    'no answer from https://host:80/a.tar nor from s3://bucket/b.tar'
    """
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def anchors(base: Path | None) -> list[Path]:
    """Return the folders that relative paths start from."""
    return [Path.cwd()] if base is None else [Path(base).absolute(), Path.cwd()]


def find_path(text: str, base: Path | None) -> Path | None:
    """Find a file or folder below the first anchor that has it."""
    given = os.path.expanduser(text)
    candidates = (os.path.join(anchor, given) for anchor in anchors(base))  # an absolute path replaces the anchor
    return next((Path(path) for path in candidates if given and os.path.exists(path)), None)


def no_such_path(text: str, base: Path | None) -> NotFoundError:
    """Make the error for a path that is not there, with near matches or where it was looked for."""
    hints = (near_miss(Path(anchor, os.path.expanduser(text))) for anchor in anchors(base))
    hint = next((hint for hint in hints if hint), None)
    return NotFoundError(f"no file or folder '{text}'", hint or started_from(text, base))


def near_miss(path: Path) -> str | None:
    """Suggest names beside the first missing part of `path`."""
    while not os.path.isdir(path.parent) and path != path.parent:
        path = path.parent
    try:
        return did_you_mean(path.name, os.listdir(path.parent))
    except OSError:
        return None


def started_from(text: str, base: Path | None) -> str:
    """Hint at where a relative path was looked for."""
    if os.path.isabs(os.path.expanduser(text)):
        return "check the path"
    starts = dict.fromkeys(f"'{anchor}'" for anchor in anchors(base))
    return f"relative paths start from {' then '.join(starts)}"


# Errors.


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what the system says about an unreadable or damaged file into one line."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"'{name}' is damaged: {brief(error)}") from None
    except OSError as error:
        raise InputError(f"cannot read '{name}': {error.strerror or brief(error)}") from None


def brief(error: BaseException) -> str:
    """Put what an error says into one line of at most 200 characters, without logins and signatures."""
    text = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
