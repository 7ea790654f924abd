"""Metrics of translations, computed by sacrebleu (Post, arXiv:1804.08771) so that they compare with published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmhub.errors import PluginError


def translation(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, float | str]:
    """Corpus BLEU (Papineni et al., 2002) and chrF (Popovic, 2015), both 0 to 100, with sacrebleu's signatures.

    Texts are compared as they are, with their case; BLEU is tokenized by sacrebleu ("13a"). A BLEU
    without its signature compares with nothing.

    Raises:
        PluginError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise PluginError("translations are measured by sacrebleu, which is not installed", _INSTALL) from None
    texts = [str(p["text"]) for p in predictions]
    streams = [[str(one) for one in references]]
    found: dict[str, float | str] = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found[name] = metric.corpus_score(texts, streams).score
        found[f"{name}_signature"] = str(metric.get_signature())
    return found


_INSTALL = "pip install 'mmhub[text]', or pip install sacrebleu"
