"""POST /v1/chat/completions: conversations with pictures and sounds, whole or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mmhub_serve.bodies import answer, aside, lent, read_json, shaped, size_of
from mmhub_serve.errors import Refused
from mmhub_serve.events import EventStream
from mmhub_serve.inputs import read_inputs, read_talk
from mmhub_serve.openai_parameters import CHAT, Writing, without_defaults
from mmhub_serve.pool import Pool
from mmhub_serve.refusals import blaming
from mmhub_serve.served import Served
from mmhub_serve.settings import Limits
from mmhub_serve.tokens import talk_tokens, usage, written_tokens

FINISH = {"end": "stop", "stop": "stop", "length": "length"}


class ChatBody(Writing, kw_only=True):
    messages: list[Any]


async def complete_chat(request: Request, pool: Pool, limits: Limits) -> Response:
    """Answer the last message of a conversation."""
    table = await read_json(request)
    body = await aside(size_of(request), shaped, ChatBody, without_defaults(table, CHAT))
    if not body.messages:
        raise Refused(400, "messages is empty", "add the one to be answered", param="messages")
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(lent(request, pool, body.model))
        _check_converses(served, body.n or 1)
        settings = body.settings(served.model, limits)
        with blaming("messages"):
            talk = await read_inputs(request, limits, read_talk, body.messages)
            if isinstance(talk[-1], Mapping) and talk[-1].get("role") == "assistant":
                hint = "end with the message to be answered; no answer is gone on with"
                raise Refused(400, "the last message is the assistant's", hint, param="messages")
            sample = {"messages": talk}
            if body.stream:
                pieces = served.stream(sample, settings)
                stack.push_async_callback(pieces.aclose)  # type: ignore[attr-defined]
                first = await anext(pieces)
                reply = _Reply(served, body, "chat.completion.chunk")
                return EventStream(_chunks(reply, first, pieces, talk, limits), stack.pop_all().aclose)
            (found,) = await served.write([sample], settings, n=body.n or 1)
        reply = _Reply(served, body, "chat.completion")
        choices = [_choice(number, one) for number, one in enumerate(apart(found))]
        return answer(reply.head | {"choices": choices, "usage": await reply.usage(talk, apart(found), limits)})


def _check_converses(served: Served, texts: int) -> None:
    info = served.info
    if info.hears or not info.writes or not (info.converses or info.task == "language-modelling"):
        what = f"{info.name} is for {info.task} and holds no conversations"
        raise Refused(400, what, "name a model that chats, or ask /v1/predict", param="model")
    if texts > 1 and not info.converses:
        raise Refused(400, f"n is {texts}, and {info.name} gives one answer", "ask several times", param="n")


def apart(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the answers to one question, each by itself."""
    if "texts" not in found:
        return [dict(found)]
    keys = {"texts": "text", "finish": "finish", "refused": "refused"}
    answers = [
        {keys[key]: values[number] for key, values in found.items() if key in keys}
        for number in range(len(found["texts"]))
    ]
    return [{key: value for key, value in one.items() if value is not None} for one in answers]


class _Reply:
    """What all parts of an answer have in common."""

    def __init__(self, served: Served, body: ChatBody, kind: str) -> None:
        self._served, self.body = served, body
        name = f"chatcmpl-{uuid.uuid4().hex}"
        self.head = {"id": name, "object": kind, "created": int(time.time()), "model": served.name}

    async def usage(self, talk: Any, answers: list[dict[str, Any]], limits: Limits) -> dict[str, int]:
        model = self._served.model

        def count() -> dict[str, int]:
            written = sum(written_tokens(model, one.get("text", "")) for one in answers)
            return usage(talk_tokens(model, talk, limits.policy), written)

        return await aside(2**30, count)

    def chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self.head | {"choices": [choice]} | ({"usage": None} if self.body.counts else {})


def _choice(number: int, found: Mapping[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": found.get("text"), "refusal": found.get("refused")}
    return {"index": number, "message": message, "logprobs": None, "finish_reason": finish_of(found)}


def finish_of(found: Mapping[str, Any]) -> str:
    """Return why an answer ends, in OpenAI's words; what a guard refuses has none."""
    return "content_filter" if "refused" in found else FINISH[found["finish"]]


async def _chunks(
    reply: _Reply, first: str | dict[str, Any], pieces: AsyncIterator[str | dict[str, Any]], talk: Any, limits: Limits
) -> AsyncIterator[dict[str, Any]]:
    yield reply.chunk({"role": "assistant", "content": "", "refusal": None})
    piece = first
    while isinstance(piece, str):
        yield reply.chunk({"content": piece})
        piece = await anext(pieces)
    if "refused" in piece:
        yield reply.chunk({"refusal": piece["refused"]})
    yield reply.chunk({}, finish_of(piece))
    if reply.body.counts:
        yield reply.head | {"choices": [], "usage": await reply.usage(talk, [piece], limits)}
