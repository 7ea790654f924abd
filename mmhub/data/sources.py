"""Rows of a data set, whatever it is kept in: tables, text, parallel text, folders of media, Hub data sets.

Nothing is decoded here: media stay paths or `{bytes, path}` structs, csv and tsv fields stay strings ("007" is not 7).
Batching and decoding are the loader's and the processors' part.
"""

from __future__ import annotations

import copy
import csv
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, TypeAlias, final

import pyarrow as pa

from mmhub.errors import InputError, MmhubError, NetworkError, NotFoundError, UsageError, did_you_mean

Source: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]"
Column: TypeAlias = "pa.ChunkedArray | list[Any]"  # a list only where values are nested or of several types

MEDIA = {
    "image": frozenset({".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}),
    "audio": frozenset({".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aif", ".aiff"}),
}
_MEDIA_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_COMPRESSED = (".gz", ".zst")
_SPLITS = frozenset({"train", "training", "valid", "validation", "val", "dev", "test", "testing"})
_HUB_SCHEMES = ("hub:", "hf-hub:")
_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[^:#]+))?(#(?P<config>[^:]+))?(:(?P<split>.+))?")
_BLOCK = 65_536  # rows packed into one Arrow chunk
_HUB_SECONDS = 10.0  # how long the Hub may take to say whether a data set exists


@final
class Rows:
    """The rows of one data set, read by position; made by `open_rows`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "train.tsv").write_text("text\\tlabel\\ngood\\t007\\n")
        >>> rows = open_rows("train.tsv", base=folder)
        >>> rows[0], rows.where(0)
        ({'text': 'good', 'label': '007'}, 'train.tsv row 1')
    """

    def __init__(self, source: str, parts: Sequence[_Part]) -> None:
        self.source = source
        self._parts = tuple(parts)
        self._starts = [0, *accumulate(part.rows for part in parts)]
        self._data = _merge(parts)
        self._index: array[int] | None = None  # row numbers in `_data`, where this is a selection

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._data)

    def __len__(self) -> int:
        return self._starts[-1] if self._index is None else len(self._index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return row `i` as a dict; only this row is turned into Python objects."""
        at = self._at(i)
        return {name: _value(column, at) for name, column in self._data.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def column(self, name: str) -> Iterator[Any]:
        """Yield the values of one column in row order, without touching the others.

        Raises:
            UsageError: there is no such column.
        """
        require_columns(self, [name])
        return self._values(self._data[name])

    def where(self, i: int) -> str:
        """Say where row `i` came from, for error messages: 'train.csv row 17' (data rows from 1), or the media file."""
        part, row = self._locate(i)
        return f"{part.name}/{part.row_names[row]}" if part.row_names else f"{part.name} row {row + 1}"

    def folder(self, i: int) -> Path | None:
        """Return the folder of the file row `i` came from, where relative media paths start; None for Hub data sets."""
        return self._locate(i)[0].folder

    def select(self, indices: Iterable[int]) -> Rows:
        """Return a view of these rows, in this order; data are shared, repeats are allowed."""
        view = copy.copy(self)
        view._index = array("q", (self._at(int(i)) for i in indices))
        return view

    def fingerprint(self) -> dict[str, Any]:
        """Say what the rows were read from, for provenance: source, rows, bytes, and the sha256 of every file.

        A media folder is one entry, hashed over the names and hashes of its files. Absolute paths are left out.
        A selection adds the sha256 of its row numbers; a Hub data set has its commit in place of files.
        """
        files = [entry for part in self._parts for entry in part.fingerprint()]
        found = {"source": self.source, "rows": len(self), "bytes": sum(f["bytes"] for f in files), "files": files}
        revisions = [part.revision for part in self._parts if part.revision]
        found |= {"revision": revisions[0]} if revisions else {}
        return found if self._index is None else found | {"selection": hashlib.sha256(self._index).hexdigest()}

    def _at(self, i: int) -> int:
        count = len(self)
        if not -count <= i < count:
            raise IndexError(f"row {i} of {count}")
        i %= count
        return i if self._index is None else self._index[i]

    def _locate(self, i: int) -> tuple[_Part, int]:
        at = self._at(i)
        part = bisect_right(self._starts, at) - 1
        return self._parts[part], at - self._starts[part]

    def _values(self, column: Column) -> Iterator[Any]:
        if self._index is not None:
            yield from (_value(column, at) for at in self._index)
        elif isinstance(column, list):
            yield from column
        else:
            for chunk in column.chunks:
                yield from (scalar.as_py() for scalar in chunk)


def open_rows(
    source: Source, *, columns: Sequence[str] | None = None, base: Path | None = None, split: str = "train"
) -> Rows:
    """Open a data set.

    `source` is a file (.parquet .csv .tsv .jsonl .json .txt; text formats also as .gz or .zst), a glob or a list of
    both (shards with the same columns), a folder of images or audio (a sub-folder for each class, or flat; joined with
    its metadata.csv or metadata.jsonl by `file_name`), a table {name: text file, ...} of parallel text, or a Hub data
    set `[hub:]org/name[@revision][#config][:split]`. Relative paths start from `base`, then from the current folder.

    csv is read with quoting, tsv without (a quote is text); blank lines are skipped in both, and in jsonl. txt has one
    column, "text", with a row for every line, blank ones too; only the last line end is not a row of its own.
    `columns` names the fields of a csv or tsv without a header (a first line equal to it is still a header) and the
    one column of a txt; formats that name their own columns ignore it. `split` is for Hub data sets.

    Raises:
        NotFoundError: no such file, folder or Hub data set.
        InputError: a file is empty, damaged or malformed.
        UsageError: the format is unknown, or shards disagree.
        NetworkError: the Hub cannot be reached, or offline mode forbids asking it.
    """
    if isinstance(source, Mapping):
        return Rows(" + ".join(_shown(file) for file in source.values()), [_open_parallel(source, base)])
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        hub = _hub_id(text, base)
        parts = [_open_hub(text, hub, split)] if hub else _open_paths(text, columns, base)
        return Rows(_shown(text), parts)
    if not source:
        raise UsageError("the list of data files is empty", "name at least one file")
    parts = [part for item in source for part in _open_paths(os.fspath(item), columns, base)]
    return Rows(", ".join(_shown(item) for item in source), parts)


def require_columns(rows: Rows, names: Iterable[str], flag_hint: str | None = None) -> None:
    """Check that `rows` has these columns; `flag_hint` says which key or flag names them.

    Raises:
        UsageError: one is missing; lists the columns there are and near matches.
    """
    for name in names:
        if name not in rows.columns:
            there = ", ".join(repr(column) for column in rows.columns)
            hints = [hint for hint in (did_you_mean(name, rows.columns), flag_hint) if hint]
            raise UsageError(f"no column {name!r} in '{rows.source}', which has {there}", "; ".join(hints) or None)


# Parts: what one file, folder or Hub data set holds.


@dataclass(frozen=True, kw_only=True)
class _Part:
    name: str  # as shown in messages and provenance
    columns: dict[str, Column]
    rows: int
    files: Mapping[str, Path] = field(default_factory=dict)  # shown name -> path
    folder: Path | None = None
    row_names: list[str] | None = None  # the file behind each row of a media folder
    revision: str | None = None  # the commit of a Hub data set

    def fingerprint(self) -> list[dict[str, Any]]:
        files: list[dict[str, Any]] = [
            {"name": name, "sha256": _sha256(path), "bytes": path.stat().st_size} for name, path in self.files.items()
        ]
        if self.row_names is None:
            return files
        digest = hashlib.sha256("".join(f"{file['name']}\n{file['sha256']}\n" for file in files).encode())
        size = sum(file["bytes"] for file in files)
        return [{"name": self.name, "sha256": digest.hexdigest(), "bytes": size, "files": len(files)}]


def _sha256(path: Path) -> str:
    with _reading(path.name), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _merge(parts: Sequence[_Part]) -> dict[str, Column]:
    first = parts[0]
    for part in parts[1:]:
        if set(part.columns) != set(first.columns):
            raise UsageError(
                f"shards disagree: '{first.name}' has columns {', '.join(first.columns)}, "
                f"'{part.name}' has {', '.join(part.columns)}"
            )
    if len(parts) == 1:
        return first.columns
    return {name: _join([part.columns[name] for part in parts]) for name in first.columns}


def _value(column: Column, at: int) -> Any:
    return column[at] if isinstance(column, list) else column[at].as_py()


def _join(pieces: Sequence[Column]) -> Column:
    arrays = [piece for piece in pieces if not isinstance(piece, list)]
    types = {piece.type for piece in arrays if piece.type != pa.null()}
    if len(arrays) < len(pieces) or len(types) > 1:
        return [value for piece in pieces for value in (piece if isinstance(piece, list) else piece.to_pylist())]
    kind = types.pop() if types else pa.null()
    whole = [piece if piece.type == kind else pa.chunked_array([pa.nulls(len(piece), kind)]) for piece in arrays]
    return pa.chunked_array([chunk for piece in whole for chunk in piece.chunks], kind)


def _pack(values: Sequence[Any]) -> Column:
    """Pack values of one plain type into Arrow; nested and mixed ones stay the Python objects they are."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds or (len(kinds) == 1 and kinds <= {str, int, float, bool}):
        try:
            return pa.chunked_array([pa.array(values, pa.large_string() if kinds == {str} else None)])
        except (OverflowError, ValueError):  # an integer beyond 64 bits, or half of a surrogate pair
            pass
    return list(values)


def _assemble(blocks: Iterable[Mapping[str, Sequence[Any]]]) -> tuple[dict[str, Column], int]:
    """Join blocks of columns; a column that a block lacks is None there."""
    pieces: dict[str, list[Column]] = {}
    rows = 0
    for block in blocks:
        size = max((len(values) for values in block.values()), default=0)
        for name in block:
            pieces.setdefault(name, [pa.chunked_array([pa.nulls(rows)])] if rows else [])
        for name, column in pieces.items():
            column.append(_pack(block[name]) if name in block else pa.chunked_array([pa.nulls(size)]))
        rows += size
    return {name: _join(column) for name, column in pieces.items()}, rows


def _batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    items = iter(items)
    while block := list(islice(items, _BLOCK)):
        yield block


# Paths.


def _shown(path: str | os.PathLike[str]) -> str:
    """Name a source in provenance and messages: as given, but without the folders of an absolute path."""
    text = os.fspath(path)
    return os.path.basename(text.rstrip("/")) if os.path.isabs(os.path.expanduser(text)) else text


def _anchors(base: Path | None) -> list[Path]:
    return [Path.cwd()] if base is None else [Path(base).absolute(), Path.cwd()]


def _find(text: str, base: Path | None) -> Path | None:
    given = os.path.expanduser(text)
    candidates = (os.path.join(anchor, given) for anchor in _anchors(base))  # an absolute path replaces the anchor
    return next((Path(path) for path in candidates if given and os.path.exists(path)), None)


def _open_paths(text: str, columns: Sequence[str] | None, base: Path | None) -> list[_Part]:
    path = _find(text, base)
    if path is not None:
        return [_open_path(path, _shown(text), columns)]
    if not glob.has_magic(text):
        raise _no_such_path(text, base)
    pattern = os.path.expanduser(text)
    for anchor in _anchors(base):
        if found := sorted(glob.glob(pattern, root_dir=anchor, recursive=True)):
            return [_open_path(anchor / name, _shown(name), columns) for name in found]
    raise NotFoundError(f"no file matches '{text}'", _started_from(text, base))


def _open_path(path: Path, name: str, columns: Sequence[str] | None) -> _Part:
    return _open_folder(path, name) if path.is_dir() else _open_file(path, name, columns)


def _no_such_path(text: str, base: Path | None) -> NotFoundError:
    hints = (_near(Path(anchor, os.path.expanduser(text))) for anchor in _anchors(base))
    hint = next((hint for hint in hints if hint), None)
    return NotFoundError(f"no file or folder '{text}'", hint or _started_from(text, base))


def _near(path: Path) -> str | None:
    """Suggest names beside the first missing part of `path`."""
    while not os.path.isdir(path.parent) and path != path.parent:
        path = path.parent
    try:
        return did_you_mean(path.name, os.listdir(path.parent))
    except OSError:
        return None


def _started_from(text: str, base: Path | None) -> str:
    if os.path.isabs(os.path.expanduser(text)):
        return "check the path"
    anchors = dict.fromkeys(f"'{anchor}'" for anchor in _anchors(base))
    return f"relative paths start from {' then '.join(anchors)}"


# Files.


def _open_file(path: Path, name: str, columns: Sequence[str] | None) -> _Part:
    kind = _extension(path)
    reader = _READERS.get(kind)
    if reader is None:
        raise UsageError(
            f"'{name}' has " + (f"the unknown extension '{kind}'" if kind else "no extension"),
            f"known are {', '.join(_READERS)}, the text formats also with .gz or .zst; "
            'or name line-by-line text as a table: { text = "FILE" }',
        )
    if kind == ".parquet" and path.suffix.lower() in _COMPRESSED:
        raise UsageError(f"'{name}' is a compressed parquet file", "decompress it; parquet compresses inside")
    data, rows = reader(path, name, columns)
    if not rows:
        raise InputError(f"'{name}' has no rows")
    return _Part(name=name, columns=data, rows=rows, files={name: path}, folder=path.parent)


def _extension(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() in _COMPRESSED else path.name).suffix.lower()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what the system says about an unreadable or damaged file into one line."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"'{name}' is damaged: {_brief(error)}") from None
    except OSError as error:
        raise InputError(f"cannot read '{name}': {error.strerror or _brief(error)}") from None


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def _chunks(path: Path, name: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, at most about a megabyte at a time."""
    kind = path.suffix.lower()
    with _reading(name):
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
        raise InputError(f"'{name}' is damaged: {_brief(error)}") from None
    if started:  # zstandard itself is silent about a missing end
        raise InputError(f"'{name}' is damaged: it ends in the middle of a frame")


def _lines(path: Path, name: str) -> Iterator[str]:
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
        raise InputError(f"'{name}' is not a readable parquet file: {_brief(error)}") from None
    return _table_columns(table, name), table.num_rows


def _table_columns(table: Any, name: str) -> dict[str, Column]:
    _check_unique(table.column_names, name)
    return dict(zip(table.column_names, table.columns, strict=True))


def _check_unique(names: Sequence[str], name: str) -> None:
    twice = [column for column, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"'{name}' has more than one column {twice[0]!r}", "rename one of them")


def _read_csv(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    before = csv.field_size_limit(2**31 - 1)  # the default refuses fields over 128 KiB, such as whole documents
    try:
        return _read_fields(_csv_records(path, name), name, columns)
    finally:
        csv.field_size_limit(before)


def _read_tsv(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    lines = enumerate((line.removesuffix("\r") for line in _lines(path, name)), 1)
    return _read_fields(((number, line.split("\t")) for number, line in lines if line), name, columns)


def _csv_records(path: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line + "\n" for line in _lines(path, name)), strict=True)
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
    _check_unique(names, name)
    body = records if names == first[1] else chain([first], records)
    fields = (_check_count(number, row, names, name, given=bool(columns)) for number, row in body)
    return _assemble(dict(zip(names, zip(*block, strict=True), strict=True)) for block in _batched(fields))


def _check_count(number: int, fields: list[str], names: list[str], name: str, *, given: bool) -> list[str]:
    if len(fields) == len(names):
        return fields
    problem = f"'{name}' line {number} has {len(fields)} fields, expected {len(names)} ({', '.join(names)})"
    if given and number == 1:
        raise UsageError(problem, "columns must name every field of a table without a header")
    raise InputError(problem, "a delimiter may be missing, or one inside a field is not quoted")


def _read_jsonl(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    return _read_objects(_json_lines(_lines(path, name), name))


def _read_json(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    text = "\n".join(_lines(path, name))
    if text.lstrip()[:1] != "[":  # many .json files hold one object a line
        return _read_objects(_json_lines(text.split("\n"), name))
    items = _parse_json(text, name, 1)
    return _read_objects((_check_object(item, f"'{name}' item {i}") for i, item in enumerate(items, 1)))


def _json_lines(lines: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _check_object(_parse_json(line, name, number), f"'{name}' line {number}")


def _parse_json(text: str, name: str, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"'{name}' line {number + error.lineno - 1} is not valid JSON: {error.msg} at column {error.colno}"
        raise InputError(problem) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{name}' line {number} is not usable JSON: {_brief(error)}") from None


def _check_object(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise InputError(f"{place} is a JSON {type(value).__name__}", 'expected an object such as {"text": "..."}')


def _read_objects(objects: Iterable[dict[str, Any]]) -> tuple[dict[str, Column], int]:
    blocks = ((block, dict.fromkeys(key for row in block for key in row)) for block in _batched(objects))
    return _assemble({key: [row.get(key) for row in block] for key in keys} for block, keys in blocks)


def _read_txt(path: Path, name: str, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    if columns and len(columns) != 1:
        raise UsageError(f"'{name}' has one column, but columns names {len(columns)} ({', '.join(columns)})")
    lines = (line.removesuffix("\r") for line in _lines(path, name))
    return _assemble({columns[0] if columns else "text": block} for block in _batched(lines))


_READERS: dict[str, Callable[[Path, str, Sequence[str] | None], tuple[dict[str, Column], int]]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
}


def _open_parallel(table: Mapping[str, str | os.PathLike[str]], base: Path | None) -> _Part:
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
    return _Part(name=name, columns=columns, rows=parts[0].rows, files=files, folder=parts[0].folder)


def _open_lines(column: str, text: str, base: Path | None) -> _Part:
    path, name = _find(text, base), _shown(text)
    if path is None:
        raise _no_such_path(text, base)
    if path.is_dir() or _extension(path) in set(_READERS) - {".txt"}:
        raise UsageError(f"'{name}' is not line-by-line text", "parallel text takes files with one sentence a line")
    columns, rows = _read_txt(path, name, [column])
    return _Part(name=name, columns=columns, rows=rows, files={name: path}, folder=path.parent)


# Folders of media.


def _open_folder(folder: Path, name: str) -> _Part:
    found = _visible_files(folder)
    media = {kind: [file for file in found if file.suffix.lower() in known] for kind, known in MEDIA.items()}
    kinds = [kind for kind, files in media.items() if files]
    if not kinds:
        raise _no_media(found, name)
    if len(kinds) > 1:
        counts = " and ".join(f"{len(files)} {kind} files" for kind, files in media.items())
        hint = "which one? name a folder with one kind, or a table that pairs them by path"
        raise UsageError(f"'{name}' holds {counts}", hint)
    kind, files = kinds[0], media[kinds[0]]
    metadata = _open_metadata(folder, name, kind, files)
    labels = _labels(files, name, has_metadata=metadata is not None)
    listed = [Path(str(file)) for file in metadata.columns["file_name"]] if metadata else files
    columns: dict[str, Column] = {
        kind: pa.chunked_array(
            [pa.array([{"bytes": None, "path": str(folder / file)} for file in listed], _MEDIA_STRUCT)]
        )
    }
    if labels:
        columns["label"] = _pack([labels[file] for file in listed])
    columns["file_name"] = _pack([file.as_posix() for file in listed])
    if metadata:
        columns |= {key: column for key, column in metadata.columns.items() if key not in (kind, "file_name")}
    return _Part(
        name=name,
        columns=columns,
        rows=len(listed),
        files={file.as_posix(): folder / file for file in files} | dict(metadata.files if metadata else {}),
        folder=folder,
        row_names=[file.as_posix() for file in listed],
    )


def _visible_files(folder: Path) -> list[Path]:
    """List files below `folder`, as sorted relative paths; hidden ones are left out."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name).relative_to(folder) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda file: file.parts)


def _no_media(found: Sequence[Path], name: str) -> MmhubError:
    if not found:
        return InputError(f"folder '{name}' is empty", "name a file, or a folder with images or audio")
    counts = Counter(file.suffix.lower() or "(no extension)" for file in found)
    there = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5))
    tables = [file for file in found if _extension(file) in _READERS]
    hint = f"name the table, such as '{Path(name, tables[0]).as_posix()}'" if tables else "name a file"
    return UsageError(f"folder '{name}' has no images or audio; found {there}", hint)


def _labels(files: Sequence[Path], name: str, *, has_metadata: bool) -> dict[Path, str]:
    """Read each file's class off its sub-folder; {} for a flat folder."""
    classes = {file.parts[0] for file in files if len(file.parts) > 1}
    beside = [file for file in files if len(file.parts) == 1]
    if not classes or (beside and has_metadata):
        return {}
    if beside:
        raise UsageError(
            f"'{name}' has class folders and {len(beside)} files beside them (first: '{beside[0]}')",
            "move the files into a class folder, or all of them into one folder",
        )
    if not has_metadata and classes <= _SPLITS:
        shown = ", ".join(f"'{Path(name, part).as_posix()}'" for part in sorted(classes))
        raise UsageError(f"'{name}' holds splits, not classes", f"name one: {shown}")
    return {file: file.parts[0] for file in files}


def _open_metadata(folder: Path, name: str, kind: str, files: Sequence[Path]) -> _Part | None:
    """Open the folder's metadata table, if it has one, and check that it and the media name the same files."""
    path = next((p for p in (folder / "metadata.csv", folder / "metadata.jsonl") if p.is_file()), None)
    if path is None:
        return None
    shown = f"{name}/{path.name}"
    part = _open_file(path, shown, None)
    if "file_name" not in part.columns:
        raise InputError(f"'{shown}' has no column 'file_name'", f"it has {', '.join(part.columns)}")
    listed = [None if v is None else str(v) for v in Rows(shown, [part]).column("file_name")]
    names = [os.path.normpath(file) if file else "" for file in listed]
    there = {str(file) for file in files}
    for row, file in enumerate(names, 1):
        if file not in there:
            hint = did_you_mean(file, there) or f"every row names one {kind} file below '{name}'"
            raise InputError(f"'{shown}' row {row} names '{listed[row - 1] or ''}', which is not there", hint)
    if unlisted := sorted(there - set(names)):
        raise InputError(f"'{shown}' does not list {len(unlisted)} {kind} files (first: '{unlisted[0]}')")
    return _Part(name=shown, columns=part.columns | {"file_name": list(names)}, rows=part.rows, files=part.files)


# Hub data sets.


def _hub_id(text: str, base: Path | None) -> re.Match[str] | None:
    """Match a Hub data set; without a scheme only `org/name` that cannot be meant as a local path."""
    for scheme in _HUB_SCHEMES:
        if text.startswith(scheme):
            if match := _HUB_ID.fullmatch(text.removeprefix(scheme)):
                return match
            raise UsageError(f"'{text}' does not name a Hub data set", "write hub:org/name[@revision][#config][:split]")
    match = _HUB_ID.fullmatch(text)
    if match is None or "/" not in match["id"] or _find(text, base):
        return None
    path = Path(match["id"])
    is_file = bool({_extension(path), path.suffix.lower()} & {*_READERS, *_COMPRESSED})
    is_typo = any((anchor / path.parent).is_dir() and _near(anchor / path) for anchor in _anchors(base))
    return None if is_file or is_typo else match


def _open_hub(text: str, match: re.Match[str], split: str) -> _Part:
    repo, revision, config = match["id"], match["revision"], match["config"]
    split = match["split"] or split
    if not _offline():
        revision = _hub_commit(repo, revision)
    elif not _cached(repo):
        raise NetworkError(f"data set '{repo}' is not in the cache, and offline mode is on", "unset HF_HUB_OFFLINE")
    data = _load_hub(repo, config, revision, split)
    commit = _loaded_commit(data)
    if revision and commit and revision != commit:  # `datasets` quietly falls back to whatever it has in its cache
        problem = f"data set '{repo}' is not in the cache at revision '{revision}', only at commit {commit}"
        raise NetworkError(problem, f"go online, or name that commit: {repo}@{commit}")
    table = data.with_format("arrow")[:]  # media come out as `{bytes, path}`, undecoded
    if not table.num_rows:
        raise InputError(f"data set '{text}' has no rows")
    return _Part(
        name=f"{repo}:{split}", columns=_table_columns(table, repo), rows=table.num_rows, revision=commit or revision
    )


def _offline() -> bool:
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def _cached(repo: str) -> bool:
    """Say whether the client's caches hold anything of this data set; spares the import of `datasets` when not."""
    from huggingface_hub import constants

    datasets_cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
    folders = (
        os.path.join(datasets_cache, repo.replace("/", "___")),
        os.path.join(constants.HF_HUB_CACHE, "datasets--" + repo.replace("/", "--")),
    )
    return any(os.path.isdir(os.path.expanduser(folder)) for folder in folders)


def _hub_commit(repo: str, revision: str | None) -> str | None:
    """Ask the Hub once for the commit, so that an absent data set or network fails at once and not after retries."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        return api.dataset_info(repo, revision=revision, timeout=_HUB_SECONDS).sha
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"data set '{repo}' has no revision '{revision}'") from None
    except errors.GatedRepoError:
        raise MmhubError(f"data set '{repo}' is gated", "ask for access on its page, then run: hf auth login") from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; a private one needs: hf auth login"
        raise NotFoundError(f"no file, folder or Hub data set '{repo}'", hint) from None
    except errors.HFValidationError as error:
        raise UsageError(f"'{repo}' cannot be a Hub data set: {_brief(error)}") from None
    except Exception as error:  # the HTTP library underneath differs between versions of huggingface_hub
        hint = "HF_HUB_OFFLINE=1 uses the cached copy" if _cached(repo) else "check the network and HF_ENDPOINT"
        raise NetworkError(f"cannot ask {api.endpoint} for data set '{repo}': {_brief(error)}", hint) from None


def _load_hub(repo: str, config: str | None, revision: str | None, split: str) -> Any:
    """Download and prepare one split."""
    import datasets

    try:
        # a bare id would load a local folder of that name in its place
        return datasets.load_dataset(f"hf://datasets/{repo}", config, revision=revision, split=split)
    except ConnectionError as error:
        raise NetworkError(f"cannot download data set '{repo}': {_brief(error)}") from None
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot load data set '{repo}': {_brief(error)}") from None
    except ValueError as error:  # an unknown split, or one of several configs must be named
        raise UsageError(f"cannot load data set '{repo}': {_brief(error)}", "write org/name#config:split") from None
    except Exception as error:  # a repository can be broken in any way its author managed
        raise MmhubError(f"cannot load data set '{repo}': {_brief(error)}") from None


def _loaded_commit(data: Any) -> str | None:
    """Read the commit off the cache folder that the rows lie in."""
    folders = [Path(file["filename"]).parent.name for file in data.cache_files]
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)
