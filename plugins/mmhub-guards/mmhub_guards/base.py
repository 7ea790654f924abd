"""What the guards share: where they watch, and the texts of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmhub.guard import texts_of, with_texts
from mmhub.interfaces import ComponentConfig
from mmhub.spec import Change, Refusal

Stage = Literal["input", "output"]
Sample = Mapping[str, Any]
Answer = Mapping[str, Any]


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
        """Refuse a sample for the first text that must not pass, or for what a list of words says together."""
        return self._refusal((*(() if self.replaces else texts_of(sample)), *_together(sample.get("text"))))

    def review(self, sample: Sample, answer: Answer) -> Answer | Change | Refusal:
        """Refuse an answer for the first text that must not pass, or clean it."""
        if self.replaces:
            return self._cleaned(answer, with_answer(answer, self.clean), answer_texts(answer))
        return self._refusal(answer_texts(answer)) or answer

    def _refusal(self, texts: Iterable[str]) -> Any:
        return next(filter(None, map(self.find, texts)), "")

    def _cleaned(self, old: Mapping[str, Any], new: Mapping[str, Any], texts: Iterable[str]) -> Any:
        if new is old:
            return old
        found = [one.rule for one in map(self.find, texts) if one is not None]
        rules = ", ".join(dict.fromkeys(found))
        return Change(new, rules, f"replaced: {rules}")


def replaced(text: str, spans: Iterable[tuple[int, int, str]]) -> str:
    """Return a text with other texts in the place of spans (start, end, text), which are in order and apart."""
    made, last = [], 0
    for start, end, put in spans:
        made += [text[last:start], put]
        last = end
    return "".join([*made, text[last:]])


def answer_texts(answer: Answer) -> Iterator[str]:
    """Yield the texts of an answer: "text", "texts", those of entities, and segments and words as they are read."""
    yield from texts_of(answer)
    yield from (text for text in answer.get("texts") or () if isinstance(text, str))
    yield from _inner(answer, "entities", "text")
    yield from filter(None, map(_run, (_inner(answer, "segments", "text"), _inner(answer, "words", "word"))))


def with_answer(answer: Answer, change: Callable[[str], str]) -> Answer:
    """Return an answer with its texts changed, the same object if none is.

    Words of a changed text are left out, and so are segments and entities of which it cannot be said what of each has
    changed.
    """
    made = dict(with_texts(answer, change))
    if isinstance(answer.get("texts"), list):
        made["texts"] = [change(text) if isinstance(text, str) else text for text in answer["texts"]]
    for key in ("segments", "entities"):
        if isinstance(answer.get(key), list):
            made[key] = [_with_text(one, change) for one in answer[key]]
    heard = _run(_inner(answer, "segments", "text"))
    if "segments" in made and _run(_inner(made, "segments", "text")) != change(heard):
        del made["segments"]
    words = _run(_inner(answer, "words", "word"))
    if change(words) != words and made.get("entities") == answer.get("entities"):
        made.pop("entities", None)
    if made == dict(answer) and change(words) == words:
        return answer
    made.pop("words", None)  # they spell it as well
    return made


def _with_text(one: Any, change: Callable[[str], str]) -> Any:
    has_text = isinstance(one, Mapping) and isinstance(one.get("text"), str)
    return {**one, "text": change(one["text"])} if has_text else one


def _inner(answer: Answer, key: str, inner: str) -> list[str]:
    """The texts of a list in an answer, of mappings or of mere texts."""
    listed = answer.get(key)
    found = (one.get(inner) if isinstance(one, Mapping) else one for one in listed or () if isinstance(listed, list))
    return [one for one in found if isinstance(one, str)]


def _run(texts: Iterable[str]) -> str:
    """Texts that are read one behind the other, as one, parted by a blank where they bring none."""
    made = ""
    parts: list[str] = []
    for text in texts:
        parts += [" "] if parts and not (made[-1:].isspace() or text[:1].isspace()) else []
        parts.append(text)
        made = text
    return "".join(parts)


def _together(texts: Any) -> list[str]:
    """What a list of texts, which may be words, says as one."""
    if hasattr(texts, "tolist"):
        texts = texts.tolist()
    listed = isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) > 1
    return [_run(text for text in texts if isinstance(text, str))] if listed else []
