"""The span head: where answers stand, which spans may be chosen, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from mmhub.batch import Features, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Stream
from mmhub_heads.span import Span, best_spans

D = 6
RAW = {"question": "Who wrote it ?", "context": "It was Ada Lovelace, who wrote Ada's notes."}
ROW = {"text": RAW}


class Pieces:
    """Stands for a text processor: [CLS], the question's words, [SEP], the pieces of the context's words, [SEP]."""

    def offsets(self, raw: Mapping[str, str]) -> list[tuple[int, int] | None]:
        pieces = [match.span() for match in re.finditer(r"\w{1,4}|[^\w\s]", raw["context"])]
        return [None] * (2 + len(raw["question"].split())) + [*pieces, None]


PROCESSORS = {"text": Pieces()}
CONTEXT = 6  # the first token of the context: It was Ada Love lace , who wrot e Ada ' s note s .


def build(targets: list[Any] | None = None, **config: Any) -> Span:
    settings = Span.Config(**config)
    return Span(settings if targets is None else Span.fit(settings, targets), {"text": Stream(D)}).eval()


def output_of(start: list[float], end: list[float], mask: list[int]) -> Output:
    logits = torch.tensor([start, end]).T[None]
    allowed = torch.tensor([mask], dtype=torch.bool)
    return Output(logits=logits.masked_fill(~allowed[..., None], -1e9), mask=allowed)


@pytest.mark.parametrize(
    ("target", "tokens"),
    [
        ("Ada", [2, 2]),
        ("Ada Lovelace", [2, 4]),
        ("love".title(), [3, 3]),
        ("ov", [3, 3]),  # part of a token
        ({"text": ["Ada"], "answer_start": [31]}, [9, 9]),
        ({"text": "Ada", "answer_start": 31}, [9, 9]),
        ({"text": np.array(["Ada", "Ada's"], dtype=object), "answer_start": np.array([31, 31])}, [9, 9]),
        ([{"text": "Ada", "answer_start": 31}], [9, 9]),
        ({"text": ["Ada"], "answer_start": [np.int64(31)]}, [9, 9]),
        ({"text": "Ada", "answer_start": 31.0}, [9, 9]),
        ({"text": ["Ada", "Ada"], "answer_start": [None, 31]}, [2, 2]),
        ({"text": "Ada", "answer_start": float("nan")}, [2, 2]),
        ([{"text": "Ada"}, "notes"], [2, 2]),
        (["Ada Lovelace", "notes"], [2, 4]),
    ],
)
def test_an_answer_becomes_the_tokens_that_it_touches(target: Any, tokens: list[int]) -> None:
    found = build().encode_pointed([target], [ROW], PROCESSORS)
    assert found.tolist() == [[CONTEXT + place for place in tokens]]


@pytest.mark.parametrize("nothing", [[], {"text": [], "answer_start": []}, np.array([])])
def test_no_answer_is_the_first_token_of_a_head_that_knows_such_questions(nothing: Any) -> None:
    assert build(["Ada", nothing]).encode_pointed([nothing], [ROW], PROCESSORS).tolist() == [[0, 0]]
    always = build(["Ada"])
    encoded = always.encode_pointed([nothing, "Ada"], [ROW, ROW], PROCESSORS)
    assert encoded.tolist()[0] == [-100, -100]
    assert always.weigh(encoded).tolist() == [0, 1]
    assert always.references([nothing]) == [[]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "the target is missing; give an empty list for a question without an answer"),
        ("Byron", "the answer 'Byron' does not stand in the context"),
        ({"text": ["Ada"], "answer_start": [8]}, "at character 8 of the context stands 'da ' and not the answer 'Ada'"),
        ({"text": ["Ada"], "answer_start": [-3]}, "at character -3"),
        ({"text": ["Ada"], "answer_start": [1, 2]}, r"1 text\(s\) and 2 answer_start\(s\)"),
        ({"text": ["Ada"], "answer_start": ["7"]}, "answer_start must be a number of characters, got '7'"),
        ({"text": ["Ada"], "answer_start": [True]}, "answer_start must be a number of characters, got True"),
        ({"text": ["Ada"], "answer_start": [7.5]}, "answer_start must be a number of characters, got 7.5"),
        ({"answer": "Ada"}, "needs the key 'text', got answer"),
        ({"text": [""]}, "an answer is the empty text"),
        (" ", "the answer ' ' holds no token of the context"),
        (3, "must be a text or a table of texts, got a int"),
    ],
)
def test_a_target_that_is_no_answer_names_what_is_wrong_and_its_row(bad: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build().encode_pointed(["Ada", bad], [ROW, ROW], PROCESSORS)
    assert caught.value.row == 1


def test_a_question_without_a_context_is_refused() -> None:
    for raw in ({"question": "Who?"}, "Who?", None):
        with pytest.raises(InputError, match="a question needs a context"):
            build().encode_pointed(["Ada"], [{"text": raw}], PROCESSORS)
        with pytest.raises(InputError, match="a question needs a context") as caught:
            build().locate(
                [{"tokens": [], "score": 0.0}, {"tokens": [1, 1], "score": 0.5}], [{}, {"text": raw}], PROCESSORS
            )
        assert caught.value.row == 1


def test_the_references_are_all_right_answers() -> None:
    found = build().references(["Ada", {"text": ["Ada", "she"], "answer_start": [7, 0]}, []])
    assert found == [["Ada"], ["Ada", "she"], []]


def test_it_learns_the_spans_and_only_marked_tokens_are_ever_chosen() -> None:
    torch.manual_seed(0)
    marks = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    features = {"text": Features(torch.randn(2, 6, D), mask, marks=marks)}
    decoder = build(dropout=0.0)
    answers = decoder.predict(decoder(features))
    assert all(marks[row, place] and mask[row, place] for row in (0, 1) for place in answers[row]["tokens"])
    targets = decoder.encode_targets([[3, 4], [1, 4]])
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = decoder(features, targets).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    answers = decoder.predict(decoder(features))
    assert [answer["tokens"] for answer in answers] == [[3, 4], [1, 4]]
    assert all(0.9 < answer["score"] <= 1 for answer in answers)


def test_the_best_span_is_the_one_that_trying_all_of_them_finds() -> None:
    torch.manual_seed(0)
    logits, allowed, longest = torch.randn(8, 9, 2), torch.rand(8, 9) < 0.7, 3
    first, last, best = best_spans(logits, allowed, longest)
    for row in range(8):
        spans = [
            (float(logits[row, a, 0] + logits[row, b, 1]), a, b)
            for a, b in product(range(9), repeat=2)
            if a <= b < a + longest and allowed[row, a] and allowed[row, b]
        ]
        score, a, b = max(spans)
        assert (int(first[row]), int(last[row])) == (a, b)
        assert float(best[row]) == pytest.approx(score)


def test_no_answer_is_given_where_it_scores_above_the_best_span_by_more_than_the_threshold() -> None:
    output = output_of([2, 0, 1, 0], [2, 0, 1.5, 0], [1, 0, 1, 1])
    assert build(unanswerable=True).predict(output)[0]["tokens"] == []
    assert build(unanswerable=True, threshold=1.6).predict(output)[0]["tokens"] == [2, 2]
    assert build().predict(output)[0]["tokens"] == [0, 0]  # without such questions the first token is like any other


def test_scores_are_the_probability_of_start_and_end() -> None:
    output = output_of([9, 1.0, 2.0], [9, 0.5, 0.0], [0, 1, 1])
    start, end = torch.tensor([1.0, 2.0]).softmax(0), torch.tensor([0.5, 0.0]).softmax(0)
    (answer,) = build(max_answer_tokens=1).predict(output)
    assert answer == {"tokens": [2, 2], "score": pytest.approx(float(start[1] * end[1]))}


def test_an_answer_is_located_in_the_characters_of_the_context() -> None:
    decoder = build()
    answers = [{"tokens": [CONTEXT + 2, CONTEXT + 4], "score": 0.5}, {"tokens": [], "score": 0.25}]
    assert decoder.locate(answers, [ROW, ROW], PROCESSORS) == [
        {"text": "Ada Lovelace", "start": 7, "end": 19, "score": 0.5},
        {"text": "", "start": None, "end": None, "score": 0.25},
    ]


def test_a_row_without_text_has_no_answer() -> None:
    for decoder in (build(), build(unanswerable=True)):
        empty = Features(torch.zeros(1, 2, D), torch.zeros(1, 2).bool(), marks=torch.zeros(1, 2).bool())
        output = decoder({"text": empty})
        assert decoder.predict(output) == [{"tokens": [], "score": 0.0}]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_answer_tokens must be at least 1, got 0"):
        Span.Config(max_answer_tokens=0)
    with pytest.raises(UsageError, match=r'these streams arrive: fused; .* fusion "streams"'):
        Span(Span.Config(), {"fused": Stream(D)})
