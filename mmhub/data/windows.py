"""Windows: rows of a lane that are shuffled among each other and cut into batches, and the state after each batch."""

from __future__ import annotations

import math
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mmhub.data.lanes import Lane, Place, scramble
from mmhub.data.loader import epoch_order
from mmhub.data.shards import Row

T = TypeVar("T")
Numbered = tuple[int, Row]  # a row with its number
# Numbered rows of a window and a seed, to batches of places among them.
Cut = Callable[[list[Numbered], int], list[list[int]]]

WINDOW_BYTES = 128 * 2**20  # a window has at most so much, however few rows that is; two are held at a time


@dataclass
class Window:
    """Rows that are shuffled among each other, and the places before and after them."""

    start: Place
    after: Place
    rows: list[Numbered | None]
    key: int

    def batches(self, cut: Cut, state: dict[str, Any] | None) -> Iterator[tuple[list[Numbered], dict[str, Any]]]:
        """Yield batches that `state` has not had, each with the state after it, letting go of their rows.

        A state notes the batches taken of the window, and as bits the rows they had. If `cut` now makes other batches
        (for another number of ranks), the rows that are left are cut afresh.
        """
        without, taken, count = (
            (int(state["without"], 16), int(state["taken"], 16), state["batches"]) if state else (0, 0, 0)
        )
        plan = self._plan(cut, without)
        if state and _bits(plan[:count]) | without != taken:
            without, count = taken, 0
            plan = self._plan(cut, without)
        taken = without | _bits(plan[:count])
        for number, batch in enumerate(plan[count:], count + 1):
            taken |= _bits([batch])
            rows = [pair for place in batch if (pair := self.rows[place]) is not None]
            for place in batch:
                self.rows[place] = None
            yield rows, self._state(number, without, taken) if number < len(plan) else _state(self.after)

    def _plan(self, cut: Cut, without: int) -> list[list[int]]:
        done = _places(without)
        left = [place for place in epoch_order(len(self.rows), self.key, 0) if place not in done]
        rows = [pair for place in left if (pair := self.rows[place]) is not None]
        plan = cut(rows, self.key) if rows else []
        assert sorted(i for batch in plan for i in batch) == list(range(len(left))), "cut must use every row once"
        return [[left[i] for i in batch] for batch in plan]

    def _state(self, batches: int, without: int, taken: int) -> dict[str, Any]:
        state = {"rows": len(self.rows), "batches": batches, "without": f"{without:x}", "taken": f"{taken:x}"}
        return _state(self.start) | state


def _state(place: Place) -> dict[str, Any]:
    at = {"draw": place.draw, "sources": place.copy().sources, "skipped": place.skipped}
    return at | {"rows": 0, "batches": 0, "without": "0", "taken": "0"}


def _bits(batches: Sequence[Sequence[int]]) -> int:
    """Return a number whose bits are the places that some batches have."""
    places = [place for batch in batches for place in batch]
    bits = bytearray(max(places, default=0) // 8 + 1)
    for place in places:
        bits[place // 8] |= 1 << place % 8
    return int.from_bytes(bits, "little")


def _places(bits: int) -> set[int]:
    data = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    return {8 * i + bit for i, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1}


def windows(lane: Lane, rows: int, batch: int, key: int, first: int = 0) -> Iterator[Window]:
    """Yield windows of so many rows or bytes, rounded up to whole batches, so that only the last has a smaller one.

    `first` are the rows of the first one where it was begun before, 0 where it was not.
    """
    rows = math.ceil(rows / batch) * batch
    while True:
        start, size = lane.place.copy(), 0
        found: list[Numbered | None] = []  # the window's own, which empties it
        while len(found) < (first or rows) and (pair := next(lane, None)) is not None:
            found.append(pair)
            size += weight(pair[1])
            if size >= WINDOW_BYTES and len(found) % batch == 0 and not first:
                break
        if not found:
            return
        pair, first = None, 0
        yield Window(start, lane.place.copy(), found, scramble(key, *start.key()))


def weight(value: Any) -> int:
    """Estimate the bytes a value takes in memory; the same on every machine, unlike `sys.getsizeof`."""
    if isinstance(value, (str, bytes)):
        return 50 + len(value) * (1 if isinstance(value, bytes) or value.isascii() else 2)
    if isinstance(value, dict):
        return 240 + sum(16 + weight(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        plain = bool(value) and isinstance(value[0], (int, float))
        return 60 + (40 * len(value) if plain else sum(16 + weight(item) for item in value))
    return 32


def ahead(items: Iterator[T], *, wait: bool = False) -> Generator[T, None, None]:
    """Yield items, a thread making the next one while the caller has the last; never more than that one.

    With `wait`, closing waits for what the thread is at: a process that ends meanwhile might be aborted.
    """
    wanted, made, stopped = (
        threading.Semaphore(0),
        queue.SimpleQueue[tuple[Any, BaseException | None]](),
        threading.Event(),
    )

    def work() -> None:
        while True:
            wanted.acquire()
            if stopped.is_set():
                return
            try:
                made.put((next(items), None))
            except BaseException as error:  # StopIteration, too, ends the other side
                made.put((None, error))
                return

    thread = threading.Thread(target=work, name="mmhub-stream", daemon=True)
    thread.start()
    wanted.release()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            wanted.release()
            yield item
            del item
    finally:
        stopped.set()
        wanted.release()
        if wait and not sys.is_finalizing():
            thread.join()
