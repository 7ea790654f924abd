"""Scores as people see them: colours from blue (against) to red (for), pieces by strength, names of pieces, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmhub.explain.records import Attribution, Explanation, Faithfulness, Piece

_SURE = 0.95  # of random orders that an order must beat
FAINT = 0.08  # strength below which a piece is left without a colour
_AGAINST, _FOR = 255.0, 27.0  # hues in degrees, which the colour-blind tell apart, too
_CLEAR, _DARK, _VIVID = 0.97, 0.58, 0.17  # lightness at 0 and at full strength, and chroma there


def strength(score: float, scale: float) -> float:
    """Return a score as a share of the largest one, from -1 to 1; what is no number counts as 0.

    >>> strength(-0.5, 2.0), strength(3.0, 0.0), strength(float("nan"), 1.0)
    (-0.25, 0.0, 0.0)
    """
    if not scale or not math.isfinite(score):
        return 0.0
    return max(-1.0, min(1.0, score / scale))


def largest(pieces: Iterable[Piece]) -> float:
    """Return the largest size of a score, 0 if there is none."""
    return max((abs(piece.score) for piece in pieces if math.isfinite(piece.score)), default=0.0)


def full(attribution: Attribution, all_of: Sequence[Attribution] = ()) -> float:
    """Return the score that has the full colour: the largest of the item, or a tenth of the largest of all items.

    So items with many small scores can be seen, and one that hardly matters beside the others stays pale.
    """
    return max(largest(attribution.pieces), 0.1 * max((largest(one.pieces) for one in all_of), default=0.0))


def strongest(attribution: Attribution, most: int) -> list[int]:
    """Return the places of the pieces with the largest scores, for or against, the largest first."""
    pieces = attribution.pieces
    scored = [number for number, piece in enumerate(pieces) if piece.score and math.isfinite(piece.score)]
    return sorted(scored, key=lambda number: -abs(pieces[number].score))[:most]


def colour(value: float) -> tuple[int, int, int]:
    """Return the sRGB colour of a strength: blue at -1, nearly white at 0, red at 1.

    Lightness and chroma are linear in OKLab (bottosson.github.io/posts/oklab), so equal steps look equally large, and
    both sides are equally dark.

    >>> colour(0.0), colour(-1.0)[2] > 180 > colour(-1.0)[0], colour(1.0)[0] > 180 > colour(1.0)[2]
    ((245, 245, 245), True, True)
    """
    share = min(abs(value), 1.0)
    lightness, chroma = _CLEAR + (_DARK - _CLEAR) * share, _VIVID * share
    angle = math.radians(_FOR if value > 0 else _AGAINST)
    return _srgb(lightness, chroma * math.cos(angle), chroma * math.sin(angle))


def _srgb(lightness: float, a: float, b: float) -> tuple[int, int, int]:
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short
    return _level(red), _level(green), _level(blue)


def _level(light: float) -> int:
    light = max(0.0, min(1.0, light))
    return round(255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055))


def place(attribution: Attribution, number: int) -> str:
    """Name a piece by its place: a token by itself, a patch by its pixels, a frame by its seconds."""
    piece = attribution.pieces[number]
    if attribution.kind == "token":
        return piece.text
    if attribution.kind == "frame":
        digits = 2 if piece.end - piece.start >= 0.02 else 3
        return f"{piece.start:.{digits}f}-{piece.end:.{digits}f} s"
    left, top, right, bottom = piece.box or (0.0, 0.0, 0.0, 0.0)
    return f"x {left:.0f}-{right:.0f}, y {top:.0f}-{bottom:.0f}"


def title(attribution: Attribution, all_of: Sequence[Attribution] = ()) -> str:
    """Name an item: its modality, and its number where the sample has several."""
    several = sum(one.modality == attribution.modality for one in all_of) > 1
    return f"{attribution.modality} {attribution.item + 1}" if several else attribution.modality


def sources(attributions: Sequence[Attribution], most: int) -> list[tuple[str, str, float]]:
    """Return the strongest pieces of all items: modality, place and score."""
    found = [
        (title(one, attributions), place(one, number), one.pieces[number].score)
        for one in attributions
        for number in strongest(one, most)
    ]
    return sorted(found, key=lambda entry: -abs(entry[2]))[:most]


def signed(score: float) -> str:
    """Write a score with its sign.

    >>> signed(0.25), signed(-12.3456), signed(0.0), signed(-0.00001)
    ('+0.250', '-12.346', '0', '-1.0e-05')
    """
    if not score:
        return "0"
    return f"{score:+.3f}" if abs(score) >= 0.001 or not math.isfinite(score) else f"{score:+.1e}"


def spoken(answer: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return an answer in words, and its probability if it has one."""
    if "refused" in answer:
        return f"(refused by {answer.get('guard')}: {answer['refused']})", None
    if "label" in answer:
        return str(answer["label"]), float(answer["score"]) if "score" in answer else None
    if "labels" in answer:
        return ", ".join(map(str, answer["labels"])) or "(none)", None
    if "tags" in answer:
        return " ".join(map(str, answer["tags"])), None
    if "value" in answer:
        return f"{float(answer['value']):.6g}", None
    if answer.get("text") is not None:
        return str(answer["text"]), None
    return "", None


def about(explanation: Explanation) -> str:
    """Say in a sentence what the scores are about."""
    ends = f"{explanation.value:.4g}"
    if explanation.baseline is not None:
        ends += f" ({explanation.baseline:.4g} without any input)"
    named = explanation.unit if explanation.unit != "value" else "the value"
    return f"by {explanation.method.replace('-', ' ')}: {named} {ends}"


def faith(found: Faithfulness) -> str:
    """Say in a sentence or two whether the pieces that score high matter to the model.

    >>> curve = (1.0, 0.5, 0.0)
    >>> print(faith(Faithfulness(deletion=curve, insertion=curve, deletion_area=0.31, insertion_area=0.4,
    ...     random_deletion_area=0.52, random_insertion_area=0.45, orders=19, deletion_beaten=19, insertion_beaten=8)))
    Strongest pieces taken out first: 0.31 on average, 0.52 in random order: better than 19 of 19 random orders. \
Put in first: 0.4, 0.45 in random order: no better than random order (better than 8 of 19).
    """
    out, back = _against(found.deletion_beaten, found.orders), _against(found.insertion_beaten, found.orders)
    return (
        f"Strongest pieces taken out first: {found.deletion_area:.4g} on average, "
        f"{found.random_deletion_area:.4g} in random order: {out}. Put in first: {found.insertion_area:.4g}, "
        f"{found.random_insertion_area:.4g} in random order: {back}."
    )


def sums(explanation: Explanation) -> str:
    """Say in a sentence what the scores of integrated gradients add up to; "" with other methods."""
    if explanation.gap is None or explanation.neutral is None:
        return ""
    written = ", with those of tokens written before," if explanation.steps else ""
    return (
        f"The scores{written} add up to the difference to a neutral input ({explanation.neutral:.4g}) "
        f"within {abs(explanation.gap):.2g}."
    )


def _against(beaten: int, orders: int) -> str:
    if orders and beaten >= _SURE * orders:
        return f"better than {beaten} of {orders} random orders"
    return f"no better than random order (better than {beaten} of {orders})"
