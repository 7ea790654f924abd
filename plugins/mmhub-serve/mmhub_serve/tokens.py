"""How many tokens of a model's own a request and its answer have, for the `usage` of OpenAI's answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhub.conversation import media_of
from mmhub.generate.talks import Layout, read_talk, without_answer
from mmhub.interfaces import Policy
from mmhub.model import Model


def talk_tokens(model: Model, messages: Any, policy: Policy) -> int:
    """Return the tokens of a conversation as it is laid out, each picture and sound as many as it takes up."""
    talk = without_answer(read_talk(model, messages))
    total = len(Layout(model, policy)(talk).ids)
    for name in model.encoders if model.converses else ():
        for raw in media_of(talk, name):
            positions = model.processors[name].length(raw, policy)
            total += int(model.fusion.token_count(name, model.readers[name].token_count(positions)))  # type: ignore[operator]
    return total


def prompt_tokens(model: Model, text: Any, policy: Policy) -> int:
    """Return the tokens of a text as the model reads it, those that begin and end it included."""
    processor = model.processors["text"]
    if model.decoder.reads_text:
        return len(processor.prompt(text or "", policy))
    if isinstance(text, (str, Mapping)) and hasattr(processor, "count"):
        return int(processor.count(text, policy))
    return int(processor.length(text, policy))


def written_tokens(model: Model, text: str) -> int:
    """Return the tokens of a text that the model wrote, without the one that ends it."""
    processor: Any = getattr(model.decoder, "processor", None)
    if not text or processor is None:
        return 0
    ids = processor.prompt(text, Policy())
    return len(ids) - int(len(ids) > 0 and int(ids[0]) == processor.begin_id)


def usage(prompt: int, written: int | None = None) -> dict[str, int]:
    """Return what OpenAI calls usage; embeddings have written nothing."""
    if written is None:
        return {"prompt_tokens": prompt, "total_tokens": prompt}
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
