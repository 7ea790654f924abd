"""The guard `pattern`: named regular expressions, in bounded time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import regex  # type: ignore[import-untyped]

from mmhub.spec import Refusal
from mmhub_guards.base import GuardConfig, TextGuard

_REPEATS = re.compile(r"\{\s*(\d+)")
_MOST = 1_000_000  # characters of all patterns, repeats written out: some 100 MB, compiled
_SECONDS = 60.0


class PatternConfig(GuardConfig, kw_only=True):
    """`patterns` are regular expressions by name, of the module `regex`; `seconds` is what one may take for one text.

    `action` "replace" puts `replacement` in the place of each match; {name} in it is the pattern's.
    """

    patterns: dict[str, str]
    action: Literal["refuse", "replace"] = "refuse"
    replacement: str = "[{name}]"
    seconds: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.patterns or not 0 < self.seconds <= _SECONDS:
            raise ValueError(f"'patterns' needs a pattern, and 'seconds' is above 0 and up to {_SECONDS:g}")
        if sum(map(_size, self.patterns.values())) > _MOST:
            raise ValueError(f"the patterns are too large: their repeats make more than {_MOST} characters of them")
        for name, pattern in self.patterns.items():
            try:
                if regex.compile(pattern).fullmatch("", timeout=self.seconds):
                    raise ValueError(f"the pattern {name!r} matches nothing at all, which is everywhere")
            except regex.error as error:
                raise ValueError(f"the pattern {name!r} is no regular expression: {error}") from None
            except (RecursionError, MemoryError, TimeoutError, OverflowError) as error:
                raise ValueError(f"the pattern {name!r} is too large: {type(error).__name__}") from None


def _size(pattern: str) -> int:
    """How many characters a pattern has, at most, with its repeats written out."""
    size = len(pattern)
    for found in _REPEATS.finditer(pattern):
        size = min(size * max(1, int(found[1][:9])), _MOST + 1)
    return size


class Pattern(TextGuard):
    """Finds what patterns match. One that takes too long refuses the text."""

    kind = "pattern"
    Config = PatternConfig

    def __init__(self, config: PatternConfig, model: Any = None, folder: Path | None = None) -> None:
        super().__init__(config, model, folder)
        self._options, self.replaces = config, config.action == "replace"
        self._patterns = {name: regex.compile(pattern) for name, pattern in config.patterns.items()}

    def find(self, text: str) -> Refusal | None:
        for name, pattern in self._patterns.items():
            if pattern.search(text, timeout=self._options.seconds):
                return Refusal(f"it matches the pattern {name!r}", name)
        return None

    def clean(self, text: str) -> str:
        for name, pattern in self._patterns.items():
            put = self._options.replacement.replace("{name}", name)
            text = pattern.sub(lambda _, put=put: put, text, timeout=self._options.seconds)
        return text
