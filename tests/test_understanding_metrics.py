"""Spans of tags by the CoNLL definition, answers by SQuAD's, calibration by its bins."""

from __future__ import annotations

import pytest

from mmhub.interfaces.spans import find_spans, holds_spans
from mmhub.metrics import measure

# Tags, and their spans worked out by hand from the rules of conlleval.
SPANS = [
    ("O O", []),
    ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
    ("I-PER I-PER", [("PER", 0, 2)]),  # I without B begins a span
    ("O I-PER O", [("PER", 1, 2)]),
    ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),  # the type changes inside
    ("I-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
    ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
    ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),  # IOB1: B only between neighbours
    ("S-PER S-PER", [("PER", 0, 1), ("PER", 1, 2)]),
    ("B-PER I-PER E-PER I-PER", [("PER", 0, 3), ("PER", 3, 4)]),  # E ends one
    ("E-PER E-PER O", [("PER", 0, 1), ("PER", 1, 2)]),
    ("S-PER I-PER", [("PER", 0, 1), ("PER", 1, 2)]),
    ("B-PER L-PER U-LOC", [("PER", 0, 2), ("LOC", 2, 3)]),  # BILOU
    ("B-A-B I-A-B", [("A-B", 0, 2)]),
]


@pytest.mark.parametrize(("tags", "spans"), SPANS, ids=[tags for tags, _ in SPANS])
def test_spans_are_those_of_the_conll_definition(tags: str, spans: list[tuple[str, int, int]]) -> None:
    assert find_spans(tags.split()) == spans


def test_only_tags_with_a_prefix_and_a_type_hold_spans() -> None:
    assert holds_spans(["O", "I-PER"])
    assert holds_spans(["O"])
    assert not any(map(holds_spans, ([], ["NOUN"], ["B"], ["B-"], ["O", "e-mail"], ["O", "B-PER", "NOUN"])))


def test_a_span_is_right_only_if_its_type_and_both_ends_are() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-LOC", "O", "B-PER"]]
    guessed = [["B-PER", "O", "O", "B-LOC", "O"], ["B-PER", "O", "B-PER"]]
    found = measure(["tagging"], [{"tags": tags} for tags in guessed], true)
    # right: LOC at 3, PER at 2; predicted: 4; true: 4
    assert found.pop("f1_by_label") == {"LOC": pytest.approx(2 / 3), "PER": pytest.approx(2 / 5)}
    assert found == {"accuracy": 6 / 8, "precision": 0.5, "recall": 0.5, "f1": 0.5}


def test_equal_spans_of_different_rows_do_not_count_for_each_other() -> None:
    found = measure(["tagging"], [{"tags": ["B-X", "O"]}, {"tags": ["O", "O"]}], [["O", "O"], ["B-X", "O"]])
    assert (found["precision"], found["recall"], found["f1"]) == (0, 0, 0)


def test_tags_without_spans_have_the_mean_f1_of_the_labels_on_either_side() -> None:
    true, guessed = [["NOUN", "VERB"], ["NOUN", "X"]], [["NOUN", "NOUN"], ["NOUN", "ADV"]]
    found = measure(["tagging"], [{"tags": tags} for tags in guessed], true)
    # NOUN: 2 right of 3 predicted and 2 true; the others are never right
    assert found.pop("f1_by_label") == {"ADV": 0, "NOUN": pytest.approx(0.8), "VERB": 0, "X": 0}
    assert found == {"accuracy": 0.5, "f1": pytest.approx(0.2)}


ANSWERS = [  # text, right answers, exact match, F1
    ("The Cat!", ["cat"], 1, 1),
    ("in the old  house", ["old house", "house"], 0, 0.8),  # in, old, house: 2 of 3, 2 of 2
    ("house", ["old house", "house"], 1, 1),  # the best of both
    ("house house", ["big house house"], 0, 0.8),  # a word counts as often as it stands there
    ("", [], 1, 1),
    ("anything", [], 0, 0),
    ("", ["house"], 0, 0),
    ("theatre an-d", ["theatre and"], 1, 1),  # articles are words, punctuation vanishes
    ("the", ["a"], 1, 1),  # nothing is left of both
]


@pytest.mark.parametrize(("text", "right", "exact", "f1"), ANSWERS)
def test_answers_are_compared_as_squad_does(text: str, right: list[str], exact: float, f1: float) -> None:
    assert measure(["answers"], [{"text": text}], [right]) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_answers_are_averaged_over_rows() -> None:
    found = measure(["answers"], [{"text": text} for text, *_ in ANSWERS], [right for _, right, *_ in ANSWERS])
    assert found["exact_match"] == pytest.approx(sum(row[2] for row in ANSWERS) / len(ANSWERS))
    assert found["f1"] == pytest.approx(sum(row[3] for row in ANSWERS) / len(ANSWERS))


def test_calibration_is_the_mean_gap_of_score_and_accuracy_over_bins() -> None:
    rows = [(0.95, True), (0.97, False), (0.69, True), (0.71, False), (0.62, True)]
    predictions = [{"label": "a", "score": score} for score, _ in rows]
    found = measure(["calibration"], predictions, ["a" if right else "b" for _, right in rows])
    # 0.95 and 0.97 share the last bin, 0.69 and 0.71 the one that ends at 11/15; one of two is right in both
    assert found["ece"] == pytest.approx((abs(0.96 - 0.5) * 2 + abs(0.70 - 0.5) * 2 + abs(0.62 - 1)) / 5)
    assert measure(["calibration"], [{"label": "a", "score": 1.0}, {"label": "a", "score": 0.0}], ["a", "b"]) == {
        "ece": 0.0
    }
    assert measure(["calibration"], [{"label": "a"}], ["a"]) == {}
