"""The tagging head: which tokens stand for words, what it answers, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmhub.batch import Features, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Stream
from mmhub_heads.tagging import Tagging

D = 6
TAGS = [["O", "B-PER", "I-PER"], ["O"], ["B-LOC", "O"]]
STARTS = [[0, 1, 0, 1, 1, 0], [1, 0, 0], [1, 1]]  # where the words begin among the tokens of each row


def bundle(starts: list[list[int]], dim: int = D) -> dict[str, Features]:
    torch.manual_seed(0)
    lengths = torch.tensor([len(row) for row in starts])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    marks = torch.zeros_like(mask)
    for row, values in enumerate(starts):
        marks[row, : len(values)] = torch.tensor(values, dtype=torch.bool)
    return {"text": Features(torch.randn(*mask.shape, dim) * mask[..., None], mask, marks=marks)}


def build(targets: list[Any] = TAGS, **config: Any) -> Tagging:
    return Tagging(Tagging.fit(Tagging.Config(**config), targets), {"text": Stream(D)}).eval()


def test_it_learns_the_tag_of_each_word_and_ignores_all_other_tokens() -> None:
    decoder = build(dropout=0.0)
    features, encoded = bundle(STARTS), decoder.encode_targets(TAGS)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        decoder(features, encoded).loss.backward()
        optimizer.step()
    assert [answer["tags"] for answer in decoder.predict(decoder(features))] == TAGS
    before = decoder(features, encoded).loss
    features["text"].tokens[~features["text"].marks] = 99.0
    torch.testing.assert_close(decoder(features, encoded).loss, before)


def test_the_loss_is_the_mean_over_words_and_a_row_weighs_as_many_as_it_has() -> None:
    decoder = build()
    features, encoded = bundle(STARTS), decoder.encode_targets(TAGS)
    whole = decoder(features, encoded)
    weights = decoder.weigh(encoded)
    assert weights.tolist() == [3, 1, 2]
    alone = torch.stack([decoder(bundle_row(features, row), encoded[row : row + 1]).loss for row in range(3)])
    torch.testing.assert_close(whole.loss, (alone * weights).sum() / weights.sum())
    logits, numbers = decoder.scored(whole, encoded)
    torch.testing.assert_close(whole.loss, torch.nn.functional.cross_entropy(logits, numbers))


def bundle_row(features: dict[str, Features], row: int) -> dict[str, Features]:
    text = features["text"]
    return {
        "text": Features(*(part[row : row + 1] for part in (text.tokens, text.mask)), marks=text.marks[row : row + 1])
    }


def test_labels_come_as_lists_arrays_or_separated_text() -> None:
    decoder = build()
    raws = ["B-PER O", ["B-PER", "O"], ("B-PER", "O"), np.array(["B-PER", "O"], dtype=object)]
    assert decoder.references(raws) == [["B-PER", "O"]] * 4
    numbers = [decoder.labels.number(label) for label in ("B-PER", "O")]
    assert decoder.encode_targets(raws).tolist() == [numbers] * 4
    assert decoder.encode_targets([[]]).tolist() == [[-100]]
    assert Tagging.fit(Tagging.Config(), [[10, 9], np.array([2])]).labels == ("2", "9", "10")


def output_of(decoder: Tagging, tags: list[str], sure: float = 5.0) -> Output:
    logits = torch.zeros(1, len(tags), len(decoder.labels.names))
    for place, tag in enumerate(tags):
        logits[0, place, decoder.labels.number(tag)] = sure
    return Output(logits=logits, mask=torch.ones(1, len(tags), dtype=torch.bool))


def test_spans_are_answered_with_their_words() -> None:
    decoder = build()
    output = output_of(decoder, ["O", "B-PER", "I-PER", "B-LOC"])
    (answer,) = decoder.locate(decoder.predict(output), [{"text": "with  Ada Lovelace in"}], {})
    assert answer["words"] == ["with", "Ada", "Lovelace", "in"]
    score = pytest.approx(answer["scores"][0])
    assert answer["entities"] == [
        {"label": "PER", "start": 1, "end": 3, "score": score, "text": "Ada Lovelace"},
        {"label": "LOC", "start": 3, "end": 4, "score": score, "text": "in"},
    ]
    (brief,) = decoder.predict(output, details=False)
    assert brief == {"tags": answer["tags"], "entities": [
        {"label": "PER", "start": 1, "end": 3}, {"label": "LOC", "start": 3, "end": 4},
    ]}  # fmt: skip


def test_tags_that_are_no_spans_make_none() -> None:
    decoder = build([["NOUN", "VERB"]])
    (answer,) = decoder.locate(decoder.predict(output_of(decoder, ["NOUN"])), [{"text": ["tree"]}], {})
    assert set(answer) == {"tags", "scores", "words"}


def test_a_row_without_text_has_no_words() -> None:
    decoder = build()
    features = bundle([[1], []])
    assert decoder.predict(decoder(features), details=False)[1] == {"tags": [], "entities": []}
    assert decoder(features, decoder.encode_targets([["O"], []])).loss.isfinite()
    located = decoder.locate(decoder.predict(decoder(features)), [{"text": ["a"]}, {}], {})
    assert located[1]["words"] == []


@pytest.mark.parametrize("sample", ["one two", ["one", "two"], None])
def test_another_number_of_labels_than_words_is_refused_with_both_numbers(sample: Any) -> None:
    words = len(sample.split()) if isinstance(sample, str) else len(sample or [])
    with pytest.raises(InputError, match=rf"the text has {words} word\(s\) and 3 label\(s\)") as caught:
        build().encode_pointed([["O"], ["O", "O", "B-PER"]], [{"text": "one"}, {"text": sample}], {})
    assert caught.value.row == 1


def test_labels_that_fit_are_encoded_beside_their_words() -> None:
    decoder = build()
    encoded = decoder.encode_pointed(TAGS, [{"text": "a b c"}, {"text": ["a b"]}, {"text": "a b"}], {})
    assert torch.equal(encoded, decoder.encode_targets(TAGS))


def test_labels_are_never_moved_to_other_words() -> None:
    decoder = build()
    with pytest.raises(InputError, match=r"has 2 word\(s\) and 1 label\(s\)") as caught:
        decoder(bundle([[1], [1, 1]]), decoder.encode_targets([["O"], ["O"]]))
    assert caught.value.row == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "the target is missing"),
        ("", "the target is missing"),
        (3, "must be a list, got a int"),
        (["O", None], "the target is missing"),
        (["O", "B-ORG"], "label 'B-ORG' was not seen in training; known labels: B-LOC, B-PER, I-PER, O"),
    ],
)
def test_a_bad_target_is_an_input_error_that_knows_its_row(bad: Any, message: str) -> None:
    for call in (build().encode_targets, build().references):
        with pytest.raises(InputError, match=message) as caught:
            call([["O"], bad])
        assert caught.value.row == 1


def test_one_label_or_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match=r"1 distinct label\(s\): 'O'"):
        Tagging.fit(Tagging.Config(), [["O", "O"], []])
    with pytest.raises(UsageError, match="at least 2 labels"):
        Tagging(Tagging.Config(), {"text": Stream(D)})
    with pytest.raises(UsageError, match=r'these streams arrive: fused; .* fusion "streams"'):
        Tagging(Tagging.Config(labels=("a", "b")), {"fused": Stream(D)})
