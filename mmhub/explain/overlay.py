"""An explanation as a picture: what speaks for and against the answer, over the pictures and sounds themselves."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmhub.errors import UsageError
from mmhub.explain.heat import FAINT, about, colour, full, place, signed, spoken, strength, strongest, title
from mmhub.explain.records import Attribution, Explanation
from mmhub.explain.sources import SECONDS, Wave, picture_of, raw_of, wave_of
from mmhub.explain.terminal import clean
from mmhub.interfaces import Policy

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

EDGE, SMALLEST = 512, 320  # pixels of the longer side of a panel: larger pictures are reduced, smaller ones enlarged
_MARGIN, _LINE, _FONT = 16, 22, 15
_INK, _SOFT = (29, 31, 33), (99, 103, 108)
_WIDE, _TALL = 720, 160  # of a spectrogram
_THICK = 14  # pixels of the band of colours above and below a spectrogram
_SEEN = 0.8  # opacity of the strongest piece


def overlay(explanation: Explanation, sample: Mapping[str, Any], policy: Policy | None = None) -> bytes:
    """Return a PNG: each picture beside itself in grey under the colours of its patches, each sound as a spectrogram.

    Red speaks for the target, blue against it; each input has a scale of its own.

    Raises:
        UsageError: the sample holds neither a picture nor a sound that can be drawn.
    """
    policy, found = policy or Policy(), explanation.attributions
    drawn = ((one, _panel(one, found, raw_of(sample, one), policy)) for one in found)
    panels = [(one, panel) for one, panel in drawn if panel is not None]
    if not panels:
        raise UsageError("a PNG shows pictures and sounds, and this sample has none", "write an .html file")
    return _png(_page(explanation, panels))


def heated(picture: Image, attribution: Attribution, scale: float) -> Image:
    """Return a picture in grey under the colours of its patches; a score of `scale` has the full colour."""
    from PIL import Image, ImageDraw

    wide, high = attribution.size if len(attribution.size) == 2 else picture.size
    across, down = picture.width / (wide or 1), picture.height / (high or 1)
    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for piece in attribution.pieces:
        value = strength(piece.score, scale)
        if piece.box is None or abs(value) < FAINT:
            continue
        left, top, right, bottom = piece.box
        corners = (round(left * across), round(top * down), round(right * across) - 1, round(bottom * down) - 1)
        if corners[2] >= corners[0] and corners[3] >= corners[1]:
            draw.rectangle(corners, fill=(*colour(math.copysign(1.0, value)), round(255 * _SEEN * abs(value))))
    return Image.alpha_composite(picture.convert("L").convert("RGBA"), layer).convert("RGB")


def spectrogram(sound: Wave, width: int, height: int) -> np.ndarray:
    """Return how loud each pitch is at each time: (height, width) from 0 to 1, high pitches above, over 70 dB."""
    import numpy as np

    size = min(1024, max(64, 2 ** int(math.log2(max(sound.rate * 0.032, 64)))))
    samples = np.pad(sound.samples, (size // 2, size // 2))
    hop = max((len(samples) - size) // max(width, 1), 1)
    starts = np.arange(0, max(len(samples) - size, 0) + 1, hop)[: width + 1]
    frames = samples[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = 20 * np.log10(np.abs(np.fft.rfft(frames, axis=1)) + 1e-6)
    power = np.clip((power - power.max() + 70) / 70, 0, 1).T[::-1]
    rows = np.linspace(0, len(power) - 1, height).round().astype(int)
    columns = np.linspace(0, power.shape[1] - 1, width).round().astype(int)
    found: np.ndarray = power[rows][:, columns]
    return found


def _panel(attribution: Attribution, all_of: Sequence[Attribution], raw: Any, policy: Policy) -> Image | None:
    if raw is None:
        return None
    scale = full(attribution, all_of)
    if attribution.kind == "patch":
        picture = picture_of(raw, policy, EDGE)
        return None if picture is None else _both(picture, attribution, scale)
    sound = wave_of(raw, policy) if attribution.kind == "frame" else None
    return None if sound is None or not len(sound.samples) else _sound(sound, attribution, scale)


def _both(picture: Image, attribution: Attribution, scale: float) -> Image:
    """The picture, and beside it the same with its colours."""
    from PIL import Image

    times = max(SMALLEST // max(picture.size), 1)
    picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    found = Image.new("RGB", (2 * picture.width + _MARGIN, picture.height), "white")
    found.paste(picture, (0, 0))
    found.paste(heated(picture, attribution, scale), (picture.width + _MARGIN, 0))
    return found


def _sound(sound: Wave, attribution: Attribution, scale: float) -> Image:
    """The spectrogram under the colours of its frames, which are at full strength in a band above and below it."""
    import numpy as np
    from PIL import Image, ImageDraw

    grey = 255 - (spectrogram(sound, _WIDE, _TALL) * 215).astype(np.uint8)
    found = Image.new("RGBA", (_WIDE, _TALL + 2 * _THICK + _LINE), "white")
    found.paste(Image.fromarray(grey).convert("RGBA"), (0, _THICK))
    layer = Image.new("RGBA", found.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    length = len(sound.samples) / sound.rate
    for piece in sorted(attribution.pieces, key=lambda piece: abs(strength(piece.score, scale))):
        value = strength(piece.score, scale)
        left, right = round(piece.start / length * _WIDE), round(piece.end / length * _WIDE) - 1
        if right < left or abs(value) < FAINT:
            continue
        full, alpha = colour(math.copysign(1.0, value)), abs(value)
        draw.rectangle((left, _THICK, right, _THICK + _TALL - 1), fill=(*full, round(110 * alpha)))
        for top in (0, _THICK + _TALL):
            draw.rectangle((left, top, right, top + _THICK - 3), fill=(*full, round(255 * alpha)))
    found = Image.alpha_composite(found, layer).convert("RGB")
    draw, below = ImageDraw.Draw(found), _TALL + 2 * _THICK + 2
    cut = f"{length:.2f} s" + (f" of {sound.seconds:.0f} s" if sound.seconds > SECONDS else "")
    draw.text((0, below), "0 s", _SOFT, font=_font())
    draw.text((_WIDE, below), cut, _SOFT, font=_font(), anchor="ra")
    return found


def _page(explanation: Explanation, panels: Sequence[tuple[Attribution, Image]]) -> Image:
    from PIL import Image, ImageDraw

    font, bold = _font(), _font(22)
    width = max(*(panel.width for _, panel in panels), 480)
    answer, score = spoken(explanation.answer)
    head = _fitted(clean(answer or explanation.target) + ("" if score is None else f"  {score:.4f}"), bold, width)
    lines = _folded(f"'{clean(explanation.target)}' {about(explanation)}", font, width)
    height = 2 * _MARGIN + 34 + _LINE * (len(lines) + 2) + sum(panel.height + 3 * _LINE for _, panel in panels)
    page = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    draw, y = ImageDraw.Draw(page), _MARGIN
    draw.text((_MARGIN, y), head, _INK, font=bold)
    y += 34
    for line in lines:
        draw.text((_MARGIN, y), line, _SOFT, font=font)
        y += _LINE
    y += _LINE // 2
    for attribution, panel in panels:
        y = _titled(page, y, attribution, panel, explanation.attributions)
    return page.crop((0, 0, page.width, y))


def _titled(page: Image, y: int, attribution: Attribution, panel: Image, all_of: Sequence[Attribution]) -> int:
    """Draw a panel with its name, its strongest piece and its scale; return where the next one starts."""
    from PIL import ImageDraw

    draw, font = ImageDraw.Draw(page), _font()
    best = strongest(attribution, 1)
    said = f": {place(attribution, best[0])} {signed(attribution.pieces[best[0]].score)}" if best else ""
    draw.text((_MARGIN, y), clean(title(attribution, all_of)) + said, _INK, font=font)
    y += _LINE + 2
    page.paste(panel, (_MARGIN, y))
    y += panel.height + 6
    _scale(draw, y, full(attribution, all_of))
    return y + 2 * _LINE - 8


def _scale(draw: Any, y: int, most: float) -> None:
    """The colours with what they mean."""
    font, x = _font(), _MARGIN
    left, right = f"{signed(-most)} against ", f" for {signed(most)}"
    draw.text((x, y), left, _SOFT, font=font)
    x += math.ceil(draw.textlength(left, font=font))
    for step in range(161):
        draw.line((x + step, y + 3, x + step, y + 14), fill=colour(step / 80 - 1))
    draw.text((x + 165, y), right, _SOFT, font=font)


def _font(size: int = _FONT) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _fitted(text: str, font: Any, width: int) -> str:
    """A text that is cut where it would leave the page."""
    if font.getlength(text[:400]) <= width and len(text) <= 400:
        return text
    text = text[:400]
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _folded(text: str, font: Any, width: int) -> list[str]:
    """A text in at most three lines."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer[:400]) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_fitted(line, font, width) for line in lines[:3]]


def _png(picture: Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()
