"""What differs between a reference and an answer, word by word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

MAX_WORDS, MAX_CHARACTERS = 300, 3000  # that are compared; the rest of a longer text is left out


class Piece(NamedTuple):
    """A run of words: `kind` is "same", "ins" (in the answer alone) or "del" (in the reference alone)."""

    kind: str
    text: str


def differences(reference: str, answer: str) -> list[Piece]:
    """Return the pieces that make both texts; blanks do not count.

    >>> [tuple(piece) for piece in differences("the cat sat", "the dog sat")]
    [('same', 'the'), ('del', 'cat'), ('ins', 'dog'), ('same', 'sat')]
    """
    return list(_pieces(_cut(reference), _cut(answer)))


def _pieces(old: Sequence[str], new: Sequence[str]) -> Iterator[Piece]:
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            yield Piece("same", " ".join(old[a:b]))
            continue
        if b > a:
            yield Piece("del", " ".join(old[a:b]))
        if d > c:
            yield Piece("ins", " ".join(new[c:d]))


def _cut(text: str) -> list[str]:
    words = text[:MAX_CHARACTERS].split()
    whole = len(text) <= MAX_CHARACTERS and len(words) <= MAX_WORDS
    return words if whole else [*words[:MAX_WORDS], "…"]
