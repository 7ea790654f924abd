"""Toy targets of the tasks: what to learn, what must be refused, and what an answer looks like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmhub.testing.contract import expect

RULE = "what predict answers"


@dataclass(frozen=True)
class Toy:
    """Targets of two kinds, given the decoder's labels if its configuration has them, and their opposite.

    Attributes:
        targets: labels -> two targets. refused: targets that `encode_targets` must not take. key: what an answer calls
        the thing that was asked. check: raises ContractError for a malformed answer.
    """

    targets: Callable[[Sequence[str]], Sequence[Any]]
    refused: Sequence[Any]
    key: str
    check: Callable[[Mapping[str, Any]], None]


def _labels(known: Sequence[str]) -> Sequence[Any]:
    return [known[0], known[1]] if len(known) > 1 else ["no", "yes"]


def _label_lists(known: Sequence[str]) -> Sequence[Any]:
    first, second = _labels(known)
    return [[first], [first, second]]


def _check_label(answer: Mapping[str, Any]) -> None:
    _check_keys(answer, {"label": str, "score": float}, {"scores": dict})
    if "scores" in answer:
        scores = answer["scores"]
        total = math.fsum(scores.values())
        expect(abs(total - 1) < 1e-3, f"the scores sum to {total:.4g}", "probabilities that sum to 1", RULE)
        best = max(scores, key=scores.__getitem__)
        expect(
            scores.get(answer["label"]) == scores[best],
            f"the label is {answer['label']!r}",
            f"the best, {best!r}",
            RULE,
        )
    expect(0 <= answer["score"] <= 1, f"score is {answer['score']}", "a probability", RULE)


def _check_labels(answer: Mapping[str, Any]) -> None:
    _check_keys(answer, {"labels": list}, {"scores": dict})
    for name, score in answer.get("scores", {}).items():
        expect(0 <= score <= 1, f"the score of {name!r} is {score}", "a probability", RULE)


def _tags(known: Sequence[str]) -> Sequence[Any]:
    first, second = _labels(known)
    return [[first, first], [second, second]]  # of two words, as many as the rows of the kit have


def _tokens(known: Sequence[str]) -> Sequence[Any]:
    return [[0, 0], [1, 1]]  # the first and last token of an answer


def _check_tags(answer: Mapping[str, Any]) -> None:
    _check_keys(answer, {"tags": list}, {"scores": list, "entities": list})
    expect(len(answer["tags"]) == 2, f"2 words have {len(answer['tags'])} tags", "one tag a word", RULE)
    for score in answer.get("scores", ()):
        expect(0 <= score <= 1, f"a score is {score}", "a probability", RULE)


def _check_span(answer: Mapping[str, Any]) -> None:
    _check_keys(answer, {"tokens": list, "score": float}, {})
    expect(0 <= answer["score"] <= 1, f"score is {answer['score']}", "a probability", RULE)
    good = not answer["tokens"] or (len(answer["tokens"]) == 2 and 0 <= answer["tokens"][0] <= answer["tokens"][1] < 2)
    expect(good, f"the tokens are {answer['tokens']}", "the first and last of the 2 marked ones, or none", RULE)


def _check_text(answer: Mapping[str, Any]) -> None:
    _check_keys(answer, {"text": str}, {})


def _check_speech(answer: Mapping[str, Any]) -> None:
    _check_keys(answer, {"text": str}, {"words": list, "score": float})
    expect(0 <= answer.get("score", 0) <= 1, f"score is {answer.get('score')}", "a probability", RULE)
    for word in answer.get("words", ()):
        _check_keys(word, {"word": str, "start": float, "end": float}, {})


def _check_value(answer: Mapping[str, Any]) -> None:
    _check_keys(answer, {"value": float}, {})


def _check_vectors(answer: Mapping[str, Any]) -> None:
    _check_keys(answer, {"embeddings": dict}, {})
    expect(len(answer["embeddings"]) == 2, f"there are vectors of {sorted(answer['embeddings'])}", "two sides", RULE)
    for side, vector in answer["embeddings"].items():
        length = math.sqrt(math.fsum(number * number for number in vector))
        expect(abs(length - 1) < 1e-3, f"the vector of {side} is {length:.4g} long", "a length of 1", RULE)


def _check_keys(answer: Mapping[str, Any], needed: Mapping[str, type], optional: Mapping[str, type]) -> None:
    for key, kind in needed.items():
        expect(key in answer, f"an answer has the keys {sorted(answer)}", f"the key {key!r}", RULE)
        found = type(answer[key]).__name__
        expect(isinstance(answer[key], kind), f"{key!r} is a {found}", f"a {kind.__name__}", RULE)
    for key, kind in optional.items():
        found = type(answer.get(key)).__name__
        expect(isinstance(answer.get(key, kind()), kind), f"{key!r} is a {found}", f"a {kind.__name__}", RULE)


TOYS = {
    "classification": Toy(_labels, (None, "never seen before"), "label", _check_label),
    "multilabel": Toy(_label_lists, (None, ["never seen before"]), "labels", _check_labels),
    "tagging": Toy(_tags, (None, ["never seen before"] * 2), "tags", _check_tags),
    "question-answering": Toy(_tokens, (None, 0.5), "tokens", _check_span),
    "translation": Toy(lambda known: ["a short text", "one two three four five"], (None, 0.5), "text", _check_text),
    "captioning": Toy(
        lambda known: ["a red square", ["a blue circle", "a circle"]], (None, 0.5, [], ["a", 0.5]), "text", _check_text
    ),
    "visual-question-answering": Toy(
        lambda known: ["red", ["two", "2", "two"]], (None, 0.5, [], ["two", 0.5]), "text", _check_text
    ),
    "speech-recognition": Toy(lambda known: ["a", "b"], (None, 0.5), "text", _check_speech),
    "retrieval": Toy(lambda known: ["a thing", "another"], ({"no": "name"},), "embeddings", _check_vectors),
    "regression": Toy(lambda known: [-1.0, 1.0], (None, "no number"), "value", _check_value),
}
