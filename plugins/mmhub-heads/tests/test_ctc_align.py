"""When words were said: alignment of labels with what was heard."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Stream
from mmhub_heads.ctc import Ctc
from mmhub_heads.ctc_align import Span, align, time_words, tokens_needed, without_prior
from mmhub_heads.ctc_units import Units


def best_spans(log_probs: Tensor, labels: list[int]) -> list[tuple[int, int]]:
    """Where the labels lie in the best path that writes them, by walking all paths."""
    best: tuple[float, list[tuple[int, int]]] = (-float("inf"), [])
    for path in product(range(log_probs.shape[1]), repeat=len(log_probs)):
        starts = [t for t, label in enumerate(path) if label and (not t or label != path[t - 1])]
        if [path[t] for t in starts] == labels:
            ends = [next((u for u in range(t, len(path)) if path[u] != path[t]), len(path)) for t in starts]
            score = sum(float(log_probs[t, label]) for t, label in enumerate(path))
            best = max(best, (score, list(zip(starts, ends, strict=True))))
    return best[1]


@pytest.mark.parametrize("labels", [[1], [1, 1], [2, 1], [1, 2, 1]])
def test_labels_lie_where_the_best_of_all_paths_has_them(labels: list[int]) -> None:
    log_probs = (2 * torch.randn(6, 3, generator=torch.Generator().manual_seed(len(labels)))).log_softmax(-1)
    found = align(log_probs, labels, prior=0.0)
    assert [(span.first, span.end) for span in found] == best_spans(log_probs, labels)
    for span, label in zip(found, labels, strict=True):
        assert span.score == pytest.approx(float(log_probs[span.first : span.end, label].mean()), abs=1e-5)


def test_priors_widen_labels_that_the_blank_has_crowded_out() -> None:
    probs = torch.tensor([[0.98, 0.02]] * 3 + [[0.6, 0.4]] * 2 + [[0.2, 0.8]] + [[0.6, 0.4]] * 2 + [[0.98, 0.02]] * 3)
    assert align(probs.log(), [1], prior=0.0)[0][:2] == (5, 6)
    assert align(probs.log(), [1], prior=1.0)[0][:2] == (3, 8)


def test_a_prior_is_the_mean_of_real_tokens_alone() -> None:
    log_probs = torch.randn(2, 5, 3).log_softmax(-1)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    found = without_prior(log_probs, 0.5, mask)
    torch.testing.assert_close(found[0, :3], without_prior(log_probs[0, :3], 0.5))
    torch.testing.assert_close(found[1], log_probs[1] - 0.5 * log_probs[1].exp().mean(0).log())


def test_words_begin_and_end_with_their_pieces_and_not_with_the_blank_between() -> None:
    units = Units("character", [" ", "a", "b"])
    spans = [Span(2, 3, 0.0), Span(4, 6, 0.0), Span(7, 8, 0.0), Span(9, 11, 0.0)]
    words = time_words(units, [2, 3, 1, 2], spans, seconds=0.04, length=11)
    assert words == [{"word": "ab", "start": 0.06, "end": 0.22}, {"word": "a", "start": 0.34, "end": 0.42}]


def test_a_given_text_is_timed_and_one_that_does_not_fit_is_refused() -> None:
    decoder = Ctc(Ctc.Config(units="word", vocabulary=("a", "b")), {"audio": Stream(4, seconds=0.1)})
    log_probs = torch.eye(3)[[0, 1, 0, 2, 2, 0]].mul(5).log_softmax(-1)
    assert [word["word"] for word in decoder.align(log_probs, "A B")] == ["a", "b"]
    assert [word["word"] for word in decoder.align(log_probs, "b")] == ["b"], "not what is heard, but what is given"
    assert tokens_needed([1, 1, 2]) == 4
    with pytest.raises(InputError, match="needs 7 tokens of sound, and the recording has 6"):
        decoder.align(log_probs, "a a a a")
    with pytest.raises(UsageError, match="how long a token lasts"):
        Ctc(decoder.config, {"audio": Stream(4)}).align(log_probs, "a")
