"""How far a job is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

_EVERY = 10.0  # seconds between lines


class Progress:
    """Tell of rows that are done, of `total` or so if that is known; `start` of them were done before."""

    def __init__(self, total: int | None, start: int, say: Callable[[str], None], quiet: bool) -> None:
        terminal = sys.stderr.isatty()
        self._total, self._start, self._done, self._say = total, start, start, say
        self._plain = not quiet and not terminal
        self._begun = self._said = time.monotonic()
        self._bar: Any = tqdm(
            total=total, initial=start, unit="row", disable=quiet or not terminal, dynamic_ncols=True, leave=False
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, rows: int) -> None:
        """So many more are done."""
        self._done += rows
        self._bar.update(rows)
        now = time.monotonic()
        if self._plain and now - self._said >= _EVERY:
            self._said = now
            self._say(self._line(now - self._begun))

    def _line(self, seconds: float) -> str:
        rate = (self._done - self._start) / max(seconds, 1e-9)
        total = self._total if self._total is not None and self._total >= self._done else None
        if total is None:
            return f"{self._done:,} rows, {rate:,.0f} rows/s"
        left = (total - self._done) / max(rate, 1e-9)
        return f"{self._done:,} of {total:,} rows, {rate:,.0f} rows/s, {_time(left)} left"


def _time(seconds: float) -> str:
    """Say a time in words as exact as one wants to know.

    >>> _time(40), _time(600), _time(9000)
    ('40 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
