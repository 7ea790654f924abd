"""What a sample holds, as people read, see and hear it: texts, pictures and sounds, by modality and item.

The model has read the same inputs before, within the same policy; what cannot be shown is None, and is no error.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mmhub.errors import InputError
from mmhub.explain.records import Attribution, Piece
from mmhub.interfaces import Policy, raw_bytes
from mmhub.interfaces.apart import Decoded, decode_apart
from mmhub.interfaces.raw import worker_of

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SECONDS = 120.0  # of a sound that are shown, at most
_TURNED = (5, 6, 7, 8)  # orientations in Exif by a quarter
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class Mark:
    """A part of a text: a token with its piece, or what stands between tokens. The tokenizer has `added` some."""

    text: str
    piece: Piece | None = None
    added: bool = False


@dataclass(frozen=True)
class Wave:
    """Samples of one channel, (S,) float32 in [-1, 1], their rate in Hz, and how many seconds the whole sound lasts."""

    samples: np.ndarray
    rate: int
    seconds: float


def items_of(sample: Mapping[str, Any], modality: str) -> list[Any]:
    """Return the raw inputs of a modality in their order, those of a conversation from its messages.

    Texts that are read together are one, joined by line breaks: of a pair both, of a conversation what was asked.
    """
    if sample.get("messages") is not None:
        return _said(sample["messages"], modality)
    value = sample.get(modality)
    if modality == "text" and isinstance(value, Mapping):
        return ["\n".join(part for part in value.values() if isinstance(part, str))]
    if isinstance(value, list) or (isinstance(value, tuple) and not _samples(value)):
        return list(value)
    return [] if value is None else [value]


class _Anything(tuple[str, ...]):
    def __contains__(self, key: object) -> bool:
        return True


def _said(messages: Any, modality: str) -> list[Any]:
    from mmhub.conversation import media_of, read_messages, text_of

    talk = read_messages(messages, _Anything())
    if modality != "text":
        return media_of(talk, modality)
    return ["\n".join(filter(None, (text_of(message) for message in talk if message["role"] != "assistant")))]


def raw_of(sample: Mapping[str, Any], attribution: Attribution) -> Any:
    """Return the raw input that an attribution is about, None if the sample does not show it."""
    found = items_of(sample, attribution.modality)
    if attribution.kind == "token" and len(found) > 1 and not _fits(attribution, found[min(attribution.item, 1)]):
        return " ".join(map(str, found))  # a text that was given as words
    return found[attribution.item] if attribution.item < len(found) else None


def marked(attribution: Attribution, raw: Any) -> list[Mark]:
    """Return a text in parts. Where places do not fit the text, tokens stand side by side.

    Tokens that the tokenizer added are left out where they score nothing.
    """
    found: list[Mark] = []
    fits, placed = _fits(attribution, raw), any(piece.end > piece.start for piece in attribution.pieces)
    at = 0.0
    for piece in attribution.pieces:
        if piece.start == piece.end and placed:
            found += [Mark(piece.text, piece, added=True)] if piece.score else []
            continue
        if piece.start > at or (found and not placed and attribution.modality != "written"):
            found.append(Mark(raw[int(at) : int(piece.start)] if fits else " "))
        found.append(Mark(raw[max(int(piece.start), int(at)) : int(piece.end)] if fits else piece.text, piece))
        at = max(at, piece.end)
    return [*found, Mark(raw[int(at) :])] if fits and at < len(raw) else found


def _fits(attribution: Attribution, raw: Any) -> bool:
    """Do the tokens stand one behind the other in this text?"""
    placed = [piece for piece in attribution.pieces if piece.end > piece.start]
    ordered = all(one.start <= other.start and one.end <= other.end for one, other in pairwise(placed))
    return isinstance(raw, str) and ordered and bool(placed) and placed[0].start >= 0 and placed[-1].end <= len(raw)


def picture_of(raw: Any, policy: Policy, edge: int) -> Image | None:
    """Return a picture, RGB, as it is looked at, and its longer side at most `edge` pixels; None if it has no pixels.

    Values beyond 8 bits are stretched to what a screen shows, and what is transparent is white.
    """
    from PIL import Image

    try:
        content = raw_bytes(raw, policy)
        if content is not None:
            found = decode_apart(decode_picture, content, "a picture", policy, worker_of(raw, policy), edge=edge)
            (pixels,) = found
            return Image.fromarray(pixels)
        return _shown(raw if isinstance(raw, Image.Image) else Image.fromarray(_pixels(raw)), policy, edge)
    except Exception:  # whatever a decoder raises: there is nothing to show, and the numbers are still there
        return None


def decode_size(content: bytes, name: str, policy: Policy) -> Decoded:
    """Yield {"width", "height"} of an encoded picture, upright, in pixels, from its header."""
    from PIL import ExifTags, Image

    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        if image.width * image.height > policy.max_pixels:
            raise InputError(f"{name} has more than {policy.max_pixels} pixels", "make it smaller")
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        width, height = image.size[::-1] if turned else image.size
    yield {"width": width, "height": height}


def decode_picture(content: bytes, name: str, policy: Policy, edge: int) -> Decoded:
    """Yield the pixels of an encoded picture, uint8 (H, W, 3)."""
    import numpy as np
    from PIL import Image

    yield np.asarray(_shown(Image.open(io.BytesIO(content), formats=_FORMATS), policy, edge))


def _shown(image: Image, policy: Policy, edge: int) -> Image:
    from PIL import Image, ImageOps

    if image.width * image.height > policy.max_pixels:
        raise ValueError("too many pixels")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_stretched(image))
    if image.mode in ("RGBA", "LA", "PA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((edge, edge))
    return image


def _pixels(raw: Any) -> np.ndarray:
    import numpy as np

    pixels = np.asarray(raw)
    return pixels.transpose(1, 2, 0) if pixels.ndim == 3 and pixels.shape[0] in (1, 3) else pixels


def _stretched(image: Image) -> np.ndarray:
    import numpy as np

    values = np.asarray(image, dtype=np.float32)
    span = float(values.max() - values.min()) or 1.0
    levels: np.ndarray = ((values - values.min()) * (255 / span)).astype(np.uint8)
    return levels


def wave_of(raw: Any, policy: Policy) -> Wave | None:
    """Return a sound, at most its first two minutes; None if it cannot be read."""
    import numpy as np

    try:
        given = _samples(raw)
        if given is None:
            return _read(raw, policy)
        samples, rate = np.asarray(given[0]), int(given[1])
        if samples.dtype.kind in "iu":
            half = float(np.iinfo(samples.dtype).max + 1) / (2 if samples.dtype.kind == "u" else 1)
            samples = samples / half - (samples.dtype.kind == "u")
        samples = samples if samples.ndim == 1 else samples.mean(int(samples.shape[0] > samples.shape[1]))
        shown = np.nan_to_num(samples[: int(SECONDS * rate)]).astype(np.float32)
        return Wave(shown, rate, len(samples) / rate)
    except Exception:  # as of pictures
        return None


def _read(raw: Any, policy: Policy) -> Wave | None:
    content = raw_bytes(raw, policy)
    if content is None:
        return None
    facts, samples = decode_apart(decode_sound, content, "a sound", policy, worker_of(raw, policy))
    assert isinstance(facts, Mapping) and not isinstance(samples, Mapping)
    return Wave(samples, int(facts["rate"]), float(facts["seconds"]))


def decode_sound(content: bytes, name: str, policy: Policy) -> Decoded:
    """Yield the rate and the seconds of a sound file, and its first samples, float32 (S,)."""
    import soundfile

    with soundfile.SoundFile(io.BytesIO(content)) as file:
        samples = file.read(int(SECONDS * file.samplerate), dtype="float32", always_2d=True).mean(1)
        yield {"rate": file.samplerate, "seconds": max(file.frames, len(samples)) / file.samplerate}
        yield samples


def _samples(raw: Any) -> tuple[Any, Any] | None:
    """The samples and rate of `{array, sampling_rate}`, or of an array and its rate in either order."""
    if isinstance(raw, Mapping):
        return None if raw.get("array") is None else (raw["array"], raw.get("sampling_rate"))
    if not isinstance(raw, tuple) or len(raw) != 2:
        return None
    large = [getattr(part, "ndim", 0) > 0 for part in raw]
    return (raw if large[0] else raw[::-1]) if sum(large) == 1 else None
