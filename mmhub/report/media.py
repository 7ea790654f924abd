"""Raw inputs as they can stand in a page: pictures as small JPEGs, sounds as short files, texts cut to a length.

Everything becomes part of the page, so all of it together is bounded. What cannot be shown is said, and is no error.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmhub.conversation import of_json, read_messages
from mmhub.data.cells import cell
from mmhub.data.inputs import Anything, is_conversation, usable
from mmhub.data.sources import Rows
from mmhub.errors import InputError
from mmhub.interfaces import Policy, raw_bytes

EDGE = 160  # pixels of the longer side of a picture
SECONDS, RATE = 6.0, 16000  # of a sound that is cut
MAX_SOUND = 150_000  # bytes up to which a sound file stays as it is
MAX_TEXT = 600  # characters
MAX_ITEMS = 4  # pictures or sounds of one row
MAX_MESSAGES = 8  # of a conversation, the last ones
BUDGET = 4_500_000  # bytes of pictures and sounds in a page
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # that are decoded: those mmhub-image reads

_OPEN, _CLOSE = "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
_NAMED = re.compile(r"(?<!\w)(?<!label )'(?=\S)(?:[^'\n]|(?<=\w)'(?=\w))*[/\\]([^/\\\n]+?)(?<=\S)'(?!\w)")


@dataclass(frozen=True)
class Shown:
    """One input: `kind` is "image", "audio", "text" or "note"; `text` is a data: URI of the first two."""

    modality: str
    kind: str
    text: str
    note: str = ""


class Shelf:
    """Shows the inputs of rows, until the page is full."""

    def __init__(self, rows: Rows, inputs: Mapping[str, str], policy: Policy) -> None:
        self.rows, self.inputs = rows, inputs
        self.left = BUDGET
        self._policy = policy

    def where(self, row: int) -> str:
        """Say which row of which file it is."""
        return self.rows.where(row)

    def inputs_of(self, row: int) -> list[Shown]:
        """Return all inputs of a row; a missing one is a note."""
        content = self.rows[row]
        return [shown for name in self.inputs for shown in self._read(name, content, row)]

    def input_of(self, row: int, side: str) -> list[Shown]:
        """Return one side of a pair: the input of that modality, or of the only one its first or second item."""
        name, second = (side, 0) if side in self.inputs else (side.removesuffix("_pair"), 1)
        value = self._value(name, self.rows[row], row)
        if len(self.inputs) == 1:
            items = list(value.values()) if isinstance(value, Mapping) else list(value or ())
            value = items[second] if len(items) > second else None
        return self._show(name, value)

    def _read(self, name: str, content: Mapping[str, Any], row: int) -> list[Shown]:
        return self._show(name, self._value(name, content, row))

    def _value(self, name: str, content: Mapping[str, Any], row: int) -> Any:
        return usable(name, cell(content, self.inputs[name]), self.rows.folder(row), alone=len(self.inputs) == 1)

    def _show(self, name: str, value: Any) -> list[Shown]:
        if value is None:
            return [Shown(name, "note", f"no {name}")]
        if is_conversation(talk := of_json(value)):
            return [Shown(name, "text", text) for text in said_in(talk)]
        if name not in ("image", "audio"):
            return [Shown(name, "text", text) for text in texts_of(value)]
        alone = not isinstance(value, (list, tuple)) or (name == "audio" and _samples(value) is not None)
        items = [value] if alone else value
        found = [self._medium(name, item) for item in items[:MAX_ITEMS]]
        more = len(items) - MAX_ITEMS
        return found + ([Shown(name, "note", f"and {more} more")] if more > 0 else [])

    def _medium(self, name: str, raw: Any) -> Shown:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind, content, note = picture(raw, self._policy) if name == "image" else sound(raw, self._policy)
        except Exception as error:  # whatever a decoder raises, the page goes on
            reason = without_folders(error.message) if isinstance(error, InputError) else "it cannot be shown"
            return Shown(name, "note", f"{name}: {reason}")
        uri = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        if len(uri) > self.left:
            return Shown(name, "note", f"{name} left out: the page is full")
        self.left -= len(uri)
        return Shown(name, name, uri, note)


def texts_of(value: Any) -> list[str]:
    """Return the texts of a cell, one of words as a sentence, each cut to a length that can be read."""
    if isinstance(value, Mapping):
        parts = [str(part) for part in value.values() if part is not None]
    elif isinstance(value, (list, tuple)):
        parts = [" ".join(map(str, value))]
    else:
        parts = [str(value)]
    return [shorten(part) for part in parts]


def said_in(talk: Any) -> list[str]:
    """Return the messages of a conversation as texts, without the last answer: the truth is shown beside it.

    >>> said_in([{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}])
    ['user: what?']
    """
    try:
        messages = read_messages(talk, Anything())
    except InputError as error:
        return [f"no conversation: {error.message}"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    texts = [
        shorten(f"{message['role']}: {' '.join(_part(part) for part in message['content'])}")
        for message in asked[-MAX_MESSAGES:]
    ]
    more = len(asked) - MAX_MESSAGES
    return ([f"{more} more messages"] if more > 0 else []) + texts


def _part(part: Mapping[str, Any]) -> str:
    """A part of a message; of media their kind, for they are shown beside it."""
    return str(part["text"]) if part["type"] == "text" else f"{_OPEN}{part['type']}{_CLOSE}"


def shorten(text: str, most: int = MAX_TEXT) -> str:
    """Return a text of at most `most` characters, an ellipsis at the end of one that was cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


def without_folders(text: str) -> str:
    """Return a message with the last part alone of every path that it quotes; labels stay as they are.

    >>> without_folders("no file '/home/ada/it's/a.png'"), without_folders("label '<i>x</i>' was not seen")
    ("no file 'a.png'", "label '<i>x</i>' was not seen")
    """
    return _NAMED.sub(r"'\1'", text)


def picture(raw: Any, policy: Policy) -> tuple[str, bytes, str]:
    """Return the media type and content of a small picture, and its size in pixels as a note.

    Raises:
        InputError: the raw input cannot be read, or is larger than the policy allows.
    """
    from PIL import Image, ImageOps

    content = raw_bytes(raw, policy)
    image = Image.open(io.BytesIO(content), formats=FORMATS) if content is not None else raw
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(raw))
    width, height = image.size
    if width * height > policy.max_pixels:
        raise InputError(f"{width} x {height} pixels are too many to show")
    image.draft("RGB", (EDGE, EDGE))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits: as many levels as a screen has
        values = np.asarray(image, dtype=np.float32)
        span = float(values.max() - values.min()) or 1.0
        image = Image.fromarray(((values - values.min()) * (255 / span)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((EDGE, EDGE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return "image/jpeg", out.getvalue(), f"{width} × {height}"  # noqa: RUF001


def sound(raw: Any, policy: Policy) -> tuple[str, bytes, str]:
    """Return the media type and content of a sound: a small file as it is, of anything else the first seconds as WAV.

    Raises:
        InputError: the raw input cannot be read.
    """
    given = _samples(raw)
    if given is not None:
        samples, rate = _scaled(np.asarray(given[0])), int(given[1])
        samples = samples if samples.ndim == 1 else samples.mean(int(samples.shape[0] > samples.shape[1]))
        return _wav(samples[: int(SECONDS * rate)], rate, len(samples) / rate)
    content = raw_bytes(raw, policy)
    if content is None:
        raise InputError("it cannot be shown")
    kind = _sound_type(content)
    if kind and len(content) <= MAX_SOUND:
        return kind, content, ""
    import soundfile

    with soundfile.SoundFile(io.BytesIO(content)) as file:
        samples = file.read(int(SECONDS * file.samplerate), dtype="float32", always_2d=True).mean(1)
        return _wav(samples, file.samplerate, file.frames / file.samplerate)


def _samples(raw: Any) -> tuple[Any, Any] | None:
    """The samples and the rate of `{array, sampling_rate}`, or of an array and its rate in either order."""
    if isinstance(raw, Mapping):
        return None if raw.get("array") is None else (raw["array"], raw["sampling_rate"])
    if not isinstance(raw, tuple) or len(raw) != 2:
        return None
    large = [getattr(part, "ndim", 0) > 0 for part in raw]
    first, second = raw if large[0] else raw[::-1]
    plain = isinstance(second, (int, float)) or getattr(second, "ndim", None) == 0
    return (first, second) if sum(large) == 1 and plain else None


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Scale integer PCM to [-1, 1), as processors do; 8 bits without a sign have their silence at 128."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype in (np.int8, np.int16, np.int32):
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    if not np.issubdtype(samples.dtype, np.floating):
        raise InputError(f"samples of type {samples.dtype} do not say how loud they are")
    return samples.astype(np.float32)


def _wav(samples: np.ndarray, rate: int, seconds: float) -> tuple[str, bytes, str]:
    note = f"the first {SECONDS:.0f} of {seconds:.1f} s" if seconds > SECONDS else ""
    return "audio/wav", wav(samples, rate), note


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Return a 16-bit WAV file of one channel; a rate above 16 kHz is lowered, well enough to listen to."""
    if rate > RATE:
        count = int(len(samples) * RATE / rate)
        samples, rate = np.interp(np.arange(count) * (rate / RATE), np.arange(len(samples)), samples), RATE
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.nan_to_num(samples).clip(-1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue()


def _sound_type(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return "audio/wav"
    if content[:3] == b"ID3" or (len(content) > 1 and content[0] == 0xFF and content[1] & 0xE0 == 0xE0):
        return "audio/mpeg"
    return {b"fLaC": "audio/flac", b"OggS": "audio/ogg"}.get(content[:4], "")
