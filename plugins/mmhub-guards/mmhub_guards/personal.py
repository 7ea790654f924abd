"""The guard `personal-data`: addresses and numbers of persons, taken out of inputs and answers."""

from __future__ import annotations

from bisect import bisect
from pathlib import Path
from typing import Any, Literal

from mmhub.spec import Refusal
from mmhub_guards.base import GuardConfig, TextGuard, replaced
from mmhub_guards.detectors import DETECTORS
from mmhub_guards.folding import narrowed

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
    """Finds personal data by their form, in all widths, digits, blanks and dashes.

    Names and postal addresses have none, and stay.
    """

    kind = "personal-data"
    Config = PersonalDataConfig

    def __init__(self, config: PersonalDataConfig, model: Any = None, folder: Path | None = None) -> None:
        super().__init__(config, model, folder)
        self._kinds, self.replaces = config.kinds, config.action == "redact"

    def find(self, text: str) -> Refusal | None:
        found = next(iter(self._spans(text)), None)
        return None if found is None else Refusal(f"it holds {DETECTORS[found[2]][0]}", found[2])

    def clean(self, text: str) -> str:
        return replaced(text, ((start, end, f"[{kind.upper()}]") for start, end, kind in self._spans(text)))

    def _spans(self, text: str) -> list[tuple[int, int, str]]:
        """Where personal data stand, and of what kind, in order; of those that overlap the first kind's."""
        flat, places = narrowed(text)
        taken: list[tuple[int, int, str]] = []
        for kind, (_, detect) in DETECTORS.items():
            for start, end in detect(flat) if kind in self._kinds else ():
                place = bisect(taken, (start, end, kind))
                before, after = taken[place - 1 : place], taken[place : place + 1]
                if not any(start < one[1] and one[0] < end for one in (*before, *after)):
                    taken.insert(place, (start, end, kind))
        return [(places[start], places[end - 1] + 1, kind) for start, end, kind in taken]
