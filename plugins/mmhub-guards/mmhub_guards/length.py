"""The guard `length`: inputs that are too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmhub.guard import texts_of
from mmhub.spec import Refusal
from mmhub_guards.base import Answer, GuardConfig, Sample, Stage


class LengthConfig(GuardConfig, kw_only=True):
    """`characters` is how many all texts of a sample, or of a conversation, may have together."""

    characters: int
    on: tuple[Stage, ...] = ("input",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.characters < 1 or self.on != ("input",):
            raise ValueError("'characters' is at least 1, and 'on' is [\"input\"]")


class Length:
    """Refuses samples with more text than that."""

    Config = LengthConfig

    def __init__(self, config: LengthConfig, model: Any = None, folder: Path | None = None) -> None:
        self.config, self.name, self.on = config, config.name or "length", config.on

    def check(self, sample: Sample) -> str | Refusal:
        """Count characters."""
        count = sum(map(len, texts_of(sample)))
        limit = self.config.characters
        return "" if count <= limit else Refusal(f"it has {count} characters, more than {limit}", "characters")

    def review(self, sample: Sample, answer: Answer) -> Answer:
        """Leave answers as they are."""
        return answer
