"""Rows of data sets larger than memory, read in passing: each rank its own share, shuffled in windows, resumable.

One background thread reads the next window of rows while the batches of the last one are handed out; decoding is left
to the loader's workers, whose number can therefore change nothing. docs/streaming.md says what is promised.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mmhub.config import DataRecipe, MixRecipe
from mmhub.data.addresses import File, is_url, shown_address
from mmhub.data.cells import all_parts, cell
from mmhub.data.lanes import Lane, Place, Unit, batch_shares, lane_rows, scramble, split_number
from mmhub.data.parts import reading
from mmhub.data.shards import Row, Shard, find_shards, is_tar
from mmhub.data.sources import require_columns
from mmhub.data.windows import Cut, Numbered, ahead, windows
from mmhub.errors import InputError, NetworkError, UsageError

_FEW = 64  # files of a source, up to which parquet row groups are units
_FOOTERS = 512  # files elsewhere, up to which all parquet footers are read at the start
_HASHED = 2**30  # bytes of a stream's local files, up to which they are hashed for provenance
_LISTED = 100  # files that provenance lists one by one
_TRIES = 3  # to go on reading a file elsewhere


def wants_stream(data: DataRecipe) -> bool:
    """Say whether training rows are streamed: by wish, as they are mixed, or as only a stream can read them."""
    sources = _texts(data.train)
    return data.stream or bool(data.mix) or any(is_tar(text) or is_url(text) for text in sources)


def _texts(source: Any) -> list[str]:
    if isinstance(source, str):
        return [source]
    return list(source.values() if isinstance(source, dict) else source)


def open_stream(data: DataRecipe, base: Path | None, tell: Callable[[str], None] | None = None) -> Stream:
    """Open the training rows of a recipe as a stream.

    A source is a file (.parquet .tar .jsonl .json .csv .tsv .txt; text and tar also as .gz or .zst), a glob, a name
    with `{0000..0099}` braces, an fsspec address (`s3://bucket/*.tar`), `hf://datasets/org/name/FILES`, a Hub data set
    `[hub:]org/name[@revision][#config][:split]`, a list of these, or a table of parallel text files. Relative paths
    start from `base`, then from the current folder. `tell` is given a line for whatever is skipped.

    Raises:
        NotFoundError, NetworkError: a source is not there, or cannot be reached. InputError: a shard is empty or
        damaged. UsageError: it cannot be streamed, or a weight or window is not positive.
    """
    if data.mix and data.train:
        raise UsageError("data.train and data.mix are both given", "move the training data into data.mix")
    if data.shuffle_rows < 1:
        raise UsageError(f"data.shuffle_rows is {data.shuffle_rows}", "it must be at least 1")
    parts = data.mix or [MixRecipe(source=data.train)]
    for part in parts:
        if not 0 < part.weight < math.inf:
            raise UsageError(f"data.mix has the weight {part.weight}", "weights are finite and above 0")
    return Stream(parts, base, data, tell or _print)


def _print(text: str) -> None:
    print(text, file=sys.stderr)


@final
class Stream:
    """Rows read in passing; made by `open_stream`. A row's number says its unit and its place there, see `where`."""

    def __init__(
        self, parts: Sequence[MixRecipe], base: Path | None, data: DataRecipe, tell: Callable[[str], None]
    ) -> None:
        self.tell = tell
        self.skipped = 0  # shards and rows that this process left out so far, also before the place it resumed from
        self._absent: list[str] = []  # what of them was left out when the stream was opened, until that is told
        self._fingerprint: dict[str, Any] = {}
        self.shuffle_rows = data.shuffle_rows
        self._skips = data.on_error == "skip"
        self._wanted: tuple[str, ...] | None = None
        self._shards: list[Shard] = []
        self._headers: list[tuple[str, ...]] = []  # for each shard, the columns of its source
        self._sources: list[_Source] = []
        for part in parts:
            self._add(part, find_shards(part.source, data.columns or None, base))
        self.source = ", ".join(source.name for source in self._sources)
        self.columns = tuple(dict.fromkeys(name for source in self._sources for name in source.columns))
        self._units = [unit for source in self._sources for unit in source.units]
        listing = [(file.name.rsplit("/", 1)[-1], file.size, _hash(file.tag)) for file in self._files()]
        self._identity = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]

    @property
    def rows(self) -> int | None:
        """The rows of an epoch: counted, for a mix expected, None where only reading would tell."""
        total = sum(source.weight for source in self._sources)
        needed = [None if s.rows is None else s.rows * total / s.weight for s in self._sources]
        return None if None in needed else round(max(rows for rows in needed if rows is not None))

    @property
    def bytes(self) -> int:
        return sum(shard.size for shard in self._shards)

    def only(self, names: Iterable[str]) -> Stream:
        """Return the same stream reading these columns alone, which of parquet and tar spares reading the others.

        Raises:
            UsageError: there is no such column.
        """
        view = copy.copy(self)
        view._wanted = tuple(all_parts(names, self.columns))
        require_columns(view, view._wanted)  # type: ignore[arg-type]
        return view

    def __iter__(self) -> Iterator[Row]:
        """Yield all rows once, in the order of the files."""
        return (row for _, row in self.numbered())

    def numbered(self) -> Iterator[Numbered]:
        """Yield all rows once with their numbers, in the order of the files; nothing is told or counted as skipped."""
        rows = ((unit, *found) for unit in self._units for found in self._read(unit, 0, False))
        return ((unit.row_number(place), row) for unit, place, row in rows if row is not None)

    def cells(self, name: str) -> Iterator[tuple[int, Any]]:
        """Yield (row number, value) of one column, once over all files in their order."""
        return ((number, cell(row, name)) for number, row in self.only([name]).numbered())

    def column(self, name: str) -> Iterator[Any]:
        """Yield the values of one column, once over all files in their order."""
        return (value for _, value in self.cells(name))

    def where(self, number: int) -> str:
        """Say where a row came from, for error messages: 'train-0003.parquet row 17' (rows from 1)."""
        unit, row = split_number(number)
        return f"{self._shards[self._units[unit].shard].name} row {self._units[unit].first + row + 1}"

    def folder(self, number: int) -> Path | None:
        """Return the folder of the file a row came from, where relative media paths start; None if it is elsewhere."""
        return self._shards[self._units[split_number(number)[0]].shard].file.folder

    def batches_known(self, batch_size: int, world: int, epoch: int, seed: int) -> int | None:
        """Return the most batches that a rank has in a whole epoch; None where only reading would tell.

        Of a mix it is what weights lead to expect; rows that are left out make it fewer.
        """
        shares = batch_shares(batch_size, world)
        longest, total = [0.0] * world, sum(source.weight for source in self._sources)
        for number, source in enumerate(self._sources):
            if source.rows is None:
                return None
            sizes, part = [unit.size for unit in source.units], source.weight / total
            rows = lane_rows(sizes, shares, scramble(seed, epoch, number, 0))
            longest = [max(most, count / part) for most, count in zip(longest, rows, strict=True)]
        return max(math.ceil(round(most, 6) / share) for most, share in zip(longest, shares, strict=True))

    def batches(
        self,
        epoch: int,
        *,
        seed: int,
        rank: int,
        world: int,
        cut: Cut,
        batch_size: int = 0,
        state: dict[str, Any] | None = None,
    ) -> Iterator[tuple[list[Numbered], dict[str, Any]]]:
        """Yield what is left of this rank's share of an epoch: (numbered rows of a batch, state after it).

        `batch_size` is that of all ranks together, of which each gives its `batch_shares`: rows are dealt in these
        proportions, and windows hold whole ones, so that only a rank's last batch has fewer. It is 0 where batches have
        no number of rows. `cut(rows, seed)` makes batches of a window's numbered rows. `state` is that of an earlier
        `batches` of the same epoch, or what `join_states` made of those of all ranks; there may be more or fewer ranks
        than then. States are ready for JSON.

        Raises:
            UsageError: `state` is of other data or another epoch. InputError: a shard or row cannot be read.
            NetworkError: a shard cannot be reached.
        """
        shares = self._check(state, epoch) if state else batch_shares(batch_size, world)
        lanes, own = len(shares), batch_shares(batch_size, world)[rank]
        if rank == 0:
            self._tell_absent()
            self.fingerprint()  # of the files as they are now
        places = {str(lane): (state or {"at": {}})["at"].get(str(lane)) for lane in range(rank, lanes, world)}
        places = {lane: place for lane, place in places.items() if place is not None}
        self.skipped += sum(place["skipped"] for place in places.values())
        for lane in range(rank, lanes, world):
            for batch, place in self._lane_batches((seed, epoch), lane, shares, own, cut, places.get(str(lane))):
                places = places | {str(lane): place}
                yield batch, {"epoch": epoch, "lanes": shares, "shards": self._identity, "at": places}

    def fingerprint(self) -> dict[str, Any]:
        """Say what is read, for provenance: source, rows if known, bytes, and every file with what identifies it.

        Local files of up to 1 GiB together have a sha256; larger and distant ones their etag, hash on the Hub or time
        of change. More than 100 files are one entry, its `listing_sha256` made of their names, sizes and marks. It is
        made when it is first asked for; a file that cannot be read then has a note instead of its sha256.
        """
        if not self._fingerprint:
            self._fingerprint.update(self._describe())
        return copy.deepcopy(self._fingerprint)

    def _describe(self) -> dict[str, Any]:
        files = self._files()
        entries = [{"name": file.name, "bytes": file.size, **_mark(file.tag)} for file in files]
        if all(file.filesystem is None for file in files) and self.bytes <= _HASHED:
            for file, entry in zip(files, entries, strict=True):
                entry |= _sha256(file)
                entry.pop("modified", None)
        if len(entries) > _LISTED:
            listing = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
            entries = [{"name": self.source, "bytes": self.bytes, "files": len(entries), "listing_sha256": listing}]
        found = {"source": self.source, "streamed": True, "rows": self.rows, "bytes": self.bytes, "files": entries}
        commits = sorted({file.commit for file in files if file.commit})
        found |= {"revision": commits[0]} if len(commits) == 1 else {"revisions": commits} if commits else {}
        weights = [{"source": source.name, "weight": source.weight} for source in self._sources]
        return found | ({"mix": weights} if len(weights) > 1 else {})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tell": _print}  # for worker processes; a reporter stays where it is

    # Opening.

    def _add(self, part: MixRecipe, shards: Sequence[Shard]) -> None:
        few = len(shards) <= _FEW
        known = self._footers(shards, keep=few)
        kept = [(shard, groups) for shard, groups in zip(shards, known, strict=True) if groups != []]
        counted = all(groups is not None for _, groups in kept)
        units: list[Unit] = []
        first = sum(len(source.units) for source in self._sources)
        for shard, groups in kept:
            for group, start, rows in _groups(groups, split=few):
                share = 1.0 if group is None else rows / sum(groups or (1,))
                size = rows if counted else round(shard.size * share)
                units.append(Unit(first + len(units), len(self._shards), group, start, size))
            self._shards.append(shard)
        name = _shown_source(part.source)
        total = sum(sum(groups) for _, groups in kept if groups) if counted else None
        columns = self._columns(name, [shard for shard, _ in kept])
        self._headers += [columns] * len(kept)
        self._sources.append(_Source(name, units, part.weight, total, columns))

    def _footers(self, shards: Sequence[Shard], *, keep: bool) -> list[list[int] | None]:
        """Return the rows of each shard's row groups, None where unknown, [] for a shard that is left out."""

        def look(shard: Shard) -> list[int] | None:
            try:
                if not shard.size and shard.file.filesystem is None:
                    raise InputError(f"'{shard.name}' is empty")
                groups = shard.group_rows(keep=keep) if not distant or len(shards) <= _FOOTERS else None
                if groups is not None and not sum(groups):
                    raise InputError(f"'{shard.name}' has no rows")
                return groups
            except InputError as error:
                self._may_skip(error)
                self._absent.append(f"skipped: {error}")
                return []

        distant = any(shard.file.filesystem is not None for shard in shards)
        if not distant:
            return [look(shard) for shard in shards]
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(look, shards))

    def _columns(self, name: str, shards: Sequence[Shard]) -> tuple[str, ...]:
        for shard in shards:
            try:
                return shard.columns()
            except InputError as error:
                self._may_skip(error)  # reading comes upon it again
        raise InputError(f"'{name}' has no readable shard")

    def _may_skip(self, error: InputError) -> None:
        if not self._skips:
            error.hint = error.hint or 'mend it, or set data.on_error = "skip"'
            raise error

    def _leave_out(self, error: InputError, aloud: bool) -> None:
        """Skip what cannot be read where the recipe says so; tell and count it, unless another one does."""
        self._may_skip(error)
        if aloud:
            self.skipped += 1
            self.tell(f"skipped: {error}")

    def _tell_absent(self) -> None:
        """Tell what was left out when the stream was opened, which all ranks have seen."""
        self.skipped += len(self._absent)
        while self._absent:
            self.tell(self._absent.pop(0))

    # Reading.

    def _read(self, unit: Unit, start: int, aloud: bool) -> Iterator[tuple[int, Row | None]]:
        """Yield the rows of a unit from one on, with their places in it; None for a row, or the rest, left out."""
        shard, failed, checked, bad = self._shards[unit.shard], 0, False, None
        while True:
            try:
                for row, value in enumerate(shard.rows(self._wanted, start, unit.group), start):
                    if isinstance(value, InputError):
                        bad, start = _at(value, self.where(unit.row_number(row))), row + 1
                        self._leave_out(bad, aloud)
                        yield row, None
                        continue
                    if not checked and (bad := self._columns_error(unit, value)):
                        raise bad
                    checked, start, failed = True, row + 1, 0
                    yield row, value
                return
            except InputError as error:
                self._leave_out(error if error is bad else _after(error, unit.first + start), aloud)
                yield start, None
                return
            except NetworkError:
                failed += 1
                if failed == _TRIES:
                    raise
                time.sleep(2**failed - 1)

    def _columns_error(self, unit: Unit, row: Row) -> InputError | None:
        shard, header = self._shards[unit.shard], self._headers[unit.shard]
        missing = [name for name in self._wanted or header if name in header and name not in row]
        if shard.has_header and missing:
            there = ", ".join(shard.columns())
            return InputError(f"shards disagree: '{shard.name}' has no column {missing[0]!r}", f"it has {there}")
        return None

    def _lane_batches(
        self,
        key: tuple[int, int],
        lane: int,
        shares: Sequence[int],
        batch: int,
        cut: Cut,
        state: dict[str, Any] | None,
    ) -> Iterator[tuple[list[Numbered], dict[str, Any]]]:
        sources = [(source.units, source.weight) for source in self._sources]
        place = Place.of(state) if state else None
        walk = Lane(sources, self._read, key=key, lane=lane, shares=shares, place=place)
        begun = state["rows"] if state else 0
        for window in ahead(windows(walk, self.shuffle_rows, batch, scramble(*key, lane), begun)):
            yield from window.batches(cut, state)
            state = None

    # What the rows are of.

    def _files(self) -> list[Any]:
        return [file for shard in self._shards for file in shard.files]

    def _check(self, state: dict[str, Any], epoch: int) -> list[int]:
        """Return the shares of the lanes that a state is of."""
        if state["epoch"] != epoch:
            raise UsageError(f"the place in the stream is one of epoch {state['epoch'] + 1}, not {epoch + 1}")
        if state["shards"] != self._identity:
            raise UsageError(
                f"the shards of '{self.source}' have changed since this run was saved (other files or sizes)",
                "restore them, or start a new run with another --out",
            )
        return list(state["lanes"])


@dataclass(frozen=True)
class _Source:
    name: str
    units: Sequence[Unit]
    weight: float
    rows: int | None
    columns: tuple[str, ...]


def join_states(states: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Join the states of all ranks into the state of a run; of the same lane the later one counts.

    A rank that has had no batch since a resume has no state of its own: begin with the state the run was resumed from.
    """
    joined: dict[str, Any] | None = None
    for state in states:
        if state is not None and joined is not None and joined["epoch"] == state["epoch"]:
            joined = state | {"at": joined["at"] | state["at"]}
        elif state is not None and (joined is None or joined["epoch"] < state["epoch"]):
            joined = state
    return joined


def _groups(groups: list[int] | None, *, split: bool) -> Iterator[tuple[int | None, int, int]]:
    """Yield (group, first row, rows) of the units of a shard."""
    if groups is None or not split or len(groups) == 1:
        yield None, 0, sum(groups or ())
        return
    start = 0
    for group, rows in enumerate(groups):
        if rows:
            yield group, start, rows
        start += rows


def _at(error: InputError, place: str) -> InputError:
    text = error.message if error.message.startswith("'") else f"{place}: {error.message}"
    return InputError(text, error.hint)


def _after(error: InputError, row: int) -> InputError:
    return InputError(f"{error.message}, after row {row}", error.hint) if row else error


def _sha256(file: File) -> dict[str, str]:
    try:
        with reading(file.name), file.open() as opened:
            return {"sha256": hashlib.file_digest(opened, "sha256").hexdigest()}  # type: ignore[arg-type]
    except InputError as error:
        return {"note": str(error)}


def _hash(tag: str) -> str:
    """Return a tag if it is a hash of the content, which stays when a data set has a new commit or a file is copied."""
    return tag if tag.startswith(("sha256 ", "blob_id ")) else ""


def _mark(tag: str) -> dict[str, Any]:
    name, _, value = tag.partition(" ")
    return {name.lower(): value} if value else {}


def _shown_source(source: Any) -> str:
    if isinstance(source, dict):
        return " + ".join(shown_address(file) for file in source.values())
    files = [source] if isinstance(source, str) else list(source)
    shown = [shown_address(file) for file in files[:4]] + ([f"{len(files) - 4} more"] if len(files) > 4 else [])
    return ", ".join(shown)
