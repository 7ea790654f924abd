"""POST /v1/completions: texts that a model goes on with, or turns into others."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mmhub_serve.bodies import answer, aside, lent, read_json, shaped, size_of
from mmhub_serve.chat import apart, finish_of
from mmhub_serve.errors import Refused
from mmhub_serve.events import EventStream
from mmhub_serve.openai_parameters import COMPLETIONS, Writing, without_defaults
from mmhub_serve.pool import Pool
from mmhub_serve.refusals import blaming, check_count
from mmhub_serve.served import Served
from mmhub_serve.settings import Limits
from mmhub_serve.tokens import prompt_tokens, usage, written_tokens


class CompletionBody(Writing, kw_only=True):
    prompt: str | list[Any] = ""


async def complete(request: Request, pool: Pool, limits: Limits) -> Response:
    """Go on with one or several texts."""
    table = without_defaults(await read_json(request), COMPLETIONS)
    body = await aside(size_of(request), shaped, CompletionBody, table)
    prompts = texts_of(body.prompt, "prompt", limits)
    if body.stream and len(prompts) > 1:
        raise Refused(400, f"{len(prompts)} prompts are to be streamed", "stream one", param="prompt")
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(lent(request, pool, body.model))
        _check_continues(served)
        settings = body.settings(served.model, limits)
        samples = [{"text": text} for text in prompts]
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = served.name
        with blaming("prompt", several=len(prompts) > 1):
            if body.stream:
                pieces = served.stream(samples[0], settings)
                stack.push_async_callback(pieces.aclose)  # type: ignore[attr-defined]
                first = await anext(pieces)
                events = _chunks(head, body.counts, served, first, pieces, prompts[0], limits)
                return EventStream(events, stack.pop_all().aclose)
            found = await served.write(samples, settings, n=body.n or 1)
        answers = [one for part in found for one in apart(part)]
        choices = [_choice(number, one.get("text", ""), finish_of(one)) for number, one in enumerate(answers)]
        return answer(head | {"choices": choices, "usage": await _usage(served, prompts, answers, limits)})


def texts_of(given: str | list[Any], param: str, limits: Limits) -> list[str]:
    """Return the texts that a parameter holds, one or several.

    Raises:
        Refused: 400, they are tokens, or too many.
    """
    texts = [given] if isinstance(given, str) else given
    if not all(isinstance(text, str) for text in texts):
        raise Refused(400, f"{param} holds something else than texts", "give a text or texts, no tokens", param=param)
    check_count(len(texts), limits.samples, param)
    return texts


def _check_continues(served: Served) -> None:
    info = served.info
    if not info.writes or info.hears or info.converses or info.modalities != ("text",):
        where = "/v1/chat/completions" if info.converses else "/v1/predict"
        raise Refused(400, f"{info.name} is for {info.task} and continues no texts", f"ask {where}", param="model")


def _choice(number: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": None, "finish_reason": finish}


async def _usage(served: Served, prompts: list[str], answers: list[dict[str, Any]], limits: Limits) -> dict[str, int]:
    def count() -> dict[str, int]:
        written = sum(written_tokens(served.model, one.get("text", "")) for one in answers)
        return usage(sum(prompt_tokens(served.model, text, limits.policy) for text in prompts), written)

    return await aside(2**30, count)


async def _chunks(
    head: dict[str, Any],
    counts: bool,
    served: Served,
    first: str | dict[str, Any],
    pieces: AsyncIterator[str | dict[str, Any]],
    prompt: str,
    limits: Limits,
) -> AsyncIterator[dict[str, Any]]:
    more = {"usage": None} if counts else {}
    piece = first
    while isinstance(piece, str):
        yield head | {"choices": [_choice(0, piece, None)]} | more
        piece = await anext(pieces)
    yield head | {"choices": [_choice(0, "", finish_of(piece))]} | more
    if counts:
        yield head | {"choices": [], "usage": await _usage(served, [prompt], [piece], limits)}
