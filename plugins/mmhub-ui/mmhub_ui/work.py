"""Work that is followed while it goes on, and ends when nobody waits for it any more."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

_PAUSE = 0.05  # seconds between two looks at what was written

Stream = Callable[[str], None]


class Stopped(BaseException):
    """Whoever waited has gone."""


@dataclass(frozen=True)
class _Ended:
    result: Any = None
    error: BaseException | None = None


def follow(action: Callable[[Stream], Any]) -> Generator[tuple[str, Any], None, None]:
    """Run `action(stream)` in a thread; yield the text that it has streamed so far, and with the last its result.

    Where the iterator is closed, the action is stopped at the next piece that it streams.

    Raises:
        What the action raises.
    """
    pieces: SimpleQueue[str | _Ended] = SimpleQueue()
    gone = Event()

    def stream(piece: str) -> None:
        if gone.is_set():
            raise Stopped
        pieces.put(piece)

    def work() -> None:
        try:
            pieces.put(_Ended(action(stream)))
        except BaseException as error:  # it is raised where it is waited for
            pieces.put(_Ended(error=error))

    Thread(target=work, daemon=True).start()
    try:
        yield from _pieces(pieces, gone)
    finally:
        gone.set()


def _pieces(pieces: SimpleQueue[str | _Ended], gone: Event) -> Iterator[tuple[str, Any]]:
    text = ""
    while True:
        for piece in _waiting(pieces):
            if isinstance(piece, str):
                text += piece
            elif piece.error is not None:
                raise piece.error
            else:
                yield text, piece.result
                return
        yield text, None
        gone.wait(_PAUSE)


def _waiting(pieces: SimpleQueue[str | _Ended]) -> Iterator[str | _Ended]:
    """What has come by now, at least one piece."""
    yield pieces.get()
    while True:
        try:
            yield pieces.get_nowait()
        except Empty:
            return
