"""Changing the sampling rate with torchaudio's windowed-sinc filter: a clip at once, or block by block."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import torch
import torchaudio
from torch import Tensor

_MAX_TERM = 1000  # bounds the kernel; a rate is then off by less than one part in a million


def resample(samples: Tensor, ratio: Fraction) -> Tensor:
    """Change the rate of (S,) samples by `ratio` = new / old.

    A ratio of large terms (44,101 Hz to 16 kHz would need a kernel of 700 million weights) is rounded to the nearest
    one of small terms.
    """
    ratio = _simple(ratio)
    if ratio == 1:
        return samples
    changed: Tensor = _resampler(ratio.denominator, ratio.numerator)(samples)
    return changed


def resampled_length(frames: int, ratio: Fraction) -> int:
    """Return how many samples `resample` makes of so many; torchaudio rounds in single precision."""
    ratio = _simple(ratio)
    return int(torch.as_tensor(ratio.numerator * frames / ratio.denominator).ceil()) if ratio != 1 else frames


def resample_blocks(blocks: Iterator[Tensor], ratio: Fraction) -> Iterator[Tensor]:
    """Change the rate of a signal that comes in blocks, each (S,); what comes out, joined, is `resample` of the whole.

    Each stretch is filtered with as much of its neighbours as the kernel sees, zeros beyond the ends, and begins where
    an output sample falls exactly on an input sample.
    """
    ratio = _simple(ratio)
    if ratio == 1:
        yield from blocks
        return
    old, new = ratio.denominator, ratio.numerator
    change = _resampler(old, new)
    turns = -(-int(change.width) // old)  # of `old` samples in, `new` out, that the kernel reaches to either side
    margin = turns * old
    held = torch.zeros(margin)
    for block in blocks:
        held = torch.cat((held, block))
        ready = (len(held) - 2 * margin) // old
        if ready > 0:
            yield change(held[: ready * old + 2 * margin])[turns * new : (turns + ready) * new]
            held = held[ready * old :]
    if len(held) > margin:
        yield change(held)[turns * new :]


def _simple(ratio: Fraction) -> Fraction:
    if max(ratio.numerator, ratio.denominator) <= _MAX_TERM:
        return ratio
    # limit_denominator bounds the denominator alone, so it is given the smaller side of the ratio
    rounded = ratio.limit_denominator(_MAX_TERM) if ratio < 1 else 1 / (1 / ratio).limit_denominator(_MAX_TERM)
    return rounded if rounded > 0 else ratio


@lru_cache(maxsize=32)
def _resampler(old: int, new: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(old, new)
