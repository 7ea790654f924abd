"""Word and character error rates of transcripts."""

from __future__ import annotations

import random
import sys

import pytest

from mmhub.errors import PluginError
from mmhub.metrics.speech import NORMALISER, normalised, speech

pytest.importorskip("jiwer")


def edits(first: list[str], second: list[str]) -> int:
    """The Levenshtein distance, by its definition."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]


def test_rates_are_edits_over_the_length_of_the_whole_corpus() -> None:
    draw = random.Random(0)
    words = ["one", "two", "three", "four", "five"]
    references = [" ".join(draw.choices(words, k=draw.randint(1, 7))) for _ in range(40)]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 7))) for _ in range(40)]
    found = speech([{"text": text} for text in texts], references)
    pairs = list(zip(references, texts, strict=True))
    assert found["wer"] == pytest.approx(
        sum(edits(a.split(), b.split()) for a, b in pairs) / sum(len(a.split()) for a, _ in pairs)
    )
    assert found["cer"] == pytest.approx(sum(edits(list(a), list(b)) for a, b in pairs) / sum(len(a) for a, _ in pairs))
    counted = found["substitutions"] + found["insertions"] + found["deletions"]
    assert counted / found["words"] == pytest.approx(found["wer"])
    assert found["normaliser"] == NORMALISER


def test_what_is_no_matter_of_hearing_does_not_count() -> None:
    found = speech([{"text": " Don\u2019t  stop, \u201cplease\u201d!"}], ["don't stop please"])
    assert (found["wer"], found["cer"], found["words"]) == (0, 0, 3)
    assert normalised("\uff21\u0301 'tis well-known") == "\u00e1 tis well known"
    assert speech([{"text": "dont"}], ["don't"])["wer"] == 1
    assert normalised("co\u00adop \u0645\u06cc\u200c\u062e") == "coop \u0645\u06cc\u062e"  # soft hyphen, ZWNJ
    assert normalised("$5 + 3%") == "5 3" and "symbols" in NORMALISER


def test_a_reference_without_words_counts_what_was_heard_there() -> None:
    found = speech([{"text": "uh oh"}, {"text": "a b"}, {"text": ""}], ["...", "a b", None])
    assert (found["wer"], found["insertions"], found["words"]) == (1.0, 2, 2)
    assert found["cer"] == pytest.approx(5 / 3)
    silent = speech([{"text": ""}], [""])
    assert (silent["wer"], silent["cer"], silent["words"]) == (None, None, 0)


def test_without_jiwer_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(PluginError, match="measured by jiwer, which is not installed") as caught:
        speech([{"text": "a"}], ["a"])
    assert "pip install 'mmhub[speech]'" in (caught.value.hint or "")
