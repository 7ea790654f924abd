"""How the rows of an epoch are shared out among lanes, and one lane's walk over them, with the place it has reached.

All of it follows from the seed, the epoch and a few numbers, so that a walk can go on anywhere. An epoch's units
(files, or row groups of few parquet files) are shuffled and dealt whole to the lanes. Where they cannot be dealt
fairly, every lane reads all of them and takes every so many-th row.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from mmhub.data.loader import epoch_order
from mmhub.data.shards import Row

_ROW_BITS = 32
_UNFAIR = 1.5  # the largest lane's share, in fair shares, above which units are not dealt whole
_WORD = 2**64 - 1

# A unit's rows from one on, with their numbers in it, None for what is left out; True: say aloud what that is.
Read = Callable[["Unit", int, bool], Iterator[tuple[int, Row | None]]]


@dataclass(frozen=True)
class Unit:
    """What is read in one go: a shard, or a row group of it; `number` is its own in the whole stream."""

    number: int
    shard: int
    group: int | None
    first: int  # the row of the shard it starts with
    size: int  # rows where known for all, else bytes

    def row_number(self, row: int) -> int:
        return (self.number << _ROW_BITS) + row


def split_number(number: int) -> tuple[int, int]:
    """Split a row's number into its unit's number and its place in that."""
    return number >> _ROW_BITS, number & (2**_ROW_BITS - 1)


def scramble(*numbers: int) -> int:
    """Hash integers to 63 bits, the same on every machine (the mixing steps of SplitMix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + (number & _WORD) + 0x9E3779B97F4A7C15) & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state >> 1


def batch_shares(batch_size: int, lanes: int) -> list[int]:
    """Return how many rows of a batch each lane gives; at least one each, and else `batch_size` together.

    >>> batch_shares(8, 3), batch_shares(1, 2)
    ([3, 3, 2], [1, 1])
    """
    return [max(1, (batch_size + lanes - 1 - lane) // lanes) for lane in range(lanes)]


def deal(sizes: Sequence[int], shares: Sequence[int], key: int) -> tuple[list[list[int]], bool]:
    """Shuffle units by `key` and deal them to lanes in proportion to their shares; or all to each: True."""
    order, lanes = epoch_order(len(sizes), key, 0), len(shares)
    loads = [(0.0, lane) for lane in range(lanes)]
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    for place in sorted(range(len(order)), key=lambda place: -sizes[order[place]]):
        load, lane = loads[0]
        heapq.heapreplace(loads, (load + sizes[order[place]] / shares[lane], lane))
        dealt[lane].append(place)
    if not all(dealt) or max(loads)[0] > _UNFAIR * sum(sizes) / sum(shares):
        return [order] * lanes, lanes > 1
    return [[order[place] for place in sorted(lane)] for lane in dealt], False


def turns(shares: Sequence[int]) -> list[int]:
    """Return which lane takes which of consecutive rows, where all lanes read the same units.

    >>> turns([2, 2]), turns([3, 2])
    ([0, 1], [0, 1, 0, 1, 0])
    """
    equal = math.gcd(*shares)
    taken = [share // equal for share in shares]
    return [lane for turn in range(max(taken)) for lane in range(len(taken)) if turn < taken[lane]]


def lane_rows(sizes: Sequence[int], shares: Sequence[int], key: int) -> list[int]:
    """Return how many rows each lane has in one pass over units of so many rows."""
    dealt, striped = deal(sizes, shares, key)
    if not striped:
        return [sum(sizes[unit] for unit in units) for units in dealt]
    cycle, rows = turns(shares), [0] * len(shares)
    for place, unit in enumerate(dealt[0]):
        for slot, lane in enumerate(cycle):  # the rows r with (r + place) % len(cycle) == slot
            rows[lane] += max(0, -(-(sizes[unit] - (slot - place) % len(cycle)) // len(cycle)))
    return rows


@final
@dataclass
class Place:
    """Where a lane stands: rows drawn so far, and pass, unit and row in each source; pass -1: it has no row here.

    Likewise how many shards and rows were left out on the way.
    """

    draw: int
    sources: list[list[int]]
    skipped: int = 0

    @classmethod
    def start(cls, sources: int) -> Place:
        return cls(0, [[0, 0, 0] for _ in range(sources)])

    @classmethod
    def of(cls, table: dict[str, Any]) -> Place:
        return cls(table["draw"], [list(source) for source in table["sources"]], table["skipped"])

    def copy(self) -> Place:
        return Place(self.draw, [list(source) for source in self.sources], self.skipped)

    def key(self) -> list[int]:
        return [self.draw, *(number for source in self.sources for number in source)]


@final
class Lane:
    """The rows of one lane in reading order, each with its number; `place` is behind the last one given.

    Each row is drawn from a source chosen by a hash of the seed and the number of the draw, in proportion to weight. A
    source that is at its end starts its next pass; the lane ends when every source has been passed once.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[Unit], float]],
        read: Read,
        *,
        key: tuple[int, int],  # seed and epoch
        lane: int,
        shares: Sequence[int],  # of all lanes
        place: Place | None = None,
    ) -> None:
        self.sources, self.read, self.key, self.lane, self.shares = sources, read, key, lane, shares
        self.place = place.copy() if place else Place.start(len(sources))
        self._passes: list[Iterator[tuple[int, Row]] | None] = [None] * len(sources)
        self._over = self._all_passed()

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return self

    def __next__(self) -> tuple[int, Row]:
        while not self._over:
            found = self._draw(self._choose())
            if found is not None:
                self.place.draw += 1
                return found
        raise StopIteration

    def _all_passed(self) -> bool:
        return all(source[0] for source in self.place.sources)

    def _choose(self) -> int:
        if len(self.sources) == 1:
            return 0
        weights = [w if at[0] >= 0 else 0.0 for (_, w), at in zip(self.sources, self.place.sources, strict=True)]
        left = scramble(*self.key, self.lane, self.place.draw) / 2**63 * sum(weights)
        for source, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return source
        return max(range(len(weights)), key=weights.__getitem__)  # rounding

    def _draw(self, source: int) -> tuple[int, Row] | None:
        """Return the next row of a source, or None at the end of a pass."""
        rows = self._passes[source]
        if rows is None:
            rows = self._passes[source] = self._pass(source)
        found = next(rows, None)
        if found is None:
            at = self.place.sources[source]
            at[:] = [-1 if at[1:] == [0, 0] else at[0] + 1, 0, 0]
            self._passes[source] = None
            self._over = self._all_passed()
        return found

    def _pass(self, source: int) -> Iterator[tuple[int, Row]]:
        at = self.place.sources[source]
        units = self.sources[source][0]
        dealt, striped = deal([unit.size for unit in units], self.shares, scramble(*self.key, source, at[0]))
        cycle, aloud = turns(self.shares), not striped or self.lane == 0
        first, start = at[1:]
        for place, unit in list(enumerate(dealt[self.lane]))[first:]:
            for row, value in self.read(units[unit], start if place == first else 0, aloud):
                if value is None:
                    self.place.skipped += aloud
                elif not striped or cycle[(row + place) % len(cycle)] == self.lane:
                    at[1:] = place, row + 1
                    yield units[unit].row_number(row), value
