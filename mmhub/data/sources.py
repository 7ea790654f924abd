"""Rows of a data set, whatever it is kept in: tables, text, parallel text, folders of media, Hub data sets.

Nothing is decoded here: media stay paths or `{bytes, path}` structs, csv and tsv fields stay strings ("007" is not 7).
Batching and decoding are the loader's and the processors' part.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias, final

from mmhub.data.cells import all_parts, parts_of
from mmhub.data.cells import join as joined
from mmhub.data.folders import open_folder
from mmhub.data.hub_sets import hub_id, open_hub
from mmhub.data.parts import (
    Column,
    Part,
    anchors,
    find_path,
    join,
    no_such_path,
    scheme_of,
    shown_name,
    started_from,
    values_of,
)
from mmhub.data.plugged import open_plugged
from mmhub.data.tables import open_file, open_objects, open_parallel
from mmhub.errors import NotFoundError, UsageError, did_you_mean

File: TypeAlias = "str | os.PathLike[str]"
Source: TypeAlias = "File | Sequence[File | Mapping[str, Any]] | Mapping[str, File]"


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

    def __init__(self, source: str, parts: Sequence[Part]) -> None:
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
        """Yield the values of one column in row order, without touching the others; "a+b" is a pair of two columns.

        Raises:
            UsageError: there is no such column.
        """
        parts = parts_of(name, self._data)
        if len(parts) > 1:
            cells = zip(*map(self.column, parts), strict=True)
            return (joined(list(values)) for values in cells)
        require_columns(self, [name])
        column = self._data[name]
        return values_of(column) if self._index is None else (_value(column, at) for at in self._index)

    def where(self, i: int) -> str:
        """Say where row `i` came from, for error messages: 'train.csv row 17' (data rows from 1), or the media file."""
        part, row, _ = self._locate(i)
        return f"{part.name}/{part.row_names[row]}" if part.row_names else f"{part.name} row {row + 1}"

    def part(self, i: int) -> int:
        """Return the number of the file (folder, Hub data set) row `i` came from, which its name alone may not tell."""
        return self._locate(i)[2]

    def folder(self, i: int) -> Path | None:
        """Return the folder of the file row `i` came from, where relative media paths start; None for Hub data sets."""
        return self._locate(i)[0].folder

    def select(self, indices: Iterable[int]) -> Rows:
        """Return a view of these rows, in this order; data are shared, repeats are allowed."""
        view = copy.copy(self)
        view._index = array("q", (self._at(int(i)) for i in indices))
        return view

    @property
    def bytes(self) -> int:
        """The size of all files the rows are read from."""
        return sum(path.stat().st_size for part in self._parts for path in part.files.values())

    def fingerprint(self) -> dict[str, Any]:
        """Say what the rows were read from, for provenance: source, rows, bytes, and the sha256 of every file.

        A media folder is one entry, hashed over the names and hashes of its files. Absolute paths are left out.
        A selection adds the sha256 of its row numbers; a Hub data set has its commit in place of files. Plugins whose
        data sources read the rows are named, and the files they found.
        """
        files = [entry for part in self._parts for entry in part.fingerprint()]
        found = {"source": self.source, "rows": len(self), "bytes": sum(f["bytes"] for f in files), "files": files}
        revisions = [part.revision for part in self._parts if part.revision]
        found |= {"revision": revisions[0]} if revisions else {}
        readers = sorted({part.reader for part in self._parts if part.reader})
        found |= {"readers": readers} if readers else {}
        return found if self._index is None else found | {"selection": hashlib.sha256(self._index).hexdigest()}

    def _at(self, i: int) -> int:
        count = len(self)
        if not -count <= i < count:
            raise IndexError(f"row {i} of {count}")
        i %= count
        return i if self._index is None else self._index[i]

    def _locate(self, i: int) -> tuple[Part, int, int]:
        at = self._at(i)
        number = bisect_right(self._starts, at) - 1
        return self._parts[number], at - self._starts[number], number


def open_rows(
    source: Source, *, columns: Sequence[str] | None = None, base: Path | None = None, split: str = "train"
) -> Rows:
    """Open a data set.

    `source` is a file (.parquet .csv .tsv .jsonl .json .txt; text formats also as .gz or .zst), a glob or a list of
    both (shards with the same columns), a folder of images or audio (a sub-folder for each class, or flat; joined with
    its metadata.csv or metadata.jsonl by `file_name`), a table {name: text file, ...} of parallel text, a Hub data
    set `[hub:]org/name[@revision][#config][:split]`, a plugin's data source `SCHEME:ADDRESS`, or a list of rows, each a
    dict. Relative paths start from `base`, then from the current folder.

    csv is read with quoting, tsv without (a quote is text); blank lines are skipped in both, and in jsonl. txt has one
    column, "text", with a row for every line, blank ones too; only the last line end is not a row of its own.
    `columns` names the fields of a csv or tsv without a header (a first line equal to it is still a header) and the
    one column of a txt; formats that name their own columns ignore it. `split` is for Hub data sets.

    Raises:
        NotFoundError: no such file, folder, Hub data set or data source.
        InputError: a file is empty, damaged or malformed.
        UsageError: the format is unknown, or shards disagree.
        NetworkError: the Hub cannot be reached, or offline mode forbids asking it.
    """
    if isinstance(source, Mapping):
        return Rows(" + ".join(shown_name(file) for file in source.values()), [open_parallel(source, base)])
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        hub = hub_id(text, base)
        return Rows(shown_name(text), [open_hub(text, hub, split)] if hub else _open_text(text, columns, base, split))
    if not source:
        raise UsageError("the list of data files is empty", "name at least one file")
    objects = [item for item in source if isinstance(item, Mapping)]
    if len(objects) == len(source):
        return Rows("the given rows", [open_objects(objects, "the given rows")])
    if objects:
        raise UsageError("the list of data mixes rows and files", "give a list of dicts, or a list of files")
    files = [os.fspath(item) for item in source if not isinstance(item, Mapping)]
    parts = [part for file in files for part in _open_text(file, columns, base, split)]
    return Rows(", ".join(shown_name(file) for file in files), parts)


def require_columns(rows: Rows, names: Iterable[str], flag_hint: str | None = None) -> None:
    """Check that `rows` has these columns; `flag_hint` says which key or flag names them.

    Raises:
        UsageError: one is missing; lists the columns there are and near matches.
    """
    for name in all_parts(names, rows.columns):
        if name not in rows.columns:
            there = ", ".join(repr(column) for column in rows.columns)
            hints = [hint for hint in (did_you_mean(name, rows.columns), flag_hint) if hint]
            raise UsageError(f"no column {name!r} in '{rows.source}', which has {there}", "; ".join(hints) or None)


def _merge(parts: Sequence[Part]) -> dict[str, Column]:
    first = parts[0]
    for part in parts[1:]:
        if set(part.columns) != set(first.columns):
            raise UsageError(
                f"shards disagree: '{first.name}' has columns {', '.join(first.columns)}, "
                f"'{part.name}' has {', '.join(part.columns)}"
            )
    if len(parts) == 1:
        return first.columns
    return {name: join([part.columns[name] for part in parts]) for name in first.columns}


def _value(column: Column, at: int) -> Any:
    return column[at] if isinstance(column, list) else column[at].as_py()


def _open_text(text: str, columns: Sequence[str] | None, base: Path | None, split: str) -> list[Part]:
    """Open files, or what a plugin's data source calls `text`; a file of that very name comes first."""
    if scheme_of(text) and find_path(text, base) is None:
        return [open_plugged(text, base, split)]
    return _open_paths(text, columns, base)


def _open_paths(text: str, columns: Sequence[str] | None, base: Path | None) -> list[Part]:
    path = find_path(text, base)
    if path is not None:
        return [_open_path(path, shown_name(text), columns)]
    if not glob.has_magic(text):
        raise no_such_path(text, base)
    pattern = os.path.expanduser(text)
    for anchor in anchors(base):
        if found := sorted(glob.glob(pattern, root_dir=anchor, recursive=True)):
            return [_open_path(anchor / name, shown_name(name), columns) for name in found]
    raise NotFoundError(f"no file matches '{text}'", started_from(text, base))


def _open_path(path: Path, name: str, columns: Sequence[str] | None) -> Part:
    return open_folder(path, name) if path.is_dir() else open_file(path, name, columns)
