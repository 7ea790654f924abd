"""The guard `pattern`: named regular expressions, in bounded time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import regex  # type: ignore[import-untyped]

from mmhub.spec import Refusal
from mmhub_guards.base import GuardConfig, TextGuard


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
        if not self.patterns or self.seconds <= 0:
            raise ValueError("'patterns' needs a pattern, and 'seconds' is above 0")
        for name, pattern in self.patterns.items():
            try:
                compiled = regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"the pattern {name!r} is no regular expression: {error}") from None
            if compiled.fullmatch(""):
                raise ValueError(f"the pattern {name!r} matches nothing at all, which is everywhere")


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
