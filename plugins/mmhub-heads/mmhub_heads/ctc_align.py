"""When each word of a transcript was said: forced alignment of its pieces with what a CTC head heard.

CTC names a piece in one or two tokens and leaves the rest to the blank, so that words would seem too short. Before
aligning, each label's own share of the recording is therefore taken out of its probability: Huang et al. 2024, "Less
peaky and more accurate CTC forced alignment by label priors" (arXiv:2406.02560), whose priors are those of the training
data; here they are the recording's own, so that nothing need be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmhub.errors import InputError, PluginError
from mmhub_heads.ctc_units import Units

_FLOOR = 1e-3  # a label's share is at least that much, or one that is never heard would gain most


class Span(NamedTuple):
    """The tokens of sound, from `first` to before `end`, in which a piece was heard, and its mean log-probability."""

    first: int
    end: int
    score: float


def without_prior(log_probs: Tensor, scale: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """Take `scale` times the logarithm of each label's mean share off log-probabilities (..., T, V).

    `mask` (..., T) says which tokens are real. No gradient flows through the shares.
    """
    shares = log_probs.detach().exp()
    if mask is None:
        mean = shares.mean(-2, keepdim=True)
    else:
        real = mask.unsqueeze(-1).to(shares.dtype)
        mean = (shares * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp(min=1)
    return log_probs - scale * mean.clamp(min=_FLOOR).log()


def align(log_probs: Tensor, labels: Sequence[int], prior: float) -> list[Span]:
    """Return where each label was heard in log-probabilities (T, V), by the most probable path of `labels`.

    Raises:
        InputError: the recording is too short for them.
    """
    if not labels:
        return []
    needed = tokens_needed(labels)
    if needed > len(log_probs):
        raise InputError(f"the text needs {needed} tokens of sound, and the recording has {len(log_probs)}")
    path = _path(without_prior(log_probs, prior), labels)
    heard = log_probs.gather(1, path[:, None]).squeeze(1).tolist()
    spans = []
    for first, end in _runs(path.tolist()):
        spans.append(Span(first, end, sum(heard[first:end]) / (end - first)))
    return spans


def time_words(
    units: Units, labels: Sequence[int], spans: Sequence[Span], seconds: float, length: int
) -> list[dict[str, Any]]:
    """Return the words of aligned labels as `{"word", "start", "end"}`, in seconds.

    Token k is about what is heard at k * seconds, and stands for half of that before and after.
    """
    words = []
    for word, first, end in units.words(labels):
        inner = [place for place in range(first, end) if units.pieces[labels[place]] != " "]
        start = max(spans[inner[0]].first - 0.5, 0.0) * seconds
        stop = min(spans[inner[-1]].end - 0.5, float(length)) * seconds
        words.append({"word": word, "start": round(start, 3), "end": round(stop, 3)})
    return words


def tokens_needed(labels: Sequence[int]) -> int:
    """Return how many tokens of sound labels take at least: one each, and a blank between two that are the same."""
    return len(labels) + sum(one == other for one, other in pairwise(labels))


def _path(log_probs: Tensor, labels: Sequence[int]) -> Tensor:
    """The most probable label of each token (T,) among the ways to say `labels`."""
    try:
        from torchaudio.functional import forced_align
    except ImportError:
        hint = "pip install 'mmhub-heads[ctc]', or pip install torchaudio"
        raise PluginError("words are timed by torchaudio, which is not installed", hint) from None
    targets = torch.tensor([list(labels)], dtype=torch.int32, device=log_probs.device)
    path, _ = forced_align(log_probs[None].contiguous(), targets)
    found: Tensor = path[0].long()
    return found


def _runs(path: Sequence[int]) -> list[tuple[int, int]]:
    """The stretches of equal labels in a path, first and end, blanks left out."""
    found: list[tuple[int, int]] = []
    before = 0
    for place, label in enumerate(path):
        if label and label == before:
            found[-1] = (found[-1][0], place + 1)
        elif label:
            found.append((place, place + 1))
        before = label
    return found
