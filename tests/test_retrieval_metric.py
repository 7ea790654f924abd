"""Recall and rank in both directions, by groups, with ties and gaps."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest

from mmhub.metrics import flat, measure
from mmhub.metrics.retrieval import retrieval


def at(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def rows(*pairs: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    """Texts and pictures as directions."""
    named = (zip(("text", "image"), pair, strict=True) for pair in pairs)
    return [{"embeddings": {side: at(angle) for side, angle in pair if angle is not None}} for pair in named]


def test_recall_and_median_rank_are_told_for_both_directions() -> None:
    found = retrieval(rows((0, 1), (10, 21), (20, 22), (80, 2)), [0, 1, 2, 3])
    # texts at 0, 10, 20, 80; pictures at 1, 21, 22, 2: ranks 1, 3, 2, 4 and 1, 2, 1, 4
    assert found["recall"]["text_to_image"] == {"1": 0.25, "5": 1.0, "10": 1.0}
    assert found["recall"]["image_to_text"] == {"1": 0.5, "5": 1.0, "10": 1.0}
    assert found["median_rank"] == {"text_to_image": 2.5, "image_to_text": 1.5}
    assert found["mean_recall"] == pytest.approx((0.25 + 1 + 1 + 0.5 + 1 + 1) / 6)


def test_any_item_of_the_group_is_right_and_others_of_it_are_not_in_the_way() -> None:
    found = retrieval(rows((0, 40), (41, 1), (80, 80)), ["cat", "cat", "dog"])
    assert found["median_rank"] == {"text_to_image": 1.0, "image_to_text": 1.0}
    assert retrieval(rows((0, 40), (41, 1), (80, 80)), [0, 1, 2])["median_rank"]["text_to_image"] == 2.0
    same = retrieval(rows((0, 0), (0, 0), (90, 90)), ["cat", "cat", "dog"])
    assert same["recall"]["text_to_image"]["1"] == 1.0


def test_a_model_that_gives_everything_one_vector_finds_nothing_first() -> None:
    found = retrieval(rows(*[(30, 30)] * 20), range(20))
    assert found["recall"]["text_to_image"] == {"1": 0.0, "5": 0.0, "10": 0.0}
    assert found["median_rank"] == {"text_to_image": 20.0, "image_to_text": 20.0}


def test_what_is_not_a_number_comes_last() -> None:
    broken = rows((0, 0), (50, 50))
    broken[0]["embeddings"]["text"] = [math.nan, math.nan]
    found = retrieval(broken, [0, 1])
    assert found["recall"]["text_to_image"]["1"] == 0.5
    assert found["recall"]["image_to_text"]["1"] == 0.0  # nor can it be known that the other picture is better


def test_a_row_with_one_side_is_searched_but_asks_nothing() -> None:
    found = retrieval(rows((0, 10), (None, 1), (60, 62), (61, None)), [0, None, 2, None])
    assert found["recall"]["text_to_image"]["1"] == 0.5  # of two texts; the picture at 1 is nearer to the first
    assert found["median_rank"]["image_to_text"] == 1.5  # the text at 61 is nearer to the picture at 62
    assert retrieval(rows((0, None), (1, None)), [None, None]) == {}
    assert retrieval(rows((0, None), (None, 1)), [None, None]) == {}


def test_the_names_come_from_the_sides() -> None:
    pairs = [{"embeddings": {"text": at(0), "text_pair": at(1)}}, {"embeddings": {"text_pair": at(7)}}]
    assert list(retrieval(pairs, [0, None])["recall"]) == ["text_to_text_pair", "text_pair_to_text"]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows(*[(7.3 * i % 360, 7.3 * i % 360 + (i % 9)) for i in range(60)])
    whole = retrieval(table, list(range(60)))
    monkeypatch.setattr(import_module("mmhub.metrics.retrieval"), "_CHUNK", 130)
    assert retrieval(table, list(range(60))) == whole
    assert 0 < whole["mean_recall"] < 1


def test_every_number_has_a_flat_name() -> None:
    found = flat(measure(["retrieval"], rows((0, 1), (80, 80)), [0, 1]))
    expected = {f"recall.{way}.{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    assert set(found) == expected | {"median_rank.text_to_image", "median_rank.image_to_text", "mean_recall"}
