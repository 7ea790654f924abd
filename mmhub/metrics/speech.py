"""Metrics of transcripts, counted by jiwer over the whole corpus."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmhub.errors import PluginError

NORMALISER = (
    "mmhub-1: NFKC, lower case, punctuation and symbols ($ + %) made blanks except apostrophes within words, so that "
    "hyphens split words, invisible characters (Cf) dropped, blanks collapsed"
)
_APOSTROPHES = {"\u2019": "'", "\u02bc": "'", "\uff07": "'"}
_INSTALL = "pip install 'mmhub[speech]', or pip install jiwer"


def speech(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    """Word and character error rate: edits over the length of all references together, 0 = every word is right.

    Returns {"wer", "cer", "substitutions", "insertions", "deletions", "words", "normaliser"}; the counts are of words,
    "words" those of the references. Texts are compared after `normalised`, and of characters the blanks between words
    count, too. A reference without words adds what was heard there as insertions. Rates are None where all references
    are empty.

    Raises:
        PluginError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError:
        raise PluginError("transcripts are measured by jiwer, which is not installed", _INSTALL) from None
    pairs = [
        (normalised(_text(one)), normalised(str(p.get("text") or "")))
        for one, p in zip(references, predictions, strict=True)
    ]
    words = _counted(jiwer.process_words, pairs, str.split)
    characters = _counted(jiwer.process_characters, pairs, list)
    return {
        "wer": _rate(words),
        "cer": _rate(characters),
        **{name: words[name] for name in ("substitutions", "insertions", "deletions")},
        "words": words["length"],
        "normaliser": NORMALISER,
    }


def normalised(text: str) -> str:
    """Return a text without what is no matter of hearing: its case, punctuation and white space.

    Hyphens, other punctuation and symbols become blanks; apostrophes stay only within words. What only tells how
    letters are set, such as soft hyphens, is dropped.

    >>> normalised("  The well-known Caf\u00c9: \u201cdon\u2019t!\u201d ")
    "the well known caf\u00e9 don't"
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    plain = (_APOSTROPHES.get(char, char) for char in folded if unicodedata.category(char) != "Cf")
    kept = "".join(char if char == "'" or not _is_mark(char) else " " for char in plain)
    return " ".join(word for part in kept.split() if (word := part.strip("'")))


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] in "PSC"


def _text(reference: Any) -> str:
    return str(reference.get("text") or "") if isinstance(reference, Mapping) else str(reference or "")


def _counted(
    process: Callable[[list[str], list[str]], Any],
    pairs: Sequence[tuple[str, str]],
    parts: Callable[[str], list[str]],
) -> dict[str, int]:
    """Edits of all pairs (reference, prediction). jiwer takes no empty reference, so those are counted here."""
    full = [(reference, prediction) for reference, prediction in pairs if reference]
    found = process([one for one, _ in full], [one for _, one in full]) if full else None
    kinds = ("substitutions", "insertions", "deletions", "hits")
    counts = {kind: int(getattr(found, kind)) if found else 0 for kind in kinds}
    counts["insertions"] += sum(len(parts(prediction)) for reference, prediction in pairs if not reference)
    counts["length"] = counts["hits"] + counts["substitutions"] + counts["deletions"]
    return counts


def _rate(counts: Mapping[str, int]) -> float | None:
    edits = counts["substitutions"] + counts["insertions"] + counts["deletions"]
    return edits / counts["length"] if counts["length"] else None
