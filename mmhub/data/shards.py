"""Shards: files whose rows are read in passing, from any row on, a few at a time. Nothing is decoded here.

A shard is read as one unit, or as several where it is a parquet file of few: its row groups. Rows come as dicts; one
that cannot be read comes as the error that says why, so that those after it can still be read.
"""

from __future__ import annotations

import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, final

from mmhub.data import tables
from mmhub.data.addresses import File, find_files, is_url, shown_address
from mmhub.data.hub_files import hub_address_files, hub_split_files
from mmhub.data.hub_sets import hub_id
from mmhub.data.parts import find_path, scheme_of
from mmhub.data.sources import Source
from mmhub.data.tars import samples
from mmhub.errors import InputError, UsageError

Row = dict[str, Any]

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_LINES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
_PEEK = 32  # rows of a shard whose keys are its columns
_CHUNK_BYTES = 2**20  # of parquet that become Python objects at once
_CHUNK_ROWS = 1024
_BUFFER = 2**20  # bytes of a parquet column read at once


class Shard(ABC):
    """The rows of one file."""

    has_header = True  # every row has the same columns

    def __init__(self, file: File) -> None:
        self.file = file
        self.files = [file]
        self.name = file.name

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns; of formats without a header, those of the first rows."""

    @abstractmethod
    def rows(
        self, wanted: Collection[str] | None = None, start: int = 0, group: int | None = None
    ) -> Iterator[Row | InputError]:
        """Yield the rows from number `start` on, of one row group or of all, with those of the `wanted` columns it has.

        Raises:
            InputError: the file is damaged, empty or malformed. NetworkError: it cannot be reached.
        """

    def group_rows(self, *, keep: bool) -> list[int] | None:
        """Return the number of rows in each row group, None where only reading the whole file would tell.

        What was read to know may be kept, so that reading a group need not read it again.
        """
        return None


@final
class ParquetShard(Shard):
    """A parquet file; pages are read as they are needed, so that a row group may be larger than memory."""

    def __init__(self, file: File) -> None:
        super().__init__(file)
        self._metadata: Any = None

    def columns(self) -> tuple[str, ...]:
        with self._opened() as file:
            return tuple(file.schema_arrow.names)

    def group_rows(self, *, keep: bool) -> list[int]:
        with self._opened() as file:
            self._metadata = file.metadata if keep else None
            return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def rows(
        self, wanted: Collection[str] | None = None, start: int = 0, group: int | None = None
    ) -> Iterator[Row | InputError]:
        with self._opened() as file:
            chosen = None if wanted is None else [name for name in file.schema_arrow.names if name in wanted]
            groups, at = ([group] if group is not None else list(range(file.num_row_groups))), 0
            while groups and at + file.metadata.row_group(groups[0]).num_rows <= start:
                at += file.metadata.row_group(groups.pop(0)).num_rows
            size = _chunk_rows(file.metadata, groups)
            chunks = iter(
                file.iter_batches(size, row_groups=groups, columns=chosen, use_threads=False) if groups else ()
            )
            while True:
                with self.file.reading():
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield from chunk.slice(max(0, start - at)).to_pylist() if start < at + len(chunk) else ()
                at += len(chunk)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow.parquet as pq

        local = self.file.filesystem is None
        if local and not self.file.size:  # elsewhere 0 may also stand for an unknown size
            raise InputError(f"'{self.name}' is empty")
        with nullcontext(self.file.path) if local else closing(self.file.open()) as source:
            with self.file.reading():
                file = pq.ParquetFile(
                    source,
                    metadata=self._metadata,
                    buffer_size=_BUFFER,
                    pre_buffer=False,
                    page_checksum_verification=True,
                )
            with file:
                yield file


def _chunk_rows(metadata: Any, groups: Sequence[int]) -> int:
    """Return how many rows to turn into Python objects at once."""
    size = sum(metadata.row_group(i).total_byte_size for i in groups)
    rows = sum(metadata.row_group(i).num_rows for i in groups)
    return max(1, min(_CHUNK_ROWS, _CHUNK_BYTES * rows // max(1, size)))


@final
class LineShard(Shard):
    """A csv, tsv, txt or json lines file, also compressed; read from its beginning to reach a row."""

    def __init__(self, file: File, names: Sequence[str] | None) -> None:
        super().__init__(file)
        self.names = names
        self.kind = Path(file.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
        self.has_header = self.kind in (".csv", ".tsv", ".txt")

    def columns(self) -> tuple[str, ...]:
        if self.kind == ".txt":
            return (self._text_column(),)
        if self.kind in (".csv", ".tsv"):
            return tuple(self._header(next(self._records(), None)))
        return _keys(self.rows())

    def rows(
        self, wanted: Collection[str] | None = None, start: int = 0, group: int | None = None
    ) -> Iterator[Row | InputError]:
        reader = {".txt": self._lines, ".csv": self._fields, ".tsv": self._fields}.get(self.kind, self._objects)
        return reader(wanted, start)

    def _lines(self, wanted: Collection[str] | None, start: int) -> Iterator[Row | InputError]:
        column = self._text_column()
        for line in islice(self._text(), start, None):
            yield {column: line.removesuffix("\r")}

    def _text_column(self) -> str:
        if self.names and len(self.names) != 1:
            given = ", ".join(self.names)
            raise UsageError(f"'{self.name}' has one column, but columns names {len(self.names)} ({given})")
        return self.names[0] if self.names else "text"

    def _objects(self, wanted: Collection[str] | None, start: int) -> Iterator[Row | InputError]:
        place = -1
        for place, parse in enumerate(self._json_values()):
            if place < start:
                continue
            try:
                yield _chosen(parse(), wanted)
            except InputError as error:
                yield error
        if place < 0:
            raise InputError(f"'{self.name}' has no rows")

    def _json_values(self) -> Iterator[Callable[[], Row]]:
        """Yield what parses each line of a file, or item of a .json that holds one list; that one is read whole."""
        text, first = enumerate(self._text(), 1), True
        for number, line in text:
            if first and self.kind == ".json" and line.lstrip().startswith("["):
                items = tables.parse_json("\n".join([line, *(rest for _, rest in text)]), self.name, number)
                for at, item in enumerate(items, 1):
                    yield partial(tables.check_object, item, f"'{self.name}' item {at}")
            elif line.strip():
                first = False
                yield partial(self._object, line, number)

    def _object(self, line: str, number: int) -> Row:
        return tables.check_object(tables.parse_json(line, self.name, number), f"'{self.name}' line {number}")

    def _fields(self, wanted: Collection[str] | None, start: int) -> Iterator[Row | InputError]:
        records = self._records()
        first = next(records, None)
        names = self._header(first)
        assert first is not None
        place = -1
        for place, (number, fields) in enumerate(records if names == first[1] else chain([first], records)):
            if place < start:
                continue
            try:
                tables.check_count(number, fields, names, self.name, given=bool(self.names))
                row = dict(zip(names, fields, strict=True))
                yield _chosen(row, wanted)
            except InputError as error:
                yield error
        if place < 0:
            raise InputError(f"'{self.name}' has no rows")

    def _header(self, first: tuple[int, list[str]] | None) -> list[str]:
        if first is None:
            raise InputError(f"'{self.name}' has no rows")
        names = list(self.names) if self.names else first[1]
        tables.check_unique(names, self.name)
        return names

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        if self.kind == ".csv":
            csv.field_size_limit(2**31 - 1)  # the default refuses fields over 128 KiB, such as whole documents
            with self.file.reading():
                yield from tables.csv_records(self.file.unpacked(), self.name)  # type: ignore[arg-type]
            return
        for number, line in enumerate(self._text(), 1):
            if line := line.removesuffix("\r"):
                yield number, line.split("\t")

    def _text(self) -> Iterator[str]:
        with self.file.reading():
            yield from tables.text_lines(self.file.unpacked(), self.name)  # type: ignore[arg-type]


@final
class ParallelShard(Shard):
    """Text files {column: file}, line by line beside each other."""

    def __init__(self, files: Mapping[str, File]) -> None:
        super().__init__(next(iter(files.values())))
        self.parts = {column: LineShard(file, [column]) for column, file in files.items()}
        self.files = list(files.values())
        self.name = " + ".join(file.name for file in self.files)

    def columns(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def rows(
        self, wanted: Collection[str] | None = None, start: int = 0, group: int | None = None
    ) -> Iterator[Row | InputError]:
        readers = [part._lines(None, start) for part in self.parts.values()]
        while True:
            cells = [next(reader, None) for reader in readers]
            if all(cell is None for cell in cells):
                return
            if any(cell is None for cell in cells):
                hint = "parallel text needs one line for each line"
                raise InputError(f"one of {self.name} ends before the others", hint)
            row = {name: value for cell in cells if isinstance(cell, dict) for name, value in cell.items()}
            yield _chosen(row, wanted)


@final
class TarShard(Shard):
    """A webdataset tar."""

    has_header = False

    def columns(self) -> tuple[str, ...]:
        return _keys(samples(self.file))

    def rows(
        self, wanted: Collection[str] | None = None, start: int = 0, group: int | None = None
    ) -> Iterator[Row | InputError]:
        return samples(self.file, wanted, start)


def is_tar(name: str) -> bool:
    return name.lower().endswith(_TAR)


def find_shards(source: Source, columns: Sequence[str] | None, base: Path | None, split: str = "train") -> list[Shard]:
    """Find the shards of one source, as `open_stream` describes it, in order.

    Raises:
        NotFoundError, NetworkError: it is not there, or cannot be reached. UsageError: it cannot be streamed.
    """
    if isinstance(source, Mapping):
        return [_parallel(source, base)]
    if isinstance(source, (str, os.PathLike)):
        return [_shard(file, columns) for file in _files(os.fspath(source), base, split)]
    if any(isinstance(item, Mapping) for item in source):
        raise UsageError("rows that are in memory are not streamed", "name files, or leave data.stream out")
    if not source:
        raise UsageError("the list of data files is empty", "name at least one file")
    return [shard for item in source for shard in find_shards(os.fspath(item), columns, base, split)]  # type: ignore[arg-type]


def _files(text: str, base: Path | None, split: str) -> list[File]:
    if text.startswith("hf://"):
        return hub_address_files(text, split)
    match = None if is_url(text) or _is_known(text) else hub_id(text, base)
    if match:
        return hub_split_files(match["id"], match["revision"], match["config"], match["split"] or split)
    if scheme_of(text) and "://" not in text and find_path(text, base) is None:
        raise UsageError(
            f"'{shown_address(text)}' is not streamed: only files and data sets on the Hub are", "leave data.stream out"
        )
    return find_files(text, base)


def _is_known(name: str) -> bool:
    plain = name.lower().removesuffix(".gz").removesuffix(".zst")
    return is_tar(name) or plain.endswith((".parquet", *_LINES))


def _shard(file: File, columns: Sequence[str] | None) -> Shard:
    if is_tar(file.name):
        return TarShard(file)
    name = file.name.lower()
    if name.endswith(".parquet"):
        return ParquetShard(file)
    if _is_known(name) and ".parquet" not in name:
        return LineShard(file, columns)
    known = ", ".join((".parquet", *_LINES, ".tar"))
    raise UsageError(
        f"'{file.name}' has no extension that is streamed", f"known are {known}; text and tar also as .gz or .zst"
    )


def _parallel(source: Mapping[str, Any], base: Path | None) -> Shard:
    files = {column: _text_files(os.fspath(text), base) for column, text in source.items()}
    for column, found in files.items():
        if len(found) != 1:
            raise UsageError(
                f"'{shown_address(os.fspath(source[column]))}' is {len(found)} files",
                "parallel text takes one file for a column",
            )
    if not files:
        raise UsageError("the table of text files is empty", 'write { source = "a.en", target = "a.de" }')
    for (file,) in files.values():
        if _is_known(file.name) and LineShard(file, None).kind != ".txt":
            raise UsageError(f"'{file.name}' is not line-by-line text", "parallel text takes one sentence a line")
    return ParallelShard({column: found[0] for column, found in files.items()})


def _text_files(text: str, base: Path | None) -> list[File]:
    return hub_address_files(text, "train") if text.startswith("hf://") else find_files(text, base)


def _chosen(row: Row, wanted: Collection[str] | None) -> Row:
    return row if wanted is None else {name: row[name] for name in wanted if name in row}


def _keys(rows: Iterable[Row | InputError]) -> tuple[str, ...]:
    """Return the keys of the first rows, in order of appearance."""
    return tuple(dict.fromkeys(key for row in islice(rows, _PEEK) if isinstance(row, dict) for key in row))
