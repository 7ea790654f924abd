"""Rows of one file: parquet, csv, tsv, json lines and text, the text formats also compressed; and parallel text."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmhub.data.parts import Column, Part, brief, find_path, join, no_such_path, pack, reading, shown_name
from mmhub.errors import InputError, UsageError

COMPRESSED = (".gz", ".zst")
_BLOCK = 65_536  # rows packed into one Arrow chunk


def open_file(path: Path, name: str, columns: Sequence[str] | None) -> Part:
    """Open one table or text file by its extension."""
    kind = _extension(path)
    reader = _READERS.get(kind)
    if reader is None:
        raise UsageError(
            f"'{name}' has " + (f"the unknown extension '{kind}'" if kind else "no extension"),
            f"known are {', '.join(_READERS)}, the text formats also with .gz or .zst; "
            'or name line-by-line text as a table: { text = "FILE" }',
        )
    if kind == ".parquet" and path.suffix.lower() in COMPRESSED:
        raise UsageError(f"'{name}' is a compressed parquet file", "decompress it; parquet compresses inside")
    data, rows = reader(path, name, columns)
    if not rows:
        raise InputError(f"'{name}' has no rows")
    return Part(name=name, columns=data, rows=rows, files={name: path}, folder=path.parent)


def open_objects(rows: Iterable[Mapping[str, Any]], name: str) -> Part:
    """Take rows that are in memory already, each a mapping of column to value."""
    columns, count = _read_objects(dict(row) for row in rows)
    return Part(name=name, columns=columns, rows=count)


def is_table(path: Path) -> bool:
    """Say whether the extension, before one of a compression, is that of a format this module reads."""
    return _extension(path) in _READERS


def _extension(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def _chunks(path: Path, name: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, at most about a megabyte at a time."""
    kind = path.suffix.lower()
    with reading(name):
        if kind == ".zst":
            yield from _unzstd(path, name)
            return
        with gzip.open(path) if kind == ".gz" else path.open("rb") as file:
            while chunk := file.read(2**20):
                yield chunk


def _unzstd(path: Path, name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UsageError(f"reading '{name}' needs zstandard", "run: pip install zstandard") from None
    new_frame = zstandard.ZstdDecompressor().decompressobj
    frame, started = new_frame(), False
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**17):
                while chunk:  # a file may hold several frames
                    started = True
                    yield frame.decompress(chunk)
                    chunk = frame.unused_data if frame.eof else b""
                    if frame.eof:
                        frame, started = new_frame(), False
    except zstandard.ZstdError as error:
        raise InputError(f"'{name}' is damaged: {brief(error)}") from None
    if started:  # zstandard itself is silent about a missing end
        raise InputError(f"'{name}' is damaged: it ends in the middle of a frame")


def text_lines(path: Path, name: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without their newline (a carriage return stays); only "\\n" ends a line."""
    number = 0
    for number, raw in enumerate(_byte_lines(path, name), 1):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        yield _decode(line, name, number)
    if not number:
        raise InputError(f"'{name}' is empty")


def _byte_lines(path: Path, name: str) -> Iterator[bytes]:
    rest = b""
    for chunk in _chunks(path, name):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _decode(line: bytes, name: str, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        problem = f"'{name}' line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1})"
        raise InputError(problem, "save the file as UTF-8") from None


# Formats: each reader returns the columns and the number of rows.


def _read_parquet(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    import pyarrow.parquet as pq

    if not path.stat().st_size:
        raise InputError(f"'{name}' is empty")
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"'{name}' is not a readable parquet file: {brief(error)}") from None
    return table_columns(table, name), table.num_rows


def table_columns(table: Any, name: str) -> dict[str, Column]:
    """Return the columns of an Arrow table."""
    check_unique(table.column_names, name)
    return dict(zip(table.column_names, table.columns, strict=True))


def check_unique(names: Sequence[str], name: str) -> None:
    twice = [column for column, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"'{name}' has more than one column {twice[0]!r}", "rename one of them")


def _read_csv(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    before = csv.field_size_limit(2**31 - 1)  # the default refuses fields over 128 KiB, such as whole documents
    try:
        return _read_fields(csv_records(path, name), name, columns)
    finally:
        csv.field_size_limit(before)


def _read_tsv(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    lines = enumerate((line.removesuffix("\r") for line in text_lines(path, name)), 1)
    return _read_fields(((number, line.split("\t")) for number, line in lines if line), name, columns)


def csv_records(path: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line + "\n" for line in text_lines(path, name)), strict=True)
    number = 1  # the line on which the record starts: a quoted field may span several
    try:
        for fields in reader:
            if fields:
                yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"'{name}' line {number} is not valid csv: {error}", "check the quotes") from None


def _read_fields(
    records: Iterator[tuple[int, list[str]]], name: str, columns: Sequence[str] | None
) -> tuple[dict[str, Column], int]:
    first = next(records, None)
    if first is None:
        raise InputError(f"'{name}' has no rows")
    names = list(columns) if columns else first[1]
    check_unique(names, name)
    body = records if names == first[1] else chain([first], records)
    fields = (check_count(number, row, names, name, given=bool(columns)) for number, row in body)
    return _assemble(dict(zip(names, zip(*block, strict=True), strict=True)) for block in _batched(fields))


def check_count(number: int, fields: list[str], names: list[str], name: str, *, given: bool) -> list[str]:
    if len(fields) == len(names):
        return fields
    problem = f"'{name}' line {number} has {len(fields)} fields, expected {len(names)} ({', '.join(names)})"
    if given and number == 1:
        raise UsageError(problem, "columns must name every field of a table without a header")
    raise InputError(problem, "a delimiter may be missing, or one inside a field is not quoted")


def _read_jsonl(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    return _read_objects(_json_lines(text_lines(path, name), name))


def _read_json(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    text = "\n".join(text_lines(path, name))
    if text.lstrip()[:1] != "[":  # many .json files hold one object a line
        return _read_objects(_json_lines(text.split("\n"), name))
    items = parse_json(text, name, 1)
    return _read_objects((check_object(item, f"'{name}' item {i}") for i, item in enumerate(items, 1)))


def _json_lines(lines: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield check_object(parse_json(line, name, number), f"'{name}' line {number}")


def parse_json(text: str, name: str, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"'{name}' line {number + error.lineno - 1} is not valid JSON: {error.msg} at column {error.colno}"
        raise InputError(problem) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{name}' line {number} is not usable JSON: {brief(error)}") from None


def check_object(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise InputError(f"{place} is a JSON {type(value).__name__}", 'expected an object such as {"text": "..."}')


def _read_objects(objects: Iterable[dict[str, Any]]) -> tuple[dict[str, Column], int]:
    blocks = ((block, dict.fromkeys(key for row in block for key in row)) for block in _batched(objects))
    return _assemble({key: [row.get(key) for row in block] for key in keys} for block, keys in blocks)


def _read_txt(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    if columns and len(columns) != 1:
        raise UsageError(f"'{name}' has one column, but columns names {len(columns)} ({', '.join(columns)})")
    lines = (line.removesuffix("\r") for line in text_lines(path, name))
    return _assemble({columns[0] if columns else "text": block} for block in _batched(lines))


def _assemble(blocks: Iterable[Mapping[str, Sequence[Any]]]) -> tuple[dict[str, Column], int]:
    """Join blocks of columns; a column that a block lacks is None there."""
    pieces: dict[str, list[Column]] = {}
    rows = 0
    for block in blocks:
        size = max((len(values) for values in block.values()), default=0)
        for name in block:
            pieces.setdefault(name, [pa.chunked_array([pa.nulls(rows)])] if rows else [])
        for name, column in pieces.items():
            column.append(pack(block[name]) if name in block else pa.chunked_array([pa.nulls(size)]))
        rows += size
    return {name: join(column) for name, column in pieces.items()}, rows


def _batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    items = iter(items)
    while block := list(islice(items, _BLOCK)):
        yield block


_READERS: dict[str, Callable[[Path, str, Sequence[str] | None], tuple[dict[str, Column], int]]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
}


# Parallel text.


def open_parallel(table: Mapping[str, str | os.PathLike[str]], base: Path | None) -> Part:
    """Open text files {column: file}, line by line beside each other."""
    if not table:
        raise UsageError("the table of text files is empty", 'write { source = "a.en", target = "a.de" }')
    parts = [_open_lines(column, os.fspath(file), base) for column, file in table.items()]
    for part in parts[1:]:
        if part.rows != parts[0].rows:
            raise InputError(
                f"'{parts[0].name}' has {parts[0].rows} lines and '{part.name}' has {part.rows}",
                "parallel text needs one line for each line",
            )
    columns = {name: column for part in parts for name, column in part.columns.items()}
    files = {shown: path for part in parts for shown, path in part.files.items()}
    name = " + ".join(part.name for part in parts)
    return Part(name=name, columns=columns, rows=parts[0].rows, files=files, folder=parts[0].folder)


def _open_lines(column: str, text: str, base: Path | None) -> Part:
    path, name = find_path(text, base), shown_name(text)
    if path is None:
        raise no_such_path(text, base)
    if path.is_dir() or _extension(path) in set(_READERS) - {".txt"}:
        raise UsageError(f"'{name}' is not line-by-line text", "parallel text takes files with one sentence a line")
    columns, rows = _read_txt(path, name, [column])
    return Part(name=name, columns=columns, rows=rows, files={name: path}, folder=path.parent)
