"""The guard `wordlist`: listed words, whole and however they are spelled."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mmhub.spec import Refusal
from mmhub_guards.base import GuardConfig, TextGuard, replaced
from mmhub_guards.folding import folded

# Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese and Korean, in which words stand without blanks between them.
_UNPARTED = re.compile(
    "[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u318f\u31a0-\u31ff\u3400-\u9fff\ua960-\ua97f"
    "\uaa60-\uaa7f\uac00-\ud7ff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)


class WordListConfig(GuardConfig, kw_only=True):
    """`words` are words or phrases; `leet` also finds them with digits and signs for letters, as in "h3ll0".

    With `accents` words are found without their accents and with others, in all languages: "ano" also in "año".
    `action` "replace" puts `replacement` in the place of each instead of refusing.
    """

    words: tuple[str, ...]
    action: Literal["refuse", "replace"] = "refuse"
    replacement: str = "***"
    leet: bool = False
    accents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        blank = [word for word in self.words if not _spaced(folded(word)[0])]
        if not self.words or blank:
            raise ValueError("'words' needs words that are not empty")


class WordList(TextGuard):
    """Finds listed words: whole ones, in any case, and in look-alike letters.

    A word inside another is none: the list ["ass"] lets "class", "assess" and "bass" pass; in scripts without blanks
    between words it is one. Blanks of a phrase match blanks, line breaks and hyphens. Letters one by one, as in
    "h e l l o", are not put together.
    """

    kind = "wordlist"
    Config = WordListConfig

    def __init__(self, config: WordListConfig, model: Any = None, folder: Path | None = None) -> None:
        super().__init__(config, model, folder)
        self._options, self.replaces = config, config.action == "replace"
        self._words = {
            _spaced(folded(word, alike=alike, accents=config.accents)[0]): word
            for word in config.words
            for alike in (False, True)
        }
        self._lengths: dict[str, list[int]] = {}  # of words by their first character, the longest first
        for length, first in sorted({(len(word), word[0]) for word in self._words}, reverse=True):
            self._lengths.setdefault(first, []).append(length)

    def find(self, text: str) -> Refusal | None:
        found = next(iter(self._spans(text)), None)
        return None if found is None else Refusal("it holds a listed word", found[2])

    def clean(self, text: str) -> str:
        return replaced(text, ((start, end, self._options.replacement) for start, end, _ in self._spans(text)))

    def _spans(self, text: str) -> list[tuple[int, int, str]]:
        """Where listed words stand in a text, and which, in order and apart."""
        spans: list[tuple[int, int, str]] = []
        ways = [{"alike": False}, *([] if text.isascii() else [{"alike": True}])]
        for way in [*ways, *([{"leet": True}] if self._options.leet else [])]:
            flat, places = _single(*folded(text, accents=self._options.accents, **way))
            places.append(len(text))
            for start, end in self._found(flat):  # up to what follows: an accent may stand by itself
                spans.append((places[start], places[end], self._words[flat[start:end]]))
        apart: list[tuple[int, int, str]] = []
        for span in sorted(spans):
            if not apart or span[0] >= apart[-1][1]:
                apart.append(span)
        return apart

    def _found(self, flat: str) -> Iterator[tuple[int, int]]:
        """Yield where listed words stand, whole, the longest of those that begin together."""
        for start, char in enumerate(flat):
            if char not in self._lengths or (start and _one_word(flat[start - 1], char)):
                continue
            for length in self._lengths[char]:
                end = start + length
                if end <= len(flat) and flat[start:end] in self._words and not _one_word(*flat[end - 1 : end + 1]):
                    yield start, end
                    break


def _one_word(char: str, after: str = " ") -> bool:
    """Do two characters side by side belong to one word?"""
    if unicodedata.category(after) in ("Mn", "Mc"):  # a vowel, say, of the letter before it
        return True
    inside = after.isalnum() and (char.isalnum() or unicodedata.category(char) in ("Mn", "Mc"))
    return inside and not _UNPARTED.match(char) and not _UNPARTED.match(after)


def _spaced(text: str) -> str:
    return _single(text, list(range(len(text))))[0].strip()


def _single(text: str, places: list[int]) -> tuple[str, list[int]]:
    """A text with one blank for all that may stand between words, and where each character came from."""
    chars: list[str] = []
    kept: list[int] = []
    for char, place in zip(text, places, strict=True):
        char = " " if char in "-_" or char.isspace() else char
        if char != " " or chars[-1:] != [" "]:
            chars.append(char)
            kept.append(place)
    return "".join(chars), kept
