"""Windows: neighbouring rows that are answered and saved together, as many as take about half a minute.

They are what a kill can lose, what is sorted by length, and, times two, what is in memory. Where a batch takes longer,
they are a batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mmhub.bulk.rows import Place, Row
from mmhub.data.windows import weight

MOST_ROWS = 4096
MOST_BYTES = 64 * 2**20  # of its rows, and of its answers
_LOOKED_AT = 32  # answers by which the size of all is told
SECONDS = 30.0
_FIRST = 1024  # rows of the first window, before it is known how fast they are answered
_GROWTH = 8  # times a window may have more rows than the one before

Answer = dict[str, Any]


@dataclass
class Window:
    """Rows with their answers, None for one that is still to come."""

    rows: list[Row]
    after: Place
    answers: list[Answer | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [None] * len(self.rows)

    @property
    def first(self) -> int:
        return self.rows[0].place.number

    def done(self) -> list[Answer]:
        """Return the answers, which must all be there."""
        assert all(answer is not None for answer in self.answers)
        return [answer for answer in self.answers if answer is not None]

    def size(self) -> int:
        """Return about how many bytes the answers take in memory, which must all be there."""
        every = max(1, len(self.answers) // _LOOKED_AT)
        return every * sum(map(weight, self.answers[::every]))


class Pace:
    """How many rows a window should have, a multiple of `step`, by how fast the last ones were answered."""

    def __init__(self, step: int = 32, first: int = _FIRST) -> None:
        self.rows, self._step = first, step
        self._since = time.monotonic()

    def tell(self, rows: int, size: int = 0) -> None:
        """So many rows were answered since the last call, by answers of `size` bytes in memory together."""
        now = time.monotonic()
        rate, self._since = rows / max(now - self._since, 1e-6), now
        room = MOST_BYTES * rows // max(size, 1)
        fitting = min(MOST_ROWS, int(rate * SECONDS), self.rows * _GROWTH, room)
        self.rows = max(fitting // self._step, 1) * self._step


def windows(rows: Iterator[Row], pace: Pace) -> Iterator[Window]:
    """Cut rows into windows of as many rows as `pace` says, or of fewer where they hold much."""
    found: list[Row] = []
    size = 0
    for row in rows:
        found.append(row)
        size += weight(row.cells) if not isinstance(row.cells, Exception) else 0
        if len(found) >= pace.rows or size >= MOST_BYTES:
            yield Window(found, _next(row.place))
            found, size = [], 0
    if found:
        yield Window(found, _next(found[-1].place))


def _next(place: Place) -> Place:
    return Place(place.number + 1, place.file, place.row + 1)
