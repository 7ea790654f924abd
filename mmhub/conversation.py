"""Conversations in which texts and media alternate: read from what people write down, and packed for a language model.

A message is {"role": "system" | "user" | "assistant", "content": text or list of parts[, "weight": number]}, and a part
{"type": "text", "text": ...} or {"type": "image", "image": raw input}, likewise for any other modality.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from numbers import Real
from typing import Any

import torch

from mmhub.batch import Items, Plan, pad_sequences
from mmhub.errors import InputError, did_you_mean
from mmhub.interfaces import LanguageProcessor, Policy, Script, describe_raw

ROLES = ("system", "user", "assistant")
Message = dict[str, Any]
_PART = 'a part is {"type": "text", "text": ...}, or {"type": "image", "image": ...} and the like'
_BESIDE = ("name", "id", "interrupted")  # keys of a message that tell a model nothing
_PART_BESIDE = ("detail", "format")  # likewise, of a part
_MESSAGE = 'a message is {"role": "system" | "user" | "assistant", "content": a text or a list of parts}'


def read_messages(value: Any, modalities: Collection[str]) -> list[Message]:
    """Return a conversation as messages whose contents are lists of parts, {"type": name, name: raw input}.

    `modalities` are those that the model takes, text among them. A key that is None counts as left out, as tables have
    it, and a part whose input is None or empty as missing. OpenAI's "image_url" and "input_audio" are read, too, and so
    is a conversation that is written as JSON.

    Raises:
        InputError: it is no conversation, or holds what the model does not take, or keys that nobody knows.
    """
    value = of_json(value)
    if hasattr(value, "tolist"):  # numpy's, as tables may have it
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not value:
        given = "none" if isinstance(value, (list, tuple)) else describe_raw(value)
        raise InputError(f"a conversation is a list of messages, got {given}", _MESSAGE)
    return [_read_message(message, number, modalities) for number, message in enumerate(value, 1)]


def of_json(value: Any) -> Any:
    """Return what a text that begins with "[" is in JSON; anything else, and what is no JSON, as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _read_message(message: Any, number: int, modalities: Collection[str]) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"message {number} is {describe_raw(message)}", _MESSAGE)
    known = {key: value for key, value in message.items() if value is not None}
    role, content, weight = known.get("role"), known.get("content"), known.get("weight", 1)
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"message {number} has the role {_shown(role)}", f"roles are {', '.join(ROLES)}")
    _check_keys(known, ("role", "content", "weight", *_BESIDE), f"message {number}")
    counts = _number(weight)
    if not 0 <= counts < math.inf:
        raise InputError(f"message {number} has the weight {_shown(weight)}", "a weight is a number, at least 0")
    if content is not None and hasattr(content, "tolist"):
        content = content.tolist()
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise InputError(f"the content of message {number} is {describe_raw(content)}", _MESSAGE)
    found = [part for part in (_read_part(part, number, modalities) for part in parts) if part is not None]
    if role == "assistant" and any(part["type"] != "text" for part in found):
        raise InputError(f"message {number}, of the assistant, holds more than text", "models here write text alone")
    return {"role": role, "content": found, "weight": counts}


def _shown(value: Any) -> str:
    """A value for an error message, in one short line."""
    short = value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**18)
    return repr(value) if short else describe_raw(value)


def _number(value: Any) -> float:
    """A real number of any kind as a float, infinite if it is too large; what is none is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _read_part(part: Any, number: int, modalities: Collection[str]) -> Message | None:
    where = f"message {number} has a part"
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(f"{where} that is {describe_raw(part)}", _PART)
    known = {key: value for key, value in part.items() if value is not None}
    kind = known.get("type")
    if kind == "text":
        if "text" not in known:
            _check_keys(known, ("type", "text", *_PART_BESIDE), f"{where} of the type 'text' that")
        if not isinstance(known.get("text", ""), str):
            raise InputError(f"{where} whose text is {describe_raw(known['text'])}", _PART)
        return {"type": "text", "text": known.get("text", "")}
    if kind in ("image_url", "input_audio", "audio_url"):
        own, kind = str(kind), str(kind).replace("input_", "").removesuffix("_url")
        raw = next((_of_openai(known[key], where) for key in (own, "url", "data") if key in known), None)
    elif isinstance(kind, str):
        own = kind
        raw = next((known[key] for key in (kind, "path", "url") if key in known), None)
    else:
        raise InputError(f"{where} without a type", _PART)
    if kind not in modalities:
        raise InputError(f"{where} of the type {kind!r}", f"this model takes {', '.join(modalities)}")
    if raw is None:
        _check_keys(known, ("type", own, "path", "url", *_PART_BESIDE), f"{where} of the type {own!r} that")
    return None if raw is None or _is_empty(raw) else {"type": kind, kind: raw}


def _check_keys(given: Message, known: Sequence[str], what: str) -> None:
    """Refuse keys that are misspelt, or hold what would be lost."""
    unknown = [str(key) for key, value in given.items() if key not in known and not _is_empty(value)]
    if unknown:
        hint = did_you_mean(unknown[0], known) or f"it takes {', '.join(known)}"
        raise InputError(f"{what} has the unknown key{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}", hint)


def _is_empty(value: Any) -> bool:
    """Is it a text, bytes, a list or an array without anything in it?"""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return 0 in shape[:1]
    return isinstance(value, Sized) and not isinstance(value, Mapping) and len(value) == 0


def _of_openai(value: Any, where: str) -> Any:
    """The raw input of a part as OpenAI's interface has it: an address, or data in base64."""
    if isinstance(value, Mapping):
        value = value.get("url") or value.get("data")
    if not isinstance(value, str):
        raise InputError(f"{where} that holds neither an address nor data", _PART)
    if value.startswith(("http://", "https://")):
        return value
    content = value.partition("base64,")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where} whose data is not base64", 'e.g. "data:image/png;base64,iVBO..."') from None


def compose(sample: Mapping[str, Any], processors: Mapping[str, Any], answer: str | None = None) -> list[Message]:
    """Make a conversation of a sample: all it holds is said by the user, media before the text, and then answered."""
    parts: list[Message] = []
    for name, processor in processors.items():
        if name != "text":
            parts += [{"type": name, name: raw} for raw in processor.items_of(sample.get(name))]
    text = sample.get("text")
    if text is not None and not isinstance(text, str):
        error = InputError(f"a text is expected, got {describe_raw(text)}")
        error.modality = "text"
        raise error
    parts += [{"type": "text", "text": text}] if text else []
    asked: Message = {"role": "user", "content": parts, "weight": 1.0}
    replied: Message = {"role": "assistant", "content": [{"type": "text", "text": answer}], "weight": 1.0}
    return [asked] if answer is None else [asked, replied]


def media_of(messages: Iterable[Message], name: str) -> list[Any]:
    """Return the raw inputs of a modality, in their order."""
    return [part[name] for message in messages for part in message["content"] if part["type"] == name]


def text_of(message: Message) -> str:
    """Return the text of a message, its parts joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def read_script(processor: LanguageProcessor, messages: Sequence[Message], policy: Policy, row: int = 0) -> Script:
    """Lay out a conversation; an error names the `row`."""
    try:
        return processor.converse(messages, policy)
    except InputError as error:
        error.row, error.modality = row, "text"
        raise


def fit_talk(
    processor: LanguageProcessor,
    messages: Sequence[Message],
    policy: Policy,
    size: Callable[[Script], int],
    limit: int,
    *,
    newest: bool = False,
) -> tuple[list[Message], int]:
    """Leave out turns, the oldest first or else the newest, until the `size` of the conversation is within the limit.

    -> the messages that stay, and how many do not. A turn is a question, its media and all until the next question;
    what the system says at the beginning stays, and so does the last turn that is left, even where that is too long.

    Raises:
        UsageError, InputError: as `LanguageProcessor.converse`.
    """
    begin = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    asked = [message["role"] == "user" for message in messages]
    starts = [i for i in range(begin, len(messages)) if i == begin or (asked[i] and not asked[i - 1])]

    def kept(turns: int) -> list[Message]:
        """The conversation without so many turns."""
        if newest:
            return list(messages[: [*starts, len(messages)][len(starts) - turns]])
        return [*messages[:begin], *messages[starts[turns] if turns else begin :]]

    def fits(turns: int) -> bool:
        return size(processor.converse(kept(turns), policy)) <= limit

    most = max(len(starts) - 1, 0)
    turns = 0 if not most or fits(0) else bisect_left(range(most), True, lo=1, key=fits)
    found = kept(turns)
    return found, len(messages) - len(found)


def pack_scripts(scripts: Sequence[Script], names: Sequence[str]) -> tuple[Items, Plan, torch.Tensor]:
    """Pack conversations, one a row: their text, where media of the modalities `names` stand, and prompts' lengths."""
    ids, mask = pad_sequences([script.ids for script in scripts])
    weights, _ = pad_sequences([script.weights for script in scripts])
    plain = bool(((weights == 0) | (weights == 1)).all())
    marks = weights.bool() if plain else weights
    text = Items(ids, mask, torch.arange(len(scripts)), len(scripts), marks=marks)
    prompts = torch.tensor([script.prompt for script in scripts], dtype=torch.long)
    return text, Plan.of([script.places for script in scripts], names), prompts
