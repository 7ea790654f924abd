# ruff: noqa: RUF001 - look-alikes are what this is about
"""Texts as people read them: look-alike letters, accents, widths and invisible characters made equal.

Look-alikes are the Cyrillic and Greek letters that the eye takes for Latin ones, a part of what Unicode Technical
Standard 39 lists. A whole word of them reads as Latin, too: the Russian word for litter as "cop".
"""

from __future__ import annotations

import functools
import unicodedata

_ALIKE = dict(zip("авсегнікјмопрѕтуихьһԁӏԛԝѵ", "abcerhikjmonpstyuxbhdlqwv", strict=True))
_ALIKE |= dict(zip("αβγεζηικνορτυχω", "abyeznikvoptuxw", strict=True))
_ALIKE |= {"ı": "i", "ɩ": "i", "ɡ": "g", "ɑ": "a", "ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe"}
_CAPITAL = dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "abezhikmnoptyx", strict=True))  # of some only the capital looks alike
_INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufe0e\ufe0f"
_LEET = dict(zip("013457@$!|", "oieastasii", strict=True))


def folded(text: str, *, alike: bool = True, leet: bool = False) -> tuple[str, list[int]]:
    """Return a text in lower case, without accents and invisible characters, and where each character came from.

    `alike` turns look-alikes into Latin letters. `leet` reads digits and signs inside words as the letters they stand
    for, as in "h3ll0".

    >>> folded("Ｈé\\u200bllo")[0]
    'hello'
    >>> folded("h3ll0 12", leet=True)[0]
    'hello 12'
    """
    if text.isascii() and not leet:
        return text.lower(), list(range(len(text)))
    chars: list[str] = []
    places: list[int] = []
    for place, char in enumerate(text):
        for made in _plain(char, alike):
            chars.append(made)
            places.append(place)
    if leet:
        _read_leet(chars)
    return "".join(chars), places


@functools.lru_cache(8192)
def _plain(char: str, alike: bool) -> str:
    if char < "\x80":
        return char.lower()
    if unicodedata.category(char) == "Cf" or char in _INVISIBLE:
        return ""
    found = ""
    for one in unicodedata.normalize("NFKD", char):
        if unicodedata.combining(one):
            continue
        lower = one.casefold()
        found += (_CAPITAL.get(one) or _ALIKE.get(lower, lower)) if alike else lower
    return found


def _read_leet(chars: list[str]) -> None:
    """Replace what stands for a letter, in words that have letters."""
    start = 0
    for end in range(len(chars) + 1):
        if end < len(chars) and (chars[end].isalnum() or chars[end] in _LEET):
            continue
        word = chars[start:end]
        last = max((i for i, char in enumerate(word) if char.isalnum()), default=-1) + 1  # "hell!" ends before its sign
        if any(char.isalpha() for char in word):
            chars[start : start + last] = [_LEET.get(char, char) for char in word[:last]]
        start = end + 1
