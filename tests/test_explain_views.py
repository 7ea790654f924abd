"""Explanations as people see them: on terminals, as pictures, as pages; and that nothing strangers wrote acts there."""

from __future__ import annotations

import base64
import doctest
import hashlib
import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmhub.errors import UsageError
from mmhub.explain import Attribution, Explanation, Faithfulness, Piece, Step
from mmhub.explain.heat import colour, full, signed
from mmhub.explain.overlay import EDGE, overlay
from mmhub.explain.page import page
from mmhub.explain.sources import items_of, marked, picture_of, raw_of, wave_of
from mmhub.explain.terminal import columns, render
from mmhub.interfaces import Policy
from tests.conftest import flac, png

TEXT = "the film was good , not boring"
SCORES = (0.0, 0.05, 0.0, 0.9, 0.0, -0.45, 0.2)
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e</title><script>x()</script><img src=x onerror=x()>"
OURS = re.compile(r"\x1b\[[0-9;]*m")


def text_of(text: str = TEXT, scores: tuple[float, ...] = SCORES) -> Attribution:
    pieces, at = [Piece(score=0.0, text="[CLS]")], 0
    for word, score in zip(text.split(" "), scores, strict=True):
        at = text.index(word, at)
        pieces.append(Piece(score=score, text=word, start=at, end=at + len(word)))
        at += len(word)
    return Attribution(modality="text", kind="token", pieces=tuple(pieces))


def picture_parts(side: int = 4, hot: int = 6, cold: int = 9, size: tuple[int, int] = (16, 16)) -> Attribution:
    """A grid whose patch `hot` speaks for the target and whose patch `cold` against it."""
    wide, high = size[0] / side, size[1] / side
    pieces = []
    for number in range(side * side):
        row, column = divmod(number, side)
        score = {hot: 2.0, cold: -2.0}.get(number, 0.0)
        box = (column * wide, row * high, (column + 1) * wide, (row + 1) * high)
        pieces.append(Piece(score=score, box=box))
    return Attribution(modality="image", kind="patch", pieces=tuple(pieces), grid=(side, side), size=size)


def sound_parts(scores: tuple[float, ...] = (0.0, 1.0, 0.0, -1.0), seconds: float = 1.0) -> Attribution:
    step = seconds / len(scores)
    pieces = tuple(Piece(score=s, start=n * step, end=(n + 1) * step) for n, s in enumerate(scores))
    return Attribution(modality="audio", kind="frame", pieces=pieces, size=(seconds,))


def explained(*attributions: Attribution, **changes: Any) -> Explanation:
    found = Explanation(
        task="classification",
        method="occlusion",
        target="positive",
        unit="logit",
        value=2.5,
        baseline=0.5,
        answer={"label": "positive", "score": 0.98, "scores": {"positive": 0.98, "negative": 0.02}},
        attributions=attributions or (text_of(),),
    )
    return replace(found, **changes)


def faithful(out: float = 0.3, back: float = 0.7) -> Faithfulness:
    return Faithfulness(
        deletion=(1.0, 0.2, 0.0),
        insertion=(0.0, 0.8, 1.0),
        deletion_area=out,
        insertion_area=back,
        random_deletion_area=0.5,
        random_insertion_area=0.5,
        orders=19,
        deletion_beaten=19 if out < 0.5 else 3,
        insertion_beaten=19 if back > 0.5 else 18,
    )


# -- colours ------------------------------------------------------------------------------------------------------


def test_both_sides_are_equally_light_and_darken_evenly() -> None:
    def light(value: float) -> float:  # CIE L*
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour(value)) / 255]
        return float(116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16)

    reds, blues = ([light(side * step / 4) for step in range(5)] for side in (1, -1))
    assert reds == pytest.approx(blues, abs=6)
    falls = -np.diff(reds)
    assert falls.min() > 0.8 * falls.max()


def test_an_input_that_hardly_matters_stays_pale_and_one_alone_has_full_colour() -> None:
    weak, strong = sound_parts((0.01, 0.0)), picture_parts()
    assert full(weak) == 0.01
    assert full(weak, (weak, strong)) == pytest.approx(0.2)
    assert full(strong, (weak, strong)) == 2.0


@pytest.mark.parametrize("module", ["heat", "terminal"])
def test_the_examples_of_the_docstrings_run(module: str) -> None:
    done = doctest.testmod(import_module(f"mmhub.explain.{module}"))
    assert done.attempted and not done.failed


# -- what stands in a sample ----------------------------------------------------------------------------------------


def test_a_text_keeps_what_is_between_its_tokens() -> None:
    text = "  the film,\nwas good"
    pieces = (Piece(score=0.0, text="<s>"), Piece(score=1.0, text="THE", start=2, end=5))
    found = marked(Attribution(modality="text", kind="token", pieces=pieces), text)
    assert [one.text for one in found] == ["  ", "the", " film,\nwas good"]
    assert found[1].piece is pieces[1]


def test_a_token_that_the_tokenizer_added_is_shown_where_it_counts() -> None:
    pieces = (Piece(score=0.5, text="[CLS]"), Piece(score=1.0, text="a", start=0, end=1))
    found = marked(Attribution(modality="text", kind="token", pieces=pieces), "a")
    assert [(one.text, one.added) for one in found] == [("[CLS]", True), ("a", False)]


def test_places_that_do_not_fit_the_text_show_the_tokens_themselves() -> None:
    pieces = (Piece(score=1.0, text="far", start=90, end=93), Piece(score=1.0, text="off", start=94, end=97))
    found = marked(Attribution(modality="text", kind="token", pieces=pieces), "short")
    assert "".join(one.text for one in found).strip() == "far off"
    written = Attribution(
        modality="written", kind="token", pieces=(Piece(score=1.0, text="a"), Piece(score=0, text=" b"))
    )
    assert "".join(one.text for one in marked(written, None)) == "a b"


def test_items_come_from_pairs_lists_and_conversations() -> None:
    talk = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "sure?"},
    ]
    assert items_of({"messages": talk}, "text") == ["what?\nsure?"]
    assert items_of({"messages": talk}, "image") == ["a.png"]
    assert items_of({"text": {"text": "a", "text_pair": "b"}}, "text") == ["a\nb"]
    assert items_of({"image": ["a", "b"]}, "image") == ["a", "b"]
    rate = (np.zeros(8, np.float32), 8000)
    assert items_of({"audio": rate}, "audio") == [rate]
    assert raw_of({"text": TEXT.split(" ")}, text_of()) == TEXT
    assert raw_of({}, text_of()) is None


def test_pictures_and_sounds_of_every_kind_are_shown_and_broken_ones_are_not() -> None:
    policy = Policy()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 12), dtype=np.uint8)
    for raw in (pixels, pixels.transpose(1, 2, 0), pixels[0], Image.fromarray(pixels.transpose(1, 2, 0)).convert("P")):
        shown = picture_of(raw, policy, 100)
        assert shown is not None and (shown.size, shown.mode) == ((12, 8), "RGB")
    assert picture_of(b"no picture", policy, 100) is picture_of("/nowhere.png", policy, 100) is None
    assert picture_of(png(1, 64), Policy(max_pixels=100), 100) is None
    loud = (np.full(80, 16384, np.int16), 80)
    for raw in (loud, loud[::-1], {"array": loud[0], "sampling_rate": 80}, (np.stack([loud[0]] * 2), 80)):
        heard = wave_of(raw, policy)
        assert heard is not None and heard.seconds == 1 and heard.samples == pytest.approx(0.5)
    assert wave_of(b"no sound", policy) is None


# -- terminals ------------------------------------------------------------------------------------------------------


def test_without_colours_there_are_numbers_and_no_control_sequence() -> None:
    shares = {"text": 1.5, "image": -0.5}
    found = explained(
        text_of(), picture_parts(), sound_parts(), shares=shares, faithfulness=faithful(), gap=0.25, neutral=1.5
    )
    lines = render(found, {"text": TEXT}).splitlines()
    assert all(line.isprintable() and line.isascii() for line in lines)
    assert lines[:2] == ["positive  0.9800", "'positive' by occlusion: logit 2.5 (0.5 without any input)"]
    table = lines[lines.index("text: score, number and token") + 1 :]
    assert [line.split() for line in table[:3]] == [
        ["+0.900", "5", "good"],
        ["-0.450", "7", "not"],
        ["+0.200", "8", "boring"],
    ]
    assert "   +2.000  x 8-12, y 4-8" in lines and "   +1.000  0.25-0.50 s" in lines
    assert "image    -0.500   25%" in lines
    assert "0.3 on average, 0.5 in random order: better than 19 of 19 random orders." in " ".join(lines)
    assert "The scores add up to the difference to a neutral input (1.5) within 0.25." in lines


def test_a_token_for_the_answer_is_red_and_one_against_it_blue() -> None:
    deep = render(explained(), {"text": TEXT}, colours="24-bit")
    red, blue = (";".join(map(str, colour(value))) for value in (1.0, -0.5))
    assert f"\x1b[48;2;{red};38;2;0;0;0mgood\x1b[0m" in deep
    assert f"\x1b[48;2;{blue};38;2;0;0;0mnot\x1b[0m" in deep
    few = render(explained(), {"text": TEXT}, colours="256")
    assert "\x1b[48;5;203;38;5;16mgood\x1b[0m" in few and "\x1b[48;5;153;38;5;16mnot\x1b[0m" in few
    assert " was " in OURS.sub("", few) and TEXT in OURS.sub("", few)


@pytest.mark.parametrize("width", [30, 41, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = "日本語 " * 30 + "x" * 150 + " end"
    found = text_of(text.strip(), tuple(1.0 for _ in text.split()))
    steps = (Step(text=" word", logprob=-0.5, attributions=(found, picture_parts(40, size=(400, 400)))),)
    shown = render(
        explained(
            found,
            picture_parts(40),
            sound_parts(),
            steps=steps,
            gap=0.00065,
            faithfulness=faithful(),
            notes=("note " * 40,),
            target="t" * 300,
            shares={"text": 1, "image": 1},
        ),
        {"text": text},
        width=width,
        colours="256",
    )
    assert max(columns(OURS.sub("", line)) for line in shown.splitlines()) <= width
    assert "end" in shown


@pytest.mark.slow
def test_the_grid_shows_the_strong_patches_at_their_place_also_of_a_fine_one() -> None:
    def cells(attribution: Attribution) -> list[str]:
        lines = render(explained(attribution), {}, colours="256", width=80).splitlines()
        return [line for line in lines if "▀" in line]

    coarse = cells(picture_parts(4, hot=0, cold=15))
    assert coarse[0].startswith("\x1b[38;5;203;48;5;203m▀▀▀▀\x1b") and "48;5;69m▀▀▀▀\x1b[0m" in coarse[-1]
    assert len(coarse) == 8
    fine = cells(picture_parts(100, hot=4321, cold=9999))
    assert len(fine) == 16 and sum("5;203" in line for line in fine) == 1 and "5;69m" in fine[-1]


@pytest.mark.parametrize("colours", ["none", "256", "24-bit"])
def test_what_strangers_wrote_cannot_steer_a_terminal(colours: Any) -> None:
    item = Attribution(modality=EVIL, kind="token", pieces=(Piece(score=1.0, text=EVIL),))
    steps = (Step(text=EVIL, logprob=0.0, attributions=(item,)),)
    found = explained(
        item,
        item,
        target=EVIL,
        answer={"label": EVIL, "score": 1.0},
        notes=(EVIL,),
        shares={EVIL: 1.0, "b": 1.0},
        steps=steps,
    )
    left = OURS.sub("", render(found, {EVIL: EVIL, "text": EVIL}, colours=colours))
    assert "owned" in left
    assert all(one.isprintable() or one == "\n" for one in left)


def test_written_tokens_name_their_strongest_sources() -> None:
    steps = (Step(text=" cat", logprob=-0.25, attributions=(text_of(), picture_parts())),)
    lines = render(explained(text_of(), steps=steps), {"text": TEXT}, width=120).splitlines()
    assert lines[-1].startswith("cat    -0.25  image x 8-12, y 4-8 +2.000")


def test_an_explanation_no_better_than_random_orders_says_so() -> None:
    shown = render(explained(faithfulness=faithful(out=0.6, back=0.4)), {"text": TEXT}, width=500)
    assert "no better than random order (better than 3 of 19)" in shown
    assert "no better than random order (better than 18 of 19)" in shown, "one in twenty is better than all by chance"


def test_what_the_scores_add_up_to_is_said_with_tokens_that_were_written() -> None:
    steps = (Step(text=" cat", logprob=-0.25, attributions=(text_of(),)),)
    found = explained(steps=steps, gap=0.25, neutral=-1.5, baseline=None)
    shown = render(found, {"text": TEXT}, width=500)
    assert "with those of tokens written before, add up to the difference to a neutral input (-1.5)" in shown
    assert "without any input" not in shown
    assert "add up to the difference to a neutral input" in page(found, {"text": TEXT})


# -- pictures -------------------------------------------------------------------------------------------------------


def drawn(explanation: Explanation, sample: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(overlay(explanation, sample))).convert("RGB")).astype(int)


def test_a_picture_stands_beside_itself_in_grey_under_red_and_blue_patches() -> None:
    raw = png(1)
    found = drawn(explained(picture_parts()), {"image": raw})
    own = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB").resize((320, 320), Image.Resampling.NEAREST))
    top = next(row for row in range(200) if np.array_equal(found[row : row + 320, 16:336], own))
    heated = found[top : top + 320, 352:672]
    red, green, blue = (heated[..., channel] for channel in range(3))
    assert (red - blue)[80:160, 160:240].min() > 60, "patch 6 is in row 1, column 2"
    assert (blue - red)[160:240, 80:160].min() > 60, "patch 9 is in row 2, column 1"
    assert np.array_equal(red[240:], green[240:]) and np.array_equal(red[240:], blue[240:])


def test_a_picture_that_a_phone_turned_is_shown_upright_and_a_large_one_smaller() -> None:
    wide = Image.new("RGB", (2000, 1000), "white")
    wide.paste("black", (0, 0, 1000, 1000))
    exif, file = wide.getexif(), io.BytesIO()
    exif[274] = 6
    wide.save(file, "JPEG", exif=exif)
    found = drawn(explained(picture_parts(size=(1000, 2000))), {"image": file.getvalue()})
    assert found.shape[1] == 2 * EDGE // 2 + 16 + 32 and EDGE < found.shape[0] < EDGE + 200
    column = found[:, 16 + EDGE // 4].mean(1)
    assert (column[: EDGE // 2 + 50] < 10).sum() > 190, "the dark half is above"


def test_a_sound_has_its_colours_over_the_time_they_belong_to() -> None:
    found = drawn(explained(sound_parts()), {"audio": flac(1, 1.0)})
    bands = [row for row in found if (abs(row[16:736, 0] - row[16:736, 2]) > 60).any()]
    first = bands[0][16:736]
    assert (first[190:350, 0] - first[190:350, 2]).min() > 60, "red from 0.25 to 0.5 s"
    assert (first[550:710, 2] - first[550:710, 0]).min() > 60, "blue from 0.75 to 1 s"
    assert np.array_equal(first[10:170, 0], first[10:170, 2])


def test_a_sample_without_pictures_and_sounds_makes_no_png() -> None:
    with pytest.raises(UsageError, match="has none"):
        overlay(explained(), {"text": TEXT})
    with pytest.raises(UsageError, match="has none"):
        overlay(explained(picture_parts()), {"image": b"broken"})


# -- pages ----------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The elements of a page with their attributes, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def everything(**changes: Any) -> Explanation:
    steps = tuple(Step(text=f" w{n}", logprob=-0.1, attributions=(text_of(), picture_parts())) for n in range(5))
    shares = {"text": 1.5, "image": 0.7, "audio": -0.2}
    return explained(
        text_of(),
        picture_parts(),
        sound_parts(),
        **{"shares": shares, "faithfulness": faithful(), "steps": steps} | changes,
    )


SAMPLE = {"text": TEXT, "image": png(1), "audio": flac(1, 1.0)}


def test_a_page_needs_nothing_else_and_allows_no_script_but_its_own() -> None:
    text = page(everything(), SAMPLE, name="org/model", facts={"torch": "2"})
    tags = Tags(text)
    loaded = [
        one[key] for _, one in tags.found for key in ("src", "href", "xlink:href", "action", "data") if key in one
    ]
    assert loaded and all(one.startswith(("data:image/png;base64,", "data:audio/wav;base64,", "#")) for one in loaded)
    policy = next(one["content"] for one in tags.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}'" in policy
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    assert not [key for _, one in tags.found for key in one if key.startswith("on")]


def test_a_page_shows_tokens_patches_frames_shares_curves_and_steps() -> None:
    text = page(
        everything(notes=("mind this",), gap=0.125, neutral=0.5, points=32),
        SAMPLE,
        name="org/model",
        facts={"torch": "2.x"},
    )
    tags = Tags(text)
    spans = {one["title"]: one for one in tags.of("span") if "title" in one}
    assert spans["+0.900"]["class"] == "for" and float(spans["+0.900"]["style"].removeprefix("--s:")) == 1.0
    assert spans["-0.450"]["class"] == "against"
    assert len(tags.of("image")) == 1 and len(tags.of("use")) == 5, "the picture is in the page once"
    assert len(tags.of("audio")) == 1
    sides = [one["class"] for one in tags.of("rect") if float(one["fill-opacity"]) > 0.5]
    assert sides.count("for") == sides.count("against") == 7, "one of each for picture, sound and five steps"
    strong = [(float(one["x"]), float(one["y"])) for one in tags.of("rect") if float(one["fill-opacity"]) > 0.5]
    assert strong[:4] == [(8, 4), (4, 8), (75, 0), (225, 0)], "patches 6 and 9 of 4 x 4, then frames 1 and 3 of 4"
    assert len(tags.of("polyline")) == 2 and len([one for one in tags.of("details") if one.get("name")]) == 5
    said = " ".join(" ".join(tags.texts).split())
    for part in (
        "positive 0.9800",
        "org/model",
        "better than 19 of 19 random orders",
        "mind this",
        "0.12",
        "2.x",
        "+1.500 62 %",
        "-0.200",
    ):
        assert part in said, part
    assert all(one.get("aria-label") for one in tags.of("svg"))


def test_what_strangers_wrote_is_text_in_a_page_and_no_markup() -> None:
    item = Attribution(modality=EVIL, kind="token", pieces=(Piece(score=1.0, text=EVIL, start=0, end=len(EVIL)),))
    patches = replace(picture_parts(), modality=f'image"/>{EVIL}')
    steps = (Step(text=EVIL, logprob=0.0, attributions=(item, patches)),)
    found = everything(
        attributions=(item, replace(item, modality="text"), patches),
        target=EVIL,
        task=EVIL,
        unit=EVIL,
        answer={"label": EVIL, "score": 1.0, "scores": {EVIL: 1.0, "b": 0.0}},
        notes=(EVIL,),
        shares={EVIL: 1.0, "b": 1.0},
        steps=steps,
    )
    text = page(found, {"text": EVIL, EVIL: EVIL, patches.modality: png(1)}, name=EVIL, facts={EVIL: EVIL})
    tags = Tags(text)
    assert (
        len(tags.of("script")) == 1
        and not tags.of("img")
        and len(tags.of("title")) - len(tags.of("rect")) - len(tags.of("circle")) == 1
    )
    assert not [key for _, one in tags.found for key in one if key.startswith("on")]
    assert text.count("&lt;script&gt;x()") >= 10


@pytest.mark.slow
def test_scores_that_are_no_numbers_break_no_view() -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):

        def spoilt(one: Attribution, bad: float = bad) -> Attribution:
            return replace(one, pieces=(one.pieces[0], replace(one.pieces[1], score=bad), *one.pieces[2:]))

        found = everything(
            attributions=tuple(map(spoilt, (text_of(), picture_parts(), sound_parts()))),
            value=bad,
            shares={"text": bad, "image": 1.0},
            faithfulness=replace(faithful(), deletion=(bad, 0.0), deletion_area=bad, random_deletion_area=bad),
        )
        shown = Tags(page(found, SAMPLE))
        assert {one["style"] for one in shown.of("span") if one.get("title") == signed(bad)} == {"--s:0.000"}
        assert overlay(found, SAMPLE)[:4] == b"\x89PNG"
        for colours in ("none", "256"):
            assert "good" in render(found, SAMPLE, colours=colours)


def test_an_explanation_with_nothing_in_it_makes_every_view() -> None:
    bare = explained(
        Attribution(modality="text", kind="token", pieces=()),
        Attribution(modality="image", kind="patch", pieces=(), grid=(0, 0)),
        Attribution(modality="audio", kind="frame", pieces=()),
        answer={},
    )
    assert "positive" in page(bare, {}) and "positive" in render(bare, {}, colours="256")


def test_a_page_that_is_full_leaves_pictures_out_and_keeps_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmhub.explain.page._BUDGET", 100)
    tags = Tags(page(everything(), SAMPLE))
    assert not tags.of("image") and not tags.of("use") and not tags.of("audio") and tags.of("rect")


CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


@pytest.mark.slow
@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Chromium")
def test_a_browser_shows_the_page_on_a_phone_plays_from_a_click_and_runs_nothing_of_strangers(tmp_path: Path) -> None:
    tool = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = everything(target=EVIL, notes=(EVIL,), answer={"label": EVIL, "score": 1.0})
    (tmp_path / "page.html").write_text(page(found, SAMPLE | {"text": TEXT}, name=EVIL), "utf-8")
    with tool.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        told: list[str] = []
        tab = browser.new_page(viewport={"width": 390, "height": 800})
        tab.on("console", lambda message: told.append(message.text))
        tab.on("pageerror", lambda error: told.append(str(error)))
        tab.on("request", lambda request: told.append(request.url) if request.url.startswith("http") else None)
        tab.goto((tmp_path / "page.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        tab.wait_for_function("document.querySelector('audio').readyState > 0")
        tab.locator(".sound svg").first.click(position={"x": 150, "y": 40})
        assert 0.3 < tab.evaluate("document.querySelector('audio').currentTime") < 0.8
        assert tab.locator(".picture .heat").first.is_visible()
        tab.locator(".picture input").first.uncheck()
        assert not tab.locator(".picture .heat").first.is_visible()
        tab.locator(".steps > details > summary").first.click()
        assert tab.locator(".steps .inside").first.is_visible()
        assert not told
        browser.close()
