"""Spans of words in a sequence of tags, one a word, whose prefixes say where spans begin, go on and end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
_ALONE_OR_FIRST = ("B", "S", "U")
_ALONE_OR_LAST = ("E", "L", "S", "U")
_PREFIXES = {"B", "I", "E", "L", "S", "U"}


class Span(NamedTuple):
    """Words `start` to `end` (the first one behind it) of a sequence."""

    label: str
    start: int
    end: int


def holds_spans(labels: Iterable[str]) -> bool:
    """Say whether all labels are tags of spans, such as `O`, `B-PER` and `I-PER`.

    >>> holds_spans(["O", "B-PER", "I-PER"]), holds_spans(["NOUN", "VERB"])
    (True, False)
    """
    split = [_split(label) for label in labels]
    return bool(split) and all(prefix == OUTSIDE or (prefix in _PREFIXES and kind) for prefix, kind in split)


def find_spans(tags: Sequence[str]) -> list[Span]:
    """Return the spans of a sequence of tags, as the CoNLL shared tasks count them.

    It reads IOB1, IOB2 (BIO), IOBES and BILOU, also where tags do not follow one another as they should: a span begins
    at a B, S or U, behind an O, behind an E, L, S or U, and where the type changes; it ends before the next one and
    before an O (the rules of `conlleval`, Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050).

    >>> find_spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [Span(label='PER', start=0, end=2), Span(label='LOC', start=3, end=4), Span(label='LOC', start=4, end=5)]
    """
    spans: list[Span] = []
    before, open_kind, start = OUTSIDE, "", 0
    for place, (prefix, kind) in enumerate([*map(_split, tags), (OUTSIDE, "")]):
        joins = before != OUTSIDE and before not in _ALONE_OR_LAST and kind == open_kind
        goes_on = prefix != OUTSIDE and prefix not in _ALONE_OR_FIRST and joins
        if not goes_on:
            if before != OUTSIDE:
                spans.append(Span(open_kind, start, place))
            start, open_kind = place, kind
        before = prefix
    return spans


def _split(tag: str) -> tuple[str, str]:
    prefix, _, kind = tag.partition("-")
    return prefix, kind
