"""Git's wildcard patterns (.gitignore, .gitattributes), matched in time that no pattern can blow up.

Segments between slashes are matched one by one, and a wildcard never takes back what it matched before the next one:
no regular expression backtracks over several stars. `**` works the same way, over segments instead of letters.
"""

import re
from collections.abc import Sequence

from dulwich.wildmatch import MalformedPattern, translate_bracket_expression

__all__ = ["MalformedPattern", "Wildcard", "rules_for"]

MAX_PATTERN = 512  # bytes
MAX_SEGMENTS = 64  # of a pattern
MAX_RULES = 1000
_MAX_MATCHES = 20_000_000  # of rules with parts of paths, for one request
_NOTHING = re.compile(b"(?!)")


class Wildcard:
    """One pattern, compared with the segments of a path; without a slash it is about the last segment only.

    Raises:
        MalformedPattern: it matches nothing, to git or because it is over the limits.
    """

    def __init__(self, pattern: bytes) -> None:
        segments = pattern.removeprefix(b"/").split(b"/")
        if len(pattern) > MAX_PATTERN or len(segments) > MAX_SEGMENTS:
            raise MalformedPattern(pattern)
        parts = [None if segment == b"**" else re.compile(_translated(segment), re.DOTALL) for segment in segments]
        self._parts = parts if b"/" in pattern else [None, *parts]

    def match(self, path: Sequence[bytes]) -> bool:
        parts = self._parts
        part = at = 0
        retry: tuple[int, int] | None = None  # behind the last `**`: its next part, and what it may still skip
        while at < len(path):
            wanted = parts[part] if part < len(parts) else _NOTHING
            if wanted is None:
                part += 1
                if part == len(parts):
                    return True
                retry = part, at
            elif wanted.fullmatch(path[at]):
                part, at = part + 1, at + 1
            elif retry is None:
                return False
            else:
                part, at = retry[0], retry[1] + 1
                retry = part, at
        return part == len(parts)


def rules_for(paths: Sequence[bytes]) -> int:
    """Return how many rules these paths may be compared with."""
    return min(MAX_RULES, _MAX_MATCHES // (1 + sum(path.count(b"/") + 1 for path in paths)))


def _translated(segment: bytes) -> bytes:
    """Return the regular expression of one segment; all but the last star take the first match and keep it."""
    pieces, piece, at = [], b"", 0
    while at < len(segment):
        letter, at = segment[at : at + 1], at + 1
        if letter == b"*":
            pieces.append(piece)
            piece = b""
        elif letter == b"?":
            piece += b"."
        elif letter == b"[":
            at, bracket = translate_bracket_expression(segment, at)
            piece += bracket
        else:
            if letter == b"\\" and at < len(segment):
                letter, at = segment[at : at + 1], at + 1
            piece += re.escape(letter)
    if not pieces:
        return piece
    first, *middle = pieces
    return first + b"".join(b"(?>.*?" + one + b")" for one in middle if one) + b".*" + piece
