"""Text for a terminal: what strangers wrote made harmless, sizes and dates made short."""

from __future__ import annotations

import re
import shutil
import sys
import time

from mmhub.errors import UsageError

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def printable(value: object) -> str:
    """Return `value` as one line that a terminal only shows: no escape sequences, line breaks or writing direction.

    >>> printable("a\\x1b[2J\\nb")
    'a�[2J b'
    """
    line = " ".join(str(value).split())
    return line if line.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def short(value: object, width: int) -> str:
    """Return `printable(value)`, cut to `width` characters."""
    line = printable(value)
    return line if len(line) <= width else line[: width - 1] + "…"


def fit(text: str) -> str:
    """Cut lines to the width of the terminal that stdout is; elsewhere leave them whole."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in text.split("\n"))


def size_text(size: int | None) -> str:
    """Return a number of bytes for people, '?' if it is not known.

    >>> size_text(1_500_000)
    '1.5 MB'
    """
    if size is None:
        return "?"
    number, unit = float(size), 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{size} B" if not unit else f"{number:.3g} {_UNITS[unit]}"


def counted(number: int, noun: str) -> str:
    """Return '1 file' or '2 files'.

    >>> counted(2, "repository")
    '2 repositories'
    """
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def parse_size(text: str) -> int:
    """Return the bytes that '500MB', '1.5 GiB' or '1000' mean.

    Raises:
        UsageError: it is no size.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*(?:([kmgtp])(i?))?b?", text.strip(), re.IGNORECASE)
    if not found:
        raise UsageError(f"{text!r} is not a size", "write it as 500MB, 1.5GB or 2GiB")
    number, letter, binary = float(found[1]), (found[2] or "").lower(), found[3]
    return round(number * (1024 if binary else 1000) ** (" kmgtp".index(letter) if letter else 0))


def ago_text(when: float | None) -> str:
    """Return how long ago a time (seconds since 1970) was, in its largest unit."""
    if when is None:
        return "?"
    seconds = max(0.0, time.time() - when)
    for unit, length in (("year", 31_557_600), ("month", 2_629_800), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
