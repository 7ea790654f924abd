"""Conversations: a message with files, an answer that appears as it is written, and all that was said before."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmhub.errors import InputError, MmhubError
from mmhub_ui.context import Context
from mmhub_ui.inputs import Given, check_uploaded
from mmhub_ui.page import failure, note
from mmhub_ui.work import Stream, follow

if TYPE_CHECKING:
    from mmhub.model import Model

Message = dict[str, Any]


def contents(model: Model, message: Mapping[str, Any]) -> list[Message]:
    """Return what was written and attached as parts that the model takes, files first.

    Raises:
        InputError: there is nothing, or a file is of no kind that the model takes.
    """
    kinds = tuple(model.encoders) if model.converses else ()
    parts = [{"type": kind, kind: file} for file in message.get("files") or () for kind in [_kind(file, kinds)]]
    text = str(message.get("text") or "").strip()
    parts += [{"type": "text", "text": text}] if text else []
    if not parts:
        raise InputError("nothing was said", "write something, or attach a file")
    return parts


def _kind(file: str, kinds: Sequence[str]) -> str:
    kind = (mimetypes.guess_type(file)[0] or "").partition("/")[0]
    if kind == "video" and file.endswith(".webm"):  # browsers record sound so
        kind = "audio"
    if kind not in kinds:
        raise InputError(f"this model cannot take {file}", f"it takes {', '.join((*kinds, 'text'))}")
    return kind


def shown(talk: Sequence[Message]) -> list[Message]:
    """Return a conversation for gr.Chatbot: each file is a message of its own."""
    found: list[Message] = []
    for message in talk:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part["type"]
            value: Any = part["text"] if kind == "text" else {"path": part[kind], "alt_text": f"{kind} of the user"}
            found.append({"role": message["role"], "content": value})
    return found


def reply(
    context: Context, name: str, message: Mapping[str, Any], talk: Sequence[Message], system: str, given: Given
) -> Iterator[tuple[list[Message], str]]:
    """Yield the conversation with the answer so far, and a line of HTML about it.

    Errors are told in that line, and the conversation is then as it was.
    """
    from mmhub.generate.conversation import answer

    files = [str(file) for file in message.get("files") or ()]
    before = list(talk)

    def work(stream: Stream) -> dict[str, Any]:
        check_uploaded(files)
        context.check_length(str(message.get("text") or ""), system)
        with context.use(name) as model:
            asked = [*before, {"role": "user", "content": contents(model, message)}]
            head = [{"role": "system", "content": system.strip()}] if system.strip() else []
            how: dict[str, Any] = {"truncate": True, "policy": context.bounds(model)}
            return answer(model, [*head, *asked], given.settings(model), stream=stream, **how) | {"asked": asked}

    own = {"role": "user", "content": _plain(message)}
    try:
        with closing(follow(work)) as pieces:
            for text, found in pieces:
                if found is None:
                    yield [*before, own, {"role": "assistant", "content": text}], note("Writing…")
                elif "refused" in found:
                    yield before, note(f"Refused by the guard {found['guard']}: {found['refused']}")
                else:
                    yield [*found["asked"], {"role": "assistant", "content": found["text"]}], _ending(found)
    except MmhubError as error:
        yield before, failure(error, files)


def _plain(message: Mapping[str, Any]) -> list[Message]:
    """What was said, before the model is asked what of it it takes."""
    kinds = ("image", "audio", "video")
    parts = [(_guess(file, kinds), file) for file in message.get("files") or ()]
    found = [{"type": kind, kind: file} for kind, file in parts]
    return [*found, {"type": "text", "text": str(message.get("text") or "").strip()}]


def _guess(file: str, kinds: Sequence[str]) -> str:
    try:
        return _kind(file, kinds)
    except InputError:
        return "file"


def _ending(found: Mapping[str, Any]) -> str:
    lines = []
    if found.get("truncated"):
        lines.append(f"The oldest turns ({found['truncated']}) no longer fit the model's context and were left out.")
    if found.get("finish") == "length":
        lines.append("The answer was cut: it reached the most tokens that it may write, or the model's context.")
    return note(" ".join(lines))


class TalkView:
    """The components of a conversation; `said` is what was said in it so far."""

    def __init__(self, tab: str) -> None:
        with gr.Column(visible=False) as self.box:
            self.chat = gr.Chatbot(
                label="Conversation",
                height=420,
                elem_id=f"{tab}-chat",
                buttons=["copy"],
                feedback_options=None,
                sanitize_html=True,
                allow_tags=False,
                render_markdown=False,
            )
            self.message = gr.MultimodalTextbox(
                label="Message",
                show_label=False,
                placeholder="Write a message",
                sources=[],
                file_count="multiple",
                max_lines=8,
                elem_id=f"{tab}-message",
            )
            self.status = gr.HTML(elem_id=f"{tab}-talk", container=False, elem_classes="mm-line")
            with gr.Row():
                self.stop = gr.Button("Stop", size="sm", elem_id=f"{tab}-stop-chat")
                self.forget = gr.Button("New conversation", size="sm", elem_id=f"{tab}-forget")
        self.said = gr.State([])

    @property
    def all(self) -> list[Any]:
        return [self.box, self.chat, self.message, self.said, self.status]

    def fit(self, chats: bool, model: Model | None) -> list[Any]:
        """Return updates that begin a conversation with a model, or show none."""
        kinds = tuple(model.encoders) if model is not None and model.converses else ()
        sources = ["upload", *(["microphone"] if "audio" in kinds else [])] if kinds else []
        asks = f"Write a message, or attach {' and '.join(kinds)} files" if kinds else "Write a message"
        message = gr.update(sources=sources, file_types=list(kinds) or None, placeholder=asks, value=None)
        return [gr.update(visible=chats), [], message, [], ""]
