"""The guard `abstain`: answers of which the model is not sure are withheld."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmhub.errors import UsageError, did_you_mean
from mmhub.spec import Change, Refusal
from mmhub_guards.base import Answer, GuardConfig, Sample, Stage


class AbstainConfig(GuardConfig, kw_only=True):
    """`thresholds` are probabilities by label; "default" is for labels without one of their own, else 0."""

    thresholds: dict[str, float]
    on: tuple[Stage, ...] = ("output",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.thresholds or any(not 0 <= value <= 1 for value in self.thresholds.values()):
            raise ValueError("'thresholds' are probabilities from 0 to 1, at least one")
        if self.on != ("output",):
            raise ValueError("'on' is [\"output\"]: a guard of answers")


class Abstain:
    """Withholds an answer {"label", "score"} below its label's threshold: "refused", with the "scores" there are.

    Of {"labels", "scores"}, several labels at once, those below theirs are left out, and it is withheld if all were. Of
    {"tags", "scores"}, one a word, each below its threshold becomes "O". Of {"value"} or {"text"} nothing is said,
    unless it has a "score" from 0 to 1 (spans, and speech), for which "default" counts.
    """

    Config = AbstainConfig

    def __init__(self, config: AbstainConfig, model: Any = None, folder: Path | None = None) -> None:
        self.config, self.name, self.on = config, config.name or "abstain", config.on
        known = getattr(getattr(getattr(model, "decoder", None), "labels", None), "names", ())
        for label in config.thresholds if known else ():
            if label not in ("default", *known):
                hint = did_you_mean(label, known) or f"it knows {', '.join(map(str, known))}"
                raise UsageError(f"a threshold is for the label {label!r}, which the model does not have", hint)

    def check(self, sample: Sample) -> str:
        """Let every sample pass."""
        return ""

    def review(self, sample: Sample, answer: Answer) -> Answer | Change | Refusal:
        """Compare scores with thresholds."""
        scores = answer.get("scores")
        if "labels" in answer and isinstance(scores, Mapping):
            return self._labels(answer, scores)
        if "tags" in answer and isinstance(scores, list):
            return self._tags(answer, scores)
        score, label = answer.get("score"), str(answer.get("label", "default"))
        if isinstance(score, float) and not score < 0 and not score >= self._threshold(label):  # NaN is below
            return self._refusal(label, {label: score} if not isinstance(scores, Mapping) else scores)
        return answer

    def _labels(self, answer: Answer, scores: Mapping[str, float]) -> Answer | Change | Refusal:
        kept = [label for label in answer["labels"] if scores.get(label, 1.0) >= self._threshold(label)]
        if len(kept) == len(answer["labels"]):
            return answer
        if not kept:
            return self._refusal(str(answer["labels"][0]), scores)
        return Change({**answer, "labels": kept}, "threshold", "labels below their threshold are left out")

    def _tags(self, answer: Answer, scores: list[float]) -> Answer | Change:
        sure = [score >= self._threshold(tag) for tag, score in zip(answer["tags"], scores, strict=True)]
        tags = [tag if good else "O" for tag, good in zip(answer["tags"], sure, strict=True)]
        if tags == answer["tags"]:
            return answer
        rest = {key: value for key, value in answer.items() if key != "entities"}  # they are made of tags
        return Change({**rest, "tags": tags}, "threshold", "tags below their threshold are left out")

    def _threshold(self, label: str) -> float:
        return self.config.thresholds.get(label, self.config.thresholds.get("default", 0.0))

    def _refusal(self, label: str, scores: Mapping[str, float]) -> Refusal:
        rule = label if label in self.config.thresholds else "default"
        reason = f"the model is not sure: its score is below {self._threshold(label):g}"
        return Refusal(reason, rule, "abstained", {"scores": dict(scores)})
