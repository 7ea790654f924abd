"""The rows a model is most wrong about, in the way of each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any

from mmhub.errors import PluginError
from mmhub.evaluation import Answered
from mmhub.metrics.captions import is_exact, normal_answer
from mmhub.metrics.speech import normalised
from mmhub.report.differences import Piece, differences
from mmhub.report.media import Shelf, Shown, shorten

MOST = 24  # rows that are shown
MAX_TAGS = 120  # words of a row whose tags are shown
MAX_LABELS, LABEL = 200, 80  # labels of a row that are compared on the page, and characters of each


@dataclass
class Example:
    """A row: `facts` for report.json, and for the page its inputs and how the answer differs from the truth."""

    facts: dict[str, Any]
    inputs: Sequence[Shown] = ()
    pieces: Sequence[Piece] = ()
    tags: Sequence[tuple[str, str, str]] = ()  # word, true tag, answered tag


@dataclass
class Section:
    """The worst rows, worst first, of the `wrong` ones there are."""

    title: str
    note: str
    wrong: int
    examples: Sequence[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Badness:
    """How bad one answer is, greater is worse, 0 for a right one; `facts` are what to say of it."""

    amount: float
    facts: Mapping[str, Any]


Judge = Callable[[Mapping[str, Any], Any], Badness]


def find_mistakes(task: str, answered: Answered, shelf: Shelf) -> Section | None:
    """Return the worst answers of a task, None for one whose answers are not compared here."""
    way = _judge_of(task)
    if way is None:
        return None
    judge, title, note = way
    found = [(row, p, truth, judge(p, truth)) for row, p, truth in answered.answers]
    wrong = [entry for entry in found if entry[3].amount > 0]
    worst = nlargest(MOST, wrong, key=lambda entry: (entry[3].amount, -entry[0]))
    examples = []
    for row, p, truth, badness in worst:
        facts = {"row": row, "where": shelf.where(row), **badness.facts}
        pieces, tags = _pieces(p, badness.facts), _tags(p, truth)
        examples.append(Example(facts, shelf.inputs_of(row), pieces, tags))
    return Section(title, note, len(wrong), examples)


def check_comparable(task: str) -> None:
    """Check that what compares the answers of a task is installed.

    Raises:
        PluginError: it is not.
    """
    if task == "speech-recognition":
        word_errors("", "")
    _judge_of(task)


def _judge_of(task: str) -> tuple[Judge, str, str] | None:
    if task == "regression":
        return _number, "Largest errors", "Rows with the greatest difference between answer and truth."
    if task == "multilabel":
        return _set, "Worst mistakes", "Wrong decisions the model was surest of; labels it missed are struck through."
    if task == "tagging":
        return _words, "Worst mistakes", "Rows with the most wrong tags; under each such word the answer and the truth."
    if task in ("classification", "zero-shot-classification"):
        return _label, "Worst mistakes", "Wrong answers the model was surest of."
    if task == "speech-recognition":
        note = "Rows with the highest word error rate, of the texts as they are compared"
        return _heard, "Worst transcripts", f"{note}. {_MARKS}"
    if task in ("visual-question-answering", "question-answering"):
        note = "Rows whose answer is none of the right ones, by chrF"
        return _reply(), "Worst answers", f"{note}. {_MARKS}"
    if task == "chat":
        note = "Conversations whose last answer is another than the right one, by chrF"
        return _said(), "Worst answers", f"{note}. {_MARKS}"
    if task in ("translation", "captioning"):
        return _written(), "Worst texts", f"Rows with the lowest sentence chrF, 0 to 100. {_MARKS}"
    return None


_MARKS = "What is missing from the answer is struck through, what it adds is underlined."


def _label(p: Mapping[str, Any], truth: Any) -> Badness:
    score = p.get("score")
    facts = {"truth": truth, "answer": p.get("label"), "score": score}
    known = {"top": p["top"]} if "top" in p else {}
    return Badness(0.0 if p.get("label") == truth else 1e-9 + (score or 0.0), facts | known)


def _set(p: Mapping[str, Any], truth: Any) -> Badness:
    right, given = set(truth), set(p["labels"])
    scores = p.get("scores", {})
    sure = {label: scores.get(label, 1.0) if label in given else 1 - scores.get(label, 0.0) for label in right ^ given}
    score = max(sure.values(), default=0.0)
    facts = {"truth": sorted(right), "answer": sorted(given), "score": score}
    return Badness(1e-9 + score if sure else 0.0, facts)


def _number(p: Mapping[str, Any], truth: Any) -> Badness:
    value, right = float(p["value"]), float(truth)
    error = value - right
    return Badness(abs(error) if math.isfinite(error) else math.inf, {"truth": right, "answer": value, "error": error})


def _words(p: Mapping[str, Any], truth: Any) -> Badness:
    wrong = sum(a != b for a, b in zip(p["tags"], truth, strict=True))
    return Badness(wrong, {"truth": list(truth), "answer": list(p["tags"]), "wrong": wrong})


def _heard(p: Mapping[str, Any], truth: Any) -> Badness:
    right, given = normalised(str(truth)), normalised(str(p.get("text") or ""))
    wer = word_errors(right, given)
    return Badness(wer, {"truth": right, "answer": given, "wer": wer})


def word_errors(reference: str, answer: str) -> float:
    """Return the word error rate of one text: wrong, missing and added words by the words of the reference.

    >>> word_errors("one two three", "one too three four"), word_errors("", "uh")
    (0.6666666666666666, 1.0)
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        hint = "pip install jiwer, which brings it"
        raise PluginError("transcripts are compared by rapidfuzz, which is not installed", hint) from None
    right, given = reference.split(), answer.split()
    return Levenshtein.distance(right, given) / max(1, len(right))


def _written() -> Judge:
    chrf = _chrf()

    def judge(p: Mapping[str, Any], truth: Any) -> Badness:
        references = _several(truth)
        scores = [chrf(str(p["text"]), one) for one in references]
        score = max(scores)
        return Badness(100 - score, {"truth": references[scores.index(score)], "answer": str(p["text"]), "chrf": score})

    return judge


def _reply() -> Judge:
    return _right_or(lambda text, truth: normal_answer(text) in {normal_answer(one) for one in _several(truth)})


def _said() -> Judge:
    return _right_or(is_exact)


def _right_or(is_right: Callable[[Any, Any], bool]) -> Judge:
    """The mistakes of `_written`, but of texts that are right."""
    written = _written()

    def judge(p: Mapping[str, Any], truth: Any) -> Badness:
        found = written(p, truth)
        return Badness(0.0 if is_right(p["text"], truth) else found.amount + 1, found.facts)

    return judge


def _chrf() -> Callable[[str, str], float]:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        hint = "pip install 'mmhub[text]', or pip install sacrebleu"
        raise PluginError("written texts are compared by sacrebleu, which is not installed", hint) from None
    metric = CHRF()
    return lambda answer, reference: float(metric.sentence_score(answer, [reference]).score)


def _several(truth: Any) -> list[str]:
    several = truth if isinstance(truth, (list, tuple)) else [truth]
    return [str(one) for one in several] or [""]


def _pieces(p: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Piece]:
    if "labels" in p:
        right, given = set(facts["truth"]), set(facts["answer"])
        differing_first = sorted(right | given, key=lambda label: (label in right & given, label))
        shown = sorted(differing_first[:MAX_LABELS])
        return [Piece(_kind(label, right, given), shorten(label, LABEL)) for label in shown]
    return differences(facts["truth"], facts["answer"]) if "text" in p else []


def _kind(label: str, right: set[str], given: set[str]) -> str:
    return "same" if label in right & given else "ins" if label in given else "del"


def _tags(p: Mapping[str, Any], truth: Any) -> list[tuple[str, str, str]]:
    if "tags" not in p:
        return []
    words: Iterable[str] = p.get("words") or [""] * len(truth)
    found = [
        (shorten(str(word), LABEL), shorten(str(right), LABEL), shorten(str(tag), LABEL))
        for word, right, tag in zip(words, truth, p["tags"], strict=True)
    ]
    return found[:MAX_TAGS]
