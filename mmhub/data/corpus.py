"""A corpus: the texts of a data set as one long array of token ids, read once and kept for all epochs.

What one text, a document, is made of is for the recipe to say; which of them make a batch, for `mmhub.data.blocks`.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, final

import numpy as np
from numpy.typing import NDArray

from mmhub.data.loader import usable
from mmhub.data.sources import Rows
from mmhub.data.stream import Stream
from mmhub.discovery import cache_folder
from mmhub.errors import InputError, UsageError
from mmhub.files import disk_errors
from mmhub.interfaces import Policy, describe_raw

Numbered = tuple[int, str]  # a text with the number of the row it begins in

_IN_MEMORY = 2**30  # bytes of ids above which they are kept in a file
_TOGETHER = 256  # texts that are tokenized in one call where the processor can
_WHAT = "the corpus (MMHUB_CACHE says where)"
_FIX = 'fix the row, or set data.on_error = "skip"'


def documents(
    rows: Rows | Stream, column: str, document: str = "row", skipped: list[str] | None = None
) -> Iterator[tuple[int, str]]:
    r"""Yield the texts of a data set, each with the number of its first row.

    `document` says what one text is: "row"; "file", all rows of a file joined by "\n"; "blank-line", rows up to an
    empty or missing one; or a regular expression that begins with "^" and matches the first row of each text. Texts
    without anything but blanks are left out. `skipped` takes messages about rows that are not text, which else are
    errors.

    Raises:
        UsageError: there is no such column, or `document` is none of these; of a stream it must be "row".
        InputError: a row is not text.
    """
    begins = _beginning(document, rows)
    numbered = rows.cells(column) if isinstance(rows, Stream) else enumerate(rows.column(column))
    cells = _texts(numbered, column, rows.where, skipped, missing="" if document == "blank-line" else None)
    if document == "row":
        yield from ((number, text) for number, text in cells if text.strip())
        return
    first, lines = 0, list[str]()
    for number, text in cells:
        line = text.removesuffix("\n")  # some data sets keep it
        if begins(number, line):
            yield from _joined(first, lines)
            lines = []
        first = first if lines else number
        if line.strip() or document != "blank-line":
            lines.append(line)
    yield from _joined(first, lines)


def _beginning(document: str, rows: Rows | Stream) -> Callable[[int, str], bool]:
    """Return what says whether a document begins in a row, given its number and text; asked of rows in their order."""
    if document.startswith("^"):
        try:
            pattern = re.compile(document)
        except re.error as error:
            raise UsageError(f"data.document {document!r} is not a regular expression: {error}") from None
        return lambda number, line: pattern.match(line) is not None
    if document == "file" and isinstance(rows, Rows):
        return _FileChange(rows)
    if document in ("row", "blank-line"):
        return lambda number, line: not line.strip()
    hint = 'it is "row", "file", "blank-line", or a regular expression that begins with "^", such as "^ = [^=]"'
    raise UsageError(f"data.document is {document!r}", hint)


class _FileChange:
    """Say of each row whether it is of another file than the last one that was asked for."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.part = rows, -1

    def __call__(self, number: int, line: str) -> bool:
        before, self.part = self.part, self.rows.part(number)
        return self.part != before


def _joined(first: int, lines: list[str]) -> Iterator[Numbered]:
    text = "\n".join(lines)
    if text.strip():
        yield first, text


def _texts(
    cells: Iterable[tuple[int, Any]],
    column: str,
    where: Callable[[int], str],
    skipped: list[str] | None,
    missing: str | None = None,
) -> Iterator[Numbered]:
    """Yield the texts of cells; for an empty cell `missing`, nothing where that is None."""
    for number, cell in cells:
        text = usable("text", cell)
        text = missing if text is None else text
        if text is None:
            continue
        problem = _problem(text)
        if not problem:
            yield number, text
            continue
        problem = f"{where(number)}, column '{column}': {problem}"
        if skipped is None:
            raise InputError(problem, _FIX)
        skipped.append(problem)


def _problem(text: Any) -> str:
    """Say why a cell is no text, '' where it is one."""
    if not isinstance(text, str):
        return f"a text is expected, got {describe_raw(text)}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text holds characters that are not valid Unicode"
    return ""


@final
@dataclass(frozen=True)
class Corpus:
    """Token ids of documents back to back.

    Attributes:
        ids: those of all documents; document k ends at `ends[k]`. rows: the number of each one's first row.
        words, utf8: whitespace-separated words and UTF-8 bytes of the texts. unknown: tokens that stand for a word
            which the vocabulary lacks. skipped: a message for each text that could not be read.
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    rows: NDArray[np.int64]
    words: int
    utf8: int
    unknown: int
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        texts: Iterable[Numbered],
        processor: Any,
        policy: Policy | None = None,
        *,
        where: Callable[[int], str],
        skip: bool = False,
        skipped: list[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Corpus:
        """Tokenize texts with a `LanguageProcessor`.

        `where` names a row in messages. `skip` leaves out what cannot be read; `skipped` is the list that notes it.
        `progress` is told the number of texts that are done, now and then. More than 1 GiB of ids go into a file in the
        cache folder, which disappears with the process.

        Raises:
            InputError: a text cannot be read (unless `skip`), or there is no text at all.
        """
        skipped = [] if skipped is None else skipped
        ids, ends, rows = _Ids(), array("q"), array("q")
        words = size = unknown = 0
        missing = getattr(processor, "unknown_id", None)
        for group in _groups(texts):
            for (number, text), found in zip(group, _read_group(group, processor, policy or Policy()), strict=True):
                if isinstance(found, InputError):
                    error = InputError(f"{where(number)}: {found.message}", found.hint or _FIX)
                    if not skip:
                        raise error
                    skipped.append(str(error))
                    continue
                if not len(found):  # a text that the tokenizer makes nothing of
                    continue
                ids.add(found)
                ends.append(ids.count)
                rows.append(number)
                words, size = words + len(text.split()), size + len(text.encode())
                unknown += int((found == missing).sum()) if missing is not None else 0
            if progress is not None:
                progress(len(ends))
        if not ends:
            hint = f"the first of {len(skipped)} that were skipped: {skipped[0]}" if skipped else "check the data"
            raise InputError("there is no text in the corpus", hint)
        where_all = np.frombuffer(ends, np.int64), np.frombuffer(rows, np.int64)
        return cls(ids.whole(), *where_all, words=words, utf8=size, unknown=unknown, skipped=skipped)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    @property
    def predictions(self) -> int:
        """How many tokens are predicted in one pass: all but the first of each document."""
        return int(np.maximum(self.ends - self.starts - 1, 0).sum())

    def document(self, number: int) -> NDArray[np.int32]:
        """Return the ids of one document."""
        return self.ids[int(self.ends[number - 1]) if number else 0 : int(self.ends[number])]

    def digest(self) -> bytes:
        """Hash the ids and where documents end; the same for all processes that read the same texts."""
        return hashlib.sha256(self.ids.data).digest() + hashlib.sha256(self.ends.data).digest()

    def describe(self) -> str:
        """Say in one line how much it is."""
        unknown = f", {100 * self.unknown / len(self.ids):.2f} % unknown" if self.unknown else ""
        count = f"{len(self):,} document{'s' * (len(self) != 1)}, {len(self.ids):,} tokens"
        return f"{count}{unknown}, {self.words:,} words, {self.utf8:,} bytes"


class _Ids:
    """Ids that grow: in memory first, in a file once they are many."""

    def __init__(self) -> None:
        self.count = 0
        self._pieces: list[NDArray[np.int32]] = []
        self._folder = Path()  # that the file is in
        self._file: IO[bytes] | None = None

    def add(self, ids: NDArray[np.int32]) -> None:
        self.count += len(ids)
        if self._file is not None:
            with disk_errors(_WHAT, self._folder):
                self._file.write(ids.tobytes())
            return
        self._pieces.append(ids)
        if self.count * ids.itemsize > _IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        self._folder = Path(cache_folder())
        with disk_errors(_WHAT, self._folder):
            os.makedirs(self._folder, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="corpus-")  # noqa: SIM115 - lives as its ids
            for piece in self._pieces:
                self._file.write(piece.tobytes())
        self._pieces = []

    def whole(self) -> NDArray[np.int32]:
        if self._file is None:
            return np.concatenate(self._pieces)
        with self._file as file:  # the mapping keeps it
            with disk_errors(_WHAT, self._folder):
                file.flush()
            return np.memmap(file, np.int32, mode="r", shape=(self.count,))


def _groups(texts: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    """Texts in groups that are small enough to hold twice."""
    group: list[Numbered] = []
    size = 0
    for pair in texts:
        group.append(pair)
        size += len(pair[1])
        if len(group) == _TOGETHER or size > 2**24:
            yield group
            group, size = [], 0
    if group:
        yield group


def _read_group(group: list[Numbered], processor: Any, policy: Policy) -> list[NDArray[np.int32] | InputError]:
    """Return the ids of each text, or what is wrong with it."""
    if len(group) > 1 and hasattr(processor, "read_many"):
        try:
            return [_plain(ids) for ids in processor.read_many([text for _, text in group], policy)]
        except InputError:
            pass  # one by one, to find out which
    return [_read_one(text, processor, policy) for _, text in group]


def _read_one(text: str, processor: Any, policy: Policy) -> NDArray[np.int32] | InputError:
    try:
        return _plain(processor.read(text, policy))
    except InputError as error:
        return error


def _plain(ids: Any) -> NDArray[np.int32]:
    return np.asarray(ids, np.int32)
