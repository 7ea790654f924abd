"""From what a CTC head heard to labels: the most probable path, or the most probable text among several.

The search over prefixes is that of Graves 2012 ("Supervised sequence labelling", 7.5) and Hannun et al. 2014
(arXiv:1408.2873): all paths that write one text count for it together, and a language model has a say in each word.
"""

from __future__ import annotations

import gzip
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from mmhub.errors import InputError, NotFoundError
from mmhub.interfaces import ComponentConfig, Width
from mmhub_heads.ctc_units import Units

_LEAST = -14.0  # nats: labels that are less probable in a token are not tried
_NEVER = -math.inf
_UNKNOWN = -100.0  # log10 of a word's probability in a model without <unk>, as KenLM has it
Prefix = tuple[int, ...]


class Search(ComponentConfig, frozen=True):
    """How labels are looked for: 1 beam without a language model is the most probable path.

    `language_model` is an n-gram model of words, an ARPA file or one in .gz. A text's score is its log-probability,
    `lm_weight` times that by the language model, and `word_bonus` (nats) for each word.
    """

    beams: Width = 1
    language_model: str = ""
    lm_weight: float = 0.5
    word_bonus: float = 0.0


def find_labels(log_probs: Tensor, units: Units, search: Search) -> list[int]:
    """Return the labels that were said, given log-probabilities (T, V).

    Raises:
        NotFoundError, InputError: there is no such language model, or it is none.
    """
    if search.beams == 1 and not search.language_model:
        return best_path(log_probs)
    return list(best_texts(log_probs, units, search)[0][0])


def best_path(log_probs: Tensor) -> list[int]:
    """Return the labels of the most probable path through (T, V): repeats are one label, and blanks (0) none.

    >>> import torch
    >>> best_path(torch.eye(3)[[1, 1, 0, 1, 2, 0]].log())
    [1, 1, 2]
    """
    path = log_probs.argmax(-1).unique_consecutive().tolist() if len(log_probs) else []
    return [label for label in path if label]


def best_texts(log_probs: Tensor, units: Units, search: Search) -> list[tuple[Prefix, float]]:
    """Return the labels of at most `beams` texts with their scores, the best first."""
    texts = _Texts(units, search)
    beam: dict[Prefix, tuple[float, float]] = {(): (0.0, _NEVER)}  # by whether a blank or the last label was heard
    for frame in log_probs.tolist():
        heard = [(label, value) for label, value in enumerate(frame) if value > _LEAST]
        grown = _grow(beam, heard)
        beam = dict(heapq.nlargest(search.beams, grown.items(), lambda item: _add(*item[1]) + texts.bonus(item[0])))
    scored = [(prefix, _add(*parts) + texts.final_bonus(prefix)) for prefix, parts in beam.items()]
    return sorted(scored, key=lambda item: -item[1])


def _grow(
    beam: dict[Prefix, tuple[float, float]], heard: Sequence[tuple[int, float]]
) -> dict[Prefix, tuple[float, float]]:
    """Every prefix after one more token."""
    grown: dict[Prefix, tuple[float, float]] = defaultdict(lambda: (_NEVER, _NEVER))

    def count(prefix: Prefix, blank: float, label: float) -> None:
        if max(blank, label) > _NEVER:
            known = grown[prefix]
            grown[prefix] = _add(known[0], blank), _add(known[1], label)

    for prefix, (blank, same) in beam.items():
        total = _add(blank, same)
        for label, value in heard:
            if not label:
                count(prefix, total + value, _NEVER)
            elif prefix and label == prefix[-1]:
                count(prefix, _NEVER, same + value)
                count((*prefix, label), _NEVER, blank + value)
            else:
                count((*prefix, label), _NEVER, total + value)
    return grown


class _Texts:
    """What the language model and the word bonus add to prefixes; a word counts once the next one begins."""

    def __init__(self, units: Units, search: Search) -> None:
        self.units, self.search = units, search
        self.model = load_ngrams(search.language_model) if search.language_model else None
        begin = ("<s>",) if self.model else ()
        self._known: dict[Prefix, tuple[tuple[str, ...], str, float]] = {(): (begin, "", 0.0)}

    def bonus(self, prefix: Prefix) -> float:
        return self._state(prefix)[2]

    def final_bonus(self, prefix: Prefix) -> float:
        """The bonus of a whole text, with its last word and its end."""
        history, word, bonus = self._state(prefix)
        history, bonus = self._with_word(history, word, bonus)
        return bonus + (self.search.lm_weight * self.model(history, "</s>") if self.model else 0.0)

    def _state(self, prefix: Prefix) -> tuple[tuple[str, ...], str, float]:
        """The words before, the word that is being written, and the bonus so far."""
        if prefix not in self._known:
            history, word, bonus = self._state(prefix[:-1])
            piece = self.units.pieces[prefix[-1]]
            if piece.startswith(" "):
                history, bonus = self._with_word(history, word, bonus)
                word = ""
            self._known[prefix] = history, word + piece.strip(" "), bonus
        return self._known[prefix]

    def _with_word(self, history: tuple[str, ...], word: str, bonus: float) -> tuple[tuple[str, ...], float]:
        if not word:
            return history, bonus
        bonus += self.search.word_bonus
        if self.model is None:
            return history, bonus
        bonus += self.search.lm_weight * self.model(history, word)
        return (*history, word)[-max(self.model.order - 1, 1) :], bonus


class Ngrams:
    """An n-gram model: log-probabilities of words after others, by backing off (Katz 1987)."""

    def __init__(self, table: dict[tuple[str, ...], tuple[float, float]]) -> None:
        self.table, self.order = table, max(map(len, table))

    def __call__(self, history: Sequence[str], word: str) -> float:
        """Return log P(word | history), in nats."""
        known = word if (word,) in self.table else "<unk>"
        words = (*history[max(len(history) - self.order + 1, 0) :], known)
        backoff = 0.0
        while words not in self.table:
            if len(words) == 1:
                return (backoff + _UNKNOWN) * math.log(10)
            backoff += self.table.get(words[:-1], (0.0, 0.0))[1]
            words = words[1:]
        return (backoff + self.table[words][0]) * math.log(10)


@lru_cache(maxsize=2)
def load_ngrams(path: str) -> Ngrams:
    """Read an ARPA file, or one in .gz.

    Raises:
        NotFoundError: there is no such file. InputError: it is no ARPA file.
    """
    file = Path(path)
    if not file.is_file():
        hint = 'name an ARPA file (.arpa, .arpa.gz) in search.language_model, or "" for none'
        raise NotFoundError(f"there is no language model '{path}'", hint)
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            table = _read_arpa(lines)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"'{path}' is no ARPA file: {error}", "write one with KenLM's lmplz or SRILM") from None
    return Ngrams(table)


def _read_arpa(lines: Iterable[str]) -> dict[tuple[str, ...], tuple[float, float]]:
    """N-gram to its probability and backoff, both log10."""
    table: dict[tuple[str, ...], tuple[float, float]] = {}
    counts: dict[int, int] = {}
    order, ended = 0, False
    for line in map(str.strip, lines):
        if line.startswith("ngram "):
            name, _, count = line.removeprefix("ngram ").partition("=")
            counts[int(name)] = int(count)
        elif line.startswith("\\") and line.endswith("-grams:"):
            order = int(line[1:-7])
        elif line == "\\end\\":
            ended = True
        elif line and order:
            parts = line.split()
            if not order + 1 <= len(parts) <= order + 2:
                raise ValueError(f"{line!r} is no {order}-gram")
            table[tuple(parts[1 : order + 1])] = float(parts[0]), float(parts[order + 1]) if parts[order + 1 :] else 0.0
    if not ended or len(table) != sum(counts.values()):
        raise ValueError(f"it has {len(table)} of {sum(counts.values())} n-grams, or no end")
    return table


def _add(one: float, other: float) -> float:
    """log(exp(one) + exp(other))."""
    if one < other:
        one, other = other, one
    return one if other == _NEVER else one + math.log1p(math.exp(other - one))
