"""A conversation with a language model: messages in, the next answer out, and a history that fits the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from torch import Tensor

from mmhub.batch import Bundle
from mmhub.errors import InputError
from mmhub.generate.samples import bundle_of, kept_tokens, write_rows
from mmhub.interfaces import Generation, LanguageModel, Policy

if TYPE_CHECKING:
    from mmhub.model import Model

Message = Mapping[str, Any]
_ROLES = ("system", "user", "assistant")


def chat(
    model: Model,
    messages: Sequence[Message],
    settings: Generation | None = None,
    *,
    stream: Callable[[str], None] | None = None,
    truncate: bool = False,
) -> str:
    """Return the model's answer to the last of `messages`, each {"role", "content"}.

    A content is a text, or a list of parts {"type": "text", "text"}, which are joined.

    With `truncate` the oldest turns are left out of a conversation that is longer than the context, else that is an
    error. `stream` gets the answer piece by piece, or whole where plugins' guards review it.

    Raises:
        UsageError: the model writes no text, or has no chat template.
        InputError: the messages are no conversation, do not fit the context, or a guard refuses them or the answer.
    """
    found = answer(model, messages, settings, stream=stream, truncate=truncate)
    if "refused" in found:
        raise InputError(f"the guard {found['guard']} refused: {found['refused']}")
    return str(found["text"])


def answer(
    model: Model,
    messages: Sequence[Message],
    settings: Generation | None = None,
    *,
    stream: Callable[[str], None] | None = None,
    truncate: bool = False,
) -> dict[str, Any]:
    """As `chat`, but return {"text", "finish", "score"}, with `truncated`, the number of turns left out, if any were.

    What a guard refuses is answered {"refused", "guard"}.
    """
    decoder = model.language_model
    messages = _checked(messages)
    settings = _settled(decoder, settings)
    ids, left_out = _fitted(decoder, messages, settings, truncate)
    lead = _Lead(stream) if stream is not None else None
    guarded = model.has_guards

    def reply(passed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        give = None if lead is None or guarded else lambda row, sample, text: lead(text)

        def read(rows: Sequence[int]) -> tuple[Bundle, list[int]]:
            return bundle_of(model, [{}], [ids], Policy()), [left_out]

        found = write_rows(model, read, [len(ids)] * len(passed), settings, stream=give)
        return [one | {"text": one["text"].strip()} for one in found]

    sample = {"text": "\n\n".join(str(message["content"]) for message in messages)}  # what guards see
    (found,) = model.guarded([sample], reply)
    if lead is not None and guarded and "text" in found:
        lead(found["text"])
    return found


class _Lead:
    """Passes text on, without the white space that stands before the first word."""

    def __init__(self, stream: Callable[[str], None]) -> None:
        self._stream, self._begun = stream, False

    def __call__(self, text: str) -> None:
        text = text if self._begun else text.lstrip()
        if text:
            self._begun = True
            self._stream(text)


def _settled(decoder: LanguageModel, settings: Generation | None) -> Generation:
    """The settings with the texts that end an answer in the layout of the processor's chat template."""
    settings = settings or decoder.generation
    stop = dict.fromkeys([*settings.stop, *getattr(decoder.processor, "stop_texts", ())])
    return msgspec.structs.replace(settings, stop=tuple(stop))


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, the content of each one text."""
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise InputError(
                f"message {number} has no role", f'a message is {{"role": {" | ".join(_ROLES)}, "content"}}'
            )
        found.append({**message, "content": _content(number, message.get("content"))})
    if not found or found[-1]["role"] != "user":
        raise InputError("the conversation does not end with a message of the user", "add the one to be answered")
    return found


def _content(number: int, content: Any) -> str:
    """The text of a message's content, whose parts are joined as they are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"the content of message {number} is a {type(content).__name__}", _CONTENT)
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            what = "whose text is none" if kind == "text" else f"of type {kind!r}"
            raise InputError(f"the content of message {number} has a part {what}", _CONTENT)
    return "".join(part["text"] for part in content)


_CONTENT = 'the content of a message is a text, or a list of {"type": "text", "text": ...}'


def _fitted(
    decoder: LanguageModel, messages: Sequence[Message], settings: Generation, truncate: bool
) -> tuple[Tensor, int]:
    """The ids of as many of the latest turns as fit, with the system message, and how many turns were left out."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    system, turns = (plain[:1], plain[1:]) if plain[0]["role"] == "system" else ([], plain)
    context, room = decoder.context, kept_tokens(decoder, settings)
    ids = whole = _ids(decoder, system + turns)
    left_out = 0
    while truncate and room is not None and len(ids) > room and (later := _without_first_turn(turns)):
        turns, left_out = later, left_out + 1
        ids = _ids(decoder, system + turns)
    if context is not None and len(ids) >= context:
        what = f"the conversation has {len(whole)} tokens" if ids is whole else f"its last turn has {len(ids)} tokens"
        hint = "shorten the message" if truncate else "leave out the oldest turns, with truncate=True"
        raise InputError(f"{what}, and the model's context of {context} must also hold the answer", hint)
    return ids, left_out


def _without_first_turn(turns: Sequence[Message]) -> list[Any]:
    """The messages from the second one of the user on; none if there is no other."""
    starts = [number for number, message in enumerate(turns) if message["role"] == "user"]
    return list(turns[starts[1] :]) if len(starts) > 1 else []


def _ids(decoder: LanguageModel, messages: Sequence[Message]) -> Tensor:
    ids: Tensor = decoder.processor.chat(messages, Policy())
    return ids


class Conversation:
    """A conversation that remembers: each answer is given in view of all messages before it.

    Turns that no longer fit the model's context are left out of what the model sees, oldest first, and stay in
    `messages`. An answer that was interrupted stays as far as it came, marked `"interrupted": True`.

    Raises:
        UsageError: the model is no language model, or has no chat template.
    """

    def __init__(self, model: Model, system: str = "", settings: Generation | None = None) -> None:
        self._model = model
        self._settings = settings or model.language_model.generation
        _ids(model.language_model, [{"role": "user", "content": "?"}])  # or there is no chat template
        self.messages: list[dict[str, Any]] = []
        self.system = system

    @property
    def system(self) -> str:
        """The message that says how to answer; '' for none. Setting it keeps the rest of the conversation."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def ask(self, text: str, stream: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Say something and return the answer {"text", "finish", "score"}, see `generate.answer`.

        Ctrl-C (KeyboardInterrupt) ends the answer alone: its `finish` is "interrupted". What a guard refuses, and what
        raises an error, is not remembered.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []

        def collect(piece: str) -> None:
            pieces.append(piece)
            if stream is not None:
                stream(piece)

        try:
            found = answer(self._model, asked, self._settings, stream=collect, truncate=True)
        except KeyboardInterrupt:
            found = {"text": "".join(pieces).strip(), "finish": "interrupted"}
        if "text" in found and (found["text"] or found["finish"] != "interrupted"):
            mark = {"interrupted": True} if found["finish"] == "interrupted" else {}
            self.messages = [*asked, {"role": "assistant", "content": found["text"], **mark}]
        return found

    def undo(self) -> bool:
        """Forget the last question and its answer; return whether there was one."""
        places = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if places:
            del self.messages[places[-1] :]
        return bool(places)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.messages[:1] if self.system else []
