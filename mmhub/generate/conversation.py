"""A conversation with a language model: messages in, the next answer out, and a history that fits the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmhub.batch import Bundle
from mmhub.errors import InputError
from mmhub.generate.memory import Memory
from mmhub.generate.samples import write_rows
from mmhub.generate.talks import Layout, Lead, as_said, as_sample, read_talk, stripped, with_stops
from mmhub.interfaces import Generation, Policy

if TYPE_CHECKING:
    from mmhub.model import Model

Message = Mapping[str, Any]
Content = str | Sequence[Mapping[str, Any]]


def chat(
    model: Model,
    messages: Sequence[Message],
    settings: Generation | None = None,
    *,
    stream: Callable[[str], None] | None = None,
    truncate: bool = False,
    policy: Policy | None = None,
) -> str:
    """Return the model's answer to the last of `messages`, each {"role", "content"}.

    A content is a text, or a list of parts, {"type": "text", "text"} or, for a model with an encoder for it, {"type":
    "image", "image": raw input} and the like, in any order and number; `policy` bounds what is read.

    With `truncate` the oldest turns are left out of a conversation that is longer than the context, else that is an
    error. `stream` gets the answer piece by piece, or whole where guards review it.

    Raises:
        UsageError: the model writes no text, or has no chat template.
        InputError: the messages are no conversation, hold what the model does not take, do not fit the context, or a
            guard refuses them or the answer.
    """
    found = answer(model, messages, settings, stream=stream, truncate=truncate, policy=policy)
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
    policy: Policy | None = None,
    memory: Memory | None = None,
) -> dict[str, Any]:
    """As `chat`, but return {"text", "finish", "score"}, with `truncated`, the number of turns left out, if any were.

    What a guard refuses is answered {"refused", "guard"}. `memory` is what earlier calls for this conversation have
    left, so that nothing is read twice.
    """
    policy = policy or Policy()
    settings = with_stops(model.language_model, settings)
    talk = read_talk(model, messages)
    if talk[-1]["role"] != "user":
        raise InputError("the conversation does not end with a message of the user", "add the one to be answered")
    lay, memory = Layout(model, policy), memory or Memory(model, policy)
    memory.media.look_again()
    lead = Lead(stream) if stream is not None else None
    reviewed = model.reviews_answers

    def reply(passed: Sequence[Mapping[str, Any]], places: Sequence[int]) -> list[dict[str, Any]]:
        give = None if lead is None or reviewed else lambda row, sample, text: lead(text)
        talks = [read_talk(model, sample["messages"]) for sample in passed]  # which guards may have rewritten

        def read(rows: Sequence[int]) -> tuple[Bundle, list[int]]:
            kept, script, left_out = lay.fitted(talks[0], settings, memory.media.size, truncate)
            return memory.bundle(kept, script), [left_out]

        found = write_rows(model, read, [0] * len(passed), settings, stream=give, source=memory)
        return list(map(stripped, found))

    def seen(sample: Mapping[str, Any]) -> dict[str, Any]:
        return as_sample(model, read_talk(model, sample["messages"]))

    def said(sample: Mapping[str, Any]) -> dict[str, Any]:
        return as_said(model, read_talk(model, sample["messages"]))

    (found,) = model.guarded([{"messages": talk}], reply, seen, policy, said)
    if lead is not None and reviewed and "text" in found:
        lead(found["text"])
    return found


class Conversation:
    """A conversation that remembers: each answer is given in view of all messages before it.

    Turns that no longer fit the model's context are left out of what the model sees, oldest first, and stay in
    `messages`. An answer that was interrupted stays as far as it came, marked `"interrupted": True`. Each picture and
    sound is encoded once, and a turn computes what is new in it, if the decoder has `extend` and what it has read
    before still begins the conversation.

    Raises:
        UsageError: the model is no language model, or has no chat template.
    """

    def __init__(
        self, model: Model, system: str = "", settings: Generation | None = None, policy: Policy | None = None
    ) -> None:
        self._model, self._policy = model, policy or Policy()
        self._settings = settings or model.language_model.generation
        self._lay = Layout(model, self._policy)
        self._lay(read_talk(model, [{"role": "user", "content": "?"}]))  # or there is no chat template
        self._memory = Memory(model, self._policy)
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

    def ask(self, content: Content, stream: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Say something, a text or parts as in `chat`, and return the answer {"text", "finish", "score"}.

        Ctrl-C (KeyboardInterrupt) ends the answer alone: its `finish` is "interrupted". What a guard refuses, and what
        raises an error, is not remembered.
        """
        asked = [*self.messages, {"role": "user", "content": content}]
        pieces: list[str] = []

        def collect(piece: str) -> None:
            pieces.append(piece)
            if stream is not None:
                stream(piece)

        how: dict[str, Any] = {"truncate": True, "policy": self._policy, "memory": self._memory}
        try:
            found = answer(self._model, asked, self._settings, stream=collect, **how)
        except KeyboardInterrupt:
            found = {"text": "".join(pieces).strip(), "finish": "interrupted"}
        if "text" in found and (found["text"] or found["finish"] != "interrupted"):
            mark = {"interrupted": True} if found["finish"] == "interrupted" else {}
            self.messages = [*asked, {"role": "assistant", "content": found["text"], **mark}]
            self._memory.settle(self._lay, read_talk(self._model, self.messages))
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
        self._memory.forget()
