"""How a text is written: the settings a request asks for, on top of the model's own, within the server's bounds."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from mmhub.errors import UsageError
from mmhub.interfaces import Generation, decode_config, encode_config
from mmhub_serve.errors import Refused, refusal_of
from mmhub_serve.settings import Limits

_PENALTY = (0.01, 100.0)  # others leave no difference between scores
MOST = 16  # answers to one question, hypotheses of a beam search, and stop texts
_SEEDS = 2**63


def settings_of(
    model: Any, given: Mapping[str, Any], limits: Limits, names: Mapping[str, str] | None = None
) -> Generation:
    """Return the model's settings changed by `given`, keys of `Generation`; `names` is what a request calls them.

    Without a word on it no more tokens are written than the server allows; whoever asks for more is refused.

    Raises:
        Refused: 400, a value is out of bounds or no key of `Generation`; `param` says which.
    """
    names = names or {}
    if "watermark" in given:
        raise Refused(400, "the watermark is the server's affair", "leave it out", param="watermark")
    own = encode_config(model.decoder.generation)
    own["max_new_tokens"] = min(own["max_new_tokens"], limits.new_tokens)
    if given.get("temperature") and "beams" not in given:
        own["beams"] = 1  # texts are drawn, or the best of several is kept
    table = own | dict(given)
    if "min_new_tokens" not in given and isinstance(table["max_new_tokens"], int):
        table["min_new_tokens"] = min(own["min_new_tokens"], table["max_new_tokens"])
    try:
        settings = decode_config(Generation, table, "generation")
    except UsageError as error:
        key = next((key for key in given if key in error.message), "generation")
        raise refusal_of(error, names.get(key, key)) from None
    bounds = {"max_new_tokens": limits.new_tokens, "beams": MOST}
    for key, most in bounds.items():
        if getattr(settings, key) > most:
            name = names.get(key, key)
            what = f"{name} is {getattr(settings, key)}, and this server allows {most}"
            raise Refused(400, what, "ask for less", param=name)
    if len(settings.stop) > MOST or not -_SEEDS <= settings.seed < _SEEDS:
        name = "stop" if len(settings.stop) > MOST else "seed"
        raise Refused(400, f"{name} is out of bounds", f"at most {MOST} stop texts, and a seed of 64 bits", param=name)
    if not _PENALTY[0] <= settings.repetition_penalty <= _PENALTY[1]:
        what, hint = "repetition_penalty is out of bounds", f"from {_PENALTY[0]:g} to {_PENALTY[1]:g}, 1 being none"
        raise Refused(400, what, hint, param=names.get("repetition_penalty", "repetition_penalty"))
    if not settings.temperature:  # nothing is drawn: texts with and without a seed can be written together
        settings = replace(settings, seed=0)
    return settings


def fresh_seed() -> int:
    """A seed for a request that names none, so that asking again gives another text where texts are drawn."""
    return secrets.randbelow(2**31)
