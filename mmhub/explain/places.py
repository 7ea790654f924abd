"""Where pieces stand in what the user gave: characters of a text, pixels of a picture, seconds of a sound.

What a processor does to its input is found out by trying it: it is shown pictures whose colours say where a pixel came
from, and a second of sound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmhub.conversation import media_of, text_of
from mmhub.errors import InputError
from mmhub.explain.sources import decode_size
from mmhub.interfaces import Policy, describe_raw, raw_bytes
from mmhub.interfaces.apart import decode_apart
from mmhub.interfaces.raw import worker_of
from mmhub.model import Model

Span = tuple[int, int, str]
_RATE = 16_000  # Hz of the sound that a processor is tried with
_PIXELS = 2**20  # of the picture that it is tried with: a larger one is made smaller in proportion


@dataclass(frozen=True)
class Spot:
    """Of one item: the texts it is made of; how pixels of the tensor become pixels of the picture, x = a + b * column
    and y = c + d * row, and its width and height; and the seconds that a position of sound lasts."""

    texts: tuple[str, ...] = ()
    lines: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)
    size: tuple[float, ...] = ()
    seconds: float = 1.0

    def box(self, left: int, top: int, right: int, bottom: int) -> tuple[float, float, float, float]:
        """Return the part of the picture that pixels of the tensor show."""
        a, b, c, d = self.lines
        wide, high = self.size
        xs = [min(max(a + b * edge, 0.0), wide) for edge in (left, right)]
        ys = [min(max(c + d * edge, 0.0), high) for edge in (top, bottom)]
        return (round(xs[0], 2), round(ys[0], 2), round(xs[1], 2), round(ys[1], 2))


def spots_of(model: Model, sample: Mapping[str, Any], policy: Policy) -> dict[str, list[Spot]]:
    """Return where each item of a sample stands, by modality."""
    found: dict[str, list[Spot]] = {}
    for name, processor in model.processors.items():
        raws = _raws(model, sample, name, processor)
        if name == "text":
            found[name] = [Spot(texts=_texts(raw)) for raw in raws]
        elif name == "image":
            found[name] = [_picture(processor, raw, policy) for raw in raws]
        elif name == "audio":
            seconds = _seconds(processor, policy) if raws else 1.0
            found[name] = [Spot(seconds=seconds) for _ in raws]
        else:
            found[name] = [Spot() for _ in raws]
    return found


def _raws(model: Model, sample: Mapping[str, Any], name: str, processor: Any) -> list[Any]:
    if model.converses:
        talk = model.messages_of(sample)
        if name == "text":
            said = (text_of(message) for message in talk if message["role"] != "assistant")
            return [tuple(text for text in said if text)]
        return media_of(talk, name)
    if name == "text" and model.decoder.reads_text:
        return [sample.get("text") or ""]
    found: list[Any] = processor.items_of(sample.get(name))
    return found


def _texts(raw: Any) -> tuple[str, ...]:
    if isinstance(raw, str):
        return (raw,)
    if isinstance(raw, Mapping):
        return tuple(value for value in raw.values() if isinstance(value, str))
    if isinstance(raw, tuple):
        return raw
    return (" ".join(map(str, raw)),)


# -- texts -------------------------------------------------------------------------------------------------------------


def token_texts(processor: Any, ids: Sequence[int]) -> list[str]:
    """Return what is written on each token."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        return [tokenizer.id_to_token(one) or "" for one in ids]
    return [str(one) for one in ids]


def spans_of(processor: Any, ids: Sequence[int], texts: Sequence[str]) -> list[Span | None]:
    """Return start, end and text of each token in the texts as they were given, joined by line breaks.

    None for tokens that stand for nothing in them, such as special ones and a chat template's.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    known = None if tokenizer is None or not 1 <= len(texts) <= 2 else _by_tokenizer(tokenizer, ids, texts)
    return known or _by_search(processor, ids, texts)


def _by_tokenizer(tokenizer: Any, ids: Sequence[int], texts: Sequence[str]) -> list[Span | None] | None:
    """The offsets that the tokenizer itself gives, None where it gives other ids."""
    for special in (True, False):
        encoding = tokenizer.encode(*texts, add_special_tokens=special)
        before = len(ids) - len(encoding.ids)  # a begin token that the processor put there
        if before in (0, 1) and list(ids[before:]) == encoding.ids:
            starts = (0, len(texts[0]) + 1)
            places = zip(encoding.sequence_ids, encoding.offsets, strict=True)
            found = [None if one is None else _span(texts[one], a, b, starts[one]) for one, (a, b) in places]
            return [*[None] * before, *found]
    return None


def _span(text: str, start: int, end: int, shift: int) -> Span | None:
    """A part of a text without the white space around it."""
    part = text[start:end]
    start, end = start + len(part) - len(part.lstrip()), end - (len(part) - len(part.rstrip()))
    return (start + shift, end + shift, text[start:end]) if start < end else None


def unplaced(spans: Iterable[tuple[float, float]], texts: Sequence[str]) -> int:
    """Count the texts in which no token stands, of starts and ends of tokens as `spans_of` gives them."""
    known, shift, lacking = [one for one in spans if one[0] < one[1]], 0, 0
    for text in texts:
        lacking += bool(text.strip()) and not any(a < shift + len(text) and b > shift for a, b in known)
        shift += len(text) + 1
    return lacking


def _by_search(processor: Any, ids: Sequence[int], texts: Sequence[str]) -> list[Span | None]:
    """Find the texts, the last ones first: their own ids among the ids, or themselves in what these are decoded to."""
    tokenizer = getattr(processor, "tokenizer", None)
    found, pieces = list[Span | None]([None] * len(ids)), list[str]()
    limit, shift = len(ids), sum(len(text) + 1 for text in texts)
    for text in reversed(texts):
        shift -= len(text) + 1
        spans = _by_ids(tokenizer, ids[:limit], text) if tokenizer is not None else {}
        if not spans:
            pieces = pieces or _decoded(processor, ids)
            spans = _by_decoding(pieces[:limit], text)
        for number, (a, b) in spans.items():
            found[number] = _span(text, a, b, shift)
        limit = min(spans, default=limit)
    return found


def _by_ids(tokenizer: Any, ids: Sequence[int], text: str) -> dict[int, tuple[int, int]]:
    """Where the ids that a text has alone stand last, but for those at its ends that grew together with others."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    count = len(encoding.ids)
    for first, last in ((0, count), (1, count), (0, count - 1), (1, count - 1)):
        run = encoding.ids[first:last]
        if not run or (len(run) < min(count, 2)):
            continue
        for start in range(len(ids) - len(run), -1, -1):
            if ids[start] != run[0] or list(ids[start : start + len(run)]) != run:
                continue
            places = {start + at: encoding.offsets[first + at] for at in range(len(run))}
            if first and start and _bare(tokenizer, ids[start - 1]) == _bare(tokenizer, encoding.ids[0]):
                places[start - 1] = encoding.offsets[0]  # it alone is marked as the beginning of a word
            return places
    return {}


def _bare(tokenizer: Any, one: int) -> str:
    return str(tokenizer.id_to_token(one) or "").lstrip("▁Ġ ")


def _by_decoding(pieces: Sequence[str], text: str) -> dict[int, tuple[int, int]]:
    """Where the text stands last in what the ids are decoded to."""
    place, end, found = "".join(pieces).rfind(text), 0, dict[int, tuple[int, int]]()
    for number, piece in enumerate(pieces if place >= 0 else ()):
        end += len(piece)
        a, b = max(end - len(piece) - place, 0), min(end - place, len(text))
        if a < b:
            found[number] = (a, b)
    return found


def _decoded(processor: Any, ids: Sequence[int]) -> list[str]:
    """What each id adds to the text."""
    if not hasattr(processor, "decode"):
        return [text.replace("##", "") + " " for text in token_texts(processor, ids)]
    texts = [processor.decode(list(ids[:end])) for end in range(len(ids) + 1)]
    return grown(texts)


def grown(texts: Sequence[str]) -> list[str]:
    """Return what each text adds to the one before, "" where it changes it."""
    return [after[len(before) :] if after.startswith(before) else "" for before, after in pairwise(texts)]


# -- pictures and sounds -----------------------------------------------------------------------------------------------


def _picture(processor: Any, raw: Any, policy: Policy) -> Spot:
    true = picture_size(raw, policy)
    less = min(1.0, math.sqrt(_PIXELS / max(true[0] * true[1], 1)))
    width, height = (max(1, round(edge * less)) for edge in true)
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[..., 0] = np.linspace(0, 255, width).round()[None]
    ramps[..., 1] = np.linspace(0, 255, height).round()[:, None]
    seen, dark, bright = (
        processor([picture], policy).data[0].double().numpy()
        for picture in (ramps, np.zeros_like(ramps), np.full_like(ramps, 255))
    )
    shares = (seen - dark) / np.where(bright == dark, 1, bright - dark)
    x, y = _line(shares[0].mean(0), width), _line(shares[1].mean(1), height)
    wide, high = true[0] / width, true[1] / height
    lines = (x[0] * wide, x[1] * wide, y[0] * high, y[1] * high)
    return Spot(lines=lines, size=(float(true[0]), float(true[1])))


def _line(shares: NDArray[np.float64], length: int) -> tuple[float, float]:
    """The edges of pixels in the picture, a + b * number, by what share of its length is seen in each."""
    inside = (shares > 0.02) & (shares < 0.98)
    if length < 2 or inside.sum() < 2:
        return 0.0, length / len(shares)
    centres = np.arange(len(shares))[inside] + 0.5
    b, a = np.polyfit(centres, shares[inside] * (length - 1) + 0.5, 1)
    return float(a), float(b)


def picture_size(raw: Any, policy: Policy) -> tuple[int, int]:
    """Return width and height of a picture that a processor has read, upright."""
    if hasattr(raw, "shape"):
        shape = tuple(raw.shape)
        return (shape[2], shape[1]) if hasattr(raw, "detach") else (shape[1], shape[0])
    content = raw_bytes(raw, policy)
    if content is None:
        from PIL import ImageOps

        return ImageOps.exif_transpose(raw).size
    name = describe_raw(raw)
    found = list(decode_apart(decode_size, content, name, policy, worker_of(raw, policy)))
    told = found[0] if found else None
    width, height = (told.get("width"), told.get("height")) if isinstance(told, Mapping) else (0, 0)
    if type(width) is not int or type(height) is not int or not 0 < width * height <= policy.max_pixels:
        raise InputError(f"{name} could not be decoded: its decoder answered nonsense", "it may be made to harm")
    return width, height


def _seconds(processor: Any, policy: Policy) -> float:
    """What one position of sound lasts, by how many a second has."""
    policy = replace(policy, max_seconds=max(policy.max_seconds, 1.0))
    noise = np.random.default_rng(0).normal(0, 0.1, _RATE).astype(np.float32)
    try:
        return 1.0 / max(int(processor([(noise, _RATE)], policy).mask.sum()), 1)
    except InputError:
        return 1.0
