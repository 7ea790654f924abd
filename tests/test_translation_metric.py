"""BLEU and chrF are those of sacrebleu, and say how they were computed."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from mmhub.errors import PluginError
from mmhub.metrics import measure

sacrebleu = pytest.importorskip("sacrebleu")

WRITTEN = ["Ein Mann fährt Fahrrad.", "Zwei Hunde spielen im hohen Schnee .", ""]
WANTED = ["Ein Mann fährt mit dem Fahrrad.", "Zwei Hunde spielen im Schnee.", "Eine Frau liest."]


def scores(written: list[str], references: list[str]) -> dict[str, Any]:
    return measure(["translation"], [{"text": text} for text in written], references)


def test_they_are_sacrebleus_own_with_its_signatures() -> None:
    found = scores(WRITTEN, WANTED)
    assert found["bleu"] == sacrebleu.corpus_bleu(WRITTEN, [WANTED]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(WRITTEN, [WANTED]).score
    assert 0 < found["bleu"] < found["chrf"] < 100
    version = sacrebleu.__version__
    assert found["bleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert found["chrf_signature"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"


def test_bleu_is_the_one_computed_by_hand() -> None:
    assert scores(["a b c d"], ["a b c d e"])["bleu"] == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert scores(["Ja , das ist gut"], ["Ja , das ist gut"])["bleu"] == pytest.approx(100)


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(PluginError, match=r"sacrebleu, which is not installed; pip install 'mmhub\[text\]'"):
        scores(WRITTEN, WANTED)
