"""The guard `control-tokens`: tokens by which a model is controlled, spelled by people, become plain text."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmhub.guard import texts_of, with_texts
from mmhub.spec import Change
from mmhub_guards.base import Answer, GuardConfig, Sample, Stage, replaced
from mmhub_guards.folding import heaped, invisible

_ANY = r"<\|[^|<>\s]{1,40}\|>"  # the form that most models give them
_TURNS = 10  # a blank may join what makes another token, but not for ever
_SAID = ("\ue000", "\ue001", "\ue002")  # stand for what is said where a template is asked what it writes around it
_GAP = re.compile(f"[{''.join(_SAID)}]+")


class ControlTokensConfig(GuardConfig, kw_only=True):
    """Nothing but a name may be set: the tokens are the model's own."""

    on: tuple[Stage, ...] = ("input",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on != ("input",):
            raise ValueError("'on' is [\"input\"]: a guard of what people write")


class ControlTokens:
    """Puts a blank into special tokens of the model's tokenizer, markers of its chat template, and all like "<|name|>".

    Also into those spelled in other widths, with invisible characters between, in another case, or parted between two
    messages. Markers that are words, such as "User:", count at the beginning of a line alone.
    """

    Config = ControlTokensConfig

    def __init__(self, config: ControlTokensConfig, model: Any = None, folder: Path | None = None) -> None:
        self.config, self.name, self.on = config, config.name or "control-tokens", config.on
        self._model = model
        self._pattern: re.Pattern[str] | None = None  # made when the first sample comes

    def rewrite(self, sample: Sample) -> Sample | Change:
        """Put blanks into the tokens that a sample's texts spell, alone and together."""
        texts = [self._apart(text) for text in texts_of(sample)]
        new = iter(self._parted(texts))
        made = with_texts(sample, lambda _: next(new))
        return sample if made is sample else Change(made, "control-token", "control tokens are made plain text")

    def check(self, sample: Sample) -> str:
        """Let every sample pass."""
        return ""

    def review(self, sample: Sample, answer: Answer) -> Answer:
        """Leave answers as they are."""
        return answer

    def _apart(self, text: str) -> str:
        """A text with a blank before the last character of each token."""
        for _ in range(_TURNS):
            places = [places[found.end() - 1] for found, places in self._found(text)]
            if not places:
                return text
            text = replaced(text, ((place, place, " ") for place in places))
        raise ValueError("control tokens are left in a text")

    def _parted(self, texts: list[str]) -> list[str]:
        """Texts with a blank before each that ends a token which the ones before it begin."""
        starts = [0, *accumulate(map(len, texts))][:-1]
        inside: set[int] = set()
        for found, places in self._found("".join(texts)):
            start, end = places[found.start()], places[found.end() - 1]
            inside |= set(range(bisect_right(starts, start), bisect_right(starts, end)))
        return [f" {text}" if number in inside else text for number, text in enumerate(texts)]

    def _found(self, text: str) -> Iterator[tuple[re.Match[str], list[int]]]:
        if self._pattern is None:
            self._pattern = _pattern(self._model)
        flat, places = _flat(text)
        yield from ((found, places) for found in self._pattern.finditer(flat))


def _flat(text: str) -> tuple[str, list[int]]:
    """A text in one width, without invisible characters, and where each character came from."""
    if text.isascii() and text.isprintable():
        return text, list(range(len(text)))
    chars: list[str] = []
    places: list[int] = []
    for place, char in enumerate(text):
        made = "" if invisible(char) or heaped(char) else unicodedata.normalize("NFKC", char)
        chars += made
        places += [place] * len(made)
    return "".join(chars), places


def _pattern(model: Any) -> re.Pattern[str]:
    """What finds the control tokens of a model."""
    processors = getattr(model, "processors", {})
    tokens = {token for processor in [processors.get("text")] if processor for token in _tokens(processor)}
    words = {token for token in tokens if re.match(r"\w", token)}
    parts = [_ANY, *map(re.escape, sorted(tokens - words, key=len, reverse=True))]
    parts += [rf"^[ \t]*{re.escape(word)}" for word in sorted(words, key=len, reverse=True)]
    return re.compile("|".join(parts), re.IGNORECASE | re.MULTILINE)


def _tokens(processor: Any) -> Iterator[str]:
    """Yield what controls a model: its special tokens, that of unknown words apart, and what its template writes."""
    tokenizer = getattr(processor, "tokenizer", None)
    for number, token in tokenizer.get_added_tokens_decoder().items() if tokenizer is not None else ():
        if (token.special or token.content in _template(processor)) and number != _unknown(processor, tokenizer):
            yield from _marks(token.content)
    yield from (mark for text in getattr(processor, "media_tokens", {}).values() for mark in _marks(text))
    if _template(processor):
        system = {"role": "system", "content": _SAID[0]}
        talk = [{"role": role, "content": _SAID[i]} for role, i in (("user", 1), ("assistant", 2), ("user", 1))]
        for messages in ([system, *talk], talk):
            try:
                written = processor.layout(messages)
            except Exception:  # a template without a system message, say
                continue
            yield from (mark for gap in _GAP.split(written) for word in _beside(gap.split()) for mark in _marks(word))
            return  # without a system message a template may write a default one, of ordinary words


def _beside(words: list[str]) -> list[str]:
    """Of what stands between messages the first and last word, and those that look like markers."""
    return [word for place, word in enumerate(words) if place in (0, len(words) - 1) or word[0] in "<[{#|"]


def _template(processor: Any) -> str:
    return str(getattr(processor, "chat_template", "") or "")


def _unknown(processor: Any, tokenizer: Any) -> int | None:
    """The token of unknown words: texts of some collections spell it, and it controls nothing."""
    found = getattr(processor, "unknown_id", None)
    return (
        found
        if found is not None
        else getattr(tokenizer.model, "unk_token", None) and tokenizer.token_to_id(tokenizer.model.unk_token)
    )


def _marks(text: str) -> Iterator[str]:
    """A text, if it is long enough, and neither a mere word nor without letters."""
    mark = text.strip()
    if len(mark) > 2 and not mark.isalnum() and any(map(str.isalnum, mark)):
        yield mark
