"""Metrics of written texts, computed by sacrebleu (Post, arXiv:1804.08771) so that they compare with published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from mmhub.errors import InputError, PluginError


def translation(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float | str]:
    """Corpus BLEU (Papineni et al., 2002) and chrF (Popovic, 2015), both 0 to 100, with sacrebleu's signatures.

    Texts are compared as they are, with their case; BLEU is tokenized by sacrebleu ("13a"). A BLEU
    without its signature compares with nothing. A reference is a text, or a list of texts.

    Raises:
        PluginError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise PluginError("written texts are measured by sacrebleu, which is not installed", _INSTALL) from None
    texts = [str(p["text"]) for p in predictions]
    streams: Any = [list(stream) for stream in zip_longest(*map(several, references))]  # None where a row has fewer
    found: dict[str, float | str] = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found[name] = metric.corpus_score(texts, streams).score
        found[f"{name}_signature"] = str(metric.get_signature())
    return found


def several(reference: Any) -> list[str]:
    """Return the texts of a row's reference, one or several.

    Raises:
        InputError: it is an empty list.
    """
    if not isinstance(reference, (list, tuple)):
        return [str(reference)]
    if not reference:
        raise InputError("a reference is an empty list", "give every row a text, or leave the row out")
    return [str(one) for one in reference]


_INSTALL = "pip install 'mmhub[text]', or pip install sacrebleu"
