"""Finding texts: the search over prefixes, and language models in ARPA files."""

from __future__ import annotations

import gzip
import math
from collections import defaultdict
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmhub.errors import InputError, NotFoundError
from mmhub.interfaces import Stream
from mmhub_heads.ctc import Ctc
from mmhub_heads.ctc_search import Search, best_path, best_texts, find_labels, load_ngrams
from mmhub_heads.ctc_units import Units

ARPA = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.0\t<s>\t-0.5
-0.7\t</s>
-0.6\ta\t-0.3
-0.9\tb\t-0.2
-2.0\t<unk>

\\2-grams:
-0.2\t<s> b
-0.1\tb a
-0.4\ta </s>

\\end\\
"""


def all_texts(log_probs: Tensor) -> dict[tuple[int, ...], float]:
    """The log-probability of every text, by walking all paths."""
    totals: dict[tuple[int, ...], float] = defaultdict(float)
    for path in product(range(log_probs.shape[1]), repeat=len(log_probs)):
        labels = [label for place, label in enumerate(path) if label and (not place or label != path[place - 1])]
        totals[tuple(labels)] += math.exp(sum(float(log_probs[t, label]) for t, label in enumerate(path)))
    return {labels: math.log(total) for labels, total in totals.items()}


def random_emissions(steps: int, labels: int, seed: int) -> Tensor:
    return (2 * torch.randn(steps, labels, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


@pytest.fixture
def arpa(tmp_path: Path) -> str:
    (tmp_path / "lm.arpa").write_text(ARPA)
    return str(tmp_path / "lm.arpa")


@pytest.mark.parametrize("seed", range(4))
def test_with_enough_beams_the_search_finds_what_walking_all_paths_finds(seed: int) -> None:
    log_probs, units = random_emissions(5, 3, seed), Units("word", ["a", "b"])
    wanted = sorted(all_texts(log_probs).items(), key=lambda item: -item[1])
    found = best_texts(log_probs, units, Search(beams=200))
    assert [labels for labels, _ in found] == [labels for labels, _ in wanted]
    for (_, one), (_, other) in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    for beams in (1, 2, 3):
        labels, score = best_texts(log_probs, units, Search(beams=beams))[0]
        assert score <= dict(wanted)[labels] + 1e-6, "with few beams some of a text's paths are lost, none is gained"


def test_many_paths_of_one_text_win_against_the_best_single_path() -> None:
    log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()  # nothing 0.36, "a" 0.64 in three ways
    units = Units("word", ["a"])
    assert best_path(log_probs) == []
    assert find_labels(log_probs, units, Search()) == []
    assert find_labels(log_probs, units, Search(beams=2)) == [1]


def test_a_language_model_scores_by_backing_off_as_computed_by_hand(arpa: str) -> None:
    model = load_ngrams(arpa)
    ten = math.log(10)
    assert model.order == 2
    assert model(("<s>",), "b") == pytest.approx(-0.2 * ten)
    assert model(("<s>",), "a") == pytest.approx((-0.5 - 0.6) * ten)
    assert model(("a", "b"), "a") == pytest.approx(-0.1 * ten), "only the last word is looked at"
    assert model(("a",), "never seen") == pytest.approx((-0.3 - 2.0) * ten)


def test_a_language_model_and_a_word_bonus_change_the_result_by_what_they_say(arpa: str) -> None:
    log_probs = torch.tensor([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.1, 0.6, 0.3]]).log()
    units = Units("word", ["a", "b"])
    plain = dict(best_texts(log_probs, units, Search(beams=99)))
    scored = dict(best_texts(log_probs, units, Search(beams=99, language_model=arpa, lm_weight=2.0, word_bonus=0.7)))
    ten = math.log(10)
    assert scored[2, 1] == pytest.approx(plain[2, 1] + 2 * (-0.2 - 0.1 - 0.4) * ten + 1.4)
    assert scored[1, 1] == pytest.approx(plain[1, 1] + 2 * (-1.1 - 0.9 - 0.4) * ten + 1.4)
    assert find_labels(log_probs, units, Search(beams=99)) == [1, 1]
    assert find_labels(log_probs, units, Search(beams=99, language_model=arpa, lm_weight=2.0)) == [2, 1]


def test_words_of_characters_are_scored_like_words(arpa: str) -> None:
    log_probs = random_emissions(6, 4, 5)
    units = Units("character", [" ", "a", "b"])
    plain = dict(best_texts(log_probs, units, Search(beams=5000)))
    scored = dict(best_texts(log_probs, units, Search(beams=5000, language_model=arpa, lm_weight=1.0)))
    text = (3, 1, 2)  # "b a"
    assert scored[text] == pytest.approx(plain[text] + (-0.2 - 0.1 - 0.4) * math.log(10), abs=1e-3)


def test_the_search_of_the_configuration_can_be_changed_when_predicting(arpa: str) -> None:
    decoder = Ctc(Ctc.Config(units="word", vocabulary=("a", "b")), {"audio": Stream(4, seconds=0.1)})
    log_probs = torch.tensor([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.1, 0.6, 0.3]]).log()
    assert decoder.answer(log_probs)["text"] == "a a"
    found = decoder.answer(log_probs, search={"beams": 9, "language_model": arpa, "lm_weight": 2.0})
    assert found["text"] == "b a"
    assert [word["word"] for word in found["words"]] == ["b", "a"]


def test_an_arpa_file_may_be_compressed_and_a_bad_one_is_refused(tmp_path: Path, arpa: str) -> None:
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(ARPA.encode()))
    assert load_ngrams(str(tmp_path / "lm.arpa.gz")).table == load_ngrams(arpa).table
    with pytest.raises(NotFoundError, match="there is no language model"):
        load_ngrams(str(tmp_path / "none.arpa"))
    for name, content in {
        "cut": ARPA[:120],
        "text": "hello\n",
        "count": ARPA.replace("ngram 2=3", "ngram 2=4"),
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match="is no ARPA file"):
            load_ngrams(str(tmp_path / name))
