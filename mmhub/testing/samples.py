"""Raw inputs of the modalities that mmhub knows, of different lengths or sizes; and things no processor should take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TEXTS = (
    "a short text",
    "one two three four five six seven eight nine ten eleven twelve",
    "Modalities meet here: pictures, sounds and words, of any length at all.",
    "x",
    "a short text about words and sounds and pictures",
)
RATE = 16000  # Hz
SECONDS = (0.21, 0.5, 0.33)
SIZES = ((40, 30), (24, 24), (33, 50))  # pixels, width and height
# Of no modality. Bytes, texts and paths may be an input of some, and are refused in their own way.
NOTHING = (object(), {"no such key": 0}, 1j)
MAYBE = (b"\x00\x01 neither picture nor sound", "no/such/file", -1)


def built_in(modality: str) -> Sequence[Any]:
    """Return raw inputs of a modality, () if this kit has none."""
    makers = {"text": lambda: TEXTS, "image": _pictures, "audio": _sounds}
    return makers[modality]() if modality in makers else ()


def refused(modality: str) -> Sequence[Any]:
    """Return raw inputs that a processor of this modality must refuse."""
    known = {"text": (b"\xff\xfe", 3.5), "image": (MAYBE[0], b"", MAYBE[1], "x"), "audio": (MAYBE[0], b"", MAYBE[1])}
    return (*NOTHING, *known.get(modality, ()))


def _pictures() -> Sequence[Any]:
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


def _sounds() -> Sequence[Any]:
    import numpy as np

    draw = np.random.default_rng(0)
    clips = [0.1 * draw.standard_normal(int(seconds * RATE)).astype(np.float32) for seconds in SECONDS]
    return [{"array": clip, "sampling_rate": RATE} for clip in clips]
