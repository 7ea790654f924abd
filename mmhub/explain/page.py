"""An explanation as one HTML file that needs nothing else: texts, pictures and sounds under their scores.

Jinja escapes whatever users and checkpoints hold, and a policy in the page lets it load nothing and run no script but
its own, which only makes a click on a sound play from there. Without it everything can be read, too.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhub.explain.drawings import curves, patches, wave
from mmhub.explain.heat import (
    FAINT,
    about,
    faith,
    full,
    place,
    signed,
    sources,
    spoken,
    strength,
    strongest,
    sums,
    title,
)
from mmhub.explain.records import Attribution, Explanation
from mmhub.explain.sources import SECONDS, marked, picture_of, raw_of, wave_of
from mmhub.interfaces import Policy
from mmhub.report.media import wav

if TYPE_CHECKING:
    from PIL.Image import Image

_EDGE, _SMALL = 800, 200  # pixels of the longer side of a picture: at most, and below which its pixels stay sharp
_BUDGET = 16_000_000  # characters of pictures and sounds in a page
_ROWS = 100  # of a table of scores
_STEPS = 200  # written tokens that are shown
_NOTHING: Mapping[str, str] = {}

_SCRIPT = """
for (const box of document.querySelectorAll('.sound')) {
  const audio = box.querySelector('audio'), head = box.querySelector('.head'), svg = box.querySelector('svg');
  if (!audio || !head) continue;
  const width = svg.viewBox.baseVal.width, seconds = Number(svg.dataset.seconds);
  svg.classList.add('live');
  svg.addEventListener('click', event => {
    const area = svg.getBoundingClientRect();
    audio.currentTime = (event.clientX - area.left) / area.width * seconds;
    audio.play();
  });
  const follow = () => {
    const x = audio.currentTime / seconds * width;
    head.setAttribute('x1', x); head.setAttribute('x2', x);
    if (!audio.paused) requestAnimationFrame(follow);
  };
  for (const name of ['play', 'seeked', 'pause']) audio.addEventListener(name, follow);
}
"""


@dataclass(frozen=True)
class _Part:
    """A piece of text with its strength, from -1 to 1, and what is told where one points at it."""

    text: str
    value: float = 0.0
    said: str = ""
    added: bool = False  # by the tokenizer


@dataclass(frozen=True)
class _View:
    """One item. `svg` is safe HTML made of numbers; `source` a data: URI of a sound; `rows` places and scores."""

    title: str
    note: str
    parts: Sequence[_Part] = ()
    svg: str = ""
    source: str = ""
    kind: str = ""
    rows: Sequence[tuple[str, str]] = ()
    left: int = 0  # pieces that are not in `rows`
    most: str = ""


@dataclass(frozen=True)
class _Written:
    text: str
    chance: float
    logprob: float
    views: Sequence[_View]
    rows: Sequence[tuple[str, str, str]]


def page(
    explanation: Explanation,
    sample: Mapping[str, Any],
    *,
    name: str = "",
    facts: Mapping[str, str] = _NOTHING,
    policy: Policy | None = None,
) -> str:
    """Return the page. `name` is that of the model; `facts` are told at its end, such as versions."""
    from jinja2 import Environment, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shelf = _Shelf(sample, policy or Policy())
    answer, score = spoken(explanation.answer)
    return environment.from_string((folder / "page.html").read_text("utf-8")).render(
        name=name,
        answer=answer,
        score=score,
        explanation=explanation,
        about=about(explanation),
        views=[shelf.view(one, explanation.attributions) for one in explanation.attributions],
        shares=_shares(explanation.shares),
        faith=faith(explanation.faithfulness) if explanation.faithfulness else "",
        curves=curves(explanation.faithfulness) if explanation.faithfulness else {},
        sums=sums(explanation),
        steps=_steps(explanation, shelf),
        more_steps=max(len(explanation.steps) - _STEPS, 0),
        scores=_scores(explanation.answer),
        facts=facts,
        style=(folder / "page.css").read_text("utf-8"),
        script=_SCRIPT,
        hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
    )


def short_name(name: str) -> str:
    """Return a model's name for others to read: of a folder of this machine the last part alone."""
    return Path(name).resolve().name if os.path.exists(name) else name


def versions() -> dict[str, str]:
    """Return what an explanation was made with: mmhub, its plugins, and the libraries that compute."""
    from importlib.metadata import PackageNotFoundError, version

    from mmhub import __version__
    from mmhub.plugins import get_index

    found = {"mmhub": __version__}
    for name in ("torch", "transformers", "timm", "captum"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    plugins = [plugin for plugin in get_index().plugins if plugin.status == "ok" and plugin.distribution != "mmhub"]
    return found | {"plugins": ", ".join(sorted(f"{plugin.distribution} {plugin.version}" for plugin in plugins))}


class _Shelf:
    """Shows the items of a sample; each picture and sound is in the page once, until the page is full."""

    def __init__(self, sample: Mapping[str, Any], policy: Policy) -> None:
        self._sample, self._policy = sample, policy
        self._left = _BUDGET
        self._pictures: dict[tuple[str, int], tuple[str, bool]] = {}  # what refers to it, and whether it is small

    def view(self, attribution: Attribution, all_of: Sequence[Attribution], within: str = "") -> _View:
        """Show an item; `within` a step its picture is that of the page, and its sound is left out."""
        raw = raw_of(self._sample, attribution)
        order, scale = strongest(attribution, _ROWS), full(attribution, all_of)
        rows = [(place(attribution, number), signed(attribution.pieces[number].score)) for number in order]
        view = _View(
            title=title(attribution, all_of),
            note=_size(attribution),
            kind=attribution.kind,
            rows=rows,
            left=len(attribution.pieces) - len(rows),
            most=signed(scale).lstrip("+"),
        )
        if attribution.kind == "token":
            return replace(view, parts=_parts(attribution, raw, scale))
        if attribution.kind == "patch":
            return replace(view, svg=self._picture(attribution, raw, scale, within))
        sound = None if raw is None or within else wave_of(raw, self._policy)
        uri = self._taken("audio/wav", wav(sound.samples, sound.rate)) if sound else ""
        cut = f"{view.note}, of which the first {SECONDS:.0f} s" if sound and sound.seconds > SECONDS else view.note
        return replace(view, svg=wave(attribution, scale, sound), source=uri, note=cut)

    def _picture(self, attribution: Attribution, raw: Any, scale: float, within: str) -> str:
        key = (attribution.modality, attribution.item)
        if not within:
            picture = None if raw is None else picture_of(raw, self._policy, _EDGE)
            if picture is not None and (uri := self._taken(*_encoded(picture))):
                self._pictures[key] = uri, max(picture.size) < _SMALL
        shown, sharp = self._pictures.get(key, ("", False))
        number = f"picture-{'-'.join(str(ord(one)) for one in attribution.modality[:20])}-{attribution.item}"
        return patches(attribution, scale, number, shown if not within else "", bool(shown), sharp)

    def _taken(self, kind: str, content: bytes) -> str:
        uri = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        if len(uri) > self._left:
            return ""
        self._left -= len(uri)
        return uri


def _size(attribution: Attribution) -> str:
    if attribution.kind == "patch" and len(attribution.size) == 2:
        return f"{attribution.size[0]:.0f} × {attribution.size[1]:.0f} pixels"  # noqa: RUF001
    if attribution.kind == "frame" and attribution.size:
        return f"{attribution.size[0]:.2f} s"
    return f"{len(attribution.pieces)} tokens" if attribution.kind == "token" else ""


def _parts(attribution: Attribution, raw: Any, scale: float) -> list[_Part]:
    found = []
    for one in marked(attribution, raw):
        if one.piece is None:
            found.append(_Part(one.text))
            continue
        value = strength(one.piece.score, scale)
        found.append(_Part(one.text, value if abs(value) >= FAINT else 0.0, signed(one.piece.score), one.added))
    return found


def _encoded(picture: Image) -> tuple[str, bytes]:
    """A small picture as it is, pixel by pixel; a large one as a JPEG."""
    out = io.BytesIO()
    if max(picture.size) < _SMALL:
        picture.save(out, "PNG", optimize=True)
        return "image/png", out.getvalue()
    picture.save(out, "JPEG", quality=88)
    return "image/jpeg", out.getvalue()


def _shares(shares: Mapping[str, float]) -> list[tuple[str, str, float, str]]:
    """Modality, score, its part of all, and its side, the largest first."""
    if len(shares) < 2:
        return []
    total = math.fsum(abs(share) for share in shares.values() if math.isfinite(share))
    order = sorted(shares.items(), key=lambda entry: -abs(entry[1]))
    return [(name, signed(one), abs(strength(one, total)), "for" if one > 0 else "against") for name, one in order]


def _steps(explanation: Explanation, shelf: _Shelf) -> list[_Written]:
    found = []
    for number, step in enumerate(explanation.steps[:_STEPS], 1):
        views = [shelf.view(one, step.attributions, within=f"step-{number}") for one in step.attributions]
        rows = [(kind, text, signed(score)) for kind, text, score in sources(step.attributions, 8)]
        found.append(_Written(step.text, math.exp(min(step.logprob, 0.0)), step.logprob, views, rows))
    return found


def _scores(answer: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The labels with the highest probabilities, where the answer has them."""
    scores = answer.get("scores")
    if not isinstance(scores, Mapping):
        return []
    return sorted(((str(label), float(score)) for label, score in scores.items()), key=lambda one: -one[1])[:5]
