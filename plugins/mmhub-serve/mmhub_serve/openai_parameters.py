"""What OpenAI's clients may say beside their input: what is heeded, what changes nothing, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from mmhub.interfaces import Generation
from mmhub_serve.bodies import Body
from mmhub_serve.errors import Refused
from mmhub_serve.settings import Limits
from mmhub_serve.writing import MOST, fresh_seed, settings_of

ANY = object()  # a value that tells nothing but who asks
_ABOUT = dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), (ANY,))
_SCORES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
# by parameter, the values with which it asks for nothing; null is one of them everywhere
CHAT: dict[str, tuple[Any, ...]] = {
    **_ABOUT,
    **_SCORES,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (ANY,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETIONS: dict[str, tuple[Any, ...]] = {
    **_ABOUT, **_SCORES, "best_of": (1,), "echo": (False,), "logprobs": (0, False), "suffix": ("",)
}  # fmt: skip
EMBEDDINGS: dict[str, tuple[Any, ...]] = {"user": (ANY,)}
TRANSCRIPTS: dict[str, tuple[Any, ...]] = {
    "chunking_strategy": ("auto",),
    "include": (),
    "keywords": (),
    "known_speaker_names": (),
    "known_speaker_references": (),
    "languages": (),
    "prompt": ("",),
    "stream": ("false", "False"),
    "temperature": ("0", "0.0"),
}


def without_defaults(table: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return the parameters that remain once those are gone that ask for nothing.

    Raises:
        Refused: 400, one asks for what no model here does.
    """
    rest = {}
    for name, value in table.items():
        if name not in known:
            rest[name] = value
        elif value is not None and not any(one is ANY or _same(one, value) for one in known[name]):
            raise Refused(400, f"{name} asks for what no model here does", "leave it out", param=name)
    return {name: value for name, value in rest.items() if value is not None}


def _same(one: Any, value: Any) -> bool:
    return bool(one == value) and isinstance(one, bool) == isinstance(value, bool)


class StreamOptions(Body, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Writing(Body, kw_only=True):
    """Parameters of a text that is to be written; `top_k`, `min_p` and `repetition_penalty` are not OpenAI's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None

    @property
    def counts(self) -> bool:
        """Does a stream end with what was used?"""
        return bool(self.stream_options and self.stream_options.include_usage)

    def settings(self, model: Any, limits: Limits) -> Generation:
        """Return how the text is written: what is not said is the model's own, and without a seed one is drawn.

        Raises:
            Refused: 400, a value is out of bounds.
        """
        texts = 1 if self.n is None else self.n
        if not 1 <= texts <= MOST or (self.stream and texts > 1):
            hint = f"1 to {MOST} texts, and one where it is streamed"
            raise Refused(400, f"n is {self.n}", hint, param="n")
        if self.stream_options and not self.stream:
            raise Refused(400, "stream_options without stream", "leave it out", param="stream_options")
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        named = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if name in named}
        given |= {"max_new_tokens": most, "stop": list(stop) if stop else None}
        given["seed"] = fresh_seed() if self.seed is None else self.seed
        given = {name: value for name, value in given.items() if value is not None}
        return settings_of(model, given, limits, {"max_new_tokens": limit})
