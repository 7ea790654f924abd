"""Conversations that are to be answered: laid out, fitted to the context, and shown to guards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from mmhub.conversation import Message, fit_talk, media_of, read_messages, read_script, text_of
from mmhub.errors import InputError
from mmhub.interfaces import Generation, LanguageModel, Policy, Script, TextDecoder

if TYPE_CHECKING:
    from mmhub.model import Model

Size = Callable[[Sequence[Message]], int]


def read_talk(model: Model, messages: Any) -> list[Message]:
    """Return messages as `mmhub.conversation.read_messages` does, with the media that this model takes.

    Raises:
        InputError: they are no conversation, or hold what the model does not take.
    """
    return read_messages(messages, model.modalities if model.converses else ("text",))


def without_answer(talk: Sequence[Message]) -> list[Message]:
    """Return a conversation up to its last question.

    Raises:
        InputError: the user has said nothing.
    """
    end = max((number for number, message in enumerate(talk, 1) if message["role"] == "user"), default=0)
    if not end:
        raise InputError("the conversation holds no message of the user", "add the one to be answered")
    return list(talk[:end])


@dataclass(frozen=True)
class Layout:
    """How a model's conversations are laid out: as its processor does it, without media for a model of texts alone."""

    model: Model
    policy: Policy

    def converse(self, talk: Sequence[Message], policy: Policy) -> Script:
        processor: Any = self.model.language_model.processor
        if self.model.converses:
            return read_script(processor, talk, policy)
        ids = processor.chat([{"role": message["role"], "content": text_of(message)} for message in talk], policy)
        return Script(ids, torch.zeros(len(ids)), prompt=len(ids))

    def __call__(self, talk: Sequence[Message]) -> Script:
        return self.converse(talk, self.policy)

    def fitted(
        self, talk: Sequence[Message], settings: Generation, media: Size, truncate: bool
    ) -> tuple[list[Message], Script, int]:
        """Return what fits the context of a conversation, laid out, and how many turns were left out, the oldest first.

        `media` says how many tokens the media of a conversation are. Without `truncate` nothing is left out.

        Raises:
            InputError: it leaves no room for an answer.
        """
        decoder, kept = self.model.language_model, list(talk)
        context, room = decoder.context, kept_tokens(decoder, settings)
        if context is None or room is None:
            return kept, self(kept), 0
        if truncate:
            sized = _Sized(self, media)
            kept, _ = fit_talk(sized, talk, self.policy, sized.size, room)  # type: ignore[arg-type]
        script = self(kept)
        length = len(script.ids) + media(kept)
        left_out = _questions(talk) - _questions(kept)
        if length >= context:
            what = f"its last turn has {length} tokens" if left_out else f"the conversation has {length} tokens"
            hint = "shorten the message" if truncate else "leave out the oldest turns, with truncate=True (--truncate)"
            raise InputError(f"{what}, and the model's context of {context} must also hold the answer", hint)
        return kept, script, left_out


class _Sized:
    """Lays conversations out for `fit_talk`, and says how many tokens the latest one is, with its media."""

    def __init__(self, layout: Layout, media: Size) -> None:
        self._layout, self._media, self._talk = layout, media, list[Message]()

    def converse(self, talk: Sequence[Message], policy: Policy) -> Script:
        self._talk = list(talk)
        return self._layout.converse(talk, policy)

    def size(self, script: Script) -> int:
        return len(script.ids) + self._media(self._talk)


def _questions(talk: Sequence[Message]) -> int:
    return sum(message["role"] == "user" for message in talk)


def kept_tokens(decoder: TextDecoder, settings: Generation) -> int | None:
    """How many tokens of a prompt that is too long are kept: room stays for what is written, up to half the context."""
    context = decoder.context
    return None if context is None else max(context - settings.max_new_tokens, (context + 1) // 2)


def with_stops(decoder: LanguageModel, settings: Generation | None) -> Generation:
    """Return settings with the texts that end an answer in the layout of the processor's chat template."""
    settings = settings or decoder.generation
    stop = dict.fromkeys([*settings.stop, *getattr(decoder.processor, "stop_texts", ())])
    return msgspec.structs.replace(settings, stop=tuple(stop))


def as_sample(model: Model, talk: Sequence[Message]) -> dict[str, Any]:
    """Return a conversation as guards see it: all that is said as one text, and its media, a list where several."""
    text = "\n\n".join(text_of(message) for message in talk)
    media = {name: media_of(talk, name) for name in model.encoders} if model.converses else {}
    return {"text": text} | {name: found[0] if len(found) == 1 else found for name, found in media.items() if found}


def as_said(model: Model, talk: Sequence[Message]) -> dict[str, Any]:
    """As `as_sample`, without what the model has answered: what guards of inputs alone see."""
    return as_sample(model, [message for message in talk if message["role"] != "assistant"])


class Lead:
    """Passes text on, without the white space that stands before the first word."""

    def __init__(self, stream: Callable[[str], None]) -> None:
        self._stream, self._begun = stream, False

    def __call__(self, text: str) -> None:
        text = text if self._begun else text.lstrip()
        if text:
            self._begun = True
            self._stream(text)


def stripped(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer without white space around its texts."""
    found = dict(answer)
    if "text" in found:
        found["text"] = found["text"].strip()
    if "texts" in found:
        found["texts"] = [text and text.strip() for text in found["texts"]]  # None where a guard refused one
    return found
