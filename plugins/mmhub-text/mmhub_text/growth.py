"""How much longer a tokenizer may make a text: steps that double it, one after the other, would fill all memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

MOST = 64  # times as long, by each part of a tokenizer
LONGEST = 1000  # characters put before a text or a word, and tokens put around a text
WORD = 10_000  # characters of a word that is looked up in pieces
_STEPS = 1000


def check_growth(tokenizer: Tokenizer) -> None:
    """Raise ValueError if a part of the tokenizer may make much of little."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        steps = list(_steps(getattr(tokenizer, name)))
        growth = math.prod(map(_growth, steps))
        if growth > MOST or len(steps) > _STEPS:
            raise ValueError(f"its {name} may make a text more than {MOST} times as long")
        if sum(len(_text(step.get("prepend"))) for step in steps) > LONGEST:
            raise ValueError(f"its {name} puts more than {LONGEST:,} characters before a text")
    _check_frames(list(_steps(tokenizer.post_processor)))
    _check_model(tokenizer.model)


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """What a part does, one after the other."""
    todo = [] if part is None else [json.loads(part.__getstate__())]
    while todo:
        step = todo.pop()
        inner = next(
            (step[key] for key in ("normalizers", "pretokenizers", "processors", "decoders") if key in step), None
        )
        if inner is None:
            yield step
        else:
            todo += inner


def _growth(step: Mapping[str, Any]) -> float:
    """How many times as long a step makes a text at most, if it is one that does so again and again."""
    kind = step.get("type")
    if kind == "Replace":
        pattern, content = step["pattern"], len(step["content"])
        least = len(_text(pattern.get("String")))  # a regular expression may find a place without a character
        return max(1.0, content / least) if least else 1 + content
    return {"ByteLevel": 4, "BertNormalizer": 3}.get(str(kind), 1)


def _check_frames(steps: list[Mapping[str, Any]]) -> None:
    frames = [(step[key], step["special_tokens"]) for step in steps for key in ("single", "pair") if key in step]
    tokens, repeats = 0, 1
    for pieces, special in frames:
        names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        tokens += sum(len(special[name]["ids"]) for name in names)
        repeats *= max(1, len(pieces) - len(names))
    if tokens > LONGEST or repeats > MOST or len(steps) > _STEPS:
        raise ValueError("its post_processor puts too much around a text")


def _check_model(model: Any) -> None:
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(_text(getattr(model, name, None))) > LONGEST:
            raise ValueError(f"its model has a {name} of more than {LONGEST:,} characters")
    if (getattr(model, "max_input_chars_per_word", None) or 0) > WORD:
        raise ValueError(f"its model looks for pieces of words of more than {WORD:,} characters")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
