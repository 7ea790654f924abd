"""Rows of a table of any size in the order of its files, a few in memory at a time; and what makes a row a sample.

Files of rows are read in passing, by `mmhub.data.shards`. Folders of media, data sets of the Hub and what plugins read
are opened whole by `mmhub.data.sources`, as they hold no more than names or are in memory anyway.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

from mmhub.conversation import of_json
from mmhub.data.addresses import is_url
from mmhub.data.cells import cell
from mmhub.data.loader import is_conversation, usable
from mmhub.data.parts import find_path, scheme_of, shown_name
from mmhub.data.shards import Shard, find_shards, is_tar
from mmhub.data.sources import Rows, open_rows
from mmhub.data.tables import is_table
from mmhub.errors import InputError, UsageError

_PEEK = 1000  # rows of a file without a header that is fetched, whose keys are its columns
_SAMPLE = 2**18  # bytes of a text file from which the number of its rows is guessed


@dataclass(frozen=True)
class Place:
    """Where a row is, or the next one to read: its number in the table, its file's, and its number in that file."""

    number: int = 0
    file: int = 0
    row: int = 0


@dataclass(frozen=True)
class Row:
    """A row's cells, or the error that says why it cannot be read."""

    place: Place
    cells: Mapping[str, Any] | InputError


class Table(ABC):
    """The rows of a source. `rows` is their number, None where it is unknown; `about` is a guess at it.

    `others` are columns that are not wanted because there are none such; rows that have one after all are no rows.
    """

    source: str
    columns: tuple[str, ...]
    rows: int | None = None
    about: int | None = None
    others: Collection[str] = ()

    @abstractmethod
    def read(self, start: Place, wanted: Collection[str]) -> Iterator[Row]:
        """Yield the rows from `start` on, with those of the `wanted` columns they have.

        Raises:
            InputError: a file is damaged, or has no rows. NetworkError: it cannot be reached.
            UsageError: a row has one of the `others`.
        """

    @abstractmethod
    def where(self, place: Place) -> str:
        """Say where a row came from, for error messages: 'train.csv row 17' (rows from 1)."""

    @abstractmethod
    def folder(self, place: Place) -> Path | None:
        """Return the folder that relative paths in a row start from; None if there is none."""

    @abstractmethod
    def marks(self) -> list[list[Any]]:
        """Say what is read, as JSON data: each file's name, bytes and what tells its content, all files as they are."""


def open_table(source: str, columns: Sequence[str] | None = None) -> Table:
    """Open what `mmhub.data.sources.open_rows` opens, and tar shards and addresses of files beside.

    Raises:
        MmhubError: as `open_rows`.
    """
    if not _is_files(source):
        return _Opened(open_rows(source, columns=columns))
    return _Files(shown_name(source), find_shards(source, columns, None))


def _is_files(source: str) -> bool:
    """Is `source` files of rows, which are read in passing? Whatever is no such file is for `open_rows` to explain."""
    path = find_path(source, None)
    packed = source.lower().endswith((".parquet.gz", ".parquet.zst"))
    if path is not None:
        return path.is_file() and (is_tar(path.name.lower()) or (is_table(path) and not packed))
    return is_url(source) or (glob.has_magic(source) and not packed and not scheme_of(source))


@final
class _Files(Table):
    """Files of rows, one after the other."""

    def __init__(self, source: str, shards: Sequence[Shard]) -> None:
        self.source, self._shards = source, shards
        known = [shard.group_rows(keep=False) for shard in shards]
        for shard, groups in zip(shards, known, strict=True):
            if (groups is not None and not sum(groups)) or (shard.has_header and next(shard.rows(), None) is None):
                raise InputError(f"'{shard.name}' has no rows")
        counts = [None if groups is None else sum(groups) for groups in known]
        self.rows = None if None in counts else sum(count or 0 for count in counts)
        self.about = self.rows if self.rows is not None else _guess(shards)
        self.columns = _columns(shards)

    def read(self, start: Place, wanted: Collection[str]) -> Iterator[Row]:
        number = start.number
        for file, shard in enumerate(self._shards[start.file :], start.file):
            first = start.row if file == start.file else 0
            others = [] if shard.has_header or not _is_fetched(shard) else list(self.others)
            for row, cells in enumerate(shard.rows([*wanted, *others], first), first):
                late = [name for name in others if isinstance(cells, dict) and name in cells]
                if late:
                    what = f"column {late[0]!r} comes first in {self.where(Place(number, file, row))}"
                    hint = f"columns are those of the first {_PEEK:,} rows: fetch the file, and give it with --data"
                    raise UsageError(f"{what}, and all rows before were answered without", hint)
                yield Row(Place(number, file, row), cells)
                number += 1

    def where(self, place: Place) -> str:
        return f"{self._shards[place.file].name} row {place.row + 1}"

    def folder(self, place: Place) -> Path | None:
        return self._shards[place.file].file.folder

    def marks(self) -> list[list[Any]]:
        return [[file.name, file.size, file.tag] for shard in self._shards for file in shard.files]


def _columns(shards: Sequence[Shard]) -> tuple[str, ...]:
    """The columns of all files; those that have a header must agree on it."""
    found: dict[str, None] = {}
    for shard in shards:
        own = shard.columns() if shard.has_header else _keys(shard)
        if shard.has_header and found and set(own) != set(found):
            raise UsageError(
                f"shards disagree: '{shards[0].name}' has columns {', '.join(found)}, "
                f"'{shard.name}' has {', '.join(own)}"
            )
        found |= dict.fromkeys(own)
    return tuple(found)


def _keys(shard: Shard) -> tuple[str, ...]:
    """The keys of all rows, or, where these are fetched, of the first."""
    noted = _Noted()
    rows = islice(shard.rows(noted if is_tar(shard.name) else None), _PEEK if _is_fetched(shard) else None)
    keys = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    return tuple(keys | noted)


class _Noted(dict[str, None]):
    """The names that were asked for: of the members of a tar, none of which is read."""

    def __contains__(self, name: object) -> bool:
        self[str(name)] = None
        return False


def _is_fetched(shard: Shard) -> bool:
    return shard.file.filesystem is not None


def _guess(shards: Sequence[Shard]) -> int | None:
    """Guess the number of rows of text files from the lines at the beginning of the first; None where none shows."""
    file = shards[0].file
    if is_tar(file.name) or file.filesystem is not None or file.name.lower().endswith((".gz", ".zst", ".parquet")):
        return None
    with file.reading(), file.open() as opened:
        begin = opened.read(_SAMPLE)
    lines = begin.count(b"\n")
    return round(sum(shard.size for shard in shards) * lines / len(begin)) if lines else None


@final
class _Opened(Table):
    """Rows that are read by position."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.source, self.columns = rows.source, rows.columns
        self.rows = self.about = len(rows)

    def read(self, start: Place, wanted: Collection[str]) -> Iterator[Row]:
        for number in range(start.number, len(self._rows)):
            row = self._rows[number]
            yield Row(Place(number, 0, number), {name: row[name] for name in self.columns if name in wanted})

    def where(self, place: Place) -> str:
        return self._rows.where(place.number)

    def folder(self, place: Place) -> Path | None:
        return self._rows.folder(place.number)

    def marks(self) -> list[list[Any]]:
        found: list[list[Any]] = []
        for part in self._rows._parts:
            files = [[name, *_facts(path)] for name, path in part.files.items()]
            listing = hashlib.sha256(json.dumps(files).encode()).hexdigest()
            found.append([part.name, part.rows, part.revision or "", part.reader, listing])
        return found


def _facts(path: Path) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


def sample_of(model: Any, row: Mapping[str, Any], columns: Mapping[str, str], folder: Path | None) -> dict[str, Any]:
    """Return a row's inputs as a sample of the model; `columns` maps modality to column.

    The column of the text may hold a conversation, which has the media in it.

    Raises:
        InputError: it holds none where the model is to read one.
    """
    found = {m: usable(m, cell(row, column), folder, len(columns) == 1) for m, column in columns.items()}
    talk = cell(row, columns["text"]) if "text" in columns else None
    talk = of_json(talk) if model.converses else talk
    only = model.converses and len(columns) > 1 and len(set(columns.values())) == 1  # what it holds is a conversation
    if not only and not is_conversation(talk):
        return found
    beside = {m: raw for m, raw in found.items() if raw is not None and columns[m] != columns["text"]}
    return {"messages": usable("text", talk, folder)} | beside
