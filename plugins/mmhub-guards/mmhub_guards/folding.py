# ruff: noqa: RUF001 - look-alikes are what this is about
"""Texts as people read them: look-alike letters, widths and invisible characters made equal.

Look-alikes are the Cyrillic and Greek letters that the eye takes for Latin ones, a part of what Unicode Technical
Standard 39 lists. A whole word of them reads as Latin, too: the Russian word for litter as "cop".
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator

_ALIKE = dict(zip("авсегнікјмопрѕтуихьһԁӏԛԝѵ", "abcerhikjmonpstyuxbhdlqwv", strict=True))
_ALIKE |= dict(zip("αβγεζηικνορτυχω", "abyeznikvoptuxw", strict=True))
_ALIKE |= {"ɩ": "i", "ɡ": "g", "ɑ": "a"}
_CAPITAL = dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "abezhikmnoptyx", strict=True))  # of some only the capital looks alike
_STROKES = {"ı": "i", "ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe"}  # as good as accents, which decompose
_INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufffd"
_BLANKS = "\t\n\v\f\r"  # the control characters that part words
_HIDDEN = re.compile(rf"[^\x20-\x7e{_BLANKS}]")
# Marks that stand on letters of every script. Those of one script alone are letters of it, as the vowels of Hindi are.
_MARKS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f\U000e0100-\U000e01ef]"
)
_JOINED = re.compile("[\u1161-\u11ff\uff9e\uff9f]")  # what goes on with a Korean syllable, or marks a Japanese one
_LEET = dict(zip("013457@$!|", "oieastasii", strict=True))
_LONGEST = 16  # characters that may make one letter; of more the rest is heaped on it


def folded(text: str, *, alike: bool = True, leet: bool = False, accents: bool = False) -> tuple[str, list[int]]:
    """Return a text in lower case, without invisible characters, and where each character came from.

    Accents are kept where they make a letter, and left out where they are heaped on one or strike it through; with
    `accents` all are left out. `alike` turns look-alikes into Latin letters. `leet` reads digits and signs inside words
    as the letters they stand for, as in "h3ll0".

    >>> folded("\\uff28e\\u200bllo")[0], folded("año", accents=True)[0]
    ('hello', 'ano')
    >>> folded("h3ll0 12", leet=True)[0]
    'hello 12'
    """
    if not leet and _HIDDEN.search(text) is None:
        return text.lower(), list(range(len(text)))
    chars: list[str] = []
    places: list[int] = []
    for place, cluster in _clusters(text):
        for made in _plain(cluster, alike, accents):
            chars.append(made)
            places.append(place)
    if leet:
        _read_leet(chars)
    return "".join(chars), places


def narrowed(text: str) -> tuple[str, list[int]]:
    """Return a text with ASCII's blanks, dashes, digits and widths for those of Unicode, and where each came from.

    Invisible characters are left out, all others kept.

    >>> narrowed("\\uff14\\uff11\\u00a011\\u201122")[0]
    '41 11-22'
    """
    if _HIDDEN.search(text) is None:
        return text, list(range(len(text)))
    made = [_narrow(char) for char in text]
    return "".join(made), [place for place, char in enumerate(made) if char]


def invisible(char: str) -> bool:
    """Is a character one that people do not see, and that models drop?"""
    if char in _BLANKS:
        return False
    return char in _INVISIBLE or unicodedata.category(char) in ("Cf", "Cc", "Co", "Cn", "Cs")


def heaped(char: str) -> bool:
    """Is a character a mark that may stand on any letter?"""
    return _MARKS.match(char) is not None


@functools.lru_cache(8192)
def _narrow(char: str) -> str:
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if kind == "Zs" or kind == "Pd" or char == "\u2212":
        return " " if kind == "Zs" else "-"
    if invisible(char):
        return ""
    return "." if char == "\u3002" else chr(ord(char) - 0xFEE0) if "\uff01" <= char <= "\uff5e" else char


def _clusters(text: str) -> Iterator[tuple[int, str]]:
    """Yield the letters of a text with what stands on them, and where; invisible characters are in none."""
    start, cluster = 0, ""
    for place, char in enumerate(text):
        if char >= "\x7f" or char < " ":
            if _is_invisible(char):
                continue
            if cluster and _goes_on(char):
                cluster = (cluster + char)[:_LONGEST]
                continue
        if cluster:
            yield start, cluster
        start, cluster = place, char
    if cluster:
        yield start, cluster


_is_invisible = functools.lru_cache(8192)(invisible)


@functools.lru_cache(8192)
def _goes_on(char: str) -> bool:
    return unicodedata.category(char) in ("Mn", "Me") or _JOINED.match(char) is not None


@functools.lru_cache(8192)
def _plain(cluster: str, alike: bool, accents: bool) -> str:
    if len(cluster) == 1 and cluster < "\x80":
        return cluster.lower()
    composed = unicodedata.normalize("NFKC", cluster)
    if accents or _MARKS.search(composed):  # one that makes no letter with what it stands on makes none of them one
        composed = unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFD", composed)))
    found = ""
    for one in composed:
        lower = "i" if one == "İ" else "σ" if one == "ς" else one.lower()
        lower = _STROKES.get(lower, lower) if accents else lower
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
