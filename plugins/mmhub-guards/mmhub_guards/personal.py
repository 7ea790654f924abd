"""The guard `personal-data`: addresses and numbers of persons, taken out of inputs and answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mmhub.spec import Refusal
from mmhub_guards.base import GuardConfig, TextGuard
from mmhub_guards.detectors import DETECTORS

Kind = Literal["key", "email", "iban", "card", "id", "birth", "ip", "phone"]


class PersonalDataConfig(GuardConfig, kw_only=True):
    """`kinds` are what is looked for, all by default; `action` "redact" puts "[EMAIL]" and the like in their place."""

    action: Literal["redact", "refuse"] = "redact"
    kinds: tuple[Kind, ...] = ("key", "email", "iban", "card", "id", "birth", "ip", "phone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kinds:
            raise ValueError("'kinds' is empty")


class PersonalData(TextGuard):
    """Finds personal data by their form. Names and postal addresses have none, and stay."""

    kind = "personal-data"
    Config = PersonalDataConfig

    def __init__(self, config: PersonalDataConfig, model: Any = None, folder: Path | None = None) -> None:
        super().__init__(config, model, folder)
        self._kinds, self.replaces = config.kinds, config.action == "redact"

    def find(self, text: str) -> Refusal | None:
        found = next(self._spans(text), None)
        return None if found is None else Refusal(f"it holds {DETECTORS[found[2]][0]}", found[2])

    def clean(self, text: str) -> str:
        for start, end, kind in sorted(self._spans(text), reverse=True):
            text = f"{text[:start]}[{kind.upper()}]{text[end:]}"
        return text

    def _spans(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Yield where personal data stand, and of what kind; of those that overlap the first kind's."""
        taken: list[tuple[int, int]] = []
        for kind, (_, detect) in DETECTORS.items():
            for start, end in detect(text) if kind in self._kinds else ():
                if all(end <= a or start >= b for a, b in taken):
                    taken.append((start, end))
                    yield start, end, kind
