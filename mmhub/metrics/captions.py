"""Metrics of captions and of answers to questions about pictures; a row may have one reference or several."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmhub.metrics.translation import several, translation

_ORDERS = (1, 2, 3, 4)  # words in an n-gram
_SIGMA = 6.0  # words, of the penalty for another length
_Counts = Counter[tuple[str, ...]]
_Vectors = list[dict[tuple[str, ...], float]]  # weights of n-grams, for each of `_ORDERS`


def captions(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    """Corpus BLEU and chrF against all references of a row, 0 to 100, with sacrebleu's signatures, and CIDEr-D.

    See `cider` for the last. References are texts, or lists of texts.

    Raises:
        PluginError: sacrebleu is not installed.
    """
    rows = [several(one) for one in references]
    return translation(predictions, rows) | {"cider": cider([str(p["text"]) for p in predictions], rows)}


def exact_match(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    """Share of texts that equal their reference, or one of several, but for blanks around them and in a row."""
    hits = [is_exact(one["text"], truth) for one, truth in zip(predictions, references, strict=True)]
    return {"exact_match": sum(hits) / len(hits)}


def is_exact(text: Any, truth: Any) -> bool:
    """Whether a text equals its reference, or one of several, but for blanks around it and in a row.

    >>> is_exact(" two  cats", ["a cat", "two cats"]), is_exact("Two cats", "two cats")
    (True, False)
    """
    return " ".join(str(text).split()) in {" ".join(one.split()) for one in several(truth)}


def cider(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726), 0 to 10: how much texts say of what their references do.

    N-grams of 1 to 4 words are counted, each weighted by the log of the number of rows over that of rows whose
    references have it, so that what is said everywhere weighs nothing. Of each reference the cosine is taken, with the
    text's weights clipped to the reference's and a Gaussian penalty (sigma 6) on the difference in words; the mean over
    references and the four lengths is multiplied by 10. A text of fewer than 4 words has no 4-grams, and cannot reach
    10; the only row of a data set has no rare words, and gets 0.

    Words are lower-cased, cut at blanks, and lose the punctuation at either end.
    """
    cooked = [[_counts(text) for text in row] for row in references]
    seen = Counter(gram for row in cooked for gram in set().union(*row))
    everything = math.log(len(cooked))

    def weighted(counts: _Counts) -> _Vectors:
        vectors: _Vectors = [{} for _ in _ORDERS]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (everything - math.log(max(1, seen[gram])))
        return vectors

    scores = []
    for text, row in zip(texts, cooked, strict=True):
        counts = _counts(text)
        own, length = weighted(counts), _length(counts)
        scores += [math.fsum(_alike(own, weighted(r), length - _length(r)) for r in row) / len(row)]
    return 10 * math.fsum(scores) / len(scores)


def _alike(own: _Vectors, wanted: _Vectors, difference: int) -> float:
    """How alike a text and a reference are, 0 to 1, that differ by so many words."""
    cosines = []
    for mine, theirs in zip(own, wanted, strict=True):
        norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
        common = math.fsum(min(mine[gram], theirs[gram]) * theirs[gram] for gram in mine.keys() & theirs.keys())
        cosines.append(common / norms if norms else 0.0)
    return math.exp(-(difference**2) / (2 * _SIGMA**2)) * math.fsum(cosines) / len(cosines)


def _counts(text: str) -> _Counts:
    words = _words(text)
    return Counter(tuple(words[i : i + n]) for n in _ORDERS for i in range(len(words) - n + 1))


def _length(counts: _Counts) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 1)


def _words(text: str) -> list[str]:
    marks = "".join({char for char in text if unicodedata.category(char).startswith("P")})
    return [word for part in text.lower().split() if (word := part.strip(marks))]


def visual_answers(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float]:
    """VQA accuracy (Antol et al. 2015, arXiv:1505.00468), and how often the answer is the most frequent one, 0 to 1.

    An answer that at least 3 people gave is right: the accuracy is min(people / 3, 1), averaged over all ways to leave
    one of them out. Of fewer than 4 answers, all that are left have to agree; a single one is to be met exactly.
    Answers are compared without case, articles, punctuation and apostrophes, and with numbers up to ten as digits.
    """
    pairs = [
        (normal_answer(p["text"]), [normal_answer(one) for one in several(r)])
        for p, r in zip(predictions, references, strict=True)
    ]
    exact = sum(answer == Counter(given).most_common(1)[0][0] for answer, given in pairs)
    accuracy = math.fsum(_agreement(answer, given) for answer, given in pairs)
    return {"vqa_accuracy": accuracy / len(pairs), "exact_match": exact / len(pairs)}


def normal_answer(text: Any) -> str:
    """Return an answer as answers are compared.

    >>> [normal_answer(text) for text in ("The Red.", "two", "1,000.5", "T-shirt", "don't")]
    ['red', '2', '1000.5', 't shirt', 'dont']
    """
    plain = re.sub(r"(?<=\d),(?=\d)|['\u2019]", "", str(text).lower())
    plain = re.sub(r"(?<!\d)\.|\.(?!\d)", "", plain)
    words = "".join(" " if _is_mark(char) else char for char in plain).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _agreement(answer: str, given: Sequence[str]) -> float:
    """The accuracy of an answer against those that people gave, averaged over leaving one out."""
    if len(given) == 1:
        return float(answer == given[0])
    matches, enough = given.count(answer), min(3, len(given) - 1)
    each = (min((matches - (one == answer)) / enough, 1.0) for one in given)
    return math.fsum(each) / len(given)


def _is_mark(char: str) -> bool:
    return char != "." and unicodedata.category(char).startswith("P")  # full stops are gone but for those in numbers


_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
