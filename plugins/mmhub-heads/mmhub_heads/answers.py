"""Answers to questions about a context, as data sets write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmhub.errors import InputError
from mmhub.interfaces.labels import is_missing, plain


@dataclass(frozen=True)
class Answer:
    """One right answer: its text, and the character at which it begins, None for its first occurrence.

    `tokens` are the numbers of its first and last token instead, where a target gives those.
    """

    text: str
    start: int | None = None
    tokens: tuple[int, int] | None = None

    def find(self, context: str) -> tuple[int, int]:
        """Return where the answer stands in its context: characters, the end exclusive.

        Raises:
            InputError: it does not stand there.
        """
        start = context.find(self.text) if self.start is None else self.start
        if not self.text:
            raise InputError("an answer is the empty text", "give an empty list for a question without an answer")
        if start < 0 or context[start : start + len(self.text)] != self.text:
            if self.start is None:
                raise InputError(f"the answer {_cut(self.text)} does not stand in the context")
            found = _cut(context[max(start, 0) : max(start, 0) + len(self.text)])
            raise InputError(
                f"at character {start} of the context stands {found} and not the answer {_cut(self.text)}",
                "answer_start counts characters from 0; leave it out to take the first occurrence",
            )
        return start, start + len(self.text)


def read_answers(raw: Any) -> list[Answer]:
    """Return the right answers of one question, none where it has none.

    Taken are a text; {"text": ..., "answer_start": ...}, each one value or a list of several, as in SQuAD; a list of
    these; an empty list; and two token numbers.

    Raises:
        InputError: the target is missing or nothing of these.
    """
    raw = raw.tolist() if hasattr(raw, "tolist") else raw
    if is_missing(raw):
        raise InputError("the target is missing", "give an empty list for a question without an answer")
    if isinstance(raw, str):
        return [Answer(raw)]
    if isinstance(raw, Mapping):
        return _read_table(raw)
    if not isinstance(raw, (list, tuple)):
        raise InputError(f"an answer must be a text or a table of texts, got a {type(raw).__name__}")
    first, last = map(_whole, raw) if len(raw) == 2 else (None, None)
    if first is not None and last is not None:
        return [Answer("", tokens=(first, last))]
    return [answer for part in raw for answer in read_answers(part)]


def _read_table(raw: Mapping[str, Any]) -> list[Answer]:
    texts, starts = _listed(raw.get("text")), _listed(raw.get("answer_start"))
    if "text" not in raw or not all(isinstance(text, str) for text in texts):
        raise InputError(f"an answer needs the key 'text', got {', '.join(map(str, raw)) or 'none'}")
    if starts and len(starts) != len(texts):
        raise InputError(f"an answer has {len(texts)} text(s) and {len(starts)} answer_start(s)")
    for start in starts:
        if not is_missing(start) and _whole(start) is None:
            raise InputError(f"answer_start must be a number of characters, got {start!r}")
    return [Answer(text, _whole(start)) for text, start in zip(texts, starts or [None] * len(texts), strict=True)]


def _whole(value: Any) -> int | None:
    """The number, if it is a whole one; tables with gaps hold them as floats."""
    value = plain(value)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and not isinstance(value, bool) else None


def _listed(value: Any) -> list[Any]:
    """The values of a cell that holds one, several or none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    several = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return [plain(one) for one in several]


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
