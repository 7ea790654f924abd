"""Explaining an answer in the app: a page in a frame of its own, a file to keep, and errors in words."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import pytest

from mmhub_ui.context import Context
from mmhub_ui.tryout import TryTab
from mmhub_ui.work import follow

pytest.importorskip("captum", reason="needs captum, mmhub[explain]")
Tiny = Callable[[str], Any]
Seen = Callable[[Any, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def tab(in_blocks: Any) -> TryTab:
    """The tab of an app."""
    found: TryTab = in_blocks(lambda: TryTab(Context()))
    return found


def explained(tab: TryTab, seen: Seen, name: str, *fields: Any, method: str = "gradient-x-input") -> dict[str, Any]:
    values = [*fields, *[None] * (5 - len(fields))]
    return seen(tab.why.shown, list(tab.explained(name, method, *values))[-1])


def test_a_page_is_shown_in_a_frame_of_its_own_and_kept_as_a_file(tab: TryTab, seen: Seen, tiny: Tiny) -> None:
    text = "a good <img src=x onerror=alert(1)> film ${alert(1)} {{x}}"
    found = explained(tab, seen, "text", text)
    frame = found["try-explanation"]
    assert frame.startswith("<iframe ") and 'sandbox="allow-scripts"' in frame and "<img" not in frame
    assert not set("{}$`") & set(frame), "gradio would run these"
    page = html.unescape(re.search(r'srcdoc="(.*)"></iframe>', frame, re.S)[1])  # type: ignore[index]
    assert Path(found["try-keep"]).read_text("utf-8") == page
    assert "default-src 'none'" in page and tiny("text").predict([{"text": text}])[0]["label"] in page
    assert '<span class="' in page and ">&lt;</span>" in page


@pytest.mark.parametrize("kind", ["image", pytest.param("both", marks=pytest.mark.slow)])
def test_a_picture_is_explained_patch_by_patch(tab: TryTab, seen: Seen, kind: str, picture: str) -> None:
    frame = explained(tab, seen, kind, None, None, picture)["try-explanation"]
    assert "data:image/png;base64," in frame and html.unescape(frame).count("<rect") >= 16


def test_what_goes_wrong_is_told_in_words_without_folders(tab: TryTab, seen: Seen, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"no picture")
    for name, fields, said in (
        ("image", (None, None, str(tmp_path / "cat.png")), "cat.png"),
        ("image", (None, None, "/etc/hostname"), "was not uploaded"),
        ("both", (), "the sample is empty"),
        ("./nothing", ("a",), "no folder"),
        ("text", ("a" * 200_000,), "more than the limit"),
    ):
        found = explained(tab, seen, name, *fields)
        assert 'role="alert"' in found["try-explanation"] and said in found["try-explanation"], said
        assert str(tmp_path) not in found["try-explanation"] and found["try-keep"] is None


def test_it_is_offered_where_something_is_asked_and_gone_with_another_model(tab: TryTab, seen: Seen) -> None:
    def fitted(name: str) -> list[Any]:
        return list(tab.choose(name))[-1][-len(tab.why.all) :]

    offered, frame, file = fitted("text")
    assert offered["visible"] is True and (frame["value"], frame["visible"], file["visible"]) == ("", False, False)
    assert fitted("talker")[0]["visible"] is False
    assert tab.cleared()[-2]["value"] == "" and tab.cleared()[-1]["visible"] is False


def test_a_locked_app_tells_no_versions(in_blocks: Any, seen: Seen) -> None:
    locked: TryTab = in_blocks(lambda: TryTab(Context(names=("text",), locked=True)))
    assert "captum" not in explained(locked, seen, "text", "a good film")["try-explanation"]
    assert "is not offered here" in explained(locked, seen, "image", "a")["try-explanation"]


def test_an_explanation_that_nobody_waits_for_ends(tab: TryTab, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = Event(), Event()

    def endless(*_: Any, stop: Callable[[], None], **options: Any) -> None:
        begun.set()
        try:
            while True:
                stop()
                sleep(0.01)
        finally:
            ended.set()

    def follow_a_while(action: Any) -> Iterator[Any]:
        pieces = follow(action)
        yield next(pieces)
        assert begun.wait(5) and not ended.is_set()
        pieces.close()

    monkeypatch.setattr("mmhub.explain.explain", endless)
    monkeypatch.setattr("mmhub_ui.explaining.follow", follow_a_while)
    list(tab.explained("text", "occlusion", "a good film", *[None] * 4))
    assert ended.wait(5)
