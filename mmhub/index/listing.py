"""What there is to index: the files below a folder, or the rows of a table, each with a stamp that changes with it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmhub.data.cells import cell
from mmhub.data.folders import MEDIA
from mmhub.data.loader import usable
from mmhub.data.sources import open_rows, require_columns
from mmhub.errors import InputError, NotFoundError, UsageError
from mmhub.index.store import Entry
from mmhub.interfaces import Policy
from mmhub.interfaces.raw import local_path

TEXTS = frozenset({".txt", ".md"})
_SUFFIXES = {suffix: kind for kind, known in (MEDIA | {"text": TEXTS}).items() for suffix in known}
_SHOWN = 200  # characters of a text that results show


@dataclass(frozen=True)
class Listing:
    """Everything of one modality in a folder or table: `entries`, and for each the number of its row in `rows`.

    `rows` has `[number]`, a mapping with the raw input under `column`, and `folder(number)`, as `Rows` has them.
    """

    modality: str
    column: str
    entries: Sequence[Entry]
    numbers: Sequence[int]
    rows: Any


class Files:
    """Files as rows."""

    def __init__(self, root: Path, modality: str, entries: Sequence[Entry]) -> None:
        self.root, self.modality, self.entries = root, modality, entries

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return {self.modality: self.root / self.entries[number].path}

    def folder(self, number: int) -> Path | None:
        return None


def list_folder(root: Path, modalities: Sequence[str], modality: str = "") -> Listing:
    """List the files below `root` that a model of these modalities reads, by suffix; hidden ones are left out.

    Raises:
        UsageError: files of several modalities are there, and `modality` says not which.
        InputError: there is none.
    """
    found, others = _files(root)
    if modality and modality not in found:
        raise UsageError(f"there are no files of the modality {modality!r}", f"there are {', '.join(found)}")
    media = [name for name in modalities if name in MEDIA and found[name]]
    if len(media) > 1 and not modality:
        counts = " and ".join(f"{len(found[name])} {name} files" for name in media)
        raise UsageError(f"'{root}' holds {counts}", f"say which: --modality {media[0]}, or {media[1]}")
    readable = [name for name in modalities if name in MEDIA] or ["text"]
    chosen = modality or next(iter(media), readable[0])
    if not found[chosen]:
        counted = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(5))
        raise InputError(f"there is no {chosen} file below '{root}'", f"it holds {counted}" if counted else None)
    entries = sorted(found[chosen], key=lambda entry: entry.path)
    return Listing(chosen, chosen, entries, range(len(entries)), Files(root, chosen, entries))


def _files(root: Path) -> tuple[dict[str, list[Entry]], Counter[str]]:
    """The visible files below a folder by modality, and how many there are of each suffix."""
    found: dict[str, list[Entry]] = {"image": [], "audio": [], "text": []}
    suffixes: Counter[str] = Counter()
    for where, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            suffixes[suffix] += 1
            if suffix in _SUFFIXES:
                found[_SUFFIXES[suffix]].append(_entry(root, os.path.join(where, name)))
    return found, suffixes


def _entry(root: Path, path: str) -> Entry:
    name = Path(os.path.relpath(path, root)).as_posix()
    try:
        stat = os.stat(path)
    except OSError:  # a dangling link; what reads it says so
        return Entry(path=name)
    return Entry(path=name, size=stat.st_size, mtime_ns=stat.st_mtime_ns)


def list_table(path: Path, modality: str, column: str) -> Listing:
    """List the rows of a table that have something in `column`.

    Raises:
        NotFoundError, InputError: see `open_rows`. UsageError: there is no such column.
    """
    rows = open_rows(path)
    require_columns(rows, [column], "name the column with --column")
    if column not in rows.columns:
        raise UsageError(f"{column!r} names two columns, and an index holds one thing a row", "name one with --column")
    entries, numbers = [], []
    for number, value in enumerate(rows.column(column)):
        raw = usable(modality, cell({column: value}, column), rows.folder(number), True)
        if raw is None:
            continue
        shown = " ".join(raw.split())[:_SHOWN] if modality == "text" and isinstance(raw, str) else ""
        entries.append(Entry(path=path.name, row=number + 1, digest=_digest(raw, modality), text=shown))
        numbers.append(number)
    if not entries:
        raise InputError(f"the column {column!r} of '{path}' is empty")
    return Listing(modality, column, entries, numbers, rows)


def _digest(raw: Any, modality: str) -> str:
    """Tell a raw input from any other: a file by its size and time, anything else by its content."""
    return hashlib.blake2b(modality.encode() + b"\0" + _content(raw, modality), digest_size=16).hexdigest()


def _content(raw: Any, modality: str) -> bytes:
    if isinstance(raw, Mapping) and raw.get("bytes") is not None:
        raw = raw["bytes"]
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return bytes(raw)
    if isinstance(raw, np.ndarray) and raw.dtype != object:  # its repr leaves out the middle
        return f"{raw.dtype.str}{raw.shape}\0".encode() + raw.tobytes()
    if isinstance(raw, Mapping):
        return repr([*raw]).encode(errors="replace") + _joined(raw.values(), modality)
    numbers = isinstance(raw, (list, tuple)) and all(isinstance(part, (int, float)) for part in raw)
    if isinstance(raw, (list, tuple, np.ndarray)) and not numbers:
        return _joined(raw, modality)
    return _text(raw, modality).encode(errors="surrogatepass")


def _joined(parts: Iterable[Any], modality: str) -> bytes:
    """Several contents as one that no others make, by a hash of each."""
    return b"".join(hashlib.blake2b(_content(part, modality), digest_size=16).digest() for part in parts)


def _text(raw: Any, modality: str) -> str:
    """Say a file by its path, size and time, wherever a path starts, and anything else by itself."""
    path = local_path(raw, Policy()) if modality in MEDIA else None
    try:
        stat = os.stat(path) if path is not None else None
    except (OSError, ValueError):  # no such file, or a text that is none; what reads it says so
        stat = None
    return repr(raw) if stat is None else f"{os.fspath(raw)}\0{stat.st_size}\0{stat.st_mtime_ns}"


def list_source(
    path: Path, modalities: Sequence[str], inputs: Mapping[str, str], modality: str, column: str
) -> Listing:
    """List a folder or a table; `inputs` are the columns the model was trained with.

    Raises:
        NotFoundError: there is neither. UsageError: a table, and nothing says which column holds what.
    """
    if modality and modality not in modalities:
        raise UsageError(f"this model has no input {modality!r}", f"it takes {', '.join(modalities)}")
    if path.is_dir():
        if column:
            raise UsageError(f"'{path}' is a folder, and --column is for tables", "leave it out")
        return list_folder(path, modalities, modality)
    if not path.exists():
        raise NotFoundError(f"no folder or table '{path}'", "check the path")
    known = {name: inputs.get(name, name) for name in modalities}
    media = [name for name in modalities if name in MEDIA]
    alone = modalities if len(modalities) == 1 else media if len(media) == 1 and not column else ()
    named = [name for name in modalities if column in (name, known[name])] or [*alone]
    if not modality and not named:
        question = f"is the column {column!r} {' or '.join(modalities)}?" if column else "which column is it?"
        raise UsageError(question, f"add --column NAME and --modality {'|'.join(modalities)}")
    modality = modality or named[0]
    return list_table(path, modality, column or known[modality])
