"""Metrics of captions and of answers about pictures, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mmhub.errors import InputError
from mmhub.metrics import measure
from mmhub.metrics.captions import cider, normal_answer

CAPTIONS = ["a red square on the left", "two blue circles touch each other", "one green star is very small"]


def measured(name: str, texts: list[str], references: list[Any]) -> dict[str, Any]:
    return measure([name], [{"text": text} for text in texts], references)


def test_captions_like_their_references_have_the_highest_scores_and_others_the_lowest() -> None:
    best = measured("captions", CAPTIONS, [[text, "something else entirely"][:1] for text in CAPTIONS])
    assert (best["bleu"], best["chrf"], best["cider"]) == pytest.approx((100, 100, 10))
    worst = measured("captions", ["zzz", "qqq", "www"], CAPTIONS)
    assert (worst["bleu"], worst["chrf"], worst["cider"]) == (0, 0, 0)


def test_the_signatures_say_how_many_references_there_were() -> None:
    one = measured("captions", CAPTIONS, CAPTIONS)
    assert "nrefs:1" in one["bleu_signature"] and "nrefs:1" in one["chrf_signature"]
    mixed = measured("captions", CAPTIONS, [CAPTIONS[:1], [*CAPTIONS], CAPTIONS[2]])
    assert "nrefs:var" in mixed["bleu_signature"]
    assert mixed["bleu"] == pytest.approx(100)  # each is one of its references
    assert "nrefs:2" in measured("captions", CAPTIONS, [["x", text] for text in CAPTIONS])["bleu_signature"]


def test_cider_is_what_the_formula_gives_by_hand() -> None:
    """Two rows; "a" is in both and weighs nothing, all else log 2. One word of "a red" is right, and no other n-gram.

    Of 1-grams the text has red; the reference has red and box, of one weight: the cosine is 1 / sqrt(2). Of 2-grams
    "a red" is common, and "red box" is the reference's alone: 1 / sqrt(2) again. It has no 3-gram. The penalty is that
    of one word.
    """
    found = cider(["a red", "zzz"], [["a red box"], ["a blue dot"]])
    one = math.exp(-1 / 72) * (math.sqrt(0.5) + math.sqrt(0.5) + 0 + 0) / 4
    assert found == pytest.approx(10 * one / 2)


def test_cider_clips_what_is_repeated_and_penalises_length() -> None:
    """Four times "red" has the weight 4 log 2, clipped to 1 log 2: 1 / 4, three words too long."""
    found = cider(["red red red red", "zzz"], [["red"], ["blue"]])
    assert found == pytest.approx(10 * math.exp(-9 / 72) * (1 / 4) / 4 / 2)


def test_cider_is_a_mean_over_references() -> None:
    rows = [["a red box here", "zzz yyy xxx www"], ["a blue dot there"], ["qqq"]]
    alone = [["a red box here"], ["a blue dot there"], ["qqq"]]
    halves = cider(["a red box here", "-", "-"], rows) * 3
    assert cider(["a red box here", "-", "-"], alone) * 3 == pytest.approx(10)
    assert halves == pytest.approx(5)


def test_cider_does_not_see_case_and_outer_punctuation() -> None:
    loud = ["A RED square, on the (left)!", "Two blue circles touch each other.", "“One green star is very small”"]
    assert cider(loud, [[text] for text in CAPTIONS]) == pytest.approx(10)
    assert cider(["it's"], [["its"]]) == 0


@pytest.mark.parametrize("name", ["translation", "captions", "visual_answers"])
def test_a_row_without_any_reference_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="a reference is an empty list; give every row a text"):
        measured(name, ["a", "b"], [["a"], []])


def test_cider_of_short_or_empty_texts_and_of_one_row_is_a_number() -> None:
    assert cider(["red box", "dot"], [["red box"], ["dot"]]) == pytest.approx(10 * (2 / 4 + 1 / 4) / 2)
    assert cider(["", "dot"], [["red box"], [""]]) == 0
    assert cider(["a red box"], [["a red box"]]) == 0  # nothing is rare in a single row


@pytest.mark.parametrize(
    ("answer", "given", "accuracy"),
    [
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),  # without one of the three, two are left
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),  # 2 times 1/3, 8 times 2/3
        ("red", ["red"] + ["blue"] * 9, 0.3),
        ("red", ["blue"] * 10, 0.0),
        ("red", "red", 1.0),
        ("red", ["blue"], 0.0),
        ("red", ["red", "red"], 1.0),
        ("red", ["red", "blue"], 0.5),
        ("red", ["red", "red", "red"], 1.0),
    ],
)
def test_an_answer_that_three_people_gave_is_right(answer: str, given: Any, accuracy: float) -> None:
    found = measured("visual_answers", [answer], [given])
    assert found["vqa_accuracy"] == pytest.approx(accuracy)


def test_the_exact_match_is_with_the_answer_that_is_given_most() -> None:
    found = measured("visual_answers", ["Two!", "blue", "3"], [["2", "two", "3"], ["red", "blue"], "three"])
    assert found["exact_match"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The RED one.", "red 1"),
        ("ten", "10"),
        ("none", "0"),
        ("1,000", "1000"),
        ("1.5", "1.5"),
        ("a t-shirt", "t shirt"),
        ("don’t", "dont"),  # noqa: RUF001
        ("yes/no?", "yes no"),
        ("", ""),
    ],
)
def test_answers_are_compared_in_a_normal_form(text: str, same: str) -> None:
    assert normal_answer(text) == same
