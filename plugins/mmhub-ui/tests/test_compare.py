"""Two models side by side: what each takes of one input, their answers, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmhub_ui.answers import Shown
from mmhub_ui.compare import CompareTab, agreement
from mmhub_ui.context import Context

Seen = Callable[[Any, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def tab(in_blocks: Any) -> CompareTab:
    found: CompareTab = in_blocks(lambda: CompareTab(Context(names=("text", "both"))))
    return found


def run(tab: CompareTab, seen: Seen, first: str, second: str, *fields: Any) -> dict[str, Any]:
    parts = [tab.agreement, *(part for view in tab.views for part in view.all)]
    found = tab.answered(first, second, *fields, *[None] * (5 - len(fields)))
    return seen(parts, tab.told(first, second, found))


def test_the_fields_of_both_appear_and_what_one_lacks_is_said(tab: CompareTab, seen: Seen) -> None:
    parts = [tab.status, *tab.fields.all, tab.run, tab.agreement, *(part for view in tab.views for part in view.all)]
    found = seen(parts, tab.choose("image", "both"))
    assert found["compare-image"] and found["compare-audio"] and found["compare-text"] is None
    assert "image takes no audio" in found["compare-status"] and "both takes no" not in found["compare-status"]
    assert found["compare-run"]
    wrong = seen(parts, tab.choose("image", "./nothing"))
    assert "no folder" in wrong["compare-status"] and wrong["compare-run"] is None
    assert [name.value for name in tab.names] == ["text", "both"]


def test_each_is_asked_what_it_takes_and_answers_as_alone(
    tab: CompareTab, seen: Seen, tiny: Any, picture: str, sound: str
) -> None:
    found = run(tab, seen, "image", "both", "unread", None, picture, sound)
    assert found["compare-json-a"] == tiny("image").predict([{"image": picture}])[0]
    assert found["compare-json-b"] == tiny("both").predict([{"image": picture, "audio": sound}])[0]
    same = found["compare-json-a"]["label"] == found["compare-json-b"]["label"]
    assert ("They agree" if same else "They disagree") in found["compare-agreement"]
    assert "differ most for" in found["compare-agreement"] and found["compare-time-a"] and found["compare-time-b"]


def test_an_error_of_one_leaves_the_other_its_answer(tab: CompareTab, seen: Seen, picture: str) -> None:
    found = run(tab, seen, "image", "text", None, None, picture)
    assert found["compare-json-a"] and found["compare-json-b"] is None
    assert "the sample is empty" in found["compare-said-b"] and not found["compare-agreement"]


def test_a_file_that_was_not_uploaded_is_read_by_none(
    tab: CompareTab, seen: Seen, picture: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    found = run(tab, seen, "image", "both", None, None, picture)
    for side in "ab":
        assert "not uploaded" in found[f"compare-said-{side}"] and found[f"compare-json-{side}"] is None


def test_answers_of_models_that_are_no_longer_chosen_are_dropped(tab: CompareTab, picture: str) -> None:
    import gradio as gr

    found = tab.answered("image", "both", None, None, picture, None, None)
    assert all(update == gr.skip() for update in tab.told("image", "text", found))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"text": "a"}, {"text": "a"}, "They agree"),
        ({"text": "a"}, {"text": "b"}, "They disagree"),
        ({"value": 1.5}, {"value": 1.0}, "They differ by 0.5"),
        ({"label": "a", "score": 1.0}, {"value": 1.0}, "nothing to compare"),
    ],
)
def test_agreement_is_told_by_what_both_answer(first: Any, second: Any, said: str) -> None:
    assert said in agreement(Shown(raw=first), Shown(raw=second))
