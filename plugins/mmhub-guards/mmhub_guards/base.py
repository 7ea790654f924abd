"""What the guards share: where they watch, and the texts of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmhub.guard import texts_of, with_texts
from mmhub.interfaces import ComponentConfig
from mmhub.spec import Change, Refusal

Stage = Literal["input", "output"]
Sample = Mapping[str, Any]
Answer = Mapping[str, Any]

_LISTS = {"segments": "text", "entities": "text", "words": "word"}  # in answers, and what of them is text


class GuardConfig(ComponentConfig, kw_only=True):
    """What every guard may be told: its own name, where answers and logs name it, and where it watches."""

    name: str = ""
    on: tuple[Stage, ...] = ("input", "output")

    def __post_init__(self) -> None:
        if not self.on:
            raise ValueError("'on' is empty: name 'input', 'output' or both")


class TextGuard:
    """A guard that looks at texts one by one: `find` says what is wrong in one, and `clean` takes it out.

    Attributes:
        kind: the component's name. replaces: are texts cleaned instead of refused?
    """

    kind: ClassVar[str]
    replaces: bool = False

    def __init__(self, config: GuardConfig, model: Any = None, folder: Path | None = None) -> None:
        self.config, self.name, self.on = config, config.name or self.kind, config.on

    def find(self, text: str) -> Refusal | None:
        """Return why a text must not pass, None if it may."""
        raise NotImplementedError

    def clean(self, text: str) -> str:
        """Return a text without what must not pass."""
        raise NotImplementedError

    def rewrite(self, sample: Sample) -> Sample | Change:
        """Clean a sample's texts."""
        return self._cleaned(sample, with_texts(sample, self.clean), texts_of(sample)) if self.replaces else sample

    def check(self, sample: Sample) -> str | Refusal:
        """Refuse a sample for the first text that must not pass."""
        return "" if self.replaces else self._refusal(texts_of(sample))

    def review(self, sample: Sample, answer: Answer) -> Answer | Change | Refusal:
        """Refuse an answer for the first text that must not pass, or clean it."""
        if self.replaces:
            return self._cleaned(answer, with_answer(answer, self.clean), answer_texts(answer))
        return self._refusal(answer_texts(answer)) or answer

    def _refusal(self, texts: Iterator[str]) -> Any:
        return next(filter(None, map(self.find, texts)), "")

    def _cleaned(self, old: Mapping[str, Any], new: Mapping[str, Any], texts: Iterator[str]) -> Any:
        if new is old:
            return old
        found = [one.rule for one in map(self.find, texts) if one is not None]
        rules = ", ".join(dict.fromkeys(found))
        return Change(new, rules, f"replaced: {rules}")


def answer_texts(answer: Answer) -> Iterator[str]:
    """Yield the texts of an answer: "text", "texts", and those of segments, entities and words."""
    yield from texts_of(answer)
    yield from (text for text in answer.get("texts") or () if isinstance(text, str))
    for key, inner in _LISTS.items():
        found = [one[inner] for one in answer.get(key) or () if isinstance(one, Mapping) and inner in one]
        yield from found if key != "words" else [" ".join(found)] if found else []


def with_answer(answer: Answer, change: Callable[[str], str]) -> Answer:
    """Return an answer with its texts changed, the same object if none is; words of a changed text are left out."""
    made = dict(with_texts(answer, change))
    if isinstance(answer.get("texts"), list):
        made["texts"] = [change(text) if isinstance(text, str) else text for text in answer["texts"]]
    for key, inner in _LISTS.items():
        if key != "words" and isinstance(answer.get(key), list):
            made[key] = [{**one, inner: change(one[inner])} if inner in one else one for one in answer[key]]
    if made == dict(answer):
        joined = " ".join(str(one.get("word", "")) for one in answer.get("words") or ())
        if change(joined) == joined:
            return answer
    made.pop("words", None)  # they spell it as well
    return made
