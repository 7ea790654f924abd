"""The text of tokens that keep coming: what of it is final, and whether a stop text stands in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_WINDOW = 48  # tokens that are decoded anew with each one that comes

Decode = Callable[[Sequence[int]], str]


class GrowingText:
    """Decodes tokens one by one, though one may change how those before it read, and holds back what may change.

    A character may span tokens, and a token that begins a word reads differently at the beginning of a text. So the
    last tokens are decoded together, and those before them are settled only where that makes no difference.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._longest = max(map(len, stop), default=0)
        self._settled = ""
        self._ids: list[int] = []  # those that are not settled
        self._shown = 0  # characters given out by `news`
        self._patience = _WINDOW
        self.text = ""
        self.stopped = False  # does a stop text stand in it? Then `text` ends before it

    def add(self, token: int) -> bool:
        """Take the next token; return whether the text now holds a stop text."""
        self._ids.append(token)
        before = len(self.text)
        self.text = self._settled + self._decode(self._ids)
        if self._stop:
            # a character that was not complete before may have made the text shorter or longer by a few
            start = max(0, min(before, len(self.text)) - self._longest - 8)
            found = [at for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        if len(self._ids) >= self._patience:
            self._settle()
        return self.stopped

    def news(self, final: bool = False) -> str:
        """Return the text that came since the last call, without what later tokens may still change or stop at."""
        end = len(self.text)
        if not final:
            end -= len(self.text) - len(self.text.rstrip("\N{REPLACEMENT CHARACTER}"))
            end = min(end, self._stop_may_begin(self.text[:end]))
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _stop_may_begin(self, text: str) -> int:
        """Where the earliest end of the text begins that is the beginning of a stop text."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[at:]) for stop in self._stop):
                return at
        return len(text)

    def _settle(self) -> None:
        """Settle the older half, if decoding both apart gives the same text; else try again some tokens later."""
        half = len(self._ids) // 2
        whole, old, new = (self._decode(part) for part in (self._ids, self._ids[:half], self._ids[half:]))
        for between in ("", " "):
            if whole == old + between + new and not new.startswith("\N{REPLACEMENT CHARACTER}"):
                self._settled += old + between
                self._ids = self._ids[half:]
                self._patience = _WINDOW
                return
        self._patience = len(self._ids) + 7
